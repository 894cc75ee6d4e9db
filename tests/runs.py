"""What runs leave behind, compared to rounding."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from copg_jax.files import read_json_lines


def json_rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON or JSON Lines file."""
    if path.suffix == ".jsonl":
        return [row for _, row in read_json_lines(path)]
    return [json.loads(path.read_text())]


def assert_close(got: Any, wanted: Any, near_zero: float = 1e-5) -> None:
    """Equal, numbers to 1e-5.

    A loss near zero three times as much: it is a difference of log-probabilities of texts, here
    about -130, and float32 tells these apart by 1.5e-5.
    """
    if isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_close(got[name], value, 3e-5 if name == "loss" else 1e-5)
    elif isinstance(wanted, list | tuple):  # a map of Parquet is a list of pairs
        for one, other in zip(got, wanted, strict=True):
            assert_close(one, other)
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, rel=1e-5, abs=near_zero)
    else:
        assert got == wanted


def assert_same_training(got: Path, wanted: Path) -> None:
    """Losses, evaluations and exported weights of two training runs."""
    metrics = (json_rows(run / "metrics.jsonl") for run in (got, wanted))
    assert_close(*(list(map(_comparable, rows)) for rows in metrics))
    exports = {path.parent.name for path in wanted.glob("*/model.safetensors")}
    assert "model" in exports
    for name in exports:
        files = (run / name / "model.safetensors" for run in (got, wanted))
        weights, others = map(load_file, files)
        assert weights.keys() == others.keys()
        for key, value in weights.items():
            np.testing.assert_allclose(value, others[key], rtol=1e-5, atol=1e-5, err_msg=key)


def _comparable(row: dict[str, Any]) -> dict[str, Any]:
    """Without clocks; and without the share of positive margins where all margins are zero to
    rounding, which then decides it: at the first step the policy is its reference.
    """
    left_out = {"time"} | {name for name in row if name.startswith("perf/")}
    if abs(row.get("rewards/margins", 1.0)) < 1e-5:
        left_out.add("rewards/accuracies")
    return {name: value for name, value in row.items() if name not in left_out}


def assert_same_scores(got: Path, wanted: Path) -> None:
    """Parts of two scored folders."""
    parts = sorted(path.name for path in wanted.glob("part-*.parquet"))
    assert parts == sorted(path.name for path in got.glob("part-*.parquet")) != []
    for part in parts:
        assert_close(*(pq.read_table(run / part).to_pylist() for run in (got, wanted)))


def assert_same_rounds(got: Path, wanted: Path) -> None:
    """Training, and the scored samples of the last round."""
    assert_same_training(got, wanted)
    last = max(path.name for path in (wanted / "rounds").iterdir())
    assert_same_scores(*(run / "rounds" / last / "scored" for run in (got, wanted)))


def assert_same_evaluation(got: Path, wanted: Path) -> None:
    """Averages and generations of two evaluations."""
    for name in ("evaluation.json", "generations.jsonl"):
        rows, others = (json_rows(run / name) for run in (got, wanted))
        for row in (*rows, *others):
            row.pop("crc32", None)  # of numbers that are the same to rounding
        assert_close(rows, others)
