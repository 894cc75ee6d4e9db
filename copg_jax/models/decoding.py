"""Decoding: the computation of `forward`, one completion token at a time.

1. `prefill` runs the prompts once and keeps their keys and values.
2. `decode_step` appends a token to every completion; all completions of a prompt share its cache.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from copg_jax.models.attention import completion_attention
from copg_jax.models.decoder import Decoder, rotary_angles
from copg_jax.models.forward import attend_completions, attend_prompts
from copg_jax.models.layout import GroupPacking, Layout, Slots, by_bucket, from_buckets, take_rows
from copg_jax.models.params import Params


class KeyValues(NamedTuple):
    """Keys and values of a stack of l layers, for the B groups of a bucket.

    They lie as a step multiplies, scores = q @ k and mixed = weights @ v, so that it transposes
    nothing: a step reads them once for a single query.
    """

    prompt_k: jax.Array  # [l, B, KV, Hd, P]
    prompt_v: jax.Array  # [l, B, KV, P, Hd]
    own_k: jax.Array  # [l, B, KV, K, Hd, C]
    own_v: jax.Array  # [l, B, KV, K, C, Hd]

    def with_column(self, index: jax.Array | int, k: jax.Array, v: jax.Array) -> "KeyValues":
        """The same with column `index` of the completions written.

        For one layer or a stack of them: the axes that it writes are counted from the end.

        Args:
            index: 0 to C - 1.
            k: [..., Hd, 1].
            v: [..., 1, Hd].
        """
        update = jax.lax.dynamic_update_slice_in_dim
        return self._replace(
            own_k=update(self.own_k, k, index, axis=-1),
            own_v=update(self.own_v, v, index, axis=-2),
        )


Columns = Sequence[tuple[jax.Array, jax.Array]]  # (k, v) of one token, by bucket


class Cache(NamedTuple):
    """What a decoding step remembers: prompts are written once, completions one column a step."""

    prompt_length: jax.Array  # by bin, [R, B / R]
    layers: tuple[KeyValues, ...]  # by bucket
    last_layer: tuple[KeyValues, ...]

    def with_column(self, index: jax.Array | int, layers: Columns, last_layer: Columns) -> "Cache":
        """The same with column `index` of all completions written, see `KeyValues.with_column`."""

        def write(buckets: tuple[KeyValues, ...], columns: Columns) -> tuple[KeyValues, ...]:
            pairs = zip(buckets, columns, strict=True)
            return tuple(bucket.with_column(index, k, v) for bucket, (k, v) in pairs)

        return Cache(
            self.prompt_length, write(self.layers, layers), write(self.last_layer, last_layer)
        )


def prefill(
    decoder: Decoder,
    params: Params,
    prompt_tokens: jax.Array,
    prompt_length: jax.Array,
    layout: Layout | None,
    *,
    num_samples: int,
    max_new_tokens: int,
) -> tuple[Cache, jax.Array]:
    """Run the prompts once and make room for `num_samples` completions of each.

    Args:
        decoder: static.
        params: tree of `init_params`.
        prompt_tokens: ids, right-padded with any valid id; [B, P].
        prompt_length: valid tokens [B], at least 1.
        layout: of the prompts, see `Shape.prompt_layout`; None = as they are padded.
        num_samples: K, completions of each prompt.
        max_new_tokens: C, columns of the own cache.

    Returns:
        The cache and the hidden state of the last prompt token [B, D], after the final norm.
    """
    group = GroupPacking.of_prompts(prompt_tokens, prompt_length, layout)
    blank = jnp.zeros(group.completion_shape, prompt_tokens.dtype)

    def attend(q, k, v):
        q, k, v = map(group.unpack, (q, k, v))
        mixed = attend_prompts(decoder, group, q, k, v)
        return group.pack(q._replace(prompts=mixed)), _of_prompts(k, v)

    def attend_last(q, k, v):
        k, v = group.unpack(k), group.unpack(v)
        # A completion without tokens yet: its query sees the whole prompt and nothing of its own.
        rows = q.reshape(len(prompt_length), 1, 1, *q.shape[2:])
        mixed = attend_completions(group, rows, k, v, jnp.zeros(rows.shape[:3], jnp.int32))
        return mixed.reshape(q.shape), _of_prompts(k, v)

    rotation = rotary_angles(decoder.arch, group.positions())
    x = decoder.embed(params, group.pack(group.slots(prompt_tokens, blank)))
    x, layers = decoder.scan_layers(params, x, rotation, attend)
    read = partial(take_rows, index=group.last_prompt_token())
    x, final = decoder.last_layer(params, x, rotation, attend_last, read=read)

    hidden = decoder.final_norm(params, x).reshape(len(prompt_length), -1)
    begin = partial(_begin, num_samples=num_samples, max_new_tokens=max_new_tokens)
    layers, final = (tuple(begin(*of_bucket) for of_bucket in part) for part in (layers, final))
    return Cache(prompt_length.reshape(group.num_bins, -1), layers, final), hidden


def _of_prompts(k: Slots, v: Slots) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values of a layer's prompts, by bucket, as they lie in `KeyValues`."""
    return [
        (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))
        for k, v in zip(k.prompts, v.prompts, strict=True)
    ]


