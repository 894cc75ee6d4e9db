"""Decoding with the two-part cache is the training computation, one token at a time."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.models import decoding
from copg_jax.models.decoder import Decoder
from copg_jax.models.params import init_params
from tests.models import tiny


def _prefill(arch, params, group, num_samples, layout=None):
    prefill = functools.partial(decoding.prefill, num_samples=num_samples, max_new_tokens=6)
    arguments = params, group.prompt_tokens, group.prompt_length, layout
    return jax.jit(prefill, static_argnums=0)(Decoder(arch), *arguments)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize(
    ("num_bins", "spare", "buckets"),
    [
        (None, None, None),  # no layout
        *((bins, spare, buckets) for bins, spare in ((1, 0), (1, 3), (3, 2)) for buckets in (0, 1)),
    ],
)
def test_prefill_and_decode_steps_give_the_states_of_training(
    arch, params, make_group, num_samples, num_bins, spare, buckets
):
    group = make_group([8, 1, 5], [[6] * num_samples] * 3)
    hidden = tiny.predictive(arch, params, group)
    layout = None
    if num_bins is not None:
        shape = tiny.shape_of(group, num_bins, (spare, 0), buckets=buckets)
        layout = shape.prompt_layout(group.prompt_length)
        most = group.prompt_length.reshape(num_bins, -1).sum(1).max()
        assert layout.token_slots.shape == (num_bins, most + spare)
    cache, last_prompt = _prefill(arch, params, group, num_samples, layout)
    np.testing.assert_allclose(last_prompt, hidden[:, 0, 0], atol=1e-5)
    step = jax.jit(functools.partial(decoding.decode_step, Decoder(arch)))
    for index in range(5):
        state, cache = step(params, cache, group.completion_tokens[:, :, index], jnp.int32(index))
        np.testing.assert_allclose(state, hidden[:, :, index + 1], atol=1e-5)


def test_a_step_writes_its_own_column_only(arch, params, make_group):
    group = make_group([4, 2], [[6, 6]] * 2)
    cache, _ = _prefill(arch, params, group, 2)
    _, after = jax.jit(decoding.decode_step, static_argnums=0)(
        Decoder(arch), params, cache, group.completion_tokens[:, :, 0], 2
    )
    for (old,), (new,) in zip((cache.layers, cache.last_layer), after[1:], strict=True):
        for name, axis in (("own_k", -1), ("own_v", -2)):
            changed = np.asarray(getattr(new, name) != getattr(old, name))
            column = changed.take(2, axis)
            assert column.all() and changed.sum() == column.size
        np.testing.assert_array_equal(new.prompt_k, old.prompt_k)
        np.testing.assert_array_equal(new.prompt_v, old.prompt_v)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_step_transposes_no_prompt(arch, params, make_group, num_samples):
    group = make_group([50] * 3, [[6] * num_samples] * 3, p=50)
    cache, _ = _prefill(arch, params, group, num_samples)
    step = jax.jit(decoding.decode_step, static_argnums=0, donate_argnums=2)
    program = step.lower(
        Decoder(arch), params, cache, group.completion_tokens[:, :, 0], 2
    ).compile()
    layer = cache.last_layer[0].prompt_k.size
    for line in program.as_text().splitlines():
        name, _, result = line.partition(" = ")
        sizes = re.match(r"f32\[([\d,]+)\]", result)
        if sizes and re.search("transpose|copy", name):
            assert math.prod(map(int, sizes[1].split(","))) < layer, line


def test_a_loop_of_steps_works_in_the_donated_cache(arch, params, make_group):
    arch = tiny.deeper(arch, 8)
    params = init_params(arch, jax.random.key(0))
    decoder = Decoder(arch)
    group = make_group([64] * 4, [[6, 6]] * 4, p=64)
    cache, _ = _prefill(arch, params, group, 2)

    def generate(cache):
        def body(state):
            index, cache = state
            tokens = jnp.ones((4, 2), jnp.int32)
            return index + 1, decoding.decode_step(decoder, params, cache, tokens, index)[1]

        return jax.lax.while_loop(lambda state: state[0] < 6, body, (jnp.int32(0), cache))[1]

    compiled = jax.jit(generate, donate_argnums=0).lower(cache).compile()
    memory = compiled.memory_analysis()
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == num_bytes
    # Temporaries hold a layer or two of the cache, not a second cache.
    assert memory.temp_size_in_bytes < 0.6 * num_bytes
