"""Exact quantities: recorded numbers, identities, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.bandit import exact
from copg_jax.bandit.exact import Bandit, make_bandit
from copg_jax.errors import InputError


def random_log_policies(bandits: Bandit, seed: int = 1) -> jax.Array:
    logits = jax.random.normal(jax.random.key(seed), bandits.reward.shape) * 2
    return jax.nn.log_softmax(logits, axis=-1)


def test_paper_bandit_has_the_recorded_optimum(paper_bandit):
    best = exact.optimal_policy(paper_bandit)
    np.testing.assert_allclose(jnp.exp(best), [0.70538, 0.25950, 0.03512], atol=5e-6)
    np.testing.assert_allclose(exact.rl_objective(best, paper_bandit), 2.12520, atol=5e-6)
    np.testing.assert_allclose(exact.optimal_value(paper_bandit), 2.12520, atol=5e-6)
    uniform = jnp.log(paper_bandit.ref)
    np.testing.assert_allclose(exact.regret(uniform, paper_bandit), 0.29187, atol=5e-6)
    assert exact.kl(uniform, paper_bandit) == 0


def test_everything_is_float64_and_the_mode_does_not_leak(paper_bandit):
    assert exact.regret(exact.optimal_policy(paper_bandit), paper_bandit).dtype == jnp.float64
    with jax.enable_x64(False):
        assert jnp.ones(1).dtype == jnp.float32
        with pytest.raises(InputError, match="enable_x64"):
            make_bandit([1.0, 2.0], mu1=[0.5, 0.5], mu2=[0.5, 0.5], beta=1.0)


def test_regret_is_the_gap_of_j_and_is_never_negative(random_bandits):
    bandits = random_bandits(20)
    policies = random_log_policies(bandits)
    gap = jax.vmap(exact.optimal_value)(bandits) - jax.vmap(exact.rl_objective)(policies, bandits)
    regret = jax.vmap(exact.regret)(policies, bandits)
    np.testing.assert_allclose(regret, gap, rtol=1e-10, atol=1e-12)
    assert (regret > 0).all()


def test_j_is_expected_reward_minus_beta_kl(random_bandits):
    bandits = random_bandits(20)
    policies = random_log_policies(bandits)
    reward = jax.vmap(exact.expected_reward)(policies, bandits)
    divergence = jax.vmap(exact.kl)(policies, bandits)
    j = jax.vmap(exact.rl_objective)(policies, bandits)
    np.testing.assert_allclose(j, reward - bandits.beta * divergence, rtol=1e-12)


def test_jit_and_vmap_give_the_same_numbers(random_bandits):
    bandits = random_bandits(3)
    policies = random_log_policies(bandits)
    for fn in (exact.copg_population_objective, exact.rl_objective, exact.regret):
        mapped = jax.jit(jax.vmap(fn))(policies, bandits)
        for i in range(3):
            one = fn(policies[i], jax.tree.map(lambda leaf, i=i: leaf[i], bandits))
            np.testing.assert_allclose(mapped[i], one, rtol=1e-12)


def test_l_equals_its_square_form_identically(random_bandits):
    bandits = random_bandits(50)
    policies = random_log_policies(bandits)
    by_pairs = jax.vmap(exact.copg_population_objective)(policies, bandits)
    by_squares = jax.vmap(exact.copg_square_form)(policies, bandits)
    np.testing.assert_allclose(by_pairs, by_squares, rtol=1e-11, atol=1e-12)


def test_equation_15_holds_for_any_value_with_the_corrected_normaliser(random_bandits):
    """β ℓ_CoPG = ½ΔR² − ½(ΔR − ΔV)², with V no longer tied to a policy."""
    bandits = random_bandits(20)
    value = jax.random.normal(jax.random.key(3), bandits.reward.shape) * 3
    policies = jax.vmap(exact.policy_from_value)(value, bandits)
    np.testing.assert_allclose(jnp.exp(policies).sum(-1), 1.0, rtol=1e-12)

    def right_side(value, bandit):
        values, rewards = exact.all_pairs(value), exact.all_pairs(bandit.reward)
        value_gap, reward_gap = values[..., 0] - values[..., 1], rewards[..., 0] - rewards[..., 1]
        square = 0.5 * reward_gap**2 - 0.5 * (reward_gap - value_gap) ** 2
        meet = bandit.mu1[..., :, None] * bandit.mu2[..., None, :]
        return (bandit.context_prob * (meet * square).sum((-2, -1))).sum()

    left = bandits.beta * jax.vmap(exact.copg_population_objective)(policies, bandits)
    np.testing.assert_allclose(left, jax.vmap(right_side)(value, bandits), rtol=1e-10, atol=1e-12)


def test_the_printed_normaliser_of_equation_14_gives_no_policy(paper_bandit):
    """As printed, β ln(π/π_ref) = V − ln Z_V with Z_V = β Σ π_ref exp V: the π does not sum to
    1."""
    value, beta = paper_bandit.reward, paper_bandit.beta
    printed_z = beta * (paper_bandit.ref * jnp.exp(value)).sum()
    printed = paper_bandit.ref * jnp.exp((value - jnp.log(printed_z)) / beta)
    assert abs(printed.sum() - 1) > 0.1


def test_the_maximiser_by_linear_algebra_is_pi_star(random_bandits):
    bandits = random_bandits(30)

    def solve(bandit):
        gap = bandit.reward[..., :, None] - bandit.reward[..., None, :]
        weights = exact.pair_weights(bandit.mu1, bandit.mu2)
        ratio = exact.copg_maximiser(weights, exact.reward_pull(weights, gap), bandit.beta)
        return jax.nn.log_softmax(jnp.log(bandit.ref) + ratio, axis=-1)

    distance = jax.vmap(exact.total_variation)(
        jax.vmap(solve)(bandits), jax.vmap(exact.optimal_policy)(bandits)
    )
    assert distance.max() < 1e-10


@pytest.mark.parametrize(
    ("mu1", "mu2", "sets"),
    [
        ([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0, 0, 1]),  # arm 2 is never drawn
        ([0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0, 0, 0]),  # supports differ, yet pairs connect all
        ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0, 0, 1]),
        ([0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0, 0, 0]),
    ],
)
def test_pairs_connect_the_arms_that_l_can_compare(mu1, mu2, sets):
    weights = exact.pair_weights(jnp.array(mu1), jnp.array(mu2))
    np.testing.assert_array_equal(exact.pair_components(weights), sets)
    flat_directions = (jnp.abs(jnp.linalg.eigvalsh(exact.pair_laplacian(weights))) < 1e-12).sum()
    assert flat_directions == len(set(sets))  # the shift of all logits, and one more a further set


GOOD = {"reward": [1.0, 2.0], "mu1": [0.5, 0.5], "mu2": [0.4, 0.6], "beta": 1.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta": 0.0}, ["beta", "positive", "0.0"]),
        ({"beta": -1.0}, ["beta", "-1.0"]),
        ({"beta": float("nan")}, ["beta", "nan"]),
        ({"mu1": [0.0, 1.0]}, ["mu1", "arm 0", "support"]),
        ({"mu2": [1.5, -0.5]}, ["mu2", "arm 1", "-0.5"]),
        ({"ref": [0.0, 1.0]}, ["ref", "arm 0", "support"]),
        ({"mu1": [0.5, 0.6]}, ["mu1", "sum to 1", "1.1"]),
        ({"mu2": [0.2, 0.3, 0.5]}, ["mu2", "(2,)", "(3,)"]),
        ({"reward": [1.0]}, ["reward", "at least 2 arms"]),
        ({"reward": [1.0, float("inf")]}, ["reward", "finite"]),
        ({"context_prob": [1.0]}, ["context_prob", "()"]),
    ],
)
def test_bad_problems_are_refused_with_the_field_and_the_reason(change, words):
    with pytest.raises(InputError) as error:
        make_bandit(**(GOOD | change))
    for word in words:
        assert word in str(error.value)


def test_a_zero_probability_names_its_context():
    with pytest.raises(ValueError, match="context 1, arm 0"):
        make_bandit(
            [[1.0, 2.0], [1.0, 2.0]],
            mu1=[[0.5, 0.5], [0.0, 1.0]],
            mu2=[[0.5, 0.5], [0.5, 0.5]],
            beta=1.0,
        )
