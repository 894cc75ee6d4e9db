"""Finite data and the low-β study: the laws behind the notebook's figures."""

import jax
import jax.numpy as jnp
import numpy as np

from copg_jax.bandit import exact, population
from experiments.studies import ablations, instability


def test_noise_free_pairs_that_connect_all_arms_determine_pi_star(paper_bandit, rng):
    result = ablations.finite_data_regret(rng, paper_bandit, 10)
    assert 0.5 < result["connected"].mean() < 0.9
    assert np.abs(result["copg"][result["connected"]]).max() < 1e-12
    assert result["copg"][~result["connected"]].min() > 1e-3
    assert result["ipo"].mean() > 0.15  # a floor that no data removes


def test_regret_of_finite_noisy_data_follows_the_law(paper_bandit, rng):
    for num_pairs, noise in ((2000, 0.5), (2000, 1.0), (10_000, 1.0)):
        measured = ablations.finite_data_regret(
            rng, paper_bandit, num_pairs, reward_noise=noise, num_sets=4000
        )["copg"].mean()
        law = ablations.predicted_regret(paper_bandit, num_pairs, reward_noise=noise)
        np.testing.assert_allclose(measured, law, rtol=0.1)


def test_larger_groups_use_the_same_samples_better(paper_bandit, rng):
    uniform = ablations.tilted_sampler(paper_bandit, 1.0)
    np.testing.assert_allclose(uniform.mu1, 1 / 3)
    law = float(ablations.predicted_regret(uniform, 600, reward_noise=1.0))
    for k in (2, 4, 12):
        measured = ablations.group_regret(
            rng, uniform, num_samples=1200, k=k, reward_noise=1.0, num_sets=1500
        ).mean()
        np.testing.assert_allclose(measured, law * k / (2 * (k - 1)), rtol=0.12)


def test_gradient_ascent_diverges_just_above_the_largest_stable_step(paper_bandit):
    """The limit is proportional to 1/β: low β is the stable side."""
    limits = []
    for beta in (0.05, 0.5, 5.0):
        problem = paper_bandit._replace(beta=jnp.asarray(beta))
        limit = instability.largest_stable_step(problem)
        limits.append(float(limit * beta))
        climb = jax.jit(
            lambda step, b=problem: jax.lax.fori_loop(
                0, 3000, lambda _, z: z + step * population.direction("copg", z, b), jnp.zeros(3)
            )
        )
        end = jax.nn.log_softmax(climb(0.99 * limit))
        assert exact.total_variation(end, exact.optimal_policy(problem)) < 1e-6
        assert jnp.ptp(climb(1.01 * limit)) > 1e10
    np.testing.assert_allclose(limits, limits[0], rtol=1e-12)


def test_every_beta_fits_the_same_implicit_reward_so_held_out_loss_cannot_see_beta():
    problem = instability.make_problem(jax.random.key(0), num_arms=64, num_features=4)
    arms = instability.sample_arms(jax.random.key(1), problem.log_ref, 300)
    held_out = instability.sample_arms(jax.random.key(2), problem.log_ref, 300)
    low, high = (
        instability.measure(instability.least_squares(problem, arms, beta), problem, held_out, beta)
        for beta in (0.01, 1.0)
    )
    np.testing.assert_allclose(low["residual"], high["residual"], rtol=1e-9)
    assert low["kl"] > high["kl"] + 0.5


def test_dividing_rewards_by_their_scale_is_a_change_of_beta():
    problem = instability.make_problem(jax.random.key(3), num_arms=64, num_features=4)
    arms = instability.sample_arms(jax.random.key(4), problem.log_ref, 300)
    reward = problem.reward[arms]
    scaled = instability.normalise(reward, "batch")
    scale = float(((reward[:, 0] - reward[:, 1]) ** 2).mean() ** 0.5)
    np.testing.assert_allclose(
        instability.least_squares(problem, arms, 0.1, scaled),
        instability.least_squares(problem, arms, 0.1 * scale),
        rtol=1e-9,
    )
    signs = instability.normalise(reward, "pair")
    assert set(np.unique(np.round(signs[:, 0] - signs[:, 1], 12))) <= {-1.0, 0.0, 1.0}


def test_normalising_every_batch_is_that_change_of_beta_too_up_to_noise():
    problem = instability.make_problem(jax.random.key(3), num_arms=64, num_features=4)
    arms = instability.sample_arms(jax.random.key(4), problem.log_ref, 300)
    gap = problem.reward[arms] @ jnp.array([1.0, -1.0])
    scale = jnp.sqrt((gap**2).mean())
    fit = instability.fit(jax.random.key(7), problem, arms, 0.5, how="batch", num_steps=2000)[-1]
    target = instability.least_squares(problem, arms, 0.5 * scale)
    assert jnp.linalg.norm(fit - target) < 0.15 * jnp.linalg.norm(target)
    assert jnp.linalg.norm(fit - target * scale) > 0.3 * jnp.linalg.norm(target)


def test_stochastic_training_reaches_the_least_squares_solution():
    problem = instability.make_problem(jax.random.key(5), num_arms=64, num_features=4, misfit=0.0)
    arms = instability.sample_arms(jax.random.key(6), problem.log_ref, 300)
    path = instability.fit(jax.random.key(7), problem, arms, 0.5, num_steps=3000, every=1000)
    np.testing.assert_allclose(path[-1], instability.least_squares(problem, arms, 0.5), atol=1e-4)


def test_fresh_pairs_from_the_policy_enter_the_fit():
    problem = instability.make_problem(jax.random.key(8), num_arms=64, num_features=4)
    arms = instability.sample_arms(jax.random.key(9), problem.log_ref, 300)
    offline = instability.least_squares(problem, arms, 0.3)
    fresh = instability.refreshed(jax.random.key(10), problem, arms, 0.3, rounds=2, num_pairs=100)
    assert jnp.abs(fresh - offline).max() > 1e-3
    none = instability.refreshed(jax.random.key(10), problem, arms, 0.3, rounds=0, num_pairs=100)
    np.testing.assert_allclose(none, offline, rtol=1e-9)


def test_at_low_beta_a_training_budget_ends_far_from_the_optimum_without_diverging(paper_bandit):
    betas = jnp.array([0.05, 0.5])
    regret = ablations.trained_regret(
        jax.random.key(0), paper_bandit, betas, algorithms=("copg",), num_seeds=2,
        num_epochs=100, learning_rate=5e-3,
    )  # fmt: skip
    start = [
        float(exact.regret(jnp.log(paper_bandit.ref), paper_bandit._replace(beta=beta)))
        for beta in betas
    ]
    assert (regret[0] > 0.05).all() and (regret[0] < start[0]).all()
    assert (regret[1] < 0.02).all()
