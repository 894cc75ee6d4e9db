"""Several rewards: the logits of one run a reward make the optimum of every weighted sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.bandit import exact, several
from copg_jax.bandit.exact import Bandit, make_bandit

WEIGHTS = [[0.5, 0.5], [0.9, 0.1], [0.0, 1.0], [1.0, -0.5], [2.0, 3.0]]


@pytest.fixture
def problem() -> tuple[Bandit, jax.Array]:
    """Two contexts with five arms, π_ref far from uniform, and two rewards that disagree."""
    rng = np.random.default_rng(5)
    ref, mu1, mu2 = rng.dirichlet(np.full(5, 0.7), size=(3, 2))
    first = rng.normal(size=(2, 5))
    second = rng.normal(size=(2, 5)) - first
    bandit = make_bandit(first, ref=ref, mu1=mu1, mu2=mu2, beta=0.4)
    return bandit, jnp.stack([first, second])


def optima(bandit: Bandit, rewards: jax.Array) -> jax.Array:
    """ln π* of each reward."""
    return jnp.stack([exact.optimal_policy(bandit._replace(reward=reward)) for reward in rewards])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_interpolated_logits_of_the_optima_are_the_optimum_of_the_weighted_sum(problem, weights):
    bandit, rewards = problem
    policies = optima(bandit, rewards)
    of_sum = several.weigh_rewards(rewards, weights, bandit)
    best = exact.optimal_policy(of_sum)
    got = several.interpolate_logits(policies, weights, bandit)
    np.testing.assert_allclose(got, best, atol=1e-12)
    np.testing.assert_allclose(exact.regret(got, of_sum), 0, atol=1e-13)
    # Without π_ref it is right for weights that sum to 1 alone.
    plain = jax.nn.log_softmax(jnp.tensordot(jnp.array(weights), policies, 1))
    assert np.allclose(plain, best) == (sum(weights) == 1)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_copg_fits_of_the_same_pairs_add_as_their_rewards_do_however_few_and_noisy(
    problem, weights, rng
):
    bandit, rewards = problem
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (0, 4)]  # a few, some of them twice
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(np.transpose(pairs)), 1)
    counts = jnp.asarray(counts + counts.T)[None]
    gaps = rewards[:, :1, :, None] - rewards[:, :1, None, :]
    noise = rng.normal(size=(2, 1, 5, 5))
    gaps = gaps + noise - np.swapaxes(noise, -1, -2)

    def fit(gap: jax.Array) -> jax.Array:
        return exact.copg_maximiser(counts, exact.reward_pull(counts, gap), bandit.beta)

    one_each = jnp.tensordot(jnp.array(weights), jax.vmap(fit)(gaps), 1)
    of_sum = fit(jnp.tensordot(jnp.array(weights), gaps, 1))
    np.testing.assert_allclose(one_each, of_sum, atol=1e-10)
    # It is far from the optimum: what is exact is the sum, not the fit.
    exact_sum = np.tensordot(weights, rewards[:, :1], 1) / bandit.beta
    assert np.ptp(of_sum - exact_sum) > 0.1


def test_mixing_the_policies_loses_on_the_way_and_the_optimum_of_the_least_is_no_interpolation(
    problem,
):
    bandit, rewards = problem
    policies = optima(bandit, rewards)
    weights = jnp.stack([share := jnp.linspace(0, 1, 11), 1 - share], 1)
    join = jax.vmap(several.interpolate_logits, (None, 0, None))
    mixed = jax.vmap(several.mix_policies, (None, 0))(policies, weights)
    joined = join(policies, weights, bandit)
    front, chord = (several.measure_front(x, rewards, weights, bandit) for x in (joined, mixed))
    np.testing.assert_allclose(front.regret, 0, atol=1e-13)
    assert chord.regret[1:-1].min() > 0.02
    np.testing.assert_allclose(chord.regret[::10], 0, atol=1e-13)
    # Rewards of a mixture are on the chord between the two runs.
    np.testing.assert_allclose(chord.rewards, weights @ chord.rewards[::-10])
    least = exact.optimal_policy(bandit._replace(reward=rewards.min(0)))
    fine = jnp.stack([share := jnp.linspace(0, 1, 201), 1 - share], 1)
    gaps = jax.vmap(exact.total_variation, (0, None))(join(policies, fine, bandit), least)
    assert gaps.min() > 0.05


def test_the_front_trades_one_reward_for_the_other_and_no_other_policy_has_a_higher_objective(
    problem,
):
    bandit, rewards = problem
    weights = jnp.stack([share := jnp.linspace(0, 1, 21), 1 - share], 1)
    best = jax.vmap(lambda w: exact.optimal_policy(several.weigh_rewards(rewards, w, bandit)))(
        weights
    )
    front = several.measure_front(best, rewards, weights, bandit)
    objective = weights * front.rewards
    value = objective.sum(1) - bandit.beta * front.kl
    # Each of them is the best of all of them under its own weights.
    others = weights @ front.rewards.T - bandit.beta * front.kl[None]
    assert (others <= value[:, None] + 1e-12).all()
    assert (jnp.diff(front.rewards[:, 0]) > 0).all() and (jnp.diff(front.rewards[:, 1]) < 0).all()
    logits = jax.random.normal(jax.random.key(0), (300, *rewards.shape[1:])) * 2
    drawn = jax.nn.log_softmax(logits)
    others = jax.vmap(exact.rl_objective, (0, None))(
        drawn, several.weigh_rewards(rewards, weights[7], bandit)
    )
    assert others.max() < value[7]


def test_a_scale_for_each_prompt_changes_the_optimum_and_one_for_all_is_another_weight(problem):
    bandit, rewards = problem
    reward = rewards[0] * jnp.array([[1.0], [0.1]])  # good and bad are nearer in one of the prompts
    best = exact.optimal_policy(bandit._replace(reward=reward))
    centred = exact.optimal_policy(bandit._replace(reward=reward - reward.mean(-1, keepdims=True)))
    np.testing.assert_allclose(centred, best, atol=1e-12)
    whole = (reward - reward.mean()) / reward.std()
    same = bandit._replace(reward=whole, beta=bandit.beta / reward.std())
    np.testing.assert_allclose(exact.optimal_policy(same), best, atol=1e-12)
    by_prompt = exact.optimal_policy(same._replace(reward=whole / whole.std(-1, keepdims=True)))
    assert exact.total_variation(by_prompt, best) > 0.1
