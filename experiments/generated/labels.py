"""What makes reward models of the generated posts wrong in a known way."""

import json
import random
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from copg_jax.files import write_text


def write_turned(folder: Path, percents: Iterable[int]) -> None:
    """Writes the comparisons of a folder with labels turned round: comparisons_N.jsonl, N per cent.

    Args:
        folder: of comparisons.jsonl.
        percents: of the labels, [0, 100] each.
    """
    lines = (folder / "comparisons.jsonl").read_text().splitlines()
    for percent in percents:
        rng = random.Random(f"labels {percent}")
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["choice"] ^= rng.random() < percent / 100
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"comparisons_{percent}.jsonl", text)


def shift_of_prompt(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float]:
    """Reward function: a number of the prompt alone, in [-3, 3), which no π* depends on."""
    return [6 * (zlib.crc32(prompt.encode()) / 2**32) - 3 for prompt in prompts]
