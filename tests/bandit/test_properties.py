"""Properties 1 to 3, invariances, and population gradients against enumeration of sample
gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import gradients, losses
from copg_jax.bandit import exact, population


def random_policy(bandits, seed=5):
    logits = jax.random.normal(jax.random.key(seed), bandits.reward.shape)
    return logits, jax.nn.log_softmax(logits, axis=-1)


def along_logits(coefficients, logits, bandits):
    log_policy = jax.nn.log_softmax(logits, axis=-1)
    return jax.vmap(population.logit_gradient)(coefficients, log_policy, bandits)


def test_equation_7_is_the_gradient_of_l(random_bandits):
    bandits = random_bandits(20)
    logits, log_policy = random_policy(bandits)
    objective = lambda z, b: exact.copg_population_objective(jax.nn.log_softmax(z, axis=-1), b)
    autodiff = jax.jit(jax.vmap(jax.grad(objective)))(logits, bandits)
    closed = along_logits(
        jax.vmap(population.GRADIENTS["copg"])(log_policy, bandits), logits, bandits
    )
    np.testing.assert_allclose(closed, autodiff, atol=1e-12)
    step = 1e-6 * jax.random.normal(jax.random.key(0), logits.shape)
    difference = jax.vmap(objective)(logits + step, bandits) - jax.vmap(objective)(
        logits - step, bandits
    )
    np.testing.assert_allclose(2 * (closed * step).sum((1, 2)), difference, rtol=1e-5, atol=1e-12)


def test_with_one_sampler_equation_7_is_twice_a_policy_gradient_with_the_mu_baseline(
    random_bandits,
):
    bandits = random_bandits(20)
    bandits = bandits._replace(mu2=bandits.mu1)
    _, log_policy = random_policy(bandits)
    ratio = log_policy - jnp.log(bandits.ref)
    value = bandits.reward - bandits.beta[:, None, None] * ratio
    mean = (bandits.mu1 * value).sum(-1, keepdims=True)
    closed = jax.vmap(population.GRADIENTS["copg"])(log_policy, bandits)
    np.testing.assert_allclose(closed, 2 * bandits.mu1 * (value - mean), atol=1e-12)


def test_property_1_on_policy_the_expected_gradient_is_twice_that_of_j(random_bandits):
    """By enumeration of all pairs, weighted by π(y)π(y'), of the autodiff gradient of ℓ."""
    bandits = random_bandits(10)
    logits, _ = random_policy(bandits)

    def expected_sample_gradient(logits, bandit):
        policy = jax.lax.stop_gradient(jax.nn.softmax(logits, axis=-1))
        on_policy = bandit._replace(mu1=policy, mu2=policy)
        return exact.copg_population_objective(jax.nn.log_softmax(logits, axis=-1), on_policy)

    left = jax.jit(jax.vmap(jax.grad(expected_sample_gradient)))(logits, bandits)
    j = lambda z, b: exact.rl_objective(jax.nn.log_softmax(z, axis=-1), b)
    right = jax.jit(jax.vmap(jax.grad(j)))(logits, bandits)
    np.testing.assert_allclose(left, 2 * right, atol=1e-12)
    closed = jax.vmap(population.rl_gradient)(jax.nn.log_softmax(logits, axis=-1), bandits)
    np.testing.assert_allclose(along_logits(closed, logits, bandits), right, atol=1e-12)


def test_property_1_needs_on_policy_samples(random_bandits):
    bandits = random_bandits(10)
    logits, log_policy = random_policy(bandits)
    off_policy = along_logits(
        jax.vmap(population.GRADIENTS["copg"])(log_policy, bandits), logits, bandits
    )
    j = lambda z, b: exact.rl_objective(jax.nn.log_softmax(z, axis=-1), b)
    right = jax.jit(jax.vmap(jax.grad(j)))(logits, bandits)
    assert (jnp.abs(off_policy - 2 * right).max((1, 2)) > 1e-3).all()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_property_2_copg_is_rloo_and_its_expectation_the_closed_form(random_bandits, k):
    """Σ over all A^k groups of Π μ_i(y_i) × autodiff of the CoPG-k sample objective."""
    bandit = jax.tree.map(lambda leaf: leaf[0], random_bandits(1, num_contexts=1))
    reward, beta, ref = bandit.reward[0], bandit.beta, bandit.ref[0]
    logits = jax.random.normal(jax.random.key(k), (4,))
    samplers = jax.random.dirichlet(jax.random.key(10 + k), jnp.ones(4), (k,))
    groups = jnp.array(list(itertools.product(range(4), repeat=k)))
    weight = jnp.prod(samplers[jnp.arange(k)[None, :], groups], axis=-1)

    def expected(logits, objective):
        ratio = jax.nn.log_softmax(logits) - jnp.log(ref)
        return (weight * objective(ratio[groups], reward[groups], beta=beta)).sum()

    copg = jax.jit(jax.grad(lambda z: expected(z, losses.copg_objective)))(logits)
    rloo = jax.jit(jax.grad(lambda z: expected(z, losses.rloo_objective)))(logits)
    ratio = jax.nn.log_softmax(logits) - jnp.log(ref)
    closed = gradients.population_rloo_gradient(ratio, reward, samplers, beta=beta)
    np.testing.assert_allclose(copg, rloo, atol=1e-12)
    np.testing.assert_allclose(copg, closed - jnp.exp(ratio) * ref * closed.sum(), atol=1e-12)


@pytest.mark.parametrize("name", ["ipo", "dpo"])
def test_population_preference_gradients_are_expectations_of_sample_gradients(paper_bandit, name):
    sample = {"ipo": gradients.ipo_gradient, "dpo": gradients.dpo_gradient}[name]
    bandit = paper_bandit
    log_policy = jax.nn.log_softmax(jnp.array([0.3, -0.2, 0.7]))
    ratio = exact.log_ratio(log_policy, bandit)
    total = jnp.zeros(3)
    for a, b in itertools.product(range(3), repeat=2):
        win = jax.nn.sigmoid(bandit.reward[a] - bandit.reward[b])
        for preference, probability in (([1.0, 0.0], win), ([0.0, 1.0], 1 - win)):
            w = sample(ratio[jnp.array([a, b])], jnp.array(preference), beta=bandit.beta)
            total = total.at[jnp.array([a, b])].add(bandit.mu1[a] * bandit.mu2[b] * probability * w)
    np.testing.assert_allclose(population.GRADIENTS[name](log_policy, bandit), -total, atol=1e-12)


def test_property_3_ipo_is_copg_with_quarter_rewards():
    ratio = jax.random.normal(jax.random.key(0), (50, 2))
    order = jax.random.normal(jax.random.key(1), (50, 2))
    quarter = jnp.where(order > order[:, ::-1], 0.25, -0.25)
    copg = jax.jit(jax.grad(lambda x, r, b: losses.copg_objective(x, r, beta=b).sum()))
    ipo = jax.jit(jax.grad(lambda x, r, b: losses.ipo_loss(x, r, beta=b).sum()))
    for beta in (0.1, 0.5, 2.0):
        right = -ipo(ratio, order, beta) / (2 * beta)
        np.testing.assert_allclose(copg(ratio, quarter, beta), right, atol=1e-12)
        # The proof's "−1/4" for the preferred completion points the other way.
        assert jnp.abs(copg(ratio, -quarter, beta) - right).min() > 0.5


def test_l_ignores_rewards_shifted_by_a_function_of_the_context(random_bandits):
    bandits = random_bandits(10)
    _, log_policy = random_policy(bandits)
    shift = jax.random.normal(jax.random.key(2), bandits.reward.shape[:2])[..., None]
    value = jax.vmap(exact.copg_population_objective)
    shifted = bandits._replace(reward=bandits.reward + shift)
    np.testing.assert_allclose(value(log_policy, bandits), value(log_policy, shifted), atol=1e-11)
    # So that unnormalised policies (log-ratios + c(x)) are as good: the normaliser cancels.
    np.testing.assert_allclose(
        value(log_policy, bandits), value(log_policy + shift, bandits), atol=1e-11
    )


def test_swapping_the_samplers_changes_nothing(random_bandits):
    bandits = random_bandits(10)
    _, log_policy = random_policy(bandits)
    value = jax.vmap(exact.copg_population_objective)
    swapped = bandits._replace(mu1=bandits.mu2, mu2=bandits.mu1)
    np.testing.assert_allclose(value(log_policy, bandits), value(log_policy, swapped), atol=1e-12)


def test_scaling_rewards_and_beta_together_keeps_pi_star(random_bandits):
    bandits = random_bandits(10)
    scaled = bandits._replace(reward=3 * bandits.reward, beta=3 * bandits.beta)
    best, same = jax.vmap(exact.optimal_policy)(bandits), jax.vmap(exact.optimal_policy)(scaled)
    np.testing.assert_allclose(best, same, atol=1e-12)
    _, log_policy = random_policy(bandits)
    value = jax.vmap(exact.copg_population_objective)
    np.testing.assert_allclose(
        3 * value(log_policy, bandits), value(log_policy, scaled), rtol=1e-12
    )
