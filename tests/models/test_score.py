"""The reward model reads each completion at its last token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.models.forward import make_score
from copg_jax.models.params import init_params
from tests.models import tiny


@pytest.fixture(scope="module")
def score_params(arch, params):
    drawn = init_params(arch, jax.random.key(2), head="score")
    return {**params, "score": drawn["score"]}


@pytest.mark.parametrize(("num_bins", "spare"), [(None, 0), (1, 0), (1, 3), (3, 2)])
def test_the_score_is_that_of_the_last_valid_state(arch, score_params, make_group, num_bins, spare):
    group = make_group([8, 1, 3], [[6, 1], [2, 3], [1, 5]])
    laid_out = group if num_bins is None else tiny.laid_out(group, num_bins, (spare, spare))
    scores = jax.jit(make_score(arch))(score_params, laid_out)
    assert scores.dtype == jnp.float32
    hidden = tiny.plain_hidden(arch, score_params, tiny.sequences(group))
    last = (group.prompt_length[:, None] + group.completion_length - 1).reshape(-1)
    wanted = np.asarray(hidden)[np.arange(last.size), last] @ np.asarray(score_params["score"])
    np.testing.assert_allclose(scores.reshape(-1), wanted, atol=1e-5)


def test_absent_completions_get_zero_and_give_no_gradient(arch, score_params, make_group):
    score = make_score(arch)
    group = make_group([4, 8, 2], [[3, 0], [0, 0], [0, 1]])
    scores = np.asarray(jax.jit(score)(score_params, group))
    np.testing.assert_array_equal(scores == 0, group.completion_length == 0)
    total = jax.jit(jax.value_and_grad(lambda params, batch: score(params, batch).sum()))
    value, grads = total(score_params, group)
    assert np.isfinite(value) and np.any(grads["score"] != 0)
    nothing = group._replace(completion_length=np.zeros((3, 2), np.int32))
    for leaf in jax.tree.leaves(total(score_params, nothing)):
        np.testing.assert_array_equal(leaf, 0.0)
