"""Tiny random groups shared by the tests of the model."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.models import functional
from copg_jax.models.llama import LlamaConfig, Params
from tests.models import tiny


class Group(NamedTuple):
    """Arguments of `functional.apply` plus the completions' lengths."""

    prompt_tokens: jax.Array
    prompt_length: jax.Array
    completion_tokens: jax.Array
    completion_length: jax.Array


@pytest.fixture(scope="session")
def config() -> LlamaConfig:
    """Grouped-query attention, untied."""
    return LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )


@pytest.fixture(scope="session")
def params(config: LlamaConfig) -> Params:
    """Weights large enough for attention to matter, embeddings of size 1 for good conditioning."""
    drawn = functional.init(config, jax.random.key(1))
    layers = {name: leaf if leaf.ndim == 2 else 10 * leaf for name, leaf in drawn["layers"].items()}
    return {**drawn, "embed_tokens": 50 * drawn["embed_tokens"], "layers": layers}


@pytest.fixture
def make_group(rng: np.random.Generator) -> Callable[..., Group]:
    """Random ids everywhere, padding included, so that padding is garbage by itself."""

    def make(prompt_length: list[int], completion_length: list[list[int]], p=8, c=6) -> Group:
        b, k = np.shape(completion_length)
        return Group(
            jnp.asarray(rng.integers(0, tiny.VOCAB, (b, p))),
            jnp.asarray(prompt_length),
            jnp.asarray(rng.integers(0, tiny.VOCAB, (b, k, c))),
            jnp.asarray(completion_length),
        )

    return make
