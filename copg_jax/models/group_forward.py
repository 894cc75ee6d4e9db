"""Groups through the model: each prompt once, its K completions beside it.

1. Linear layers see packed tokens, attention sees slots; `_Group` holds the map between them.
2. `predictive_hidden` gives the states from which completion tokens are predicted, `final_hidden`
   those of the last tokens. The last layer computes no others.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from copg_jax.data.groups import GroupBatch
from copg_jax.models.attention import completion_attention, prompt_attention
from copg_jax.models.functional import embed, final_norm, last_layer, scan_layers
from copg_jax.models.llama import LlamaConfig, Params, rotary_angles
from copg_jax.models.packing import Packing, last_tokens, take_rows


def predictive_hidden(config: LlamaConfig, params: Params, batch: GroupBatch) -> jax.Array:
    """Hidden states, after the final norm, from which completion tokens are predicted.

    The first token of every completion is predicted by the last token of its prompt, the others by
    the token before them. Each prompt is computed once.

    Args:
        config: static.
        params: tree of `init`.
        batch: B groups; tokens, lengths and slots are read.

    Returns:
        Compute dtype; [R, M, D], one state for each entry of `batch.completion_slots`.
    """
    group = _Group.of(batch)
    size = batch.completion_tokens.shape[2]
    num_slots = group.num_completion_slots
    packing = Packing.of(batch.completion_slots, num_slots)
    last_prompt = jnp.repeat(group.last_prompt_token(), num_slots // group.per_block, axis=1)
    # By completion slot: the packed token that predicts it.
    before = group.packing.token[:, -num_slots - 1 : -1]
    before = jnp.where(jnp.arange(num_slots)[None, :] % size == 0, last_prompt, before)

    def attend(q, keys_values):
        rows = packing.unpack(q).reshape(*batch.completion_tokens.shape, *q.shape[2:])
        num_seen = jnp.arange(size)[None, None, :]
        mixed = completion_attention(rows, *keys_values, num_seen=num_seen)
        return packing.pack(mixed.reshape(len(q), num_slots, *q.shape[2:]))

    return _run_groups(config, params, group, packing.pack(before), attend)


def final_hidden(config: LlamaConfig, params: Params, batch: GroupBatch) -> jax.Array:
    """Hidden state, after the final norm, of the last token of every completion.

    Args:
        config: static.
        params: tree of `init`.
        batch: B groups; tokens, lengths and slots are read.

    Returns:
        Compute dtype; [B, K, D]. Absent completions have a state that means nothing.
    """
    group = _Group.of(batch)
    tokens = group.packing.token[:, -group.num_completion_slots :]
    last = jnp.maximum(batch.completion_length - 1, 0)[:, :, None]
    index = jnp.take_along_axis(tokens.reshape(batch.completion_tokens.shape), last, axis=2)

    def attend(q, keys_values):
        rows = q.reshape(*last.shape, *q.shape[2:])
        num_seen = batch.completion_length[:, :, None]
        return completion_attention(rows, *keys_values, num_seen=num_seen).reshape(q.shape)

    x = _run_groups(config, params, group, index.reshape(len(tokens), -1), attend)
    return x.reshape(*batch.completion_length.shape, -1)


class _Group(NamedTuple):
    """A batch of groups with its map between packed tokens and slots [prompts | completions]."""

    batch: GroupBatch
    packing: Packing

    @classmethod
    def of(cls, batch: GroupBatch) -> Self:
        slots = batch.prompt_tokens.size + batch.completion_tokens.size
        return cls(batch, Packing.of(batch.token_slots, slots // len(batch.token_slots)))

    @property
    def per_block(self) -> int:
        """Groups of a block, B / R."""
        return len(self.batch.prompt_tokens) // len(self.packing.token)

    @property
    def num_completion_slots(self) -> int:
        """Completion slots of a block; its prompt slots come before them."""
        return self.batch.completion_tokens.size // len(self.packing.token)

    def last_prompt_token(self) -> jax.Array:
        """Packed index of the last token of each prompt; [R, B / R]."""
        tokens = self.packing.token[:, : -self.num_completion_slots]
        return last_tokens(tokens, self.batch.prompt_length)

    def pack(self, prompt: jax.Array, completion: jax.Array) -> jax.Array:
        """[B, P, ...] and [B, K, C, ...] → [R, N, ...]."""
        num_blocks = len(self.packing.token)
        rest = prompt.shape[2:]
        parts = [x.reshape(num_blocks, -1, *rest) for x in (prompt, completion)]
        return self.packing.pack(jnp.concatenate(parts, axis=1))

    def unpack(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[R, N, ...] → [B, P, ...] and [B, K, C, ...]."""
        slots = self.packing.unpack(x)
        prompt, completion = jnp.split(slots, [slots.shape[1] - self.num_completion_slots], axis=1)
        return (
            prompt.reshape(*self.batch.prompt_tokens.shape, *x.shape[2:]),
            completion.reshape(*self.batch.completion_tokens.shape, *x.shape[2:]),
        )


def _run_groups(
    config: LlamaConfig,
    params: Params,
    group: _Group,
    index: jax.Array,
    attend_last: Callable[..., jax.Array],
) -> jax.Array:
    """All layers on packed tokens, but of the last layer only the output of some tokens.

    Args:
        config: static.
        params: tree of `init`.
        group: the batch.
        index: packed tokens whose output is wanted; [R, U].
        attend_last: (q [R, U, H, Hd], keys and values in slots) → [R, U, H, Hd].

    Returns:
        [R, U, D] after the final norm.
    """
    length = group.batch.prompt_length
    prompt_shape, completion_shape = (
        group.batch.prompt_tokens.shape,
        group.batch.completion_tokens.shape,
    )
    own_position = jnp.arange(completion_shape[2])[None, None, :]
    positions = group.pack(
        jnp.broadcast_to(jnp.arange(prompt_shape[1])[None, :], prompt_shape),
        jnp.broadcast_to(length[:, None, None] + own_position, completion_shape),
    )
    rotation = rotary_angles(config, positions)

    def in_slots(k, v):
        (prompt_k, own_k), (prompt_v, own_v) = group.unpack(k), group.unpack(v)
        return prompt_k, prompt_v, length, own_k, own_v

    def attend(q, k, v):
        prompt_q, own_q = group.unpack(q)
        keys_values = in_slots(k, v)
        mixed = prompt_attention(prompt_q, *keys_values[:3], backend=config.attention)
        own_mixed = completion_attention(own_q, *keys_values, num_seen=own_position + 1)
        return group.pack(mixed, own_mixed), None

    x = embed(config, params, group.pack(group.batch.prompt_tokens, group.batch.completion_tokens))
    x, _ = scan_layers(config, params["layers"], x, rotation, attend)
    x, _ = last_layer(
        config,
        params["last_layer"],
        x,
        rotation,
        lambda q, k, v: (attend_last(q, in_slots(k, v)), None),
        read=partial(take_rows, index=index),
    )
    return final_norm(config, params, x)
