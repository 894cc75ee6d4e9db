"""Groups through the model: each prompt once, its K completions beside it.

1. Linear layers see packed tokens, attention sees slots: `attend_prompts` and `attend_completions`
   run bucket by bucket, each as wide as its longest prompt.
2. `predictive_hidden` gives the states from which completion tokens are predicted, `final_hidden`
   those of the last tokens. The last layer computes no others.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from copg_jax.data.groups import GroupBatch
from copg_jax.models.attention import completion_attention, prompt_attention
from copg_jax.models.functional import embed, final_norm, last_layer, scan_layers
from copg_jax.models.llama import LlamaConfig, Params, rotary_angles
from copg_jax.models.packing import GroupPacking, Packing, Slots, from_buckets, take_rows


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
    group = GroupPacking.of(batch)
    size = batch.completion_tokens.shape[2]
    num_slots = group.num_completion_slots
    packing = Packing.of(batch.completion_slots, num_slots)
    last_prompt = group.last_prompt_token()
    last_prompt = jnp.repeat(last_prompt, num_slots // last_prompt.shape[1], axis=1)
    # By completion slot: the packed token that predicts it.
    before = group.packing.token[:, -num_slots - 1 : -1]
    before = jnp.where(jnp.arange(num_slots)[None, :] % size == 0, last_prompt, before)
    num_seen = jnp.broadcast_to(jnp.arange(size)[None, None, :], batch.completion_tokens.shape)

    def attend(q, k, v):
        rows = packing.unpack(q).reshape(*batch.completion_tokens.shape, *q.shape[2:])
        mixed = attend_completions(group, rows, k, v, num_seen)
        return packing.pack(mixed.reshape(len(q), num_slots, *q.shape[2:]))

    return _run_groups(config, params, batch, group, packing.pack(before), attend)


def final_hidden(config: LlamaConfig, params: Params, batch: GroupBatch) -> jax.Array:
    """Hidden state, after the final norm, of the last token of every completion.

    Args:
        config: static.
        params: tree of `init`.
        batch: B groups; tokens, lengths and slots are read.

    Returns:
        Compute dtype; [B, K, D]. Absent completions have a state that means nothing.
    """
    group = GroupPacking.of(batch)
    tokens = group.packing.token[:, -group.num_completion_slots :]
    last = jnp.maximum(batch.completion_length - 1, 0)[:, :, None]
    index = jnp.take_along_axis(tokens.reshape(batch.completion_tokens.shape), last, axis=2)

    def attend(q, k, v):
        rows = q.reshape(*last.shape, *q.shape[2:])
        num_seen = batch.completion_length[:, :, None]
        return attend_completions(group, rows, k, v, num_seen).reshape(q.shape)

    x = _run_groups(config, params, batch, group, index.reshape(len(tokens), -1), attend)
    return x.reshape(*batch.completion_length.shape, -1)


def attend_prompts(
    group: GroupPacking, q: Slots, k: Slots, v: Slots, backend: str
) -> tuple[jax.Array, ...]:
    """`attention.prompt_attention` of all groups, by bucket: [R n_j, P_j, H, Hd]."""
    attend = partial(prompt_attention, backend=backend)
    return tuple(map(attend, q.prompts, k.prompts, v.prompts, group.by_bucket(group.prompt_length)))


def attend_completions(
    group: GroupPacking, q: jax.Array, k: Slots, v: Slots, num_seen: jax.Array
) -> jax.Array:
    """`attention.completion_attention` of all groups.

    Args:
        group: how they lie.
        q: queries [B, K, Q, H, Hd].
        k: keys of all tokens.
        v: values of all tokens.
        num_seen: see `attention.completion_attention`; [B, K, Q].

    Returns:
        [B, K, Q, H, Hd].
    """
    own = q, group.prompt_length, k.completions, v.completions, num_seen
    rows, length, own_k, own_v, seen = map(group.by_bucket, own)
    mixed = map(completion_attention, rows, k.prompts, v.prompts, length, own_k, own_v, seen)
    return from_buckets(list(mixed), group.num_blocks)


def _run_groups(
    config: LlamaConfig,
    params: Params,
    batch: GroupBatch,
    group: GroupPacking,
    index: jax.Array,
    attend_last: Callable[..., jax.Array],
) -> jax.Array:
    """All layers on packed tokens, but of the last layer only the output of some tokens.

    Args:
        config: static.
        params: tree of `init`.
        batch: token ids are read.
        group: how they lie.
        index: packed tokens whose output is wanted; [R, U].
        attend_last: (q [R, U, H, Hd], keys and values in slots) → [R, U, H, Hd].

    Returns:
        [R, U, D] after the final norm.
    """
    shape = group.completion_shape
    upto = jnp.broadcast_to(jnp.arange(1, shape[2] + 1)[None, None, :], shape)
    rotation = rotary_angles(config, group.positions())

    def attend(q, k, v):
        q, k, v = map(group.unpack, (q, k, v))
        prompts = attend_prompts(group, q, k, v, config.attention)
        completions = attend_completions(group, q.completions, k, v, upto)
        return group.pack(Slots(prompts, completions)), None

    x = embed(config, params, group.pack(Slots(batch.prompt_tokens, batch.completion_tokens)))
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
