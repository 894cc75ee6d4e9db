"""ln π(y|x) of groups under a language model: the forward pass of the model and `logprobs`, put
together once.

Training, scoring and evaluation all take their log-probabilities from here.
"""

from typing import Any

from jax import Array

from copg_jax import logprobs
from copg_jax.data.groups import GroupBatch
from copg_jax.models import functional
from copg_jax.models.group_forward import predictive_hidden
from copg_jax.models.llama import LlamaConfig
from copg_jax.models.packing import Packing


def token_logp(
    config: LlamaConfig, params: Any, batch: GroupBatch, *, chunk: int | None = None
) -> Array:
    """Log-probability of every completion token given its prompt and its past.

    Args:
        config: architecture.
        params: parameter tree with a language-model head.
        batch: groups; tokens, lengths and slots are read.
        chunk: see `logprobs.token_logp`.

    Returns:
        Nats, float32; [B, K, C]. Positions that `completion_slots` leaves
        out are 0; others past a completion's end hold numbers without meaning.
    """
    num_blocks, shape = len(batch.completion_slots), batch.completion_tokens.shape
    packing = Packing.of(batch.completion_slots, batch.completion_tokens.size // num_blocks)
    hidden = predictive_hidden(config, params, batch)
    tokens = packing.pack(batch.completion_tokens.reshape(num_blocks, -1))
    matrix = functional.output_matrix(config, params)
    logp = logprobs.token_logp(hidden, matrix, tokens, chunk=chunk)
    return packing.unpack(logp).reshape(shape)


def seq_logp(
    config: LlamaConfig, params: Any, batch: GroupBatch, *, chunk: int | None = None
) -> Array:
    """ln π(y|x), summed over tokens, of every completion; arguments of `token_logp`.

    Returns:
        Nats, float32; [B, K]. Absent completions have 0.
    """
    return logprobs.seq_logp(
        token_logp(config, params, batch, chunk=chunk), batch.completion_length
    )
