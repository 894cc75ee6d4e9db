"""Sampling completions: one jitted function per prompt shape.

1. The prompts run once (`prefill`); all samples of a prompt share its keys and values.
2. A `while_loop` appends one token at a time to a small cache of the completions' own, and ends
   when every row has met an end token or the limit. No host round trip per token.
3. The log-probability of each chosen token is recorded on the way; it is the one training computes.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from copg_jax import sharding
from copg_jax.models import decoding
from copg_jax.models.decoder import Decoder
from copg_jax.models.layout import Layout
from copg_jax.models.params import Architecture, cast_matrices
from copg_jax.sharding import Partitioner


class Samples(NamedTuple):
    """K completions of each prompt."""

    tokens: Array  # int32 [B, K, C], zero after the end
    length: Array  # int32 [B, K], the end token included
    token_logp: Array  # float32 [B, K, C], nats under π itself (temperature 1), zero after the end
    has_eos: Array  # bool [B, K]: ended by an end token, not by the limit, or never begun


class _Loop(NamedTuple):
    index: Array  # position of the newest token
    cache: decoding.Cache
    samples: Samples


_RUN = 128

Sampler = Callable[[Any, Array, Array, Layout | None, Array], Samples]
"""(params, prompt_tokens [B, P], prompt_length [B], layout, keys [B]) → Samples.

