"""Forward passes over many groups: sorted by length into batches, back in the order they came.

Scoring with the reference and with a reward model differ by one function of (params, batch); this
is all the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from copg_jax import sharding
from copg_jax.data import groups, packing
from copg_jax.data.groups import GroupBatch, TokenGroup
from copg_jax.models import functional, hf_weights
from copg_jax.models.llama import LlamaConfig
from copg_jax.runtime import Progress

_PROMPT_MULTIPLE, _COMPLETION_MULTIPLE = 64, 16
"""Shapes are rounded up to these, so that a data set needs few compilations."""
_MOST_COMPLETIONS = 8


class GroupForward:
    """Applies a function of (params, batch) → [B, K] to any number of groups.

    Args:
        function: pure function, e.g. of `policy.seq_logp` or a reward model; jitted here, once a
            shape.
        params: its parameters, already in their shards.
        param_shardings: where they lie.
        mesh: the device mesh.
        batch_size: groups per call, rounded up to a multiple of data·fsdp.
        name: what is computed, for the progress of long calls.
    """

    def __init__(
        self,
        function: Callable[[Any, GroupBatch], Array],
        params: Any,
        *,
        param_shardings: Any,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        name: str,
    ) -> None:
        self._name = name
        shards = sharding.num_batch_shards(mesh)
        self._num_blocks, self._batch_size = shards, -(-batch_size // shards) * shards
        self._params = params
        self._rows = sharding.batch_sharding(mesh)
        self._function = jax.jit(
            sharding.batch_parallel(mesh)(function),
            in_shardings=(param_shardings, self._rows),
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(self, rows: Sequence[TokenGroup]) -> list[np.ndarray]:
        """One float32 array [number of completions] per group, in the order of `rows`.

        What occurs several times is computed once: groups with the same prompt are merged, equal
        completions of it too.
        """
        merged, places = _merge(rows)
        values = self._run(merged)
        return [np.array([values[i][k] for i, k in of_row], np.float32) for of_row in places]

    def _run(self, rows: Sequence[TokenGroup]) -> list[np.ndarray]:
        progress = Progress(self._name, len(rows))
        # Longest first: running out of memory shows at once, not at the end.
        order = sorted(range(len(rows)), key=lambda i: _sizes(rows[i]), reverse=True)
        results: list[np.ndarray] = [np.empty(0, np.float32)] * len(rows)
        pending: list[tuple[list[int | None], Array]] = []

        def fetch() -> None:
            chunk, values = pending.pop(0)
            for i, row_values in zip(chunk, np.asarray(jax.device_get(values)), strict=True):
                if i is not None:
                    results[i] = row_values

        for start in range(0, len(order), self._batch_size):
            chunk = self._by_block(rows, order[start : start + self._batch_size])
            batch = self._batch([None if i is None else rows[i] for i in chunk])
            placed = sharding.place_whole(batch, self._rows)
            pending.append((chunk, self._function(self._params, placed)))
            # Read one batch late: the device computes while the host collates the next.
            if len(pending) > 1:
                fetch()
            progress.update(start)
        while pending:
            fetch()
        return results

    def _by_block(self, rows: Sequence[TokenGroup], chunk: Sequence[int]) -> list[int | None]:
        """Deals the groups of a batch to the devices, and None to the places that are left."""
        tokens = [
            len(rows[i].prompt_tokens) + sum(map(len, rows[i].completion_tokens)) for i in chunk
        ]
        (dealt,) = packing.deal(
            np.array(tokens), batch_size=self._batch_size, num_blocks=self._num_blocks
        )
        return [chunk[i] if 0 <= i < len(chunk) else None for i in dealt]

    def _batch(self, rows: Sequence[TokenGroup | None]) -> GroupBatch:
        """Collates a batch of the smallest rounded shape and room."""
        present = [row for row in rows if row is not None]
        longest = max(len(ids) for row in present for ids in row.completion_tokens)
        most = max(len(row.completion_tokens) for row in present)
        prompt_size = _round_up(max(len(row.prompt_tokens) for row in present), _PROMPT_MULTIPLE)
        batch = groups.collate(
            rows,
            batch_size=self._batch_size,
            prompt_size=prompt_size,
            num_completions=_power_of_two(most),
            completion_size=_round_up(longest, _COMPLETION_MULTIPLE),
            num_blocks=self._num_blocks,
        )
        room = packing.room_of(
            batch.prompt_length,
            batch.completion_length,
            num_blocks=self._num_blocks,
            # About 3 % of the slots: little is wasted, and few sizes need few compilations.
            multiple=max(8, batch.token_slots.shape[1] // 32),
        )
        return groups.with_slots(batch, num_blocks=self._num_blocks, capacity=room)


def _sizes(row: TokenGroup) -> tuple[int, int]:
    return len(row.prompt_tokens), max(map(len, row.completion_tokens))


def _merge(
    rows: Sequence[TokenGroup],
) -> tuple[list[TokenGroup], list[list[tuple[int, int]]]]:
    """Groups of distinct completions of distinct prompts; (group, slot) of each row's completions.

    Groups are closed at `_MOST_COMPLETIONS`, so that few shapes are compiled.
    """
    completions: list[list[np.ndarray]] = []
    prompts: list[TokenGroup] = []
    open_group: dict[bytes, int] = {}
    found: dict[tuple[bytes, bytes], tuple[int, int]] = {}

    def place(row: TokenGroup, prompt: bytes, tokens: np.ndarray) -> tuple[int, int]:
        key = prompt, tokens.tobytes()
        if key not in found:
            group = open_group.get(prompt)
            if group is None or len(completions[group]) == _MOST_COMPLETIONS:
                group = open_group[prompt] = len(prompts)
                prompts.append(row)
                completions.append([])
            found[key] = group, len(completions[group])
            completions[group].append(tokens)
        return found[key]

    places = []
    for row in rows:
        prompt = row.prompt_tokens.tobytes()
        places.append([place(row, prompt, tokens) for tokens in row.completion_tokens])
    merged = [
        replace(row, completion_tokens=tuple(tokens), rewards=None, ref_logps=None)
        for row, tokens in zip(prompts, completions, strict=True)
    ]
    return merged, places


def load_frozen(folder: Path, config: LlamaConfig, *, head: str, shardings: Any) -> Any:
    """Weights that are only read (π_ref, a reward model), stored in the compute dtype.

    Args:
        folder: Hugging Face folder.
        config: architecture and compute dtype.
        head: "lm" or "score".
        shardings: where each weight shall lie.
    """
    params = hf_weights.load_params(folder, config, head=head, shardings=shardings)
    cast = partial(functional.cast_matrices, config)
    return jax.jit(cast, out_shardings=shardings)(params)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
