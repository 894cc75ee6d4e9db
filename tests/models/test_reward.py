"""The reward model reads each completion at its last token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.models.forward import reward
from copg_jax.models.layout import Capacity
from copg_jax.models.params import init_params
from tests.models import tiny

_reward = jax.jit(reward, static_argnums=0)
_sum_and_grad = jax.jit(
    jax.value_and_grad(lambda *args: reward(*args).sum(), argnums=1), static_argnums=0
)


@pytest.fixture(scope="module")
def score_params(config, params):
    drawn = init_params(config, jax.random.key(2), head="score")
    return {**params, "score": drawn["score"]}


@pytest.mark.parametrize(
    ("blocks", "room"), [(1, None), (1, Capacity(31, 18)), (3, Capacity(16, 9))]
)
def test_reward_is_the_score_of_the_last_valid_state(
    config, score_params, make_group, blocks, room
):
    group = make_group([8, 1, 3], [[6, 1], [2, 3], [1, 5]], blocks=blocks, room=room)
    rewards = _reward(config, score_params, group)
    assert rewards.dtype == jnp.float32
    hidden = tiny.plain_hidden(config, score_params, tiny.sequences(group))
    last = (group.prompt_length[:, None] + group.completion_length - 1).reshape(-1)
    wanted = np.asarray(hidden)[np.arange(last.size), last] @ np.asarray(score_params["score"])
    np.testing.assert_allclose(rewards.reshape(-1), wanted, atol=1e-5)


def test_absent_completions_get_zero_and_give_no_gradient(config, score_params, make_group):
    group = make_group([4, 8, 2], [[3, 0], [0, 0], [0, 1]])
    rewards = np.asarray(_reward(config, score_params, group))
    np.testing.assert_array_equal(rewards == 0, group.completion_length == 0)
    value, grads = _sum_and_grad(config, score_params, group)
    assert np.isfinite(value) and np.any(grads["score"] != 0)
    nothing = group._replace(completion_length=np.zeros((3, 2), np.int32))
    for leaf in jax.tree.leaves(_sum_and_grad(config, score_params, nothing)):
        np.testing.assert_array_equal(leaf, 0.0)
