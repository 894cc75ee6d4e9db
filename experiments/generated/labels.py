"""What makes reward models of the generated posts wrong in a known way."""

import random
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from copg_jax.files import read_json_lines
from experiments.generated.writing import write_lines


def write_turned(folder: Path, percents: Iterable[int]) -> None:
    """Writes the comparisons of a folder with labels turned round: comparisons_N.jsonl, N per cent.

    Args:
        folder: of comparisons.jsonl.
        percents: of the labels, [0, 100] each.
    """
    for percent in percents:
        rng = random.Random(f"labels {percent}")
        rows = [r for line, r in read_json_lines(folder / "comparisons.jsonl") if line]
        for row in rows:
            row["choice"] ^= rng.random() < percent / 100
        write_lines(folder / f"comparisons_{percent}.jsonl", rows)


def write_parts(folder: Path, count: int) -> None:
    """Parts the comparisons of a folder, one after the other: comparisons_part_1.jsonl, ...

    Args:
        folder: of comparisons.jsonl.
        count: of parts; rows that are over, fewer than it, are in none.
    """
    rows = [row for line, row in read_json_lines(folder / "comparisons.jsonl") if line]
    size = len(rows) // max(count, 1)
    for part in range(count):
        path = folder / f"comparisons_part_{part + 1}.jsonl"
        write_lines(path, rows[part * size : (part + 1) * size])


def shift_of_prompt(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float]:
    """Reward function: a number of the prompt alone, in [-3, 3), which no π* depends on."""
    return [6 * (zlib.crc32(prompt.encode()) / 2**32) - 3 for prompt in prompts]
