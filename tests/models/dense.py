"""Attention by its definition: every score, float32, nothing shared and nothing left out."""

import jax
import jax.numpy as jnp
import numpy as np


def prompt_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Each token of a row sees the row up to itself; [B, P, H, Hd] and float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k, precision="highest") / q.shape[-1] ** 0.5
    future = np.triu(np.ones(scores.shape[2:], bool), 1)[None, None]
    weights = jax.nn.softmax(jnp.where(future, -jnp.inf, scores), axis=-1)
    return jnp.einsum("bhqk,bkhe->bqhe", weights, v, precision="highest")


def random_prompts(
    size: int, heads: tuple[int, int], head_dim: int, dtype: str, length: list[int]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q, k, v and lengths."""
    keys = jax.random.split(jax.random.key(size), 3)
    shapes = [(len(length), size, number, head_dim) for number in (heads[0], heads[1], heads[1])]
    drawn = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return *(x.astype(dtype) for x in drawn), jnp.array(length, jnp.int32)


def loss_and_grads(attend, q, k, v, length, cotangent):
    """Result of the valid rows, and gradients of their product with a cotangent."""
    valid = (np.arange(q.shape[1]) < np.asarray(length)[:, None])[..., None, None]

    def product(q, k, v):
        mixed = jnp.where(valid, attend(q, k, v).astype(jnp.float32), 0)
        return jnp.sum(mixed * cotangent), mixed

    run = jax.jit(jax.value_and_grad(product, argnums=(0, 1, 2), has_aux=True))
    (_, mixed), grads = run(q, k, v)
    return mixed, *grads


def error(actual: jax.Array, desired: jax.Array) -> float:
    """Relative to the norm; NaN if anything is."""
    actual, desired = (np.asarray(x, np.float64) for x in (actual, desired))
    return float(np.linalg.norm(actual - desired) / np.linalg.norm(desired))
