"""Closed forms against autodiff of the losses, finite differences in float64, and recorded numbers.

1. sample gradients, Eq. (9), (16) and RLOO-k;
2. the paper's three properties;
3. population gradients, Eq. (7), on the bandit of Sec. 5.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import gradients, losses

BETA = 0.4
BASELINE = 0.3

ORIGIN = jnp.array([0, 1, 1, 0, 2])


def of_groups(x):
    """Origins of groups of k completions."""
    return jnp.broadcast_to(ORIGIN[: x.shape[-1]], x.shape)


PAIRS = {  # name: (closed form, function that it differentiates)
    "copg": (gradients.copg_gradient, losses.copg_objective),
    "cross_copg": (
        lambda x, r, beta: gradients.cross_copg_gradient(x, r, of_groups(x), beta=beta),
        lambda x, r, beta: losses.cross_copg_objective(x, r, beta=beta, origin=of_groups(x)),
    ),
    "rloo": (gradients.rloo_gradient, losses.rloo_objective),
    "ipo": (gradients.ipo_gradient, losses.ipo_loss),
    "dpo": (gradients.dpo_gradient, losses.dpo_loss),
    "pg": (
        functools.partial(gradients.pg_gradient, baseline=BASELINE),
        functools.partial(losses.pg_objective, baseline=BASELINE),
    ),
}
CASES = [
    ("copg", 2),
    ("copg", 5),
    ("cross_copg", 3),
    ("cross_copg", 5),
    ("rloo", 4),
    ("pg", 3),
    ("ipo", 2),
    ("dpo", 2),
]

# The bandit of Sec. 5.
REWARD = np.array([2.5, 2.0, 1.0])
MU1, MU2 = np.array([0.1, 0.2, 0.7]), np.array([0.05, 0.05, 0.9])
BANDIT_BETA = 0.5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_groups(k: int, *, batch: int = 5) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(k)
    return jnp.asarray(rng.normal(size=(batch, k)) * 2), jnp.asarray(rng.normal(size=(batch, k)))


def central_difference(fn, x, step=1e-4):
    """(f(x + h) − f(x − h)) / 2h in every coordinate of the last axis; fn: [..., K] → [...]."""
    columns = [
        (fn(x + shift) - fn(x - shift)) / (2 * step)
        for shift in step * jnp.eye(x.shape[-1])[:, None, :]
    ]
    return jnp.stack(columns, axis=-1)


# --- 1. sample gradients ---


@pytest.mark.parametrize(("name", "k"), CASES)
def test_closed_form_equals_autodiff_of_the_loss(name, k):
    closed_form, loss = PAIRS[name]
    x, r = random_groups(k)
    autodiff = jax.jit(jax.grad(lambda x: loss(x, r, beta=BETA).sum()))(x)
    np.testing.assert_allclose(closed_form(x, r, beta=BETA), autodiff, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "k"), CASES)
def test_closed_form_equals_finite_differences(name, k):
    closed_form, loss = PAIRS[name]
    x, r = random_groups(k)
    if name in ("rloo", "pg"):  # surrogates: what autodiff does not see is held where it is
        weight = closed_form(x, r, beta=BETA)
        fn = jax.jit(lambda x: (weight * x).sum(-1))
        np.testing.assert_allclose(fn(x), loss(x, r, beta=BETA), rtol=1e-10, atol=1e-12)
    else:
        fn = jax.jit(lambda x: loss(x, r, beta=BETA))
    expected = central_difference(fn, x)
    np.testing.assert_allclose(closed_form(x, r, beta=BETA), expected, rtol=1e-6, atol=1e-8)


def test_closed_forms_equal_recorded_numbers():
    # By hand, λ = (1, 0, −2), R = (3, 1, 2), β = ½: R^π_β = R − λ/2 = (5/2, 1, 3).
    # Less the mean of the two others: 5/2 − 2 = ½, 1 − 11/4 = −7/4, 3 − 7/4 = 5/4.
    x, r = jnp.array([1.0, 0.0, -2.0]), jnp.array([3.0, 1.0, 2.0])
    np.testing.assert_allclose(gradients.regularized_reward(x, r, beta=0.5), [2.5, 1.0, 3.0])
    for closed_form in (gradients.copg_gradient, gradients.rloo_gradient):
        np.testing.assert_allclose(closed_form(x, r, beta=0.5), [0.5, -1.75, 1.25])
    # Origins (0, 1, 1): the partners are 2, 1 and 1, on average 4/3. With R^π_β as above:
    # ¾(3/2 − 1/2), ¾(1 − 5/2), ¾(3 − 5/2).
    cross = gradients.cross_copg_gradient(x, r, jnp.array([0, 1, 1]), beta=0.5)
    np.testing.assert_allclose(cross, [0.75, -1.125, 0.375])
    np.testing.assert_allclose(gradients.pg_gradient(x, r, beta=0.5, baseline=1.0), [1.5, 0.0, 2.0])
    # The pair (1, 3) has Δ = 3, ΔR = 1; preferred is the first.
    # Eq. (9): 1 − 3/2 = −½.  IPO: −2β(½ − 3/2) = 1.  DPO: −½ σ(−3/2) = −½ · 0.182425524.
    pair = jnp.array([1.0, -2.0]), jnp.array([3.0, 2.0])
    np.testing.assert_allclose(gradients.copg_gradient(*pair, beta=0.5), [-0.5, 0.5])
    np.testing.assert_allclose(gradients.ipo_gradient(*pair, beta=0.5), [1.0, -1.0])
    dpo = 0.5 * 0.182425524
    np.testing.assert_allclose(gradients.dpo_gradient(*pair, beta=0.5), [-dpo, dpo], rtol=1e-8)


def test_halving_beta_in_the_gradient_is_not_the_gradient():
    """Eq. (5) has β/2, Eq. (9) has β: finite differences tell them apart."""
    x, r = random_groups(2)
    objective = jax.jit(lambda x: losses.copg_objective(x, r, beta=BETA))
    wrong = gradients.copg_gradient(x, r, beta=BETA / 2)
    assert np.abs(wrong - central_difference(objective, x)).min() > 1e-3


@pytest.mark.parametrize("name", ["ipo", "dpo"])
def test_ties_and_swaps_of_a_pair(name):
    closed_form, _ = PAIRS[name]
    x, r = random_groups(2)
    np.testing.assert_array_equal(closed_form(x, jnp.ones_like(r), beta=BETA), jnp.zeros_like(x))
    swapped = closed_form(x[:, ::-1], r[:, ::-1], beta=BETA)
    np.testing.assert_allclose(swapped, closed_form(x, r, beta=BETA)[:, ::-1], rtol=1e-12)


@pytest.mark.parametrize("name", ["copg", "cross_copg", "rloo", "pg"])
def test_gradients_refuse_rewards_of_another_shape(name):
    with pytest.raises(AssertionError, match="shape"):
        PAIRS[name][0](jnp.zeros((2, 3)), jnp.zeros((2, 2)), beta=BETA)


@pytest.mark.parametrize("name", ["ipo", "dpo"])
def test_pair_gradients_refuse_groups_that_are_no_pairs(name):
    with pytest.raises(AssertionError, match="2"):
        PAIRS[name][0](jnp.zeros((2, 3)), jnp.zeros((2, 3)), beta=BETA)


@pytest.mark.parametrize("name", ["ipo", "dpo"])
def test_pair_gradients_refuse_rewards_of_another_shape(name):
    with pytest.raises(AssertionError, match="shape"):
        PAIRS[name][0](jnp.zeros((4, 2)), jnp.zeros((4, 3)), beta=BETA)


# --- 2. the paper's properties ---


def bandit_objective(log_pi, log_ref, reward, beta):
    """J(π), Eq. (2)."""
    return (jnp.exp(log_pi) * (reward - beta * (log_pi - log_ref))).sum()


def bandit():
    """A policy and a reference with full support, as logits of the policy and ln π_ref."""
    rng = np.random.default_rng(3)
    logits, ref_logits = jnp.asarray(rng.normal(size=(2, 3)))
    return logits, jax.nn.log_softmax(ref_logits)


def test_property_1_on_policy_the_expected_copg_gradient_is_twice_the_policy_gradient():
    logits, log_ref = bandit()
    log_pi, score = jax.nn.log_softmax(logits), jax.jacobian(jax.nn.log_softmax)(logits)
    pi = np.exp(log_pi)
    total = np.zeros(3)
    for i in range(3):
        for j in range(3):  # Eq. (9) for the pair of arms (i, j), which comes with π(i)π(j)
            arms = np.array([i, j])
            weight = gradients.copg_gradient((log_pi - log_ref)[arms], REWARD[arms], beta=BETA)
            total += pi[i] * pi[j] * np.asarray(weight @ score[arms])
    slope = jax.grad(
        lambda logits: bandit_objective(jax.nn.log_softmax(logits), log_ref, REWARD, BETA)
    )(logits)
    np.testing.assert_allclose(total, 2 * slope, rtol=1e-10)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_property_2_copg_gradient_is_rloo_written_as_leave_one_out(k):
    x, r = random_groups(k)
    value = np.asarray(r - BETA * x)
    expected = [
        [row[i] - np.mean([row[j] for j in range(k) if j != i]) for i in range(k)] for row in value
    ]
    np.testing.assert_allclose(gradients.rloo_gradient(x, r, beta=BETA), expected, rtol=1e-10)
    np.testing.assert_allclose(gradients.copg_gradient(x, r, beta=BETA), expected, rtol=1e-10)


def test_property_3_copg_at_rewards_of_a_quarter_is_ipo_over_minus_two_beta():
    """With the missing ∇ put in, and +¼ for the preferred completion: −¼ points the other way."""
    x, r = random_groups(2)
    ipo = gradients.ipo_gradient(x, r, beta=BETA)
    quarter = jnp.sign(r - r[:, ::-1]) / 4
    np.testing.assert_allclose(
        gradients.copg_gradient(x, quarter, beta=BETA), -ipo / (2 * BETA), rtol=1e-10
    )
    wrong = gradients.copg_gradient(x, -quarter, beta=BETA)
    assert np.abs(wrong + ipo / (2 * BETA)).min() > 0.9  # off by 1 = twice ½, whatever Δ is


@pytest.mark.parametrize("k", [2, 4])
def test_coefficients_of_a_group_sum_to_zero_but_those_of_the_policy_gradient_do_not(k):
    x, r = random_groups(k)
    np.testing.assert_allclose(gradients.copg_gradient(x, r, beta=BETA).sum(-1), 0.0, atol=1e-12)
    assert np.abs(gradients.pg_gradient(x, r, beta=BETA, baseline=0.0).sum(-1)).min() > 1e-3


# --- 3. population gradients ---


def on_logits(coefficients, pi):
    """∇ in logits of Σ_a w_a ∇ ln π(a): ∂ln π(a)/∂z_b = 1[a = b] − π(b)."""
    return coefficients - pi * coefficients.sum()


def population_objective(logits, log_ref, reward, mu1, mu2, beta):
    """L(π) of Eq. (6), as the expectation of the sample objective over all pairs of arms."""
    log_ratio = jax.nn.log_softmax(logits) - log_ref
    first, second = jnp.meshgrid(jnp.arange(3), jnp.arange(3), indexing="ij")
    arms = jnp.stack([first, second], axis=-1)
    sample = losses.copg_objective(log_ratio[arms], jnp.asarray(reward)[arms], beta=beta)
    return (mu1[:, None] * mu2[None, :] * sample).sum()


def test_equation_7_is_the_gradient_of_equation_6():
    logits, log_ref = bandit()
    args = (log_ref, REWARD, MU1, MU2, BETA)
    log_pi = jax.nn.log_softmax(logits)
    weight = gradients.population_copg_gradient(
        log_pi - log_ref, jnp.asarray(REWARD), MU1, MU2, beta=BETA
    )
    fn = jax.jit(lambda logits: population_objective(logits, *args))
    closed_form = on_logits(weight, jnp.exp(log_pi))
    np.testing.assert_allclose(closed_form, jax.grad(fn)(logits), rtol=1e-10)
    finite = central_difference(jax.vmap(fn), logits[None])[0]
    np.testing.assert_allclose(closed_form, finite, rtol=1e-6)
    # Eq. (7) is for a common baseline of the *other* distribution; with its own it is another one.
    value = REWARD - BETA * np.asarray(log_pi - log_ref)
    own = MU1 * (value - MU1 @ value) + MU2 * (value - MU2 @ value)
    assert np.abs(own - weight).max() > 1e-3


def test_copg_is_stationary_at_the_optimum_whatever_the_data():
    # π* ∝ exp(R/β) = exp(5, 4, 2): 148.413159 + 54.598150 + 7.389056 = 210.400365.
    optimum = jnp.array([148.413159, 54.598150, 7.389056]) / 210.400365
    np.testing.assert_allclose(optimum, [0.70538, 0.25950, 0.03512], atol=1e-5)
    log_ratio = jnp.log(optimum) - jnp.log(1 / 3)
    reward = jnp.asarray(REWARD)
    for mu1, mu2 in [(MU1, MU2), (MU2, MU1), (MU1, MU1), (np.ones(3) / 3, MU2)]:
        weight = gradients.population_copg_gradient(log_ratio, reward, mu1, mu2, beta=BANDIT_BETA)
        np.testing.assert_allclose(weight, 0.0, atol=1e-8)
    wrong = gradients.population_copg_gradient(log_ratio, reward, MU1, MU2, beta=BANDIT_BETA / 2)
    assert np.abs(on_logits(wrong, optimum)).max() > 1e-2


def test_off_policy_the_policy_gradient_with_value_baseline_stops_elsewhere():
    """Recorded fixed point of both arms of the pair together: (0.8115, 0.1675, 0.0209)."""
    reward = jnp.asarray(REWARD)

    def slope(pi):
        log_ratio = jnp.log(pi) - jnp.log(1 / 3)
        weight = gradients.population_pg_gradient(
            log_ratio, reward, MU1 + MU2, beta=BANDIT_BETA, baseline=pi @ reward
        )
        return np.abs(on_logits(weight, pi)).max()

    biased = jnp.array([0.8115, 0.1675, 0.0209])
    optimum = jnp.array([0.70538, 0.25950, 0.03512])
    assert slope(biased / biased.sum()) < 1e-3
    assert slope(optimum) > 1e-2


def test_on_policy_the_policy_gradient_is_that_of_j_for_every_baseline():
    logits, log_ref = bandit()
    log_pi = jax.nn.log_softmax(logits)
    pi = jnp.exp(log_pi)
    expected = central_difference(
        jax.vmap(lambda z: bandit_objective(jax.nn.log_softmax(z), log_ref, REWARD, BETA)),
        logits[None],
    )[0]
    for baseline in (0.0, 1.0, -7.0):
        weight = gradients.population_pg_gradient(
            log_pi - log_ref, jnp.asarray(REWARD), pi, beta=BETA, baseline=baseline
        )
        np.testing.assert_allclose(on_logits(weight, pi), expected, rtol=1e-6, atol=1e-9)
    with_mu = [
        gradients.population_pg_gradient(
            log_pi - log_ref, jnp.asarray(REWARD), MU1, beta=BETA, baseline=b
        )
        for b in (0.0, 1.0)
    ]
    assert np.abs(on_logits(with_mu[0] - with_mu[1], pi)).max() > 1e-2
