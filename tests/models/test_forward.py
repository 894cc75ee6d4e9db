"""A group is computed as its sequences would be, one by one, packed or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.data.groups import with_slots
from copg_jax.models.forward import predictive_hidden
from copg_jax.models.layout import Capacity
from copg_jax.models.params import REMAT_POLICIES, abstract_params, init_params
from tests.models import tiny
from tests.toys import in_buckets

SHAPES = [
    ([8, 1, 3], [[6], [1], [4]]),
    ([5, 8], [[6, 1], [2, 6]]),
    ([1, 4], [[1, 3, 6], [2, 0, 5]]),
    ([2, 7, 8, 1], [[3, 0], [6, 6], [1, 2], [0, 0]]),
]
PACKINGS = {
    "every slot": (1, None),
    "no room to spare": (1, Capacity(0, 0)),
    "filling": (1, Capacity(5, 3)),
    "a block per group": (None, Capacity(2, 1)),
    "buckets": (1, Capacity(5, 3)),
    "buckets in blocks": (2, Capacity(5, 3)),
}


def _packed(group, packing):
    """The group under a packing; a capacity is what the fullest block needs, and so much more."""
    num_blocks, extra = PACKINGS[packing]
    num_blocks = num_blocks or len(group.prompt_length)
    if len(group.prompt_length) % num_blocks:
        num_blocks = len(group.prompt_length)
    if layout.startswith("buckets"):
        group = in_buckets(group, num_blocks)
    if extra is None:
        return with_slots(group, num_blocks=num_blocks)
    completion = group.completion_length.reshape(num_blocks, -1).sum(1)
    tokens = group.prompt_length.reshape(num_blocks, -1).sum(1) + completion
    room = Capacity(int(tokens.max()) + extra.tokens, int(completion.max()) + extra[1])
    return with_slots(group, num_blocks=num_blocks, capacity=room)


def _valid(group):
    size = group.completion_tokens.shape[2]
    return np.arange(size)[None, None, :] < group.completion_length[:, :, None]


def _group_sum(config, params, group, weights):
    """Weighted sum of all states that predict a token, as any loss on them would take it."""
    hidden = tiny.predictive(config, params, group)
    return jnp.sum(jnp.where(_valid(group)[..., None], hidden * weights, 0.0), dtype=jnp.float32)


def _grad(config, params, group, weights):
    return jax.jit(jax.grad(_group_sum, argnums=1), static_argnums=0)(
        config, params, group, weights
    )


def _plain(config, params, group):
    """The predicting states [B, K, C, D] of the same group, sequence by sequence."""
    hidden = tiny.plain_hidden(config, params, tiny.sequences(group))
    shape = group.completion_tokens.shape
    hidden = hidden.reshape(*shape[:2], *hidden.shape[1:])
    index = group.prompt_length[:, None, None] - 1 + np.arange(shape[2])[None, None, :]
    return jnp.take_along_axis(hidden, np.broadcast_to(index, shape)[..., None], axis=2)


def _weights(config, group):
    shape = (*group.completion_tokens.shape, config.hidden_size)
    return jax.random.normal(jax.random.key(3), shape)


def _assert_trees_close(actual, desired, atol):
    for (path, a), d in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(desired), strict=True
    ):
        np.testing.assert_allclose(a, d, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("prompt", "completion"), SHAPES)
def test_predicting_states_equal_the_plain_computation(
    config, params, make_group, prompt, completion, packing
):
    group = _packed(make_group(prompt, completion), packing)
    hidden = np.asarray(tiny.predictive(config, params, group))
    assert np.isfinite(hidden).all()
    valid = _valid(group)
    np.testing.assert_allclose(hidden[valid], _plain(config, params, group)[valid], atol=1e-5)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("prompt", "completion"), SHAPES[1:])
def test_gradients_equal_the_plain_computation(
    config, params, make_group, prompt, completion, packing
):
    group = _packed(make_group(prompt, completion), packing)
    weights = _weights(config, group)
    grads = _grad(config, params, group, weights)

    def plain_sum(params):
        hidden = _plain(config, params, group)
        return jnp.sum(jnp.where(_valid(group)[..., None], hidden * weights, 0.0))

    plain = jax.grad(plain_sum)(params)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain))
    _assert_trees_close(grads, plain, atol=1e-5 * scale)


@pytest.mark.parametrize("packing", PACKINGS)
def test_garbage_in_padding_and_absent_slots_changes_no_value_and_no_gradient(
    config, params, make_group, packing
):
    group = _packed(make_group([3, 8], [[2, 0], [6, 1]]), packing)
    weights = _weights(config, group)
    padded = tiny.padded_prompts(group)
    in_prompt = np.arange(padded.shape[1])[None, :] < group.prompt_length[:, None]
    wide = group._replace(prompt_tokens=(np.where(in_prompt, padded, 60 - padded),))
    same_shape = in_buckets if layout.startswith("buckets") else lambda group, _: group
    other = same_shape(wide, len(group.token_slots))._replace(
        completion_tokens=np.where(
            _valid(group), group.completion_tokens, 60 - group.completion_tokens
        ),
    )
    both = [
        (_group_sum(config, params, g, weights), _grad(config, params, g, weights))
        for g in (group, other)
    ]
    assert np.isfinite(both[0][0])
    # The embedding's gradient sums the same terms in another order.
    _assert_trees_close(both[0], both[1], atol=1e-5)


def test_completions_of_a_group_do_not_see_each_other(config, params, make_group):
    group = make_group([4], [[6, 6, 6]])
    changed = group.completion_tokens.copy()
    changed[:, 0] = 7
    before = tiny.predictive(config, params, group)
    after = tiny.predictive(config, params, group._replace(completion_tokens=changed))
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    assert not np.allclose(before[:, 0], after[:, 0])


def test_rematerialisation_does_not_change_gradients(config, make_group):
    deep = dataclasses.replace(config, num_hidden_layers=4)  # a loop of three
    drawn = init_params(deep, jax.random.key(1))
    params = jax.tree.map(lambda x: x if x.ndim == 2 else 4 * x, drawn)
    group = make_group(*SHAPES[1])
    weights = _weights(deep, group)
    stored, *again = (
        _grad(dataclasses.replace(deep, remat=remat), params, group, weights)
        for remat in REMAT_POLICIES
    )
    assert len(again) >= 3
    # To rounding: gradients reach hundreds, and what is computed again is fused in another way.
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(stored))
    for gradients in again:
        _assert_trees_close(gradients, stored, atol=1e-6 * scale)


def test_full_rematerialisation_needs_less_memory_than_none(config, params, make_group):
    deep = dataclasses.replace(config, num_hidden_layers=8)
    group = make_group([32] * 4, [[8, 8]] * 4, p=32, c=8)
    memory = {}
    for remat in ("none", "full"):
        of = dataclasses.replace(deep, remat=remat)
        grad = jax.jit(jax.grad(_group_sum, argnums=1), static_argnums=0)
        lowered = grad.lower(of, abstract_params(of), group, _weights(of, group))
        memory[remat] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert memory["full"] < 0.7 * memory["none"]


def test_bfloat16_compute_is_close_and_gradients_stay_float32(config, params, make_group):
    group = make_group(*SHAPES[1])
    weights = _weights(config, group)
    narrow = dataclasses.replace(config, dtype="bfloat16")
    wide_hidden = tiny.predictive(config, params, group)
    hidden = tiny.predictive(narrow, params, group)
    assert hidden.dtype == jnp.bfloat16
    # Measured: root mean square 0.0055 (states are of size 1), gradients 1 to 3 %.
    error = np.asarray(hidden, np.float32) - wide_hidden
    assert np.sqrt(np.mean(error**2)) < 0.015
    wide = _grad(config, params, group, weights)
    grads = _grad(narrow, params, group, weights)
    for leaf, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(wide), strict=True):
        assert leaf.dtype == jnp.float32
        assert np.linalg.norm(leaf - reference) <= 0.05 * np.linalg.norm(reference)


def _flops(config, params, group):
    lowered = jax.jit(predictive_hidden, static_argnums=0).lower(config, params, group)
    return lowered.compile().cost_analysis()["flops"]


def test_sharing_the_prompt_saves_its_flops(config, params, make_group):
    shared = make_group([40], [[4, 4]], p=40, c=4)
    apart = make_group([40, 40], [[4], [4]], p=40, c=4)
    # 40 + 2 * 4 tokens in place of 2 * (40 + 4): 0.55.
    assert _flops(config, params, shared) < 0.6 * _flops(config, params, apart)


def test_packing_saves_the_flops_of_padding(config, params, make_group):
    wide = dataclasses.replace(config, hidden_size=128, intermediate_size=256)
    shapes = abstract_params(wide)
    group = make_group([8, 40], [[1, 4], [4, 1]], p=40, c=4)
    # 58 of 96 slots hold a token.
    assert _flops(wide, shapes, _packed(group, "no room to spare")) < 0.7 * _flops(
        wide, shapes, group
    )


def test_the_last_layer_computes_no_more_than_what_is_read(config, params, make_group):
    """A layer more costs less at the end than in between: of most tokens keys and values only."""
    wide = dataclasses.replace(config, hidden_size=128, intermediate_size=512)
    group = make_group([40], [[2, 2]], p=40, c=2)
    cost = _flops(wide, abstract_params(wide), group)
    matrices = {
        name: np.prod(leaf.shape[1:])
        for name, leaf in abstract_params(wide)["layers"].items()
        if leaf.ndim > 2
    }
    one_layer = 2 * 44 * sum(matrices.values())
    last = 2 * 44 * (matrices["k_proj"] + matrices["v_proj"]) + 2 * 4 * sum(matrices.values())
    # The compiler counts the body of the scan over the other layers once.
    assert cost < 1.15 * (one_layer + last)
