"""Groups through the model: each prompt once, its K completions beside it.

1. `make_token_logp` and `make_seq_logp` make a language model of an architecture: a pure function
   (params, batch) → log-probabilities. `make_score` makes a reward model, (params, batch) → [B, K].
2. Linear layers see packed tokens, attention sees slots: `attend_prompts` and `attend_completions`
   run bucket by bucket, each as wide as its longest prompt.
3. `predictive_hidden` gives the states from which completion tokens are predicted, `final_hidden`
   those of the last tokens. The last layer computes no others.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from copg_jax.data.groups import GroupBatch
from copg_jax.logprobs import hidden_to_logp, sum_logp
from copg_jax.models.attention import completion_attention, prompt_attention
from copg_jax.models.decoder import Decoder, rotary_angles
from copg_jax.models.layout import GroupPacking, Slots, take_rows
from copg_jax.models.params import Architecture, Params
from copg_jax.sharding import ONE_DEVICE, Partitioner

BatchFn = Callable[[Any, GroupBatch], jax.Array]
"""(params, batch) → an array."""


def make_token_logp(
    arch: Architecture, partitioner: Partitioner = ONE_DEVICE, *, chunk: int | None = None
) -> BatchFn:
    """Builds (params, batch) → log-probability of every completion token given its prompt and past.

    Args:
        arch: architecture; the parameters have a language-model head.
        partitioner: where activations lie.
        chunk: see `logprobs.hidden_to_logp`; tokens are those of a bin.

    Returns:
        A function to nats, float32, [B, K, C]. Positions past a completion's end are 0 where the
        batch's layout leaves them out, else numbers without meaning.
    """
    decoder = Decoder(arch, partitioner)

    def token_logp(params: Params, batch: GroupBatch) -> jax.Array:
        group = GroupPacking.of(batch)
        hidden = predictive_hidden(decoder, params, batch, group)
        ids = batch.completion_tokens
        tokens = group.completions.pack(ids.reshape(group.num_bins, -1))
        logp = hidden_to_logp(hidden, decoder.output_matrix(params), tokens, chunk=chunk)
        return group.completions.unpack(logp).reshape(ids.shape)

    return token_logp


def make_seq_logp(
    arch: Architecture, partitioner: Partitioner = ONE_DEVICE, *, chunk: int | None = None
) -> BatchFn:
    """Builds (params, batch) → ln π(y|x) of every completion, summed over tokens.

    Args are those of `make_token_logp`.

    Returns:
        A function to nats, float32, [B, K]. Absent completions have 0.
    """
    token_logp = make_token_logp(arch, partitioner, chunk=chunk)

    def seq_logp(params: Params, batch: GroupBatch) -> jax.Array:
        return sum_logp(token_logp(params, batch), batch.completion_length)

    return seq_logp


def make_score(arch: Architecture, partitioner: Partitioner = ONE_DEVICE) -> BatchFn:
    """Builds a reward model, (params, batch) → score · hidden[last token] of each completion.

    The last token is the EOS where there is one; higher is better.

    Args:
        arch: architecture; the parameters have a score head.
        partitioner: where activations lie.

    Returns:
        A function to reward units, float32, [B, K]. Absent completions have 0.
    """
    decoder = Decoder(arch, partitioner)

    def score(params: Params, batch: GroupBatch) -> jax.Array:
        state = final_hidden(decoder, params, batch, GroupPacking.of(batch)).astype(jnp.float32)
        value = jnp.einsum("bkd,d->bk", state, params["score"].astype(jnp.float32))
        return jnp.where(batch.completion_length > 0, value, 0.0)

    return score


def predictive_hidden(
    decoder: Decoder, params: Params, batch: GroupBatch, group: GroupPacking
) -> jax.Array:
    """Hidden states, after the final norm, from which completion tokens are predicted.

    The first token of every completion is predicted by the last token of its prompt, the others by
    the token before them. Each prompt is computed once.

    Args:
        decoder: static.
        params: tree of `init_params`.
        batch: B groups; tokens and lengths are read.
        group: how they lie.

    Returns:
        Compute dtype; [R, M, D], one state for each computed completion slot.
    """
    size = batch.completion_tokens.shape[2]
    num_slots, packing = group.num_completion_slots, group.completions
    last_prompt = group.last_prompt_token()
    last_prompt = jnp.repeat(last_prompt, num_slots // last_prompt.shape[1], axis=1)
    # By completion slot: the packed token that predicts it.
    before = group.tokens.token[:, -num_slots - 1 : -1]
    before = jnp.where(jnp.arange(num_slots)[None, :] % size == 0, last_prompt, before)
    num_seen = jnp.broadcast_to(jnp.arange(size)[None, None, :], batch.completion_tokens.shape)

    def attend(q, k, v):
        rows = packing.unpack(q).reshape(*batch.completion_tokens.shape, *q.shape[2:])
        mixed = attend_completions(group, rows, k, v, num_seen)
        return packing.pack(mixed.reshape(len(q), num_slots, *q.shape[2:]))

    return _run_groups(decoder, params, batch, group, packing.pack(before), attend)


def final_hidden(
    decoder: Decoder, params: Params, batch: GroupBatch, group: GroupPacking
) -> jax.Array:
    """Hidden state, after the final norm, of the last token of every completion.

    Args:
        decoder: static.
        params: tree of `init_params`.
        batch: B groups; tokens and lengths are read.
        group: how they lie.

    Returns:
        Compute dtype; [B, K, D]. Absent completions have a state that means nothing.
    """
    tokens = group.tokens.token[:, -group.num_completion_slots :]
    last = jnp.maximum(batch.completion_length - 1, 0)[:, :, None]
    index = jnp.take_along_axis(tokens.reshape(batch.completion_tokens.shape), last, axis=2)

    def attend(q, k, v):
        rows = q.reshape(*last.shape, *q.shape[2:])
        num_seen = batch.completion_length[:, :, None]
        return attend_completions(group, rows, k, v, num_seen).reshape(q.shape)

    x = _run_groups(decoder, params, batch, group, index.reshape(len(tokens), -1), attend)
    return x.reshape(*batch.completion_length.shape, -1)


def attend_prompts(
    decoder: Decoder, group: GroupPacking, q: Slots, k: Slots, v: Slots
) -> tuple[jax.Array, ...]:
    """`attention.prompt_attention` of all groups, by bucket: [R n_j, P_j, H, Hd]."""
    attend = partial(
        prompt_attention, backend=decoder.arch.attention, partitioner=decoder.partitioner
    )
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
    return group.from_buckets(list(mixed))


def _run_groups(
    decoder: Decoder,
    params: Params,
    batch: GroupBatch,
    group: GroupPacking,
    index: jax.Array,
    attend_last: Callable[..., jax.Array],
) -> jax.Array:
    """All layers on packed tokens, but of the last layer only the output of some tokens.

    Args:
        decoder: static.
        params: tree of `init_params`.
        batch: token ids are read.
        group: how they lie.
        index: packed tokens whose output is wanted; [R, U].
        attend_last: (q [R, U, H, Hd], keys and values in slots) → [R, U, H, Hd].

    Returns:
        [R, U, D] after the final norm.
    """
    shape = group.completion_shape
    upto = jnp.broadcast_to(jnp.arange(1, shape[2] + 1)[None, None, :], shape)
    rotation = rotary_angles(decoder.arch, group.positions())

    def attend(q, k, v):
        q, k, v = map(group.unpack, (q, k, v))
        prompts = attend_prompts(decoder, group, q, k, v)
        completions = attend_completions(group, q.completions, k, v, upto)
        return group.pack(Slots(prompts, completions)), None

    tokens = group.pack(group.slots(batch.prompt_tokens, batch.completion_tokens))
    x, _ = decoder.scan_layers(params, decoder.embed(params, tokens), rotation, attend)
    x, _ = decoder.last_layer(
        params,
        x,
        rotation,
        lambda q, k, v: (attend_last(q, group.unpack(k), group.unpack(v)), None),
        read=partial(take_rows, index=index),
    )
    return decoder.final_norm(params, x)
