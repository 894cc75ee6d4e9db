"""Theorem 1, by optimisation on random instances; and what fails when its assumption does."""

import jax
import jax.numpy as jnp
import numpy as np

from copg_jax.bandit import exact, population


def maximise(objective, logits, bandit):
    """Follows the autodiff gradient of an objective of ln π to its end."""
    gradient = jax.grad(lambda z: objective(jax.nn.log_softmax(z, axis=-1), bandit))
    return population.fixed_point(gradient, logits)


def test_the_maximiser_of_l_is_pi_star_from_every_start_and_that_of_j_too(random_bandits):
    bandits = random_bandits(16)

    @jax.jit
    @jax.vmap
    def distances(starts, bandit):
        find = jax.vmap(lambda z: maximise(exact.copg_population_objective, z, bandit))
        of_l = jax.vmap(exact.total_variation, (0, None))(
            find(starts), exact.optimal_policy(bandit)
        )
        # J is not concave in the logits and flat where arms are rare, so it is followed from π_ref
        # only.
        of_j = maximise(exact.rl_objective, jnp.log(bandit.ref), bandit)
        return of_l, exact.total_variation(of_j, exact.optimal_policy(bandit))

    starts = jax.random.normal(jax.random.key(0), (16, 5, 3, 4)) * 3
    of_l, of_j = distances(starts, bandits)
    assert of_l.max() < 1e-6
    assert of_j.max() < 1e-6


def test_l_is_strictly_concave_in_the_logits_up_to_shifts(random_bandits):
    """Uniqueness: the Hessian is −β Laplacian, the same everywhere, with one zero per context."""
    bandits = random_bandits(10, num_contexts=1)

    def spectra(logits, bandit):
        objective = lambda z: exact.copg_population_objective(
            jax.nn.log_softmax(z, axis=-1), bandit
        )
        hessian = jax.hessian(objective)(logits)[0, :, 0, :]
        weights = exact.pair_weights(bandit.mu1, bandit.mu2)[0]
        expected = -bandit.beta * bandit.context_prob[0] * exact.pair_laplacian(weights)
        return hessian, expected, jnp.linalg.eigvalsh(hessian)

    for seed in range(2):
        logits = jax.random.normal(jax.random.key(seed), bandits.reward.shape)
        hessian, expected, eigenvalues = jax.jit(jax.vmap(spectra))(logits, bandits)
        np.testing.assert_allclose(hessian, expected, atol=1e-10)
        assert (eigenvalues[:, :-1] < -1e-6).all()
        np.testing.assert_allclose(eigenvalues[:, -1], 0, atol=1e-10)


def test_pi_star_beats_random_policies_on_l(random_bandits):
    bandits = random_bandits(20)
    best = jax.vmap(exact.copg_population_objective)(
        jax.vmap(exact.optimal_policy)(bandits), bandits
    )
    other = jax.random.normal(jax.random.key(9), bandits.reward.shape)
    policies = jax.nn.log_softmax(other, axis=-1)
    assert (best > jax.vmap(exact.copg_population_objective)(policies, bandits)).all()


def test_stopping_the_weight_gradient_solves_half_the_beta(random_bandits):
    """The trap: with R^π_{β/2} as a constant weight the end is π*(β/2), not π*(β)."""
    bandits = random_bandits(8)

    def stopped(log_policy, bandit):
        half = bandit._replace(beta=bandit.beta / 2)
        return population.GRADIENTS["copg"](log_policy, half)

    def stopped_by_autodiff(logits, bandit):
        def objective(z):
            ratio = exact.all_pairs(exact.log_ratio(jax.nn.log_softmax(z, axis=-1), bandit))
            weight = jax.lax.stop_gradient(
                exact.all_pairs(bandit.reward) - 0.5 * bandit.beta * ratio
            )
            loss = (weight[..., 0] - weight[..., 1]) * (ratio[..., 0] - ratio[..., 1])
            meet = bandit.mu1[..., :, None] * bandit.mu2[..., None, :]
            return (bandit.context_prob * (meet * loss).sum((-2, -1))).sum()

        return jax.grad(objective)(logits)

    def by_hand(logits, bandit):
        log_policy = jax.nn.log_softmax(logits, axis=-1)
        return population.logit_gradient(stopped(log_policy, bandit), log_policy, bandit)

    start = jax.random.normal(jax.random.key(4), bandits.reward.shape)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(by_hand))(start, bandits),
        jax.jit(jax.vmap(stopped_by_autodiff))(start, bandits),
        atol=1e-10,
    )
    # Followed by hand: the Newton steps need derivatives of the direction, which stop_gradient
    # would hide.
    find = jax.jit(jax.vmap(lambda z, b: population.fixed_point(lambda y: by_hand(y, b), z)))
    end = find(start, bandits)
    half = jax.vmap(exact.optimal_policy)(bandits._replace(beta=bandits.beta / 2))
    right = jax.vmap(exact.optimal_policy)(bandits)
    assert jax.vmap(exact.total_variation)(end, half).max() < 1e-6
    assert jax.vmap(exact.total_variation)(end, right).min() > 1e-3


def test_an_arm_without_data_keeps_its_logit_and_costs_regret(paper_bandit):
    """Support broken: L is flat along that arm, so the end depends on the start, and is not π*."""
    broken = paper_bandit._replace(mu1=jnp.array([0.0, 0.3, 0.7]), mu2=jnp.array([0.0, 0.1, 0.9]))
    weights = exact.pair_weights(broken.mu1, broken.mu2)
    assert exact.pair_components(weights).tolist() == [0, 1, 1]
    find = jax.jit(lambda z: maximise(exact.copg_population_objective, z, broken))
    regrets = []
    for first in (-2.0, 0.0, 1.0):
        end = find(jnp.array([first, 0.0, 0.0]))
        np.testing.assert_allclose(end[1] - end[2], 2.0, atol=1e-6)  # ΔR/β where there are pairs
        regrets.append(float(exact.regret(end, broken)))
    assert min(regrets) > 1e-3
    assert max(regrets) - min(regrets) > 0.1


def test_different_supports_still_determine_pi_star_when_pairs_connect_the_arms(paper_bandit):
    """Equal supports are sufficient, not necessary: a connected graph of pairs is enough."""
    crossed = paper_bandit._replace(mu1=jnp.array([0.5, 0.5, 0.0]), mu2=jnp.array([0.0, 0.0, 1.0]))
    end = maximise(exact.copg_population_objective, jnp.array([1.0, -1.0, 0.5]), crossed)
    assert exact.total_variation(end, exact.optimal_policy(crossed)) < 1e-6
