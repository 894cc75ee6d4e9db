"""Data: rows in any public TL;DR schema become batches of groups, with NumPy only.

1. `rows` reads local files or the hub, one row at a time.
2. `tldr` turns a row of any schema into a `TextGroup` (one prompt, K completions).
3. `tokenizer` and `groups` turn text into tokens, kept in a memory-mapped Arrow file.
4. `stream` orders, batches and shards the groups, resumable at any step.
5. `scored` is the file format of completions with rewards and reference log-probabilities.
6. `generated` writes made-up posts and comparisons for the quickstart.
"""
