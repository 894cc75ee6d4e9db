"""Forward passes over many groups: sorted by length into batches, back in the order they came.

Scoring with the reference and with a reward model differ by one function of (params, batch); this
is all the rest.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array

from copg_jax import distributed, sharding
from copg_jax.data.formats.texts import Text
from copg_jax.data.groups import TokenGroup
from copg_jax.errors import InputError
from copg_jax.models.forward import BatchFn
from copg_jax.models.layout import ReusedShapes, pack_by_length
from copg_jax.models.one_shape import OneShape
from copg_jax.runtime import Progress

Item = TypeVar("Item")

_MOST_COMPLETIONS = 8


class GroupForward:
    """Applies a function of (params, batch) → [B, K] to any number of groups.

    Args:
        function: pure function, e.g. of `forward.make_seq_logp` or `make_score`; jitted here, once
            a shape.
        params: its parameters, already in their shards; the attribute may be set to others.
        mesh: the device mesh.
        batch_size: groups per call, rounded up to a multiple of data·fsdp.
        name: the model, for progress and messages, e.g. "reference /models/a".
        shape: of all batches; None: few shapes, of what comes.
    """

    def __init__(
        self,
        function: BatchFn,
        params: Any,
        *,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        name: str,
        shape: OneShape | None = None,
    ) -> None:
        self._name, self.params = name, params
        self._num_bins, self._batch_size = sharding.num_batch_shards(mesh), batch_size
        self._shapes, self._placement = ReusedShapes(), sharding.batch_sharding(mesh)
        self._one_shape, self._is_compiled = shape, False
        self._function = jax.jit(
            function,
            in_shardings=(None, self._placement),
            out_shardings=sharding.replicated(mesh),
        )

    def __call__(self, rows: Sequence[TokenGroup]) -> list[np.ndarray]:
        """One float32 array [number of completions] per group, in the order of `rows`.

        What occurs several times is computed once: groups with the same prompt are merged, equal
        completions of it too.

        Raises:
            InputError: a value that is not finite; names the model and the completion.
        """
        merged, found = _merge(rows)
        values = self._run(merged)
        for row, of_row in zip(rows, found, strict=True):
            for text, (i, k) in zip(row.completions, of_row, strict=True):
                if not np.isfinite(values[i][k]):
                    raise not_finite(self._name, values[i][k], row.where, text)
        return [np.array([values[i][k] for i, k in of_row], np.float32) for of_row in found]

    def _run(self, rows: Sequence[TokenGroup]) -> list[np.ndarray]:
        """Values of each group; those after a batch with one that is not finite stay 0."""
        results = [np.zeros(len(row.completion_tokens), np.float32) for row in rows]
        done, compiles = 0, not self._is_compiled and len(rows) > 0
        with Progress(self._name, len(rows), "groups", compiles=compiles) as progress:
            for batch, values in one_late(self._launched(rows)):
                present = batch >= 0
                for i, of_row in zip(batch[present], jax.device_get(values)[present], strict=True):
                    results[i] = of_row[: len(results[i])]
                if not all(np.isfinite(results[i]).all() for i in batch[present]):
                    break
                done += int(present.sum())
                progress.update(done)
                self._is_compiled = True
        return results

    def _launched(self, rows: Sequence[TokenGroup]) -> Iterator[tuple[np.ndarray, Array]]:
        """Starts batch after batch; yields the indices of its groups [B] and its values [B, K]."""
        lengths = [(len(row.prompt_tokens), sum(map(len, row.completion_tokens))) for row in rows]
        num_tokens = np.array(lengths).reshape(-1, 2)
        if self._one_shape is not None:
            batches = [self._one_shape.pack(num_tokens)]
        else:
            batches = pack_by_length(
                num_tokens, batch_size=self._batch_size, num_bins=self._num_bins
            )
        total = sum(len(packed.rows) for packed in batches)
        for packed in batches:
            for batch in packed.rows:
                groups = [None if i < 0 else rows[i] for i in batch]
                shape = packed.shape
                if self._one_shape is None:
                    shape = self._shapes.fit(shape, groups, num_batches=total)
                placed = distributed.place_whole(shape.collate(groups), self._placement)
                yield batch, self._function(self.params, placed)


def not_finite(model: str, value: float, where: str, text: Text) -> InputError:
    """The error of a number of a model of ours that is NaN or infinite.

    Args:
        model: its part and its folder.
        value: the number.
        where: `file:line` of the row.
        text: the completion.
    """
    return InputError(
        f"{where}: {model}: wanted a finite number, got {value} for completion {text!r:.80}. "
        "Its computation overflows, or its weights are not those of a trained model. Fix: "
        "dtype=float32 for this model, or another model."
    )


def one_late(items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each once the next one is there.

    Where making an item starts a computation, the device has the next one to go on with while the
    host waits for this one and reads it.
    """
    waiting: list[Item] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _merge(
    rows: Sequence[TokenGroup],
) -> tuple[list[TokenGroup], list[list[tuple[int, int]]]]:
    """Groups of distinct completions of distinct prompts, and where the completions of each row are
    in them: (group, completion).

    Groups are closed at `_MOST_COMPLETIONS`, so that few shapes are compiled.
    """
    completions: list[list[np.ndarray]] = []
    prompts: list[TokenGroup] = []
    open_group: dict[bytes, int] = {}
    found: dict[tuple[bytes, bytes], tuple[int, int]] = {}

    def find(row: TokenGroup, prompt: bytes, tokens: np.ndarray) -> tuple[int, int]:
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

    of_rows = []
    for row in rows:
        prompt = row.prompt_tokens.tobytes()
        of_rows.append([find(row, prompt, tokens) for tokens in row.completion_tokens])
    merged = [
        TokenGroup(row.id, row.where, row.prompt, row.prompt_tokens, (), tuple(tokens))
        for row, tokens in zip(prompts, completions, strict=True)
    ]
    return merged, of_rows
