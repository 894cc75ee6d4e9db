"""Who sees whom: the one definition of attention inside a group.

1. `prompt_attention`: a prompt token sees its prompt up to itself. XLA or a fused kernel computes
   it.
2. `completion_attention`: a query sees its whole prompt and the first tokens of its own
   completion, never another completion; one softmax over both parts.

Both keep query heads as [KV, H / KV], so grouped key-value heads are never repeated in memory, and
take scores and softmax in float32.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from copg_jax.models.flash import fused_attention
from copg_jax.models.llama import MIXED

# Finite, so that a row without any visible key would still give a number and not NaN.
_MASKED = float(jnp.finfo(jnp.float32).min)
_QUERY_BLOCK = 128
# An estimate for a TPU v5e and heads of 128: with fewer slots, starting a small product for every
# group and head takes a fused kernel longer than reading and writing all scores takes XLA.
_SHORTEST_FUSED = 256


def prompt_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, prompt_length: jax.Array, *, backend: str = "xla"
) -> jax.Array:
    """Causal attention within right-padded prompts: softmax(q k / sqrt(Hd)) v.

    Args:
        q: queries [B, P, H, Hd].
        k: keys [B, P, KV, Hd].
        v: values [B, P, KV, Hd].
        prompt_length: valid tokens [B], at least 1.
        backend: one of `llama.ATTENTIONS`; XLA computes short prompts in any case.

    Returns:
        [B, P, H, Hd]; rows of padding are finite and mean nothing.
    """
    if backend != "xla" and q.shape[1] >= _SHORTEST_FUSED:
        return fused_attention(backend, q, k, v, prompt_length)
    queries, keys, values = _by_head(q, k.shape[2]), _by_head(k), _by_head(v)
    # A block of queries sees no key after its last one: half of the square is never computed.
    blocks = [
        _causal_block(queries[:, :, :, start : start + _QUERY_BLOCK], keys, values, start)
        for start in range(0, q.shape[1], _QUERY_BLOCK)
    ]
    mixed = _from_heads(jnp.concatenate(blocks, axis=3)).astype(q.dtype)
    return checkpoint_name(mixed, MIXED)


def _causal_block(q: jax.Array, k: jax.Array, v: jax.Array, start: int) -> jax.Array:
    """Queries at positions start, start + 1, ...: [B, KV, G, Q, Hd] against [B, KV, P, Hd]."""
    num_queries = q.shape[3]
    stop = start + num_queries
    # Padding is on the right, so no valid query comes after it: causality alone hides it.
    visible = jnp.arange(stop)[None, :] <= jnp.arange(start, stop)[:, None]
    visible = jnp.tile(visible, (q.shape[2], 1))
    rows = q.reshape(*q.shape[:2], -1, q.shape[-1])
    scores = jnp.where(visible[None, None], _scores(rows, k[:, :, :stop]), _MASKED)
    weights, total = _softmax(scores)
    mixed = _mix(weights.astype(q.dtype), v[:, :, :stop]) / total[..., None]
    return mixed.reshape(q.shape)


def completion_attention(
    q: jax.Array,
    prompt_k: jax.Array,
    prompt_v: jax.Array,
    prompt_length: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    num_seen: jax.Array,
) -> jax.Array:
    """One softmax over [whole prompt | own past], for every completion of a group at once.

    Args:
        q: queries [B, K, Q, H, Hd].
        prompt_k: keys of the prompt, shared by its K completions [B, P, KV, Hd].
        prompt_v: values of the prompt [B, P, KV, Hd].
        prompt_length: valid prompt tokens [B], at least 1.
        own_k: keys of the completions [B, K, C, KV, Hd].
        own_v: values of the completions [B, K, C, KV, Hd].
        num_seen: tokens of its own completion that a query sees, 0 to C; broadcasts to [B, K, Q].
            A completion token at position t sees t + 1; the last prompt token, which predicts the
            first token of each completion, sees 0.

    Returns:
        [B, K, Q, H, Hd]; rows of padding are finite and mean nothing.
    """
    batch, num_completions, num_queries = q.shape[:3]
    num_heads, prompt_size, own_size = prompt_k.shape[2], prompt_k.shape[1], own_k.shape[2]
    # Heads before rows; all completions of a group are rows of one product with its prompt.
    rows = q.reshape(batch, num_completions, num_queries, num_heads, -1, q.shape[-1])
    rows = rows.transpose(0, 3, 1, 4, 2, 5)  # [B, KV, K, G, Q, Hd]
    shape = rows.shape[:-1]
    whole = rows.reshape(batch, num_heads, -1, q.shape[-1])
    split = rows.reshape(batch, num_heads, num_completions, -1, q.shape[-1])
    own_k, own_v = (jnp.moveaxis(x, 3, 1) for x in (own_k, own_v))  # [B, KV, K, C, Hd]

    in_prompt = jnp.arange(prompt_size)[None, :] < prompt_length[:, None]
    in_past = jnp.arange(own_size)[None, None, None, :] < num_seen[..., None]
    prompt_scores = _scores(whole, _by_head(prompt_k)).reshape(*shape, -1)
    own_scores = _scores(split, own_k).reshape(*shape, -1)
    scores = jnp.concatenate(
        [
            jnp.where(in_prompt[:, None, None, None, None, :], prompt_scores, _MASKED),
            jnp.where(in_past[:, None, :, None, :, :], own_scores, _MASKED),
        ],
        axis=-1,
    )
    weights, total = _softmax(scores)
    weights = weights.astype(q.dtype)
    of_prompt = weights[..., :prompt_size].reshape(*whole.shape[:-1], -1)
    of_past = weights[..., prompt_size:].reshape(*split.shape[:-1], -1)
    mixed = _mix(of_prompt, _by_head(prompt_v)).reshape(rows.shape)
    mixed += _mix(of_past, own_v).reshape(rows.shape)
    mixed = mixed / total[..., None]
    return mixed.transpose(0, 2, 4, 1, 3, 5).reshape(q.shape).astype(q.dtype)


def _softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the last axis as (numerator [..., N], denominator [...]).

    Dividing what was mixed instead of the weights saves passes over the scores, most of all in the
    backward pass, where the sum of the weights' gradients then comes from [..., Hd] alone.
    """
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    return weights, weights.sum(-1)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """[..., Q, Hd], [..., T, Hd] → [..., Q, T]."""
    scaled = q * q.shape[-1] ** -0.5
    return jnp.matmul(scaled, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)


def _mix(weights: jax.Array, values: jax.Array) -> jax.Array:
    """[..., Q, T], [..., T, Hd] → [..., Q, Hd]."""
    return jnp.matmul(weights, values, preferred_element_type=jnp.float32)


def _by_head(x: jax.Array, num_groups: int | None = None) -> jax.Array:
    """[B, T, H, Hd] → [B, H, T, Hd]; with groups → [B, KV, H / KV, T, Hd].

    Consecutive query heads share a key-value head.
    """
    x = x.swapaxes(1, 2)
    if num_groups is None:
        return x
    return x.reshape(len(x), num_groups, -1, *x.shape[2:])


def _from_heads(x: jax.Array) -> jax.Array:
    """[B, KV, G, T, Hd] → [B, T, KV G, Hd]."""
    return x.reshape(len(x), -1, *x.shape[3:]).swapaxes(1, 2)
