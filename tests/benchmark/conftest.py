"""A workload of short rows for the toy Llama of `tests.toys`."""

import json
from pathlib import Path

import numpy as np
import pytest

from copg_jax.data.groups import TokenGroup
from experiments.benchmark.workload import MODELS
from tests.toys import LLAMA


@pytest.fixture
def rows() -> list[dict]:
    """Ten pairs with ids of a vocabulary of 64."""
    rng = np.random.default_rng(0)
    draw = lambda most: rng.integers(0, LLAMA.vocab_size, rng.integers(1, most)).tolist()
    return [
        {
            "prompt_ids": draw(20),
            "completion_ids": [draw(6), draw(6)],
            "rewards": rng.normal(size=2).tolist(),
        }
        for _ in range(10)
    ]


@pytest.fixture
def write(tmp_path: Path):
    """Writes rows as a workload and returns the path."""

    def to_file(rows: list) -> Path:
        path = tmp_path / "workload.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return to_file


@pytest.fixture
def toy_model(monkeypatch):
    """The toy Llama under the name tiny."""
    monkeypatch.setitem(MODELS, "tiny", LLAMA)
    return LLAMA


@pytest.fixture
def groups(rows) -> list[TokenGroup]:
    """The rows as groups of tokens."""
    return [
        TokenGroup(
            id=str(i),
            where="",
            prompt="",
            prompt_tokens=np.array(row["prompt_ids"], np.int32),
            completions=("", ""),
            completion_tokens=tuple(np.array(ids, np.int32) for ids in row["completion_ids"]),
            rewards=np.array(row["rewards"], np.float32),
        )
        for i, row in enumerate(rows)
    ]
