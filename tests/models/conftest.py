"""Tiny random groups shared by the tests of the model."""

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
import pytest

from copg_jax.data.groups import GroupBatch
from copg_jax.models.params import Architecture, Params, init_params
from tests.models import tiny

LLAMA = Architecture(
    vocab_size=tiny.VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
# It has all that one family has and another has not, and so stands for all of them; what each is
# alone is in the golden tests.
PARTICULAR = {"qkv_bias": True, "qk_norm": True, "rotary_layers": (False, True)}


@pytest.fixture(scope="session")
def arch() -> Architecture:
    """Grouped-query attention, untied."""
    return replace(LLAMA, **PARTICULAR)


@pytest.fixture(scope="session")
def params(arch: Architecture) -> Params:
    """Weights large enough for attention to matter, embeddings of size 1 for good conditioning."""
    drawn = init_params(arch, jax.random.key(1))
    noise = np.random.default_rng(1)

    def in_layers(name: str, leaf: jax.Array) -> jax.Array:
        if name in ("q_norm", "k_norm") or name.endswith("bias"):
            return leaf + 0.3 * noise.standard_normal(leaf.shape, np.float32)
        return leaf if leaf.ndim == 2 else 10 * leaf

    stacks = {
        stack: {name: in_layers(name, leaf) for name, leaf in drawn[stack].items()}
        for stack in ("layers", "last_layer")
    }
    return {**drawn, "embed_tokens": 50 * drawn["embed_tokens"], **stacks}


@pytest.fixture
def make_group(rng: np.random.Generator) -> Callable[..., GroupBatch]:
    """Random ids everywhere, padding included, so that padding is garbage by itself; no layout."""

    def make(
        prompt_length: list[int], completion_length: list[list[int]], p: int = 8, c: int = 6
    ) -> GroupBatch:
        b, k = np.shape(completion_length)
        return GroupBatch(
            prompt_tokens=rng.integers(0, tiny.VOCAB, (b, p)),
            prompt_length=np.array(prompt_length),
            completion_tokens=rng.integers(0, tiny.VOCAB, (b, k, c)),
            completion_length=np.array(completion_length),
            reward=np.zeros((b, k), np.float32),
            ref_logp=np.zeros((b, k), np.float32),
        )

    return make