def _begin(
    prompt_k: jax.Array, prompt_v: jax.Array, *, num_samples: int, max_new_tokens: int
) -> KeyValues:
    """Keys and values of prompts, and zeros in place of those of their completions."""
    size, batch, heads, head_dim, _ = prompt_k.shape
    own = jnp.zeros((size, batch, heads, num_samples, head_dim, max_new_tokens), prompt_k.dtype)
    return KeyValues(prompt_k, prompt_v, own, own.swapaxes(-1, -2))


def decode_step(
    decoder: Decoder,
    params: Params,
    cache: Cache,
    tokens: jax.Array,
    index: jax.Array | int,
) -> tuple[jax.Array, Cache]:
    """Append one token to every completion; the same attention as in training, one query a row.

    Args:
        decoder: static.
        params: tree of `init_params`.
        cache: from `prefill` or the previous step; columns before `index` are filled.
        tokens: ids [B, K], the tokens at position `index` of the completions.
        index: column to write, 0 to C - 1.

    Returns:
        Hidden states [B, K, D], which predict token index + 1, and the cache with column `index`
        written (in place where the cache is donated or carried by a loop).
    """
    num_bins, length = len(cache.prompt_length), cache.prompt_length.reshape(-1)
    counts = [past.prompt_k.shape[1] // num_bins for past in cache.layers]
    split = partial(by_bucket, num_bins=num_bins, counts=counts)
    decoder = decoder.with_weights_in_place()
    constrain = decoder.partitioner.constrain_batch
    rotation = rotary_angles(
        decoder.arch, jnp.broadcast_to((length + index)[:, None], tokens.shape)
    )
    num_seen = jnp.broadcast_to(index + 1, (1, 1, 1))

    def attend_bucket(q, k, v, past: KeyValues, length):
        column = k.swapaxes(1, 2)[..., None], v.swapaxes(1, 2)[..., None, :]
        past = past.with_column(index, *column)
        mixed = completion_attention(
            q[:, :, None],
            past.prompt_k.transpose(0, 3, 1, 2),
            past.prompt_v.swapaxes(1, 2),
            length,
            past.own_k.transpose(0, 2, 4, 1, 3),
            past.own_v.transpose(0, 2, 3, 1, 4),
            num_seen,
        )
        return mixed[:, :, 0], column

    def attend(q, k, v, *past: KeyValues):
        q = constrain(q, None, "heads")
        k, v = (constrain(x, None, "kv_heads") for x in (k, v))
        of_bucket = map(attend_bucket, *map(split, (q, k, v)), past, split(length))
        mixed, columns = zip(*of_bucket, strict=True)
        # Layers return their new columns only, so that small writes update the whole cache.
        return from_buckets(mixed, num_bins), columns

    x = decoder.embed(params, tokens)
    x, layers = decoder.scan_layers(params, x, rotation, attend, cache.layers)
    x, final = decoder.last_layer(params, x, rotation, attend, cache.last_layer)
    hidden = constrain(decoder.final_norm(params, x))
    return hidden, cache.with_column(index, layers, final)
