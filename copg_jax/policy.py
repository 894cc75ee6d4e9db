"""ln π(y|x) of groups under a language model: the forward pass of the model and `logprobs`, put
together once.

Training, scoring and evaluation all take their log-probabilities from here.
"""

from typing import Any

from jax import Array

from copg_jax import logprobs
from copg_jax.data.groups import GroupBatch
from copg_jax.models import functional
from copg_jax.models.llama import LlamaConfig


def token_logp(
    config: LlamaConfig, params: Any, batch: GroupBatch, *, chunk: int | None = None
) -> Array:
    """Log-probability of every completion token given its prompt and its past.

    Args:
        config: architecture.
        params: parameter tree with a language-model head.
        batch: groups; only the tokens and lengths are read.
        chunk: see `logprobs.token_logp`.

    Returns:
        Nats, float32; [B, K, C]. Positions past a completion's end hold numbers without meaning.
    """
    hidden = functional.apply(
        config, params, batch.prompt_tokens, batch.prompt_length, batch.completion_tokens
    )
    predictive = logprobs.predictive_hidden(hidden.last_prompt, hidden.completion)
    matrix = functional.output_matrix(params)
    return logprobs.token_logp(predictive, matrix, batch.completion_tokens, chunk=chunk)


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
