"""What is timed: rows of token ids that any library can run, and the models to run them on.

1. `write_workload` draws groups with the lengths of TL;DR under a Llama-class tokenizer.
2. `read_workload` checks such a file, row by row, before anything is compiled; the training stream
   reads from the `Workload` that it returns.
3. `MODELS` names the architectures; weights are random, since speed does not depend on them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from copg_jax.data.dataset import GroupDataset
from copg_jax.data.groups import TokenGroup
from copg_jax.errors import InputError
from copg_jax.models.params import Architecture

_VOCAB_SIZE = 32000


def _model(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_key_value_heads: int,
    *,
    tied: bool = False,
) -> Architecture:
    return Architecture(
        vocab_size=_VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_heads,
        tie_word_embeddings=tied,
    )


MODELS: dict[str, Architecture] = {
    "tiny": _model(32, 64, 3, 4, 2),
    "small": _model(256, 688, 4, 8, 8),
    "smol": _model(576, 1536, 30, 9, 3, tied=True),
    "1b": _model(2048, 5632, 22, 32, 4),
    "7b": _model(4096, 11008, 32, 32, 32),
}
"""By the name in `--shape`; smol has the layers of SmolLM2-135M, 1b those of TinyLlama-1.1B, 7b is
Llama-2-7B.
"""


def write_workload(path: Path, *, num_pairs: int, seed: int = 0) -> None:
    """Writes pairs of random ids, one JSON line each: prompt_ids, completion_ids, rewards.

    Prompt lengths are normal(340, 100) clipped to [64, 512], those of completions normal(36, 11)
    clipped to [8, 64].

    Args:
        path: file to write; its folder is made.
        num_pairs: lines.
        seed: decides everything.
    """
    rng = np.random.default_rng(seed)

    def length(mean: float, std: float, least: int, most: int) -> int:
        return int(np.clip(rng.normal(mean, std), least, most))

    def draw(size: int) -> list[int]:
        return rng.integers(10, _VOCAB_SIZE, size).tolist()

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_pairs):
            prompt = length(340, 100, 64, 512)
            completions = [length(36, 11, 8, 64) for _ in range(2)]
            rewards = rng.normal(size=2).tolist()
            row = {
                "prompt_ids": draw(prompt),
                "completion_ids": [draw(size) for size in completions],
                "rewards": rewards,
            }
            file.write(json.dumps(row) + "\n")


class Workload(GroupDataset):
    """Groups of a workload, in memory instead of in a prepared file.

    Args:
        groups: at least one.
    """

    def __init__(self, groups: Sequence[TokenGroup]) -> None:
        self._groups = groups
        lengths = [[len(ids) for ids in group.completion_tokens] for group in groups]
        self._sizes = np.array(
            [
                (len(group.prompt_tokens), sum(own))
                for group, own in zip(groups, lengths, strict=True)
            ]
        )
        self.stats = {
            "kept": len(groups),
            "prompt_tokens": {"max": int(self._sizes[:, 0].max())},
            "completion_tokens": {"max": max(map(max, lengths))},
            "completions": {"max": max(map(len, lengths))},
        }

    def __getitem__(self, index: int) -> TokenGroup:
        return self._groups[index]

    def num_tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._sizes[np.asarray(indices)]


def read_workload(path: Path, *, vocab_size: int) -> Workload:
    """Reads and checks a workload; ln π_ref is 0 everywhere, which costs a step the same.

    Args:
        path: JSON lines as `write_workload` writes them, with any number of completions.
        vocab_size: ids must be below it.

    Raises:
        InputError: no such file, no row, or a row that cannot be computed; names file and line.
    """
    if not path.is_file():
        raise InputError(
            f"--workload {path}: wanted a file of JSON lines, got nothing there. Write one with "
            f"`python -m experiments.benchmark workload --pairs 256 --out {path}`."
        )
    with path.open(encoding="utf-8") as lines:
        found = [_group(f"{path}:{i}", line, vocab_size) for i, line in enumerate(lines, start=1)]
    if not found:
        raise InputError(f"--workload {path}: wanted at least one row, got an empty file.")
    return Workload(found)


def _group(where: str, line: str, vocab_size: int) -> TokenGroup:
    try:
        row: dict[str, Any] = json.loads(line)
        prompt = np.asarray(row["prompt_ids"])
        completions = tuple(np.asarray(ids) for ids in row["completion_ids"])
        rewards = np.asarray(row["rewards"], np.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{where}: wanted a JSON object with prompt_ids (list of ids), completion_ids (list of "
            f"lists of ids) and rewards (list of numbers), got {line[:60]!r} ({error!r})"
        ) from error
    if len(completions) < 2 or rewards.shape != (len(completions),):
        raise InputError(
            f"{where}: wanted at least 2 completions with a reward each, got {len(completions)} "
            f"completions and {rewards.size} rewards"
        )
    for name, ids in (("prompt_ids", prompt), *(("completion_ids", ids) for ids in completions)):
        if ids.ndim != 1 or not ids.size or ids.dtype.kind != "i":
            raise InputError(f"{where}: {name}: wanted a list of at least one integer id")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise InputError(
                f"{where}: {name}: wanted ids from 0 to {vocab_size - 1}, the vocabulary of the "
                f"model, got {ids.min()} to {ids.max()}. Choose another --shape or workload."
            )
    return TokenGroup(
        id=where,
        where=where,
        prompt="",
        prompt_tokens=prompt.astype(np.int32),
        completions=("",) * len(completions),
        completion_tokens=tuple(ids.astype(np.int32) for ids in completions),
        rewards=rewards,
        ref_logps=np.zeros(len(completions), np.float32),
    )
