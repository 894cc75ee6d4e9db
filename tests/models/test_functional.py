"""A group is computed as its sequences would be, one by one; its parameters are as described."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.errors import InputError
from copg_jax.models import functional
from copg_jax.models.llama import LlamaConfig
from tests.models import tiny

SHAPES = [
    ([8, 1, 3], [[6], [1], [4]]),
    ([5, 8], [[6, 1], [2, 6]]),
    ([1, 4], [[1, 3, 6], [2, 0, 5]]),
]
_apply = jax.jit(functional.apply, static_argnums=0)


def _group_sum(config, params, group, weights):
    """Weighted sum of all valid hidden states, as any loss on them would take it."""
    prompt, completion = functional.apply(config, params, *group[:3])
    valid = jnp.arange(completion.shape[2])[None, None, :] < group.completion_length[:, :, None]
    total = jnp.sum(jnp.where(valid[..., None], completion * weights, 0.0), dtype=jnp.float32)
    return total + jnp.sum(prompt * weights[:, 0, 0], dtype=jnp.float32)


_grad = jax.jit(jax.grad(_group_sum, argnums=1), static_argnums=0)
_value_and_grad = jax.jit(jax.value_and_grad(_group_sum, argnums=1), static_argnums=0)


def _plain(config, params, group):
    """Hidden states [B, K, P + C, D] of the same group, sequence by sequence."""
    hidden = tiny.plain_hidden(config, params, tiny.sequences(group))
    return hidden.reshape(*group.completion_tokens.shape[:2], *hidden.shape[1:])


def _plain_sum(config, params, group, weights):
    total, hidden = 0.0, _plain(config, params, group)
    for b, k in np.ndindex(*group.completion_length.shape):
        length, own = int(group.prompt_length[b]), int(group.completion_length[b, k])
        total += jnp.vdot(hidden[b, k, length : length + own], weights[b, k, :own])
        if k == 0:
            total += jnp.vdot(hidden[b, k, length - 1], weights[b, 0, 0])
    return total


def _weights(config, group):
    shape = (*group.completion_tokens.shape, config.hidden_size)
    return jax.random.normal(jax.random.key(3), shape)


def _assert_trees_close(actual, desired, atol):
    for (path, a), d in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(desired), strict=True
    ):
        np.testing.assert_allclose(a, d, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("prompt", "completion"), SHAPES)
def test_group_hidden_states_equal_the_plain_computation(
    config, params, make_group, prompt, completion
):
    group = make_group(prompt, completion)
    hidden = _apply(config, params, *group[:3])
    assert np.isfinite(hidden.completion).all()
    plain = _plain(config, params, group)
    for b, length in enumerate(prompt):
        np.testing.assert_allclose(hidden.last_prompt[b], plain[b, 0, length - 1], atol=1e-5)
        for k, own in enumerate(completion[b]):
            np.testing.assert_allclose(
                hidden.completion[b, k, :own], plain[b, k, length : length + own], atol=1e-5
            )


@pytest.mark.parametrize(("prompt", "completion"), SHAPES[1:])
def test_group_gradients_equal_the_plain_computation(
    config, params, make_group, prompt, completion
):
    group = make_group(prompt, completion)
    weights = _weights(config, group)
    grads = _grad(config, params, group, weights)
    plain = jax.grad(lambda p: _plain_sum(config, p, group, weights))(params)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain))
    _assert_trees_close(grads, plain, atol=1e-5 * scale)


def test_garbage_in_padding_and_absent_slots_changes_no_value_and_no_gradient(
    config, params, make_group
):
    group = make_group([3, 8], [[2, 0], [6, 1]])
    weights = _weights(config, group)
    in_prompt = jnp.arange(8)[None, :] < group.prompt_length[:, None]
    valid = jnp.arange(6)[None, None, :] < group.completion_length[:, :, None]
    other = group._replace(
        prompt_tokens=jnp.where(in_prompt, group.prompt_tokens, 60 - group.prompt_tokens),
        completion_tokens=jnp.where(valid, group.completion_tokens, 60 - group.completion_tokens),
    )
    both = [_value_and_grad(config, params, g, weights) for g in (group, other)]
    assert np.isfinite(both[0][0])
    # The embedding's gradient sums the same terms in another order.
    _assert_trees_close(both[0], both[1], atol=1e-5)


def test_completions_of_a_group_do_not_see_each_other(config, params, make_group):
    group = make_group([4], [[6, 6, 6]])
    changed = group.completion_tokens.at[:, 0].set(7)
    before = _apply(config, params, *group[:3]).completion
    after = _apply(config, params, group.prompt_tokens, group.prompt_length, changed).completion
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    assert not np.allclose(before[:, 0], after[:, 0])


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_rematerialisation_does_not_change_gradients(config, params, make_group, remat):
    group = make_group(*SHAPES[1])
    weights = _weights(config, group)
    other = dataclasses.replace(config, remat=remat)
    full = _grad(config, params, group, weights)
    _assert_trees_close(_grad(other, params, group, weights), full, atol=1e-5)


def test_full_rematerialisation_needs_less_memory_than_none(config, params, make_group):
    deep = dataclasses.replace(config, num_hidden_layers=8)
    group = make_group([32] * 4, [[8, 8]] * 4, p=32, c=8)
    memory = {}
    for remat in ("none", "full"):
        of = dataclasses.replace(deep, remat=remat)
        lowered = _grad.lower(of, functional.abstract_params(of), group, _weights(of, group))
        memory[remat] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert memory["full"] < 0.7 * memory["none"]


def test_bfloat16_compute_is_close_and_gradients_stay_float32(config, params, make_group):
    group = make_group(*SHAPES[1])
    weights = _weights(config, group)
    narrow = dataclasses.replace(config, dtype="bfloat16")
    wide_hidden = _apply(config, params, *group[:3]).completion
    hidden = _apply(narrow, params, *group[:3]).completion
    assert hidden.dtype == jnp.bfloat16
    # Measured: root mean square 0.0055 (states are of size 1), gradients 1 %.
    error = np.asarray(hidden, np.float32) - wide_hidden
    assert np.sqrt(np.mean(error**2)) < 0.015
    wide = _grad(config, params, group, weights)
    grads = _grad(narrow, params, group, weights)
    for leaf, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(wide), strict=True):
        assert leaf.dtype == jnp.float32
        assert np.linalg.norm(leaf - reference) <= 0.03 * np.linalg.norm(reference)


def test_sharing_the_prompt_saves_its_flops(config, params):
    def flops(num_groups, num_completions):
        tokens = jax.ShapeDtypeStruct((num_groups, 40), jnp.int32)
        length = jax.ShapeDtypeStruct((num_groups,), jnp.int32)
        completion = jax.ShapeDtypeStruct((num_groups, num_completions, 4), jnp.int32)
        lowered = _apply.lower(config, params, tokens, length, completion)
        return lowered.compile().cost_analysis()["flops"]

    # 40 + 2 * 4 tokens in place of 2 * (40 + 4): 0.55.
    assert flops(1, 2) < 0.6 * flops(2, 1)


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("tied", [False, True])
def test_one_table_describes_shapes_axes_and_initialisation(config, head, tied):
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    drawn = functional.init(config, jax.random.key(0), head=head)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), drawn)
    abstract = functional.abstract_params(config, head=head)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    axes = functional.logical_axes(config, head=head)
    ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert ranks == jax.tree.map(lambda x: x.ndim, drawn)
    assert ("lm_head" in drawn) == (head == "lm" and not tied)
    assert ("score" in drawn) == (head == "score")


def test_score_head_is_drawn_with_the_published_scale():
    config = LlamaConfig(8, 4000, 2, 1, 1, 1, 2)
    score = functional.init(config, jax.random.key(0), head="score")["score"]
    np.testing.assert_allclose(np.std(score), 4001**-0.5, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"dtype": "float16"}, "dtype"),
        ({"remat": "some"}, "remat"),
    ],
)
def test_impossible_sizes_are_refused_by_name(config, change, field):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(config, **change)
