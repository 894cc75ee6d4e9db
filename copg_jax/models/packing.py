"""Packed tokens, padded slots, and the way between them.

Linear layers run on packed tokens: the valid tokens of a block of groups, one after another without
padding in between, [R, N] for R blocks. Attention runs on slots, where every group has rows of its
own. The batch says which slot each packed token comes from.

1. `Packing.of` inverts that map, once per batch.
2. `pack` and `unpack` carry arrays from one side to the other. Each is the other's transpose, so
   the backward pass gathers as well and never scatters.
3. `GroupPacking` is the map of whole groups, whose prompts lie in buckets.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from copg_jax.data.groups import GroupBatch


class Packing(NamedTuple):
    """A one-to-one map between the packed tokens and the slots of each of R blocks."""

    slot: jax.Array  # int32 [R, N]: slot that each packed token comes from; S for filling
    token: jax.Array  # int32 [R, S]: packed token of each slot; N for an empty slot

    @classmethod
    def of(cls, slot: jax.Array, num_slots: int) -> Self:
        """Completes the map.

        Args:
            slot: slot that each packed token comes from, S for filling; int32 [R, N].
            num_slots: S, slots of a block.
        """
        num_tokens = slot.shape[1]

        def invert(row: jax.Array) -> jax.Array:
            empty = jnp.full(num_slots, num_tokens, jnp.int32)
            return empty.at[row].set(jnp.arange(num_tokens, dtype=jnp.int32), mode="drop")

        return cls(slot, jax.vmap(invert)(slot))

    def pack(self, slots: jax.Array) -> jax.Array:
        """[R, S, ...] → [R, N, ...]; filling is zero."""
        return _move(slots, self.slot, self.token)

    def unpack(self, tokens: jax.Array) -> jax.Array:
        """[R, N, ...] → [R, S, ...]; empty slots are zero."""
        return _move(tokens, self.token, self.slot)


@jax.custom_vjp
def _move(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """`take_rows(x, source)`; `target` is the inverse map, with which the backward pass gathers."""
    del target
    return take_rows(x, source)


def _move_forward(x: jax.Array, source: jax.Array, target: jax.Array):
    return take_rows(x, source), (source, target)


def _move_backward(maps: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    source, target = maps
    return _move(cotangent, target, source), None, None


_move.defvjp(_move_forward, _move_backward)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[r, index[r, j]], zero where that is out of range; [R, I, ...], [R, J] → [R, J, ...]."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode="fill", fill_value=0))(x, index)


class Slots(NamedTuple):
    """An array of all tokens of a batch of groups, padded."""

    prompts: tuple[jax.Array, ...]  # by bucket, [R n_j, P_j, ...]
    completions: jax.Array  # [B, K, C, ...]


class GroupPacking(NamedTuple):
    """The map between packed tokens and slots [prompts | completions] of a batch of groups."""

    packing: Packing
    prompt_length: jax.Array  # [B]
    prompt_shapes: tuple[tuple[int, int], ...]  # by bucket, (R n_j, P_j)
    completion_shape: tuple[int, int, int]  # (B, K, C)

    @classmethod
    def of(cls, batch: GroupBatch) -> Self:
        """That of all tokens of a batch."""
        return cls._of(
            batch.token_slots,
            batch.prompt_length,
            batch.prompt_tokens,
            batch.completion_tokens.shape,
        )

    @classmethod
    def of_prompts(cls, tokens: tuple[jax.Array, ...], length: jax.Array, slots: jax.Array) -> Self:
        """That of groups without a completion.

        Args:
            tokens: ids of each bucket, [R n_j, P_j].
            length: [B].
            slots: prompt slots of each block that are computed, see `GroupBatch`; [R, N].
        """
        return cls._of(slots, length, tokens, (len(length), 0, 0))

    @classmethod
    def _of(cls, slots, length, tokens, completion_shape) -> Self:
        shapes = tuple(x.shape for x in tokens)
        num_slots = sum(map(math.prod, (*shapes, completion_shape))) // len(slots)
        return cls(Packing.of(slots, num_slots), length, shapes, completion_shape)

    @property
    def num_blocks(self) -> int:
        """R."""
        return len(self.packing.slot)

    @property
    def num_completion_slots(self) -> int:
        """Completion slots of a block; its prompt slots come before them."""
        return math.prod(self.completion_shape) // self.num_blocks

    def positions(self) -> jax.Array:
        """Of each packed token in its sequence, which begins with the prompt; [R, N]."""
        prompts = (
            jnp.broadcast_to(jnp.arange(shape[1])[None, :], shape) for shape in self.prompt_shapes
        )
        own = jnp.arange(self.completion_shape[2])[None, None, :]
        own = jnp.broadcast_to(self.prompt_length[:, None, None] + own, self.completion_shape)
        return self.pack(Slots(tuple(prompts), own))

    def last_prompt_token(self) -> jax.Array:
        """Packed index of the last token of each prompt; [R, B / R]."""
        tokens = self._cut(self.packing.token).prompts
        last = [
            jnp.take_along_axis(row, (length - 1)[:, None], axis=1)
            for row, length in zip(tokens, self.by_bucket(self.prompt_length), strict=True)
        ]
        return from_buckets(last, self.num_blocks).reshape(self.num_blocks, -1)

    def by_bucket(self, x: jax.Array) -> list[jax.Array]:
        """[B, ...] → [R n_j, ...] for the groups of each bucket."""
        return by_bucket(x, self.num_blocks, [count for count, _ in self.prompt_shapes])

    def pack(self, x: Slots) -> jax.Array:
        """[R, N, ...]."""
        rest = x.completions.shape[3:]
        parts = (part.reshape(self.num_blocks, -1, *rest) for part in (*x.prompts, x.completions))
        return self.packing.pack(jnp.concatenate(list(parts), axis=1))

    def unpack(self, x: jax.Array) -> Slots:
        """Of [R, N, ...]."""
        return self._cut(self.packing.unpack(x))

    def _cut(self, slots: jax.Array) -> Slots:
        """Of an array by slot, [R, S, ...]."""
        shapes = (*self.prompt_shapes, self.completion_shape)
        parts = _split(slots, [math.prod(shape) // self.num_blocks for shape in shapes])
        *prompts, completions = (
            part.reshape(*shape, *slots.shape[2:])
            for part, shape in zip(parts, shapes, strict=True)
        )
        return Slots(tuple(prompts), completions)


def by_bucket(x: jax.Array, num_blocks: int, counts: Sequence[int]) -> list[jax.Array]:
    """[B, ...] → [R n_j, ...] for the groups of each bucket.

    Args:
        x: an array by group.
        num_blocks: R.
        counts: groups of each bucket, R n_j.
    """
    blocks = x.reshape(num_blocks, -1, *x.shape[1:])
    parts = _split(blocks, [count // num_blocks for count in counts])
    return [part.reshape(-1, *x.shape[1:]) for part in parts]


def from_buckets(parts: Sequence[jax.Array], num_blocks: int) -> jax.Array:
    """[R n_j, ...] for the groups of each bucket → [B, ...], in the order of the batch."""
    rest = parts[0].shape[1:]
    blocks = [part.reshape(num_blocks, -1, *rest) for part in parts]
    return jnp.concatenate(blocks, axis=1).reshape(-1, *rest)


def _split(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Pieces of these sizes along the second axis."""
    return jnp.split(x, list(itertools.accumulate(sizes))[:-1], axis=1)
