"""Made-up data for the quickstart: a module for each task, and one way to write them."""

import random
from pathlib import Path

from experiments.generated.arithmetic import ARITHMETIC
from experiments.generated.code import CODE
from experiments.generated.dialogue import DIALOGUE
from experiments.generated.posts import POSTS
from experiments.generated.writing import train_tokenizer, write_lines

TASKS = {"tldr": POSTS, "dialogue": DIALOGUE, "code": CODE, "arithmetic": ARITHMETIC}
"""By name; that of a file in configs/tasks, but for TL;DR."""


def write_generated(
    folder: Path,
    *,
    task: str = "tldr",
    num_examples: int,
    num_comparisons: int,
    seed: int,
    vocab_size: int,
) -> None:
    """Writes `sft.jsonl`, `comparisons.jsonl` and `tokenizer/` into a folder, the same for a seed.

    Args:
        folder: made if it is not there; files of those names are replaced.
        task: one of `TASKS`.
        num_examples: rows of `sft.jsonl`.
        num_comparisons: rows of `comparisons.jsonl`, drawn apart from those.
        seed: decides everything.
        vocab_size: most tokens of the tokenizer, which has 256 bytes and its special tokens at
            least.
    """
    rows = TASKS[task]
    folder.mkdir(parents=True, exist_ok=True)
    examples = list(rows.examples(num_examples, random.Random(f"{seed} posts")))
    comparisons = rows.comparisons(num_comparisons, random.Random(f"{seed} comparisons"))
    write_lines(folder / "sft.jsonl", examples)
    write_lines(folder / "comparisons.jsonl", comparisons)
    tokenizer = train_tokenizer(map(rows.text, examples), vocab_size, rows.marks)
    tokenizer.chat_template = rows.chat_template
    tokenizer.save_pretrained(str(folder / "tokenizer"))
