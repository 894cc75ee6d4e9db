"""A group is computed as its sequences would be, one by one, packed or not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.data.groups import GroupBatch
from copg_jax.models.decoder import REMAT_POLICIES, Decoder
from copg_jax.models.forward import make_score, make_seq_logp, make_token_logp, predictive_hidden
from copg_jax.models.layout import GroupPacking
from copg_jax.models.params import abstract_params, init_params
from tests.models import tiny

SHAPES = [
    ([8, 1, 3], [[6], [1], [4]]),
    ([5, 8], [[6, 1], [2, 6]]),
    ([1, 4], [[1, 3, 6], [2, 0, 5]]),
    ([2, 7, 8, 1], [[3, 0], [6, 6], [1, 2], [0, 0]]),
]
# Number of bins (None = a bin a group), spare capacity, and whether prompts lie in buckets.
LAYOUTS = {
    "no capacity to spare": (1, (0, 0), False),
    "filling": (1, (5, 3), False),
    "a bin a group": (None, (2, 1), False),
    "buckets": (1, (5, 3), True),
    "buckets in bins": (2, (5, 3), True),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
layouts_or_none = pytest.mark.parametrize("layout", [None, *LAYOUTS])


def _laid_out(group: GroupBatch, layout: str | None) -> GroupBatch:
    """The group under a layout; None leaves it as it is padded."""
    if layout is None:
        return group
    num_bins, spare, buckets = LAYOUTS[layout]
    num_groups = len(group.prompt_length)
    if num_bins is None or num_groups % num_bins:
        num_bins = num_groups
    return tiny.laid_out(group, num_bins, spare, buckets=buckets)


def _valid(group):
    size = group.completion_tokens.shape[2]
    return np.arange(size)[None, None, :] < group.completion_length[:, :, None]


def _group_sum(arch, params, group, weights):
    """Weighted sum of all states that predict a token, as any loss on them would take it."""
    hidden = tiny.predictive(arch, params, group)
    return jnp.sum(jnp.where(_valid(group)[..., None], hidden * weights, 0.0), dtype=jnp.float32)


def _grad(arch, params, group, weights):
    return jax.jit(jax.grad(_group_sum, argnums=1), static_argnums=0)(arch, params, group, weights)


def _plain(arch, params, group):
    """The predicting states [B, K, C, D] of the same group, sequence by sequence."""
    hidden = tiny.plain_hidden(arch, params, tiny.sequences(group))
    shape = group.completion_tokens.shape
    hidden = hidden.reshape(*shape[:2], *hidden.shape[1:])
    index = group.prompt_length[:, None, None] - 1 + np.arange(shape[2])[None, None, :]
    return jnp.take_along_axis(hidden, np.broadcast_to(index, shape)[..., None], axis=2)


def _weights(arch, group):
    shape = (*group.completion_tokens.shape, arch.hidden_size)
    return jax.random.normal(jax.random.key(3), shape)


def _assert_trees_close(actual, desired, atol):
    for (path, a), d in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(desired), strict=True
    ):
        np.testing.assert_allclose(a, d, atol=atol, err_msg=jax.tree_util.keystr(path))


@layouts_or_none
@pytest.mark.parametrize(("prompt", "completion"), SHAPES)
def test_predicting_states_equal_the_plain_computation(
    arch, params, make_group, prompt, completion, layout
):
    group = _laid_out(make_group(prompt, completion), layout)
    hidden = np.asarray(tiny.predictive(arch, params, group))
    assert np.isfinite(hidden).all()
    valid = _valid(group)
    np.testing.assert_allclose(hidden[valid], _plain(arch, params, group)[valid], atol=1e-5)


@layouts_or_none
@pytest.mark.parametrize(("prompt", "completion"), SHAPES[1:])
def test_gradients_equal_the_plain_computation(
    arch, params, make_group, prompt, completion, layout
):
    group = _laid_out(make_group(prompt, completion), layout)
    weights = _weights(arch, group)
    grads = _grad(arch, params, group, weights)

    def plain_sum(params):
        hidden = _plain(arch, params, group)
        return jnp.sum(jnp.where(_valid(group)[..., None], hidden * weights, 0.0))

    plain = jax.grad(plain_sum)(params)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(plain))
    _assert_trees_close(grads, plain, atol=1e-5 * scale)


def _seq_logp_total(arch, params, group, weights):
    """Weighted sum of ln π(y|x), and what it is the sum of."""
    token_logp = jnp.where(_valid(group), make_token_logp(arch)(params, group), 0.0)
    seq_logp = make_seq_logp(arch)(params, group)
    return jnp.sum(weights * seq_logp), (token_logp, seq_logp)


def _score_total(arch, params, group, weights):
    """Weighted sum of scores, and the scores."""
    score = make_score(arch)(params, group)
    return jnp.sum(weights * score), score


@functools.cache
def _values_and_grads(total, arch):
    return jax.jit(jax.value_and_grad(functools.partial(total, arch), has_aux=True))


@layouts
@pytest.mark.parametrize("total", [_seq_logp_total, _score_total])
def test_log_probabilities_scores_and_gradients_are_the_same_without_a_layout(
    arch, params, make_group, total, layout
):
    group = make_group(*SHAPES[3])
    params = {**params, "score": jnp.linspace(-1, 1, arch.hidden_size)}
    weights = np.linspace(0.5, 1.5, group.completion_length.size, dtype=np.float32)
    weights = weights.reshape(group.completion_length.shape)
    wanted, wanted_grads = _values_and_grads(total, arch)(params, group, weights)
    got, grads = _values_and_grads(total, arch)(params, _laid_out(group, layout), weights)
    _assert_trees_close(got, wanted, atol=1e-4)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted_grads))
    assert scale > 0.1
    _assert_trees_close(grads, wanted_grads, atol=1e-5 * scale)


def test_a_layout_that_leaves_out_a_token_gives_other_log_probabilities(arch, params, make_group):
    group = make_group([8, 5], [[6, 2], [3, 4]])
    shape, seq_logp = tiny.shape_of(group, 2), jax.jit(make_seq_logp(arch))
    for prompt, own in ((1, 0), (0, 1)):
        lengths = group.prompt_length - prompt, group.completion_length - own
        cut = seq_logp(params, group._replace(layout=shape.layout(*lengths)))
        # Ten times what the test above lets pass, at least.
        assert (np.abs(seq_logp(params, group) - cut) > 1e-3).all()


@layouts_or_none
def test_garbage_in_padding_and_absent_slots_changes_no_value_and_no_gradient(
    arch, params, make_group, layout
):
    group = _laid_out(make_group([3, 8], [[2, 0], [6, 1]]), layout)
    weights = _weights(arch, group)
    in_prompt = np.arange(group.prompt_tokens.shape[1])[None, :] < group.prompt_length[:, None]
    other = group._replace(
        prompt_tokens=np.where(in_prompt, group.prompt_tokens, 60 - group.prompt_tokens),
        completion_tokens=np.where(
            _valid(group), group.completion_tokens, 60 - group.completion_tokens
        ),
    )
    both = [
        (_group_sum(arch, params, g, weights), _grad(arch, params, g, weights))
        for g in (group, other)
    ]
    assert np.isfinite(both[0][0])
    # The embedding's gradient sums the same terms in another order.
    _assert_trees_close(both[0], both[1], atol=1e-5)


def test_completions_of_a_group_do_not_see_each_other(arch, params, make_group):
    group = make_group([4], [[6, 6, 6]])
    changed = group.completion_tokens.copy()
    changed[:, 0] = 7
    before = tiny.predictive(arch, params, group)
    after = tiny.predictive(arch, params, group._replace(completion_tokens=changed))
    np.testing.assert_array_equal(before[:, 1:], after[:, 1:])
    assert not np.allclose(before[:, 0], after[:, 0])


def test_rematerialisation_does_not_change_gradients(arch, make_group):
    deep = tiny.deeper(arch, 4)  # a loop of three
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


def test_full_rematerialisation_needs_less_memory_than_none(arch, params, make_group):
    deep = tiny.deeper(arch, 8)
    group = make_group([32] * 4, [[8, 8]] * 4, p=32, c=8)
    memory = {}
    for remat in ("none", "full"):
        of = dataclasses.replace(deep, remat=remat)
        grad = jax.jit(jax.grad(_group_sum, argnums=1), static_argnums=0)
        lowered = grad.lower(of, abstract_params(of), group, _weights(of, group))
        memory[remat] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert memory["full"] < 0.7 * memory["none"]


def test_bfloat16_compute_is_close_and_gradients_stay_float32(arch, params, make_group):
    group = make_group(*SHAPES[1])
    weights = _weights(arch, group)
    narrow = dataclasses.replace(arch, dtype="bfloat16")
    wide_hidden = tiny.predictive(arch, params, group)
    hidden = tiny.predictive(narrow, params, group)
    assert hidden.dtype == jnp.bfloat16
    # Measured: root mean square 0.0055 (states are of size 1), gradients 1 to 3 %.
    error = np.asarray(hidden, np.float32) - wide_hidden
    assert np.sqrt(np.mean(error**2)) < 0.015
    wide = _grad(arch, params, group, weights)
    grads = _grad(narrow, params, group, weights)
    for leaf, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(wide), strict=True):
        assert leaf.dtype == jnp.float32
        assert np.linalg.norm(leaf - reference) <= 0.05 * np.linalg.norm(reference)


def _flops(arch, params, group):
    def hidden(params, group):
        return predictive_hidden(Decoder(arch), params, group, GroupPacking.of(group))

    return jax.jit(hidden).lower(params, group).compile().cost_analysis()["flops"]


def test_sharing_the_prompt_saves_its_flops(arch, params, make_group):
    shared = make_group([40], [[4, 4]], p=40, c=4)
    apart = make_group([40, 40], [[4], [4]], p=40, c=4)
    # 40 + 2 * 4 tokens in place of 2 * (40 + 4): 0.55.
    assert _flops(arch, params, shared) < 0.6 * _flops(arch, params, apart)


def test_a_layout_saves_the_flops_of_padding(arch, params, make_group):
    wide = dataclasses.replace(arch, hidden_size=128, intermediate_size=256)
    shapes = abstract_params(wide)
    group = make_group([8, 40], [[1, 4], [4, 1]], p=40, c=4)
    # 58 of 96 slots hold a token.
    assert _flops(wide, shapes, _laid_out(group, "no capacity to spare")) < 0.7 * _flops(
        wide, shapes, group
    )


def test_the_last_layer_computes_no_more_than_what_is_read(arch, params, make_group):
    """A layer more costs less at the end than in between: of most tokens keys and values only."""
    wide = dataclasses.replace(arch, hidden_size=128, intermediate_size=512)
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
