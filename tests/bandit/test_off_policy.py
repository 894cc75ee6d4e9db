"""Which losses are right off-policy: exact fixed points, for data from π_ref and from another µ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import losses, relatives
from copg_jax.bandit import exact, population
from copg_jax.bandit.exact import Bandit

UNIFORM, OTHER = (1 / 3, 1 / 3, 1 / 3), (0.1, 0.2, 0.7)

# Total variation between the end and π* on the bandit of Sec. 5 with both arms of a pair from µ:
# µ = π_ref, then µ = (0.1, 0.2, 0.7).
DISTANCES = {
    "copg": (0.0, 0.0),
    "rloo": (0.0, 0.0),
    "opmd": (0.0856, 0.2833),
    "oapl": (0.0, 0.1748),
}
# The same for groups of k instead of groups without number.
GROUPS = {
    ("copg_loss", 2): (0.0, 0.0),
    ("copg_loss", 5): (0.0, 0.0),
    ("opmd_loss", 2): (0.1835, 0.3132),
    ("opmd_loss", 8): (0.1040, 0.2893),
    ("oapl_loss", 2): (0.1628, 0.2967),
    ("oapl_loss", 8): (0.0326, 0.2167),
}


def sampled_from(mu) -> Bandit:
    return exact.make_bandit([2.5, 2.0, 1.0], mu1=mu, mu2=mu, beta=0.5)


def distance(coefficients, bandit: Bandit) -> jax.Array:
    return exact.total_variation(
        population.end_of(coefficients, bandit), exact.optimal_policy(bandit)
    )


@pytest.mark.parametrize("name", DISTANCES)
def test_each_loss_ends_at_the_recorded_distance_from_the_optimum(name):
    got = [distance(population.GRADIENTS[name], sampled_from(mu)) for mu in (UNIFORM, OTHER)]
    np.testing.assert_allclose(got, DISTANCES[name], atol=6e-5)


@pytest.mark.parametrize(("name", "k"), GROUPS)
def test_groups_of_k_end_at_the_recorded_distance_from_the_optimum(name, k):
    """CoPG is right for every k and µ; a baseline from few samples is another bias."""
    loss = getattr(losses if name == "copg_loss" else relatives, name)
    coefficients = functools.partial(population.group_coefficients, loss, k=k)
    got = [distance(coefficients, sampled_from(mu)) for mu in (UNIFORM, OTHER)]
    np.testing.assert_allclose(got, GROUPS[name, k], atol=6e-5)


def test_the_value_of_the_reference_is_right_for_any_reference_that_the_data_come_from():
    reward, ref = [2.5, 2.0, 1.0], [0.5, 0.1, 0.4]
    bandit = exact.make_bandit(reward, mu1=ref, mu2=ref, ref=ref, beta=0.5)
    assert distance(population.GRADIENTS["oapl"], bandit) < 1e-9
    assert distance(population.GRADIENTS["opmd"], bandit) > 0.05
    uniform = bandit._replace(ref=jnp.full(3, 1 / 3))
    assert distance(population.GRADIENTS["oapl"], uniform) > 0.02


@pytest.mark.parametrize("mu", [UNIFORM, OTHER])
def test_groups_of_copg_follow_equation_7(mu):
    bandit = sampled_from(mu)
    log_policy = jax.nn.log_softmax(jnp.array([0.3, -0.2, 0.7]))
    for k in (2, 3):
        got = population.group_coefficients(losses.copg_loss, log_policy, bandit, k=k)
        expected = k / 2 * population.GRADIENTS["copg"](log_policy, bandit)
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "loss"), [("opmd", relatives.opmd_loss), ("oapl", relatives.oapl_loss)]
)
def test_large_groups_approach_the_population(name, loss):
    bandit = sampled_from(OTHER)
    log_policy = jax.nn.log_softmax(jnp.array([0.3, -0.2, 0.7]))

    def error(k):
        got = population.group_coefficients(loss, log_policy, bandit, k=k) / k
        expected = 0.5 * bandit.beta * population.GRADIENTS[name](log_policy, bandit)
        return np.abs(got - expected).max()

    assert error(8) < 0.65 * error(4) < 0.65 * 0.65 * error(2)


# --- AsymRE and TOPR ---


@pytest.mark.parametrize(
    ("delta_v", "expected"),
    [
        (0.0, (0.0, 0.0)),
        (-0.1, (0.0506, 0.1703)),
        (-0.5, (0.1614, 0.3823)),
        (0.1, (0.0681, 0.2315)),
    ],
)
def test_asymre_is_right_without_its_shift_alone(delta_v, expected):
    coefficients = functools.partial(population.asymre, delta_v=delta_v)
    got = [distance(coefficients, sampled_from(mu)) for mu in (UNIFORM, OTHER)]
    np.testing.assert_allclose(got, expected, atol=6e-5)


@pytest.mark.parametrize("delta_v", [-1.0, -0.1])
@pytest.mark.parametrize("mu", [UNIFORM, OTHER])
def test_asymre_without_kl_ends_at_its_closed_form(mu, delta_v):
    """[a − τ]⁺/−δV with a = µ(R − V) and τ such that it sums to 1: π_ref is not in it."""
    bandit = sampled_from(mu)
    a = bandit.mu1 * (bandit.reward - (bandit.mu1 * bandit.reward).sum() - delta_v)
    low, high = a.min() - 1.0, a.max()
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if jnp.maximum(a - tau, 0).sum() > -delta_v else (low, tau)
    without_kl = bandit._replace(beta=jnp.asarray(0.0))
    end = population.end_of(functools.partial(population.asymre, delta_v=delta_v), without_kl)
    np.testing.assert_allclose(jnp.exp(end), jnp.maximum(a - tau, 0) / -delta_v, atol=1e-6)


def test_topr_on_positive_rewards_ends_at_mu_weighted_by_reward():
    for mu in (UNIFORM, OTHER):
        bandit = sampled_from(mu)
        end = population.end_of(functools.partial(population.topr, baseline=0.0), bandit)
        weighted = bandit.mu1 * bandit.reward
        np.testing.assert_allclose(jnp.exp(end), weighted / weighted.sum(), atol=1e-9)
        assert exact.total_variation(end, exact.optimal_policy(bandit)) > 0.2


def test_topr_about_the_mean_reward_ends_at_what_beats_it():
    """The arm below the mean is unlearned until π no longer writes it; π_ref is not in it."""
    for mu, expected in ((UNIFORM, [0.8, 0.2, 0.0]), (OTHER, [0.46939, 0.53061, 0.0])):
        bandit = sampled_from(mu)
        baseline = (bandit.mu1 * bandit.reward).sum()
        end = population.end_of(functools.partial(population.topr, baseline=baseline), bandit)
        np.testing.assert_allclose(jnp.exp(end), expected, atol=1e-5)
