"""Data: rows in any public schema become batches of groups, with NumPy and Arrow only.

1. `sources` finds the files behind a path; `rows` reads them or the hub, one row at a time.
2. `formats` turns a row into a `TextGroup`, one prompt with K completions: `columns` knows the
   fields of each schema, `tldr` and `verbatim` are conventions of the text, `choice` takes one.
3. `tokenizer` and `groups` turn text into a `TokenGroup`, and groups into a padded batch.
4. `scored` is the file format of completions with rewards and ln π_ref: token ids, as they were
   scored, which become groups without a tokenizer.
5. `reader` gives the groups of a data set that are wanted; `dataset` keeps their ids in a
   memory-mapped Arrow file.
6. `stream` orders, batches and shards them, resumable at any step.
"""
