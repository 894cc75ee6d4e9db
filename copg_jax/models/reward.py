"""The reward model: one number per completion, read at its last token (the EOS).

1. `functional.apply` runs the groups as for the policy.
2. The hidden state at position completion_length - 1 meets the `score` vector, in float32.
"""

import jax
import jax.numpy as jnp

from copg_jax.models.functional import apply
from copg_jax.models.llama import LlamaConfig, Params


def reward(
    config: LlamaConfig,
    params: Params,
    prompt_tokens: jax.Array,
    prompt_length: jax.Array,
    completion_tokens: jax.Array,
    completion_length: jax.Array,
) -> jax.Array:
    """Scalar reward of each completion, score . hidden[completion_length - 1]; higher is better.

    Args:
        config: static.
        params: tree of `init(..., head="score")`.
        prompt_tokens: ids [B, P], right-padded with any valid id.
        prompt_length: valid tokens [B], at least 1.
        completion_tokens: ids [B, K, C], right-padded with any valid id.
        completion_length: valid tokens [B, K], EOS included; 0 = absent slot.

    Returns:
        float32 [B, K]; 0 for absent slots.
    """
    hidden = apply(config, params, prompt_tokens, prompt_length, completion_tokens).completion
    last = jnp.maximum(completion_length - 1, 0)[:, :, None, None]
    state = jnp.take_along_axis(hidden, last, axis=2)[:, :, 0].astype(jnp.float32)
    value = jnp.einsum("bkd,d->bk", state, params["score"].astype(jnp.float32))
    return jnp.where(completion_length > 0, value, 0.0)
