"""Reward models that are wrong in a known way, for studies of the generated posts."""

import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from copg_jax.files import write_text
from experiments import quickstart


def make_inputs(folder: Path, *, noise: Sequence[int], **arguments: Any) -> None:
    """Writes the data and the model of the quickstart, and its comparisons with labels turned
    round: data/comparisons_N.jsonl, N per cent of them.

    Args:
        folder: to write into.
        noise: per cent of labels, [0, 100].
        arguments: of `quickstart.make_inputs`.
    """
    quickstart.make_inputs(folder, **arguments)
    lines = (folder / "data" / "comparisons.jsonl").read_text().splitlines()
    for percent in noise:
        rng = random.Random(f"labels {percent}")
        rows = [json.loads(line) for line in lines]
        for row in rows:
            row["choice"] ^= rng.random() < percent / 100
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / "data" / f"comparisons_{percent}.jsonl", text)


def shift_of_prompt(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float]:
    """Reward function: a number of the prompt alone, in [-3, 3), which no π* depends on."""
    return [6 * (zlib.crc32(prompt.encode()) / 2**32) - 3 for prompt in prompts]
