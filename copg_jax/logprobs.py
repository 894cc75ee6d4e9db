"""From hidden states to log-probabilities of completions, in float32.

1. `hidden_to_logp` applies the output matrix to the hidden states that predict completion tokens,
   and only to them: never at prompt positions;
2. `sum_logp` sums over the tokens of each completion.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def hidden_to_logp(
    hidden: Array, output_matrix: Array, tokens: Array, *, chunk: int | None = None
) -> Array:
    """ln softmax(hidden @ output_matrix)[token], accumulated and normalised in float32.

    Args:
        hidden: hidden states that predict `tokens`, compute dtype; [..., T, D].
        output_matrix: output embedding, cast to the dtype of `hidden`; [D, V].
        tokens: token ids in [0, V); out-of-range ids give NaN; [..., T].
        chunk: number of positions of T whose logits exist at a time (recomputed in the backward
            pass); it bounds memory to ...·chunk·V floats. None computes all at once. Chunking along
            T leaves the sharded first axis whole.

    Returns:
        Log-probabilities, nats, float32; [..., T].
    """
    chex.assert_rank(output_matrix, 2)
    chex.assert_shape(tokens, hidden.shape[:-1])
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 or None, got {chunk}")
    matrix = output_matrix.astype(hidden.dtype)
    *leading, length = tokens.shape
    if chunk is None or chunk >= length:
        return _hidden_to_logp(hidden, matrix, tokens)
    num_chunks = -(-length // chunk)
    padding = [(0, 0)] * len(leading) + [(0, num_chunks * chunk - length)]
    hidden = jnp.pad(hidden, [*padding, (0, 0)])
    tokens = jnp.pad(tokens, padding)
    axis = len(leading)

    def split(x: Array) -> Array:
        pieces = x.reshape(*leading, num_chunks, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(pieces, axis, 0)

    def logp(piece: tuple[Array, Array]) -> Array:
        return jax.checkpoint(_hidden_to_logp)(piece[0], matrix, piece[1])

    pieces = jax.lax.map(logp, (split(hidden), split(tokens)))
    joined = jnp.moveaxis(pieces, 0, axis)
    return joined.reshape(*leading, num_chunks * chunk)[..., :length]


@jax.custom_vjp
def _hidden_to_logp(hidden: Array, matrix: Array, tokens: Array) -> Array:
    """`hidden_to_logp` of all positions at once."""
    return _hidden_to_logp_forward(hidden, matrix, tokens)[0]


def _hidden_to_logp_forward(hidden: Array, matrix: Array, tokens: Array):
    logits = jnp.einsum("...d,dv->...v", hidden, matrix, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    # An index below 0 would count from the end; the other side gives NaN by itself.
    chosen = jnp.where(tokens < 0, jnp.nan, chosen)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    return chosen - log_total, (hidden, matrix, tokens, logits, log_total)


def _hidden_to_logp_backward(stored: tuple[Array, ...], dlogp: Array):
    """dlogits = dlogp (onehot(token) − softmax), from the logits and nothing else of their size.

    (Left to automatic differentiation, a step of the benchmark takes 13 % longer on a CPU.)
    """
    hidden, matrix, tokens, logits, log_total = stored
    onehot = jax.lax.broadcasted_iota(tokens.dtype, logits.shape, tokens.ndim) == tokens[..., None]
    dlogits = dlogp[..., None] * (onehot - jnp.exp(logits - log_total[..., None]))
    dlogits = dlogits.astype(hidden.dtype)
    dhidden = jnp.einsum("...v,dv->...d", dlogits, matrix)
    return dhidden, jnp.einsum("...d,...v->dv", hidden, dlogits), None


_hidden_to_logp.defvjp(_hidden_to_logp_forward, _hidden_to_logp_backward)


def length_mask(length: Array, size: int) -> Array:
    """True at positions before `length`.

    Args:
        length: number of valid positions; [...].
        size: size of the new last axis.

    Returns:
        Boolean [..., size].
    """
    return (
        jax.lax.broadcasted_iota(jnp.int32, (*length.shape, size), length.ndim) < length[..., None]
    )


def sum_logp(token_logp: Array, length: Array) -> Array:
    """ln π(y|x): the sum of the log-probabilities of the first `length` tokens.

    Args:
        token_logp: nats; [..., C].
        length: number of tokens, EOS included; [...].

    Returns:
        Nats, float32; [...]. An absent completion (length 0) has 0.
    """
    chex.assert_shape(length, token_logp.shape[:-1])
    return jnp.where(length_mask(length, token_logp.shape[-1]), token_logp, 0.0).sum(-1)
