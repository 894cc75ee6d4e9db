"""What a task of generated data is, and how its rows become files and a tokenizer."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        chat_template: of the tokenizer, where rows are messages.
        marks: special tokens that it writes.
    """

    examples: RowMaker
    comparisons: RowMaker
    text: Callable[[Row], str]
    chat_template: str | None = None
    marks: tuple[str, ...] = ()


def different(draw: Callable[[], str], count: int) -> list[str]:
    """Draws until there are so many different texts."""
    texts: dict[str, None] = {}  # in order
    while len(texts) < count:
        texts[draw()] = None
    return list(texts)


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, marks: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE with `marks` as special tokens; it puts a BOS in front, as Llama's
    does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>", *marks],
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
