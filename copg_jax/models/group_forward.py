"""Groups through the model: each prompt once, its K completions beside it.

1. Linear layers see packed tokens, attention sees slots; `_Group` holds the map between them.
2. Attention runs bucket by bucket, each as wide as its longest prompt.
3. `predictive_hidden` gives the states from which completion tokens are predicted, `final_hidden`
   those of the last tokens. The last layer computes no others.
"""

import itertools
import math
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
    num_seen = jnp.broadcast_to(jnp.arange(size)[None, None, :], batch.completion_tokens.shape)

    def attend(q, k, v):
        rows = packing.unpack(q).reshape(*batch.completion_tokens.shape, *q.shape[2:])
        mixed = group.attend_completions(rows, k, v, num_seen)
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

    def attend(q, k, v):
        rows = q.reshape(*last.shape, *q.shape[2:])
        num_seen = batch.completion_length[:, :, None]
        return group.attend_completions(rows, k, v, num_seen).reshape(q.shape)

    x = _run_groups(config, params, group, index.reshape(len(tokens), -1), attend)
    return x.reshape(*batch.completion_length.shape, -1)


class _Slots(NamedTuple):
    """An array of all tokens, padded."""

    prompts: tuple[jax.Array, ...]  # by bucket, [R n_j, P_j, ...]
    completions: jax.Array  # [B, K, C, ...]


class _Group(NamedTuple):
    """A batch of groups with its map between packed tokens and slots [prompts | completions]."""

    batch: GroupBatch
    packing: Packing

    @classmethod
    def of(cls, batch: GroupBatch) -> Self:
        slots = sum(x.size for x in (*batch.prompt_tokens, batch.completion_tokens))
        return cls(batch, Packing.of(batch.token_slots, slots // len(batch.token_slots)))

    @property
    def tokens(self) -> _Slots:
        """Token ids."""
        return _Slots(self.batch.prompt_tokens, self.batch.completion_tokens)

    @property
    def num_blocks(self) -> int:
        """R."""
        return len(self.batch.token_slots)

    @property
    def per_block(self) -> int:
        """Groups of a block, B / R."""
        return len(self.batch.prompt_length) // self.num_blocks

    @property
    def num_completion_slots(self) -> int:
        """Completion slots of a block; its prompt slots come before them."""
        return self.batch.completion_tokens.size // self.num_blocks

    def positions(self) -> jax.Array:
        """Of each packed token in its sequence, which begins with the prompt; [R, N]."""
        *_, size = shape = self.batch.completion_tokens.shape
        prompts = (
            jnp.broadcast_to(jnp.arange(x.shape[1])[None, :], x.shape)
            for x in self.batch.prompt_tokens
        )
        own = self.batch.prompt_length[:, None, None] + jnp.arange(size)[None, None, :]
        return self.pack(_Slots(tuple(prompts), jnp.broadcast_to(own, shape)))

    def last_prompt_token(self) -> jax.Array:
        """Packed index of the last token of each prompt; [R, B / R]."""
        tokens = self._cut(self.packing.token).prompts
        last = map(last_tokens, tokens, self.by_bucket(self.batch.prompt_length))
        return self.from_buckets(list(last)).reshape(self.num_blocks, -1)

    def attend_prompts(
        self, q: _Slots, k: _Slots, v: _Slots, backend: str
    ) -> tuple[jax.Array, ...]:
        """`attention.prompt_attention` of all groups, by bucket; [R n_j, P_j, H, Hd]."""
        lengths = self.by_bucket(self.batch.prompt_length)
        attend = partial(prompt_attention, backend=backend)
        return tuple(map(attend, q.prompts, k.prompts, v.prompts, lengths))

    def attend_completions(
        self, q: jax.Array, k: _Slots, v: _Slots, num_seen: jax.Array
    ) -> jax.Array:
        """`attention.completion_attention` of all groups.

        Args:
            q: [B, K, Q, H, Hd].
            k: keys.
            v: values.
            num_seen: [B, K, Q].

        Returns:
            [B, K, Q, H, Hd].
        """
        own = q, self.batch.prompt_length, k.completions, v.completions, num_seen
        rows, length, own_k, own_v, seen = map(self.by_bucket, own)
        mixed = map(completion_attention, rows, k.prompts, v.prompts, length, own_k, own_v, seen)
        return self.from_buckets(list(mixed))

    def by_bucket(self, x: jax.Array) -> list[jax.Array]:
        """[B, ...] → [R n_j, ...] for the groups of each bucket."""
        sizes = [len(bucket) // self.num_blocks for bucket in self.batch.prompt_tokens]
        blocks = x.reshape(self.num_blocks, -1, *x.shape[1:])
        return [part.reshape(-1, *x.shape[1:]) for part in _split(blocks, sizes)]

    def from_buckets(self, parts: list[jax.Array]) -> jax.Array:
        """[R n_j, ...] for the groups of each bucket → [B, ...]."""
        rest = parts[0].shape[1:]
        blocks = [part.reshape(self.num_blocks, -1, *rest) for part in parts]
        return jnp.concatenate(blocks, axis=1).reshape(-1, *rest)

    def pack(self, x: _Slots) -> jax.Array:
        """[R, N, ...]."""
        rest = x.completions.shape[3:]
        parts = (part.reshape(self.num_blocks, -1, *rest) for part in (*x.prompts, x.completions))
        return self.packing.pack(jnp.concatenate(list(parts), axis=1))

    def unpack(self, x: jax.Array) -> _Slots:
        """Of [R, N, ...]."""
        return self._cut(self.packing.unpack(x))

    def _cut(self, slots: jax.Array) -> _Slots:
        """Of an array by slot, [R, S, ...]."""
        shapes = [x.shape for x in (*self.batch.prompt_tokens, self.batch.completion_tokens)]
        parts = _split(slots, [math.prod(shape) // self.num_blocks for shape in shapes])
        *prompts, completions = (
            part.reshape(*shape, *slots.shape[2:])
            for part, shape in zip(parts, shapes, strict=True)
        )
        return _Slots(tuple(prompts), completions)


def _split(x: jax.Array, sizes: list[int]) -> list[jax.Array]:
    """Pieces of these sizes along the second axis."""
    return jnp.split(x, list(itertools.accumulate(sizes))[:-1], axis=1)


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
    shape = group.batch.completion_tokens.shape
    upto = jnp.broadcast_to(jnp.arange(1, shape[2] + 1)[None, None, :], shape)
    rotation = rotary_angles(config, group.positions())

    def attend(q, k, v):
        q, k, v = map(group.unpack, (q, k, v))
        prompts = group.attend_prompts(q, k, v, config.attention)
        completions = group.attend_completions(q.completions, k, v, upto)
        return group.pack(_Slots(prompts, completions)), None

    x = embed(config, params, group.pack(group.tokens))
    x, _ = scan_layers(config, params["layers"], x, rotation, attend)
    x, _ = last_layer(
        config,
        params["last_layer"],
        x,
        rotation,
        lambda q, k, v: (attend_last(q, group.unpack(k), group.unpack(v)), None),
        read=partial(take_rows, index=index),
    )
    return final_norm(config, params, x)
