"""The traps of the maths: each wrong variant is written out and must break what the right has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax import losses

BETA = 0.4


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@jax.jit
def copg(log_ratio, reward):
    return losses.copg_objective(log_ratio, reward, beta=BETA)


@jax.jit
def copg_loss(log_ratio, reward):
    return losses.copg_loss(log_ratio, reward, beta=BETA)


@jax.jit
def dpo(log_ratio, reward):
    return losses.dpo_loss(log_ratio, reward, beta=BETA)


@jax.jit
def ipo(log_ratio, reward):
    return losses.ipo_loss(log_ratio, reward, beta=BETA)


@jax.jit
def rloo(log_ratio, reward):
    return losses.rloo_objective(log_ratio, reward, beta=BETA)


def pg_without_baseline(log_ratio, reward):
    return losses.pg_objective(log_ratio, reward, beta=BETA, baseline=0.0)


def random_groups(k: int, *, batch: int = 6) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(k)
    return jnp.asarray(rng.normal(size=(batch, k)) * 2), jnp.asarray(rng.normal(size=(batch, k)))


@functools.cache
def slope(fn):
    return jax.jit(jax.grad(lambda *args: fn(*args).sum()))


def grad(fn, *args):
    """Gradient of the sum over groups with respect to the log-ratios."""
    return slope(fn)(*args)


def gap(values):
    return values[..., 0] - values[..., 1]


def test_stopping_the_weight_gradient_halves_beta():
    def stopped(log_ratio, reward, beta):
        weight = gap(reward) - beta / 2 * gap(log_ratio)
        return jax.lax.stop_gradient(weight) * gap(log_ratio)

    log_ratio, reward = random_groups(2)
    wrong = grad(lambda x, r: stopped(x, r, BETA), log_ratio, reward)
    half = grad(lambda x, r: losses.copg_objective(x, r, beta=BETA / 2), log_ratio, reward)
    right = grad(copg, log_ratio, reward)
    np.testing.assert_allclose(wrong, half, rtol=1e-12)
    assert np.abs(wrong - right).min() > 1e-3
    # Its fixed point: the solution of β/2, Δ = 2ΔR/β, instead of Δ = ΔR/β.
    np.testing.assert_allclose(grad(stopped, 2 * reward / BETA, reward, BETA), 0.0, atol=1e-12)
    assert np.abs(grad(stopped, reward / BETA, reward, BETA)).min() > 1e-3


def test_the_full_beta_in_the_weight_doubles_beta():
    def full(log_ratio, reward):
        return (gap(reward) - BETA * gap(log_ratio)) * gap(log_ratio)

    log_ratio, reward = random_groups(2)
    doubled = losses.copg_objective(log_ratio, reward, beta=2 * BETA)
    np.testing.assert_allclose(full(log_ratio, reward), doubled, rtol=1e-11, atol=1e-12)
    assert np.abs(grad(full, reward / BETA, reward)).min() > 1e-3


@pytest.mark.parametrize("k", [2, 4])
def test_not_stopping_the_gradient_of_a_surrogate_doubles_its_beta(k):
    def unstopped(x, r):
        value = r - BETA * x
        others = (value.sum(-1, keepdims=True) - value) / (k - 1)
        return ((value - others) * x).sum(-1)

    x, r = random_groups(k)
    np.testing.assert_allclose(unstopped(x, r), rloo(x, r), rtol=1e-11, atol=1e-12)
    doubled = grad(lambda x, r: losses.rloo_objective(x, r, beta=2 * BETA), x, r)
    np.testing.assert_allclose(grad(unstopped, x, r), doubled, rtol=1e-11, atol=1e-12)
    assert np.abs(grad(unstopped, x, r) - grad(rloo, x, r)).max() > 1e-2


def test_averaging_over_tokens_instead_of_summing_moves_the_maximum():
    _, reward = random_groups(3)
    optimum = reward / BETA
    np.testing.assert_allclose(grad(copg, optimum, reward), 0.0, atol=1e-12)
    lengths = jnp.array([[3, 11, 20]])
    averaged = grad(lambda x, r: copg(x / lengths, r), optimum, reward)
    assert np.abs(averaged).max(-1).min() > 1e-3
    # At equal lengths n, averaging is summing with β/n instead of β.
    fifth = losses.copg_objective(optimum, reward, beta=BETA / 5) / 5
    np.testing.assert_allclose(copg(optimum / 5, reward), fifth, rtol=1e-11)


def test_policy_gradient_with_zero_baseline_is_not_invariant_to_a_shift_of_rewards():
    log_ratio, reward = random_groups(2)

    def change(fn):
        return np.abs(grad(fn, log_ratio, reward + 3.0) - grad(fn, log_ratio, reward)).max()

    assert change(copg) < 1e-12
    np.testing.assert_allclose(change(pg_without_baseline), 3.0)


def test_policy_gradient_with_zero_baseline_is_not_stationary_at_the_optimum():
    _, reward = random_groups(2)
    log_partition = 1.7
    optimum = reward / BETA - log_partition  # ln(π*/π_ref) = R/β − ln Z
    np.testing.assert_allclose(grad(copg, optimum, reward), 0.0, atol=1e-12)
    np.testing.assert_allclose(
        grad(pg_without_baseline, optimum, reward), BETA * log_partition, rtol=1e-10
    )


def test_ipo_gradient_is_minus_two_beta_copg_at_a_quarter_and_trl_normalisation_is_not():
    log_ratio, reward = random_groups(2)
    quarter = jnp.where(reward == reward.max(-1, keepdims=True), 0.25, -0.25)
    ascent = grad(copg, log_ratio, quarter)
    np.testing.assert_allclose(-grad(ipo, log_ratio, reward) / (2 * BETA), ascent, rtol=1e-11)

    def trl(x, r, lengths):
        return (jnp.sign(gap(r)) * gap(x / jnp.array([lengths])) - 1 / (2 * BETA)) ** 2

    on_sums = -grad(trl, log_ratio, reward, (1, 1)) / (2 * BETA)
    np.testing.assert_allclose(on_sums, ascent / BETA**2, rtol=1e-11)
    on_averages = grad(trl, log_ratio, reward, (5, 9))
    # The gradient of any function of Δ alone is opposite on the two completions; this one is not.
    assert np.abs(on_averages.sum(-1)).min() > 1e-3


@pytest.mark.parametrize("k", [2, 3, 5])
def test_dividing_a_group_by_k_instead_of_k_minus_1_is_not_rloo(k):
    log_ratio, reward = random_groups(k)
    expected = grad(rloo, log_ratio, reward)
    np.testing.assert_allclose(grad(copg, log_ratio, reward), expected, rtol=1e-10)
    wrong = grad(lambda x, r: copg(x, r) * (k - 1) / k, log_ratio, reward)
    np.testing.assert_allclose(wrong, expected * (k - 1) / k, rtol=1e-10)
    assert np.abs(wrong - expected).max() > 1e-2


def test_copg_learns_from_ties_and_preference_losses_do_not():
    log_ratio = jnp.array([[1.5, -0.5]])
    tied = jnp.array([[0.7, 0.7]])

    def dropping_ties(x, r):
        return jnp.where(r[:, 0] == r[:, 1], 0.0, copg(x, r))

    # ΔR = 0, Δ = 2: −(β/2)·4 = −2β, gradient ∓2β pulls Δ back to 0.
    np.testing.assert_allclose(copg(log_ratio, tied), [-2 * BETA], rtol=1e-12)
    expected = [[-2 * BETA, 2 * BETA]]
    np.testing.assert_allclose(grad(copg, log_ratio, tied), expected, rtol=1e-12)
    assert np.all(grad(dropping_ties, log_ratio, tied) == 0)
    for loss in (dpo, ipo, losses.bradley_terry_loss):
        assert np.all(loss(log_ratio, tied) == 0)
        assert np.all(grad(loss, log_ratio, tied) == 0)


def test_objectives_are_climbed_and_losses_descended():
    """The right step improves and moves the gap as it should; the flipped one does the opposite."""
    x, r = random_groups(2)
    reward_gap, sign = gap(r), jnp.sign(gap(r))
    # Δ moves towards ΔR/β; with IPO towards ±1/(2β); DPO and Bradley-Terry widen it without end.
    cases = [
        (copg, +1, reward_gap / BETA),
        (copg_loss, -1, reward_gap / BETA),
        (rloo, +1, reward_gap / BETA),
        (ipo, -1, sign / (2 * BETA)),
        (dpo, -1, sign * 1e3),
        (losses.bradley_terry_loss, -1, sign * 1e3),
    ]
    for fn, ascent, target in cases:
        gradient = grad(fn, x, r)
        for direction in (+1, -1):
            moved = x + 1e-3 * direction * ascent * gradient
            distance = jnp.abs(gap(moved) - target) - jnp.abs(gap(x) - target)
            assert np.all(direction * distance < 0)
            if fn is not rloo:  # a surrogate: its value means nothing
                assert np.all(direction * ascent * (fn(moved, r) - fn(x, r)) > 0)
    # The policy gradient raises what beats the baseline, maximum likelihood raises everything.
    assert np.all((r - BETA * x) * grad(pg_without_baseline, x, r) > 0)
    assert np.all(grad(losses.nll_loss, x) < 0)
