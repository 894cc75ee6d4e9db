"""Packed tokens, padded slots, and the way between them.

Linear layers run on packed tokens: the valid tokens of a block of groups, one after another without
padding in between, [R, N] for R blocks. Attention runs on slots, where every group has rows of its
own. The batch says which slot each packed token comes from.

1. `Packing.of` inverts that map, once per batch.
2. `pack` and `unpack` carry arrays from one side to the other. Each is the other's transpose, so
   the backward pass gathers as well and never scatters.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp


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


def last_tokens(tokens: jax.Array, prompt_length: jax.Array) -> jax.Array:
    """Packed index [R, B / R] of each prompt's last token, given those of all its slots [R, S]."""
    rows = tokens.reshape(len(prompt_length), -1)
    last = jnp.take_along_axis(rows, (prompt_length - 1)[:, None], axis=1)
    return last.reshape(len(tokens), -1)
