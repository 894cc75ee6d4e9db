"""Decoding with the two-part cache is the training computation, one token at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.models import functional


def _prefill(config, params, group, num_samples):
    prefill = functools.partial(functional.prefill, num_samples=num_samples, max_new_tokens=6)
    return jax.jit(prefill, static_argnums=0)(config, params, *group[:2])


@pytest.mark.parametrize("num_samples", [1, 3])
def test_prefill_and_decode_steps_equal_apply(config, params, make_group, num_samples):
    group = make_group([8, 1, 5], [[6] * num_samples] * 3)
    hidden = jax.jit(functional.apply, static_argnums=0)(config, params, *group[:3])
    cache, last_prompt = _prefill(config, params, group, num_samples)
    np.testing.assert_allclose(last_prompt, hidden.last_prompt, atol=1e-5)
    step = jax.jit(functools.partial(functional.decode_step, config))
    for index in range(6):
        state, cache = step(params, cache, group.completion_tokens[:, :, index], jnp.int32(index))
        np.testing.assert_allclose(state, hidden.completion[:, :, index], atol=1e-5)


def test_a_step_writes_its_own_column_only(config, params, make_group):
    group = make_group([4, 2], [[6, 6]] * 2)
    cache, _ = _prefill(config, params, group, 2)
    _, after = jax.jit(functional.decode_step, static_argnums=0)(
        config, params, cache, group.completion_tokens[:, :, 0], 2
    )
    for name in ("own_k", "own_v"):
        changed = np.asarray(getattr(after, name) != getattr(cache, name))
        assert changed[..., 2].all() and changed.sum() == changed[..., 2].size
    np.testing.assert_array_equal(after.prompt_k, cache.prompt_k)


def test_a_loop_of_steps_works_in_the_donated_cache(config, params, make_group):
    config = dataclasses.replace(config, num_hidden_layers=8)
    params = functional.init(config, jax.random.key(0))
    group = make_group([64] * 4, [[6, 6]] * 4, p=64)
    cache, _ = _prefill(config, params, group, 2)

    def generate(cache):
        def body(state):
            index, cache = state
            tokens = jnp.ones((4, 2), jnp.int32)
            return index + 1, functional.decode_step(config, params, cache, tokens, index)[1]

        return jax.lax.while_loop(lambda state: state[0] < 6, body, (jnp.int32(0), cache))[1]

    compiled = jax.jit(generate, donate_argnums=0).lower(cache).compile()
    memory = compiled.memory_analysis()
    num_bytes = sum(leaf.nbytes for leaf in cache)
    assert memory.alias_size_in_bytes == num_bytes
    # Temporaries hold a layer or two of the cache, not a second cache.
    assert memory.temp_size_in_bytes < 0.6 * num_bytes
