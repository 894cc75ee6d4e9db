"""Beyond a bandit: an autoregressive policy so small that all its sequences are enumerated.

1. `enumerate_completions` lists every completion of a vocabulary up to a length, with the prefix
   behind each token;
2. `prefix_features` gives each prefix a hidden state: one-hot (any distribution over completions
   can be represented) or shared (position and last token only, so that completions generalise to
   each other, as in a language model);
3. `completion_logp` turns an output matrix into ln π of every completion through `logprobs.py`, the
   code that trains Llama; the result is the `log_policy` of a `Bandit` whose arms are completions.
"""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from copg_jax import logprobs
from copg_jax.errors import InputError

EOS = 0


class Completions(NamedTuple):
    """All completions, right-padded with EOS. They end in EOS (token 0), or at full length without
    it."""

    tokens: np.ndarray  # int32 [N, C]
    length: np.ndarray  # EOS included; int32 [N]
    prefix: np.ndarray  # number of the prefix before each token, 0 = empty; int32 [N, C]
    prefixes: tuple[tuple[int, ...], ...]  # the prefixes in that order


def enumerate_completions(vocab_size: int, max_length: int) -> Completions:
    """Lists all completions; their probabilities sum to 1 under any autoregressive policy.

    Args:
        vocab_size: V, EOS included; at least 2.
        max_length: C ≥ 1; completions of this length need not end in EOS.

    Returns:
        N = Σ_{c<C} (V−1)^c + (V−1)^C completions.

    Raises:
        InputError: fewer than 2 tokens or a length below 1.
    """
    if vocab_size < 2 or max_length < 1:
        raise InputError(
            "wanted vocab_size ≥ 2 (EOS and another token) and max_length ≥ 1,"
            f" got {vocab_size} and {max_length}."
        )
    words = range(1, vocab_size)
    prefixes = [p for c in range(max_length) for p in itertools.product(words, repeat=c)]
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    ended = [(*prefix, EOS) for prefix in prefixes]
    full = list(itertools.product(words, repeat=max_length))
    completions = ended + full
    tokens = np.array([c + (EOS,) * (max_length - len(c)) for c in completions], np.int32)
    length = np.array([len(c) for c in completions], np.int32)
    prefix = np.array(
        [[number.get(c[:i], 0) for i in range(max_length)] for c in completions], np.int32
    )
    return Completions(tokens, length, prefix, tuple(prefixes))


def prefix_features(completions: Completions, vocab_size: int, *, shared: bool) -> np.ndarray:
    """Hidden state of every prefix of one prompt.

    Args:
        completions: from `enumerate_completions`.
        vocab_size: V.
        shared: False gives one-hot vectors, a table of all conditionals. True gives [position, last
            token] indicators: fewer parameters than completions, so that what is learnt on one
            changes the others.

    Returns:
        float32 [number of prefixes, D].
    """
    if not shared:
        return np.eye(len(completions.prefixes), dtype=np.float32)
    max_length = completions.tokens.shape[1]
    features = np.zeros((len(completions.prefixes), max_length + vocab_size), np.float32)
    for i, prefix in enumerate(completions.prefixes):
        features[i, len(prefix)] = 1.0
        features[i, max_length + (prefix[-1] if prefix else EOS)] = 1.0
    return features


def completion_logp(output_matrix: Array, features: Array, completions: Completions) -> Array:
    """ln π(y|x) of every completion of every prompt, by the functions that compute it for Llama.

    Args:
        output_matrix: the parameters of the policy; [D, V].
        features: hidden state of each prefix of each prompt; [B, number of prefixes, D].
        completions: from `enumerate_completions`.

    Returns:
        Nats; [B, N], normalised over N.
    """
    tokens = jnp.asarray(completions.tokens)
    num_prompts, (num_completions, size) = features.shape[0], tokens.shape
    hidden = jnp.take(features, completions.prefix, axis=1)  # each token's is that of its prefix
    batched = jnp.broadcast_to(tokens, (num_prompts, num_completions, size))
    logp = logprobs.hidden_to_logp(hidden, output_matrix, batched)
    length = jnp.broadcast_to(jnp.asarray(completions.length), batched.shape[:2])
    return logprobs.sum_logp(logp, length)
