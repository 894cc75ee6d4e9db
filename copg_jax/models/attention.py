"""Who sees whom: the one definition of attention inside a group.

1. `prompt_attention`: a prompt token sees its prompt up to itself.
2. `completion_attention`: a completion token sees its whole prompt and its own completion up to
   itself, never another completion; one softmax over both parts.

Both keep query heads as [KV, H / KV], so grouped key-value heads are never repeated in memory, and
take scores and softmax in float32.
"""

import jax
import jax.numpy as jnp

# Finite, so that a row without any visible key would still give a number and not NaN.
_MASKED = float(jnp.finfo(jnp.float32).min)


def prompt_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, prompt_length: jax.Array
) -> jax.Array:
    """Causal attention within right-padded prompts: softmax(q k / sqrt(Hd)) v.

    Args:
        q: queries [B, P, H, Hd].
        k: keys [B, P, KV, Hd].
        v: values [B, P, KV, Hd].
        prompt_length: valid tokens [B], at least 1.

    Returns:
        [B, P, H, Hd]; rows of padding are finite and mean nothing.
    """
    size = q.shape[1]
    position = jnp.arange(size)
    causal = position[None, None, :] <= position[None, :, None]
    visible = causal & (position[None, None, :] < prompt_length[:, None, None])
    scores = _scores("bqkge,bpke->bkgqp", _group_heads(q, k.shape[2]), k)
    scores = jnp.where(visible[:, None, None, :, :], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return _mix("bkgqp,bpke->bqkge", weights, v).astype(q.dtype).reshape(q.shape)


def completion_attention(
    q: jax.Array,
    prompt_k: jax.Array,
    prompt_v: jax.Array,
    prompt_length: jax.Array,
    own_k: jax.Array,
    own_v: jax.Array,
    first_position: jax.Array | int,
) -> jax.Array:
    """One softmax over [whole prompt | own past], for every completion of a group at once.

    Args:
        q: queries [B, K, Q, H, Hd].
        prompt_k: keys of the prompt, shared by its K completions [B, P, KV, Hd].
        prompt_v: values of the prompt [B, P, KV, Hd].
        prompt_length: valid prompt tokens [B], at least 1.
        own_k: keys of the completions [B, K, C, KV, Hd].
        own_v: values of the completions [B, K, C, KV, Hd].
        first_position: index of the first query in its own completion, 0 to C - Q.

    Returns:
        [B, K, Q, H, Hd]; rows of padding are finite and mean nothing.
    """
    prompt_size, own_size = prompt_k.shape[1], own_k.shape[2]
    grouped = _group_heads(q, prompt_k.shape[2])
    prompt_scores = _scores("bnqkge,bpke->bknqgp", grouped, prompt_k)
    own_scores = _scores("bnqkge,bncke->bknqgc", grouped, own_k)

    in_prompt = jnp.arange(prompt_size)[None, :] < prompt_length[:, None]
    query = first_position + jnp.arange(q.shape[2])
    own_past = jnp.arange(own_size)[None, :] <= query[:, None]
    scores = jnp.concatenate(
        [
            jnp.where(in_prompt[:, None, None, None, None, :], prompt_scores, _MASKED),
            jnp.where(own_past[None, None, None, :, None, :], own_scores, _MASKED),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mixed = _mix("bknqgp,bpke->bnqkge", weights[..., :prompt_size], prompt_v)
    mixed += _mix("bknqgc,bncke->bnqkge", weights[..., prompt_size:], own_v)
    return mixed.astype(q.dtype).reshape(q.shape)


def _group_heads(q: jax.Array, num_key_value_heads: int) -> jax.Array:
    """[..., H, Hd] -> [..., KV, H / KV, Hd]: consecutive query heads share a key-value head."""
    return q.reshape(*q.shape[:-2], num_key_value_heads, -1, q.shape[-1])


def _scores(equation: str, q: jax.Array, k: jax.Array) -> jax.Array:
    products = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
    return products * q.shape[-1] ** -0.5


def _mix(equation: str, weights: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum(equation, weights, values, preferred_element_type=jnp.float32)
