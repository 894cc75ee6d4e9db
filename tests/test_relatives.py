"""Relatives of CoPG: values, gradients by three oracles, and which of them CoPG is.

1. values: literal formulas in NumPy and recorded numbers;
2. gradients: closed form, autodiff, finite differences, recorded numbers;
3. what they add to CoPG, and the losses of other papers that add nothing.

Masks are tested with those of `losses`, fixed points with the bandit.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import gradients, losses, relatives

BETA = 0.4
KS = pytest.mark.parametrize("k", [2, 3, 5])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_groups(k: int, *, batch: int = 6) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(k)
    return jnp.asarray(rng.normal(size=(batch, k)) * 2), jnp.asarray(rng.normal(size=(batch, k)))


@functools.cache
def slope(fn):
    return jax.jit(jax.grad(lambda x, r: fn(x, r).sum()))


def grad(fn, log_ratio, reward):
    """Gradient of the sum over groups with respect to the first argument."""
    return slope(fn)(log_ratio, reward)


def copg(log_ratio, reward):
    return losses.copg_objective(log_ratio, reward, beta=BETA)


def regression(log_ratio, reward):
    return relatives.regression_loss(log_ratio, reward, beta=BETA, baseline=0.3)


def opmd(log_ratio, reward):
    return relatives.opmd_loss(log_ratio, reward, beta=BETA)


def oapl(log_ratio, reward):
    return relatives.oapl_loss(log_ratio, reward, beta=BETA)


def asymre(log_ratio, reward):
    return relatives.asymre_objective(log_ratio, reward, beta=BETA, delta_v=-0.1)


def topr(logp, reward):
    return relatives.topr_objective(logp, mu_logp(reward), reward)


MU_LOGP = np.array([-0.5, 0.7, -1.0, 0.2, 0.1])


def mu_logp(reward: jax.Array) -> jax.Array:
    """ln µ of each completion, the same in every group."""
    return jnp.broadcast_to(MU_LOGP[: reward.shape[-1]], reward.shape)


def value_of_reference(reward: jax.Array) -> jax.Array:
    """β ln mean e^{R/β} of each group."""
    return BETA * jnp.log(jnp.exp(reward / BETA).mean(-1))


# --- 1. values ---


@KS
def test_regressions_are_half_the_sum_of_squares_about_their_baselines(k):
    x, r = map(np.asarray, random_groups(k))
    baselines = {
        regression: np.full(6, 0.3),
        opmd: r.mean(-1),
        oapl: BETA * np.log(np.mean(np.exp(r / BETA), -1)),
    }
    for loss, baseline in baselines.items():
        expected = [
            sum((r[g, i] - baseline[g] - BETA * x[g, i]) ** 2 / 2 for i in range(k))
            for g in range(6)
        ]
        np.testing.assert_allclose(loss(jnp.asarray(x), jnp.asarray(r)), expected, rtol=1e-11)


@KS
def test_asymre_without_kl_is_the_printed_sum_of_advantages(k):
    """Σ(r − (V̂ + δV))·ln π, with V̂ the mean reward of the group."""
    x, r = map(np.asarray, random_groups(k))
    expected = [
        sum((r[g, i] - (np.mean(r[g]) - 0.1)) * x[g, i] for i in range(k)) for g in range(6)
    ]
    got = relatives.asymre_objective(jnp.asarray(x), jnp.asarray(r), beta=0.0, delta_v=-0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@KS
def test_topr_weighs_negative_rewards_alone_by_a_ratio_of_at_most_one(k):
    logp, r = map(np.asarray, random_groups(k))

    def term(logp, mu_logp, reward):
        taper = min(max(np.exp(logp - mu_logp), 0.0), 1.0) if reward < 0 else 1.0
        return taper * reward * logp

    expected = [sum(term(logp[g, i], MU_LOGP[i], r[g, i]) for i in range(k)) for g in range(6)]
    np.testing.assert_allclose(topr(jnp.asarray(logp), jnp.asarray(r)), expected, rtol=1e-10)


def test_values_and_gradients_equal_recorded_numbers():
    # By hand, λ = (1, 0, −2), R = (3, 1, 2), β = ½, so R − λ/2 = (5/2, 1, 3).
    # b = 1: (3/2, 0, 2), squares 25/4, half 25/8; gradient −½(3/2, 0, 2).
    # Mean reward 2: (½, −1, 1), squares 9/4, half 9/8; gradient −½(½, −1, 1).
    # ½ ln((e⁶ + e² + e⁴)/3) = 2.522160: (−0.022160, −1.522160, 0.477840), half squares 1.272896.
    # AsymRE: mean R − λ/2 is 13/6, less ½ is 5/3: (5/6, −2/3, 4/3)·λ = 5/6 − 8/3 = −11/6.
    # TOPR of ln π = (−1, −3, 0), ln µ = (−2, −1, −1), R = (2, −1, −3): weights
    # (2, −e^−2, −3)·ln π = −2 + 3·0.135335 = −1.593994.
    x, r = jnp.array([1.0, 0.0, -2.0]), jnp.array([3.0, 1.0, 2.0])
    got = relatives.regression_loss(x, r, beta=0.5, baseline=1.0)
    np.testing.assert_allclose(got, 25 / 8, rtol=1e-12)
    np.testing.assert_allclose(relatives.opmd_loss(x, r, beta=0.5), 9 / 8, rtol=1e-12)
    np.testing.assert_allclose(relatives.oapl_loss(x, r, beta=0.5), 1.272896, rtol=1e-6)
    got = relatives.asymre_objective(x, r, beta=0.5, delta_v=-0.5)
    np.testing.assert_allclose(got, -11 / 6, rtol=1e-12)
    pi, mu, reward = (jnp.array(a) for a in ([-1.0, -3.0, 0.0], [-2.0, -1.0, -1.0], [2.0, -1, -3]))
    np.testing.assert_allclose(relatives.topr_objective(pi, mu, reward), -1.593994, rtol=1e-6)
    closed = gradients.regression_gradient(x, r, beta=0.5, baseline=2.0)
    np.testing.assert_allclose(closed, [-0.25, 0.5, -0.5], rtol=1e-12)
    closed = gradients.topr_gradient(pi, mu, reward)
    np.testing.assert_allclose(closed, [2.0, -np.exp(-2.0), -3.0], rtol=1e-12)


def test_a_loss_is_minus_its_objective_and_a_policy_far_from_mu_overflows_nothing():
    x, r = random_groups(3)
    numbers = {"beta": BETA, "delta_v": -0.1}
    objective = relatives.asymre_objective(x, r, **numbers)
    np.testing.assert_array_equal(relatives.asymre_loss(x, r, **numbers), -objective)
    assert np.abs(objective).max() > 0.1
    far = grad(topr, jnp.array([[1e4, -1e4]]), jnp.array([[-1.0, -1.0]]))
    np.testing.assert_array_equal(far, [[-1.0, 0.0]])


@pytest.mark.parametrize("loss", [regression, opmd, oapl, asymre])
def test_rewards_of_another_shape_are_refused(loss):
    with pytest.raises(AssertionError, match="shape"):
        loss(jnp.zeros((2, 3)), jnp.zeros((2, 2)))


# --- 2. gradients ---


def closed_forms(log_ratio: jax.Array, reward: jax.Array) -> dict:
    """Function → the gradient that it should have, from `gradients`."""
    regressed = functools.partial(gradients.regression_gradient, log_ratio, reward, beta=BETA)
    value = gradients.regularized_reward(log_ratio, reward, beta=BETA)
    return {
        regression: regressed(baseline=0.3),
        opmd: regressed(baseline=reward.mean(-1)),
        oapl: regressed(baseline=value_of_reference(reward)),
        asymre: gradients.pg_gradient(log_ratio, reward, beta=BETA, baseline=value.mean(-1) - 0.1),
        topr: gradients.topr_gradient(log_ratio, mu_logp(reward), reward),
    }


@KS
def test_autodiff_equals_the_closed_forms(k):
    x, r = random_groups(k)
    for fn, expected in closed_forms(x, r).items():
        np.testing.assert_allclose(grad(fn, x, r), expected, rtol=1e-10, atol=1e-12)


@KS
def test_finite_differences_equal_the_closed_forms(k):
    x, r = random_groups(k)
    step = 1e-4
    for fn, expected in closed_forms(x, r).items():
        held = fn
        if fn in (asymre, topr):  # surrogates: what autodiff does not see is held where it is
            held = lambda x, r, w=expected: (w * x).sum(-1)
            np.testing.assert_allclose(held(x, r), fn(x, r), rtol=1e-10, atol=1e-12)
        columns = [
            (held(x + shift, r) - held(x - shift, r)) / (2 * step)
            for shift in step * jnp.eye(k)[:, None, :]
        ]
        np.testing.assert_allclose(jnp.stack(columns, -1), expected, rtol=1e-6, atol=1e-8)


@KS
def test_each_wrong_variant_has_another_gradient(k):
    x, r = random_groups(k)
    wrong = {
        opmd: lambda x, r: relatives.regression_loss(
            x,
            r,
            beta=BETA,
            baseline=(r - BETA * x).mean(-1),  # the mean of R^π_β: CoPG
        ),
        oapl: lambda x, r: relatives.regression_loss(
            x,
            r,
            beta=BETA,
            baseline=jax.nn.logsumexp(r / BETA, axis=-1),  # no β, no mean
        ),
        asymre: lambda x, r: relatives.asymre_objective(x, r, beta=BETA, delta_v=0.1),  # sign
        topr: lambda x, r: (  # importance weights for good completions too
            jax.lax.stop_gradient(jnp.exp(jnp.minimum(x - mu_logp(r), 0.0)) * r) * x
        ).sum(-1),
    }
    for fn, expected in closed_forms(x, r).items():
        if fn in wrong:
            assert np.abs(grad(wrong[fn], x, r) - expected).max() > 1e-2, fn
    unstopped = lambda x, r: (jnp.exp(jnp.minimum(x - mu_logp(r), 0.0)) * r * x).sum(-1)
    negative = -jnp.abs(r)
    assert np.abs(grad(unstopped, x, negative) - grad(topr, x, negative)).max() > 1e-2


@KS
def test_the_loss_of_topr_is_minus_topr_of_what_the_kl_and_the_baseline_leave(k):
    x, r = random_groups(k)
    mu = mu_logp(r)
    loss = lambda x, r: relatives.topr_loss(x, r, beta=BETA, mu_log_ratio=mu, baseline=0.3)
    value = gradients.regularized_reward(x, r, beta=BETA) - 0.3
    expected = -gradients.topr_gradient(x, mu, value)
    np.testing.assert_allclose(grad(loss, x, r), expected, rtol=1e-10, atol=1e-12)
    # The ratio is that of π and µ, whatever π_ref is; the paper's own has β = 0 and b = 0.
    plain = lambda x, r: relatives.topr_loss(x, r, beta=0.0, mu_log_ratio=mu, baseline=0.0)
    np.testing.assert_allclose(grad(plain, x, r), -grad(topr, x, r), rtol=1e-10, atol=1e-12)
    by_sign_of_reward = jnp.where(r < 0, jnp.exp(jnp.minimum(x - mu, 0.0)), 1.0)
    assert np.abs(grad(loss, x, r) + by_sign_of_reward * value).max() > 1e-2


def test_a_step_along_each_moves_towards_what_it_wants():
    x, r = random_groups(4)
    for loss, baseline in ((opmd, r.mean(-1)), (oapl, value_of_reference(r))):
        target = (r - baseline[:, None]) / BETA
        moved = x - 1e-3 * grad(loss, x, r)
        assert np.all(jnp.abs(moved - target) < jnp.abs(x - target))
        assert np.all(loss(moved, r) < loss(x, r))
    assert np.all(r * grad(topr, x, r) >= 0)


# --- 3. what they add to CoPG ---


@KS
@pytest.mark.parametrize("baseline", [-1.0, 0.7])
def test_a_regression_is_copg_and_where_the_mean_log_ratio_should_be(k, baseline):
    x, r = random_groups(k)
    constant = 0.5 * ((r - r.mean(-1, keepdims=True)) ** 2).sum(-1)
    contrast = constant - BETA * (k - 1) / k * copg(x, r)
    level = k / 2 * (r.mean(-1) - baseline - BETA * x.mean(-1)) ** 2
    got = relatives.regression_loss(x, r, beta=BETA, baseline=baseline)
    np.testing.assert_allclose(got, contrast + level, rtol=1e-10)
    # The best baseline leaves CoPG alone.
    best = (r - BETA * x).mean(-1)
    got = relatives.regression_loss(x, r, beta=BETA, baseline=best)
    np.testing.assert_allclose(got, contrast, rtol=1e-10)


@KS
def test_asymre_is_copg_and_maximum_likelihood(k):
    x, r = random_groups(k)
    expected = (k - 1) / k * grad(copg, x, r) + 0.1  # δV = −0.1: towards every completion
    np.testing.assert_allclose(grad(asymre, x, r), expected, rtol=1e-10, atol=1e-12)


# The losses of other papers, each written from its formula, with λ for ln π − ln π_ref.


def gvpo(x, r):
    """Zhang et al. 2025 (GVPO), as a variance: 1/(k−1)·½Σ[(R_θ − R̄_θ) − (R − R̄)]², R_θ = βλ."""
    implicit = BETA * x
    gap = (implicit - implicit.mean(-1, keepdims=True)) - (r - r.mean(-1, keepdims=True))
    return 0.5 * (gap**2).sum(-1) / (x.shape[-1] - 1)


def tba(x, r):
    """Bartoldson et al. 2025 (TBA, VarGrad): mean (ln Ẑ + λ − R/β)², ln Ẑ = sg mean(R/β − λ)."""
    log_z = jax.lax.stop_gradient((r / BETA - x).mean(-1, keepdims=True))
    return ((log_z + x - r / BETA) ** 2).mean(-1)


def rebel(x, r):
    """Gao et al. 2024 (REBEL), a pair: ((1/η)(λ − λ') − (R − R'))², η = 1/β."""
    return (BETA * (x[..., 0] - x[..., 1]) - (r[..., 0] - r[..., 1])) ** 2


def rpo_squared(x, r):
    """Sun et al. 2025 (RPO), a pair, squared distance: ½(βΔ − ηΔR)², η = 1."""
    return 0.5 * (BETA * (x[..., 0] - x[..., 1]) - (r[..., 0] - r[..., 1])) ** 2


def command_a(x, r):
    """Cohere 2025 (Command A): 1/(k−1) Σ_{i<j} (R^π_β(y_i) − R^π_β(y_j))²."""
    k, value = x.shape[-1], r - BETA * x
    pairs = itertools.combinations(range(k), 2)
    return sum((value[..., i] - value[..., j]) ** 2 for i, j in pairs) / (k - 1)


CONSTANTS = {  # of the gradient, in units of that of `copg_objective`
    gvpo: lambda k: -BETA / k,
    tba: lambda k: -2 * (k - 1) / (BETA * k**2),
    rebel: lambda k: -2 * BETA,
    rpo_squared: lambda k: -BETA,
    command_a: lambda k: -2 * BETA,
}
SAME = [(fn, k) for fn in CONSTANTS for k in ((2,) if fn in (rebel, rpo_squared) else (2, 3, 5))]


@pytest.mark.parametrize(("loss", "k"), SAME)
def test_losses_of_other_papers_are_copg_times_a_constant(loss, k):
    x, r = random_groups(k)
    expected = CONSTANTS[loss](k) * grad(copg, x, r)
    np.testing.assert_allclose(grad(loss, x, r), expected, rtol=1e-10, atol=1e-12)
    # As a function, too: the value differs by the same factor and by what π does not change.
    difference = loss(x, r) - CONSTANTS[loss](k) * copg(x, r)
    at_reference = loss(jnp.zeros_like(x), r)  # where CoPG is 0
    np.testing.assert_allclose(difference, at_reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [opmd, oapl, asymre, regression])
@KS
def test_relatives_with_another_baseline_are_copg_times_no_constant(loss, k):
    x, r = random_groups(k)
    ratio = grad(loss, x, r) / grad(copg, x, r)
    assert np.ptp(ratio) > 0.1 * np.abs(ratio).min()
    # A gradient of gaps sums to 0 in each group, and moves no mean log-ratio; these do.
    np.testing.assert_allclose(grad(copg, x, r).sum(-1), 0.0, atol=1e-12)
    assert np.abs(grad(loss, x, r).sum(-1)).min() > 1e-3
