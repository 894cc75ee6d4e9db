"""Fresh data on the bandit: cross pairs, replayed rounds, and what a truncated support costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import losses
from copg_jax.bandit import exact, population

LOG_POLICY = np.log([0.3, 0.5, 0.2])
OFFLINE = np.array([0.05, 0.05, 0.9])


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (2, 3)])
def test_groups_of_two_origins_follow_equation_7(paper_bandit, sizes):
    """Eq. (6) with µ1 ≠ µ2, whose maximiser is π* by Theorem 1, however many are of each."""
    got = population.cross_coefficients(jnp.asarray(LOG_POLICY), paper_bandit, sizes=sizes)
    expected = sum(sizes) / 2 * population.GRADIENTS["copg"](LOG_POLICY, paper_bandit)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    end = population.end_of(population.GRADIENTS["copg"], paper_bandit)
    assert exact.total_variation(end, exact.optimal_policy(paper_bandit)) < 1e-9


def test_all_pairs_of_such_groups_have_the_same_end_but_are_other_steps(paper_bandit):
    """Both are right; they weigh the gaps of arms differently."""
    pooled = 0.5 * (paper_bandit.mu1 + paper_bandit.mu2)
    mixed = paper_bandit._replace(mu1=pooled, mu2=pooled)
    coefficients = population.GRADIENTS["copg"]
    gap = coefficients(LOG_POLICY, mixed) - coefficients(LOG_POLICY, paper_bandit)
    assert np.abs(gap).max() > 1e-3
    end = population.end_of(coefficients, mixed)
    assert exact.total_variation(end, exact.optimal_policy(mixed)) < 1e-9
    all_pairs = population.group_coefficients(losses.copg_loss, LOG_POLICY, paper_bandit, k=2)
    np.testing.assert_allclose(all_pairs, coefficients(LOG_POLICY, mixed), atol=1e-12)


def test_cross_pairs_of_disjoint_samplers_determine_the_optimum_and_pairs_within_do_not(
    paper_bandit,
):
    """An arm that µ1 alone has meets those of µ2 across; within each µ nothing joins the two."""
    disjoint = paper_bandit._replace(mu1=jnp.array([0.4, 0.6, 0.0]), mu2=jnp.array([0.0, 0.0, 1.0]))
    assert exact.regret(population.end_on_pairs(disjoint), disjoint) < 1e-12
    within = [disjoint._replace(mu1=mu, mu2=mu) for mu in (disjoint.mu1, disjoint.mu2)]
    weights = sum(exact.pair_weights(of.mu1, of.mu2) for of in within)
    assert exact.pair_components(weights).tolist() == [0, 0, 1]


SAMPLERS = {
    "fresh": lambda fresh: (fresh, fresh),
    "half offline": lambda fresh: ((fresh + OFFLINE) / 2, (fresh + OFFLINE) / 2),
    "across": lambda fresh: (fresh, OFFLINE),
}
# Regret after 20 steps (10 rounds of 2), replaying 1, 4 and 16 rounds.
AFTER_20 = {
    "fresh": (3.1308e-3, 1.6114e-3, 6.496e-4),
    "half offline": (4.201e-5, 1.1267e-4, 1.6610e-4),
    "across": (1.4612e-4, 2.0982e-4, 2.2963e-4),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_replayed_rounds_and_offline_data_change_the_pace_and_not_the_end(paper_bandit, name):
    """No importance weights: any mixture of old policies and other data is a µ of full support."""
    for index, window in enumerate((1, 4, 16)):
        regrets = population.regret_by_round(
            paper_bandit, SAMPLERS[name], num_rounds=300, steps_per_round=2, replay_rounds=window
        )
        np.testing.assert_allclose(regrets[0], 0.29187, atol=5e-6)
        np.testing.assert_allclose(regrets[10], AFTER_20[name][index], rtol=5e-4)
        assert abs(regrets[-1]) < 1e-9


def test_top_p_keeps_the_most_likely_arms_that_its_total_takes():
    policy = jnp.array([[0.2, 0.5, 0.3], [0.25, 0.25, 0.5]])
    np.testing.assert_allclose(population.truncated(policy, 1.0), policy)
    np.testing.assert_allclose(population.truncated(policy, 0.5), [[0, 1, 0], [0, 0, 1]])
    # Arms that are as likely as the last one are kept with it.
    wanted = [[0, 0.625, 0.375], [0.25, 0.25, 0.5]]
    np.testing.assert_allclose(population.truncated(policy, 0.7), wanted)


# π_ref = (0.2, 0.5, 0.3): regret at the end of training on samples of π_ref, and of training on
# samples of the policy as it becomes.
TOP_P = {1.0: (0.0, 0.0), 0.9: (0.0, 0.01739), 0.8: (0.16439, 0.07999), 0.5: (0.24045, 0.24045)}


@pytest.mark.parametrize("top_p", TOP_P)
def test_a_truncated_support_costs_regret(top_p):
    """π* is lost where an arm is never drawn: fresh samples of the learner do not bring it back."""
    ref = jnp.array([0.2, 0.5, 0.3])
    mu = population.truncated(ref, top_p)
    bandit = exact.make_bandit([2.5, 2.0, 1.0], mu1=ref, mu2=ref, ref=ref, beta=0.5)
    cut = bandit._replace(mu1=mu, mu2=mu)
    offline, online = TOP_P[top_p]
    end = population.end_on_pairs(cut)
    np.testing.assert_allclose(exact.regret(end, bandit), offline, atol=6e-6)
    regrets = population.regret_by_round(
        bandit,
        SAMPLERS["fresh"],
        num_rounds=2000,
        steps_per_round=1,
        draw=lambda policy: population.truncated(policy, top_p),
    )
    np.testing.assert_allclose(regrets[-1], online, atol=2e-5)
    # Gradient steps end where the linear algebra says.
    follow = lambda z: population.direction("copg", z, cut)
    steps = jax.lax.fori_loop(0, 2000, lambda _, z: z + 0.5 * follow(z), jnp.log(ref))
    np.testing.assert_allclose(jax.nn.softmax(steps), jnp.exp(end), atol=1e-6)
