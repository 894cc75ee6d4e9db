"""From the rows of a task to files, and a tokenizer that is trained on them."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]
RowMaker = Callable[[int, random.Random], Iterator[Row]]


class Task(NamedTuple):
    """What the rows of a task are, in a schema that `data.path` reads.

    Attributes:
        examples: (count, rng) → rows with one completion each: SFT learns them, and evaluations
            take their prompts.
        comparisons: (count, rng) → rows with several completions each, which get rewards.
        text: an example → its text, on which the tokenizer is trained.
    """

    examples: RowMaker
    comparisons: RowMaker
    text: Callable[[Row], str]


def write_generated(
    folder: Path,
    task: Task,
    *,
    num_examples: int,
    num_comparisons: int,
    seed: int,
    vocab_size: int,
) -> None:
    """Writes `sft.jsonl`, `comparisons.jsonl` and `tokenizer/` into a folder, the same for a seed.

    Args:
        folder: made if it is not there; files of those names are replaced.
        task: makes the rows.
        num_examples: rows of `sft.jsonl`.
        num_comparisons: rows of `comparisons.jsonl`, of other prompts.
        seed: decides everything.
        vocab_size: most tokens of the tokenizer, which has 256 bytes and 3 special tokens at least.
    """
    folder.mkdir(parents=True, exist_ok=True)
    examples = list(task.examples(num_examples, random.Random(f"{seed} posts")))
    comparisons = task.comparisons(num_comparisons, random.Random(f"{seed} comparisons"))
    _write_lines(folder / "sft.jsonl", examples)
    _write_lines(folder / "comparisons.jsonl", comparisons)
    tokenizer = _train_tokenizer(map(task.text, examples), vocab_size)
    tokenizer.save_pretrained(str(folder / "tokenizer"))


def _write_lines(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE; it puts a BOS in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
