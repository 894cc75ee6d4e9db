"""The reward model: one number per completion, read at its last token (the EOS).

1. `final_hidden` runs the groups as for the policy, up to the states that are read.
2. The state of each completion's last token meets the `score` vector, in float32.
"""

import jax
import jax.numpy as jnp

from copg_jax.data.groups import GroupBatch
from copg_jax.models.group_forward import final_hidden
from copg_jax.models.llama import LlamaConfig, Params


def reward(config: LlamaConfig, params: Params, batch: GroupBatch) -> jax.Array:
    """Scalar reward of each completion, score . hidden[completion_length - 1]; higher is better.

    Args:
        config: static.
        params: tree of `init(..., head="score")`.
        batch: B groups; tokens, lengths and slots are read.

    Returns:
        float32 [B, K]; 0 for absent slots.
    """
    state = final_hidden(config, params, batch).astype(jnp.float32)
    value = jnp.einsum("bkd,d->bk", state, params["score"].astype(jnp.float32))
    return jnp.where(batch.completion_length > 0, value, 0.0)
