"""Decoding with the two-part cache is the training computation, one token at a time."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.models import decoding
from copg_jax.models.layout import prompt_slots
from copg_jax.models.params import init_params
from tests.models import tiny
from tests.toys import in_buckets


def _prefill(config, params, group, num_samples, room=None, num_blocks=1):
    prefill = functools.partial(decoding.prefill, num_samples=num_samples, max_new_tokens=6)
    tokens, length = group[:2]
    sizes = [x.shape[1] for x in tokens for _ in range(len(x) // num_blocks)]
    slots = prompt_slots(length, sizes, num_blocks, room)
    return jax.jit(prefill, static_argnums=0)(config, params, tokens, length, slots)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize(("room", "num_blocks"), [(None, 1), (14, 1), (17, 1), (8, 3)])
def test_prefill_and_decode_steps_give_the_states_of_training(
    config, params, make_group, num_samples, room, num_blocks, buckets
):
    group = make_group([8, 1, 5], [[6] * num_samples] * 3)
    hidden = tiny.predictive(config, params, group)
    if buckets:
        group = in_buckets(group, num_blocks)
    cache, last_prompt = _prefill(config, params, group, num_samples, room, num_blocks)
    np.testing.assert_allclose(last_prompt, hidden[:, 0, 0], atol=1e-5)
    step = jax.jit(functools.partial(decoding.decode_step, config))
    for index in range(5):
        state, cache = step(params, cache, group.completion_tokens[:, :, index], jnp.int32(index))
        np.testing.assert_allclose(state, hidden[:, :, index + 1], atol=1e-5)


def test_a_step_writes_its_own_column_only(config, params, make_group):
    group = make_group([4, 2], [[6, 6]] * 2)
    cache, _ = _prefill(config, params, group, 2)
    _, after = jax.jit(decoding.decode_step, static_argnums=0)(
        config, params, cache, group.completion_tokens[:, :, 0], 2
    )
    for (old,), (new,) in zip((cache.layers, cache.last_layer), after[1:], strict=True):
        for name, axis in (("own_k", -1), ("own_v", -2)):
            changed = np.asarray(getattr(new, name) != getattr(old, name))
            column = changed.take(2, axis)
            assert column.all() and changed.sum() == column.size
        np.testing.assert_array_equal(new.prompt_k, old.prompt_k)
        np.testing.assert_array_equal(new.prompt_v, old.prompt_v)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_step_transposes_no_prompt(config, params, make_group, num_samples):
    group = make_group([50] * 3, [[6] * num_samples] * 3, p=50)
    cache, _ = _prefill(config, params, group, num_samples)
    step = jax.jit(decoding.decode_step, static_argnums=0, donate_argnums=2)
    program = step.lower(config, params, cache, group.completion_tokens[:, :, 0], 2).compile()
    layer = cache.last_layer[0].prompt_k.size
    for line in program.as_text().splitlines():
        name, _, result = line.partition(" = ")
        sizes = re.match(r"f32\[([\d,]+)\]", result)
        if sizes and re.search("transpose|copy", name):
            assert math.prod(map(int, sizes[1].split(","))) < layer, line


def test_a_loop_of_steps_works_in_the_donated_cache(config, params, make_group):
    config = dataclasses.replace(config, num_hidden_layers=8)
    params = init_params(config, jax.random.key(0))
    group = make_group([64] * 4, [[6, 6]] * 4, p=64)
    cache, _ = _prefill(config, params, group, 2)

    def generate(cache):
        def body(state):
            index, cache = state
            tokens = jnp.ones((4, 2), jnp.int32)
            return index + 1, decoding.decode_step(config, params, cache, tokens, index)[1]

        return jax.lax.while_loop(lambda state: state[0] < 6, body, (jnp.int32(0), cache))[1]

    compiled = jax.jit(generate, donate_argnums=0).lower(cache).compile()
    memory = compiled.memory_analysis()
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == num_bytes
    # Temporaries hold a layer or two of the cache, not a second cache.
    assert memory.temp_size_in_bytes < 0.6 * num_bytes