The layout is that of the prompts alone, see `Shape.prompt_layout`. Where a prompt's length is 0,
there is none: such a place is computed, but generates nothing."""


def _next_tokens(
    logits: Array, keys: Array, index: Array, temperature: float
) -> tuple[Array, Array]:
    """Draws one token per row and its log-probability; a row's draw depends on its key and position
    alone.

    Args:
        logits: float32 [B, K, V].
        keys: one key a prompt [B].
        index: position in the completion.
        temperature: 0 takes the most likely token.
    """
    _, num_samples, vocab_size = logits.shape
    largest = logits.max(-1, keepdims=True)
    if temperature == 0:
        # `argmax` reduces pairs, which is several times slower on CPU than these two reductions.
        position = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        tokens = jnp.where(logits == largest, position, vocab_size - 1).min(-1)
    else:
        draw = lambda key: jax.random.uniform(jax.random.fold_in(key, index), (num_samples,))
        tokens = _draw(jnp.exp((logits - largest) / temperature), jax.vmap(draw)(keys))
    logp = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return tokens, logp - jax.nn.logsumexp(logits, axis=-1)


def _draw(weights: Array, uniform: Array) -> Array:
    """Index drawn in proportion to the weights: where their running total exceeds uniform · total.

    One random number a row. (The Gumbel trick takes one for every token of the vocabulary; on CPU
    that cost as much as the rest of a decoding step of a small model.)

    Args:
        weights: not negative, float32 [B, K, V].
        uniform: in [0, 1), float32 [B, K].

    Returns:
        int32 [B, K].
    """
    # First over runs of tokens, then inside one: a running total of all would be slow and round.
    padding = -weights.shape[-1] % _RUN
    runs = jnp.pad(weights, ((0, 0), (0, 0), (0, padding)))
    runs = runs.reshape(*uniform.shape, -1, _RUN)
    totals = runs.sum(-1)
    run, rest = _first_above(totals, uniform * totals.sum(-1))
    inside = jnp.take_along_axis(runs, run[..., None, None], axis=2)[:, :, 0]
    return run * _RUN + _first_above(inside, rest)[0]


def _first_above(weights: Array, goal: Array) -> tuple[Array, Array]:
    """The first index whose running total exceeds the goal, and the goal less the total before."""
    total = jnp.cumsum(weights, axis=-1)
    # Rounding can carry the goal past either end: then the first or last index of positive weight.
    most = total[..., -1] * (1 - jnp.finfo(weights.dtype).eps)
    goal = jnp.minimum(jnp.maximum(goal, 0.0), most)
    index = (total <= goal[..., None]).sum(-1, dtype=jnp.int32)
    own, upto = (
        jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0] for x in (weights, total)
    )
    return index, goal - (upto - own)


def _empty(prompt_length: Array, num_samples: int, max_new_tokens: int) -> Samples:
    """No tokens yet; where there is no prompt, there will be none."""
    rows = (len(prompt_length), num_samples)
    return Samples(
        tokens=jnp.zeros((*rows, max_new_tokens), jnp.int32),
        length=jnp.zeros(rows, jnp.int32),
        token_logp=jnp.zeros((*rows, max_new_tokens), jnp.float32),
        has_eos=jnp.broadcast_to(prompt_length[:, None] == 0, rows),
    )


def _append(samples: Samples, tokens: Array, logp: Array, index: Array, ends: Array) -> Samples:
    """Writes token number `index` into the rows that have not ended; `ends` [E] end them."""
    live = ~samples.has_eos

    def column(array: Array, new: Array) -> Array:
        new = jnp.where(live, new, 0).astype(array.dtype)
        return jax.lax.dynamic_update_index_in_dim(array, new, index, axis=2)

    return Samples(
        tokens=column(samples.tokens, tokens),
        length=samples.length + live,
        token_logp=column(samples.token_logp, logp),
        has_eos=samples.has_eos | jnp.isin(tokens, ends),
    )


def _decode(decoder: Decoder, params: Any, first: _Loop, append: Callable[..., Samples]) -> Samples:
    """Token after token, until every row has ended.

    Args:
        decoder: static.
        params: parameters in the compute dtype.
        first: with the first token of every row.
        append: (samples, hidden [B, K, D], index) → samples with token number `index`.
    """
    max_new_tokens = first.samples.tokens.shape[2]

    def unfinished(loop: _Loop) -> Array:
        return (loop.index + 1 < max_new_tokens) & ~loop.samples.has_eos.all()

    def body(loop: _Loop) -> _Loop:
        newest = jax.lax.dynamic_index_in_dim(
            loop.samples.tokens, loop.index, axis=2, keepdims=False
        )
        hidden, cache = decoding.decode_step(decoder, params, loop.cache, newest, loop.index)
        index = loop.index + 1
        return _Loop(index, cache, append(loop.samples, hidden, index))

    return jax.lax.while_loop(unfinished, body, first).samples


def make_sampler(
    arch: Architecture,
    *,
    end_ids: Collection[int],
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    mesh: jax.sharding.Mesh,
) -> Sampler:
    """Builds the jitted sampler.

    Args:
        arch: architecture.
        end_ids: each of them ends a completion.
        max_new_tokens: C, the end token included.
        num_samples: K, completions of each prompt.
        temperature: of the sampling distribution; 0 is greedy. Log-probabilities are always those
            of temperature 1.
        mesh: the device mesh; B must be a multiple of data·fsdp.
    """
    decoder = Decoder(arch, Partitioner(mesh))

    def sample(
        params: Any,
        prompt_tokens: Array,
        prompt_length: Array,
        layout: Layout | None,
        keys: Array,
    ) -> Samples:
        # Once here instead of at every token: decoding is bound by reading the weights.
        params = cast_matrices(arch, params)
        matrix = decoder.output_matrix(params)

        def append(samples: Samples, hidden: Array, index: Array) -> Samples:
            logits = jnp.einsum("bkd,dv->bkv", hidden, matrix, preferred_element_type=jnp.float32)
            tokens, logp = _next_tokens(logits, keys, index, temperature)
            ends = jnp.array(sorted(end_ids), jnp.int32)
            return _append(samples, tokens, logp, index, ends)

        cache, last = decoding.prefill(
            decoder,
            params,
            prompt_tokens,
            jnp.maximum(prompt_length, 1),
            layout,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
        )
        hidden = jnp.broadcast_to(last[:, None], (len(last), num_samples, last.shape[-1]))
        samples = append(_empty(prompt_length, num_samples, max_new_tokens), hidden, jnp.int32(0))
        return _decode(decoder, params, _Loop(jnp.int32(0), cache, samples), append)

    rows = sharding.batch_sharding(mesh)
    return jax.jit(
        sample,
        in_shardings=(None, rows, rows, rows, rows),
        out_shardings=sharding.replicated(mesh),
    )


def row_keys(seed: int, step: int, num_rows: int) -> Array:
    """One key a prompt, reproducible from seed, step and row alone; [num_rows]."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(num_rows))
