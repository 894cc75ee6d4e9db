"""Closed-form gradients of the objectives, written down from the paper and independent of
`losses.py`.

Everything is a coefficient on ∇ln π: a sample-based gradient is Σ_i w_i ∇ln π(y_i), and the
functions here return the w_i (the derivative with respect to the log-ratio λ_i, since ln π_ref is
constant). In order below:

1. `regularized_reward`, Eq. (1);
2. sample gradients: `copg_gradient` (Eq. 9 and 16, any K), `cross_copg_gradient` (between
   origins), `rloo_gradient`, `pg_gradient`, `ipo_gradient`, `dpo_gradient`; of relatives,
   `regression_gradient`, `topr_gradient`;
3. population gradients of a bandit: `population_copg_gradient` (Eq. 7), `population_rloo_gradient`
   (k samplers), `population_pg_gradient`, and of the preference losses, `population_ipo_gradient`,
   `population_dpo_gradient`.

That autodiff of the losses agrees with these is tested, so it is a theorem and not a tautology.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def regularized_reward(log_ratio: Array, reward: Array, *, beta: float | Array) -> Array:
    """R^π_β(y) = R(y) − β ln(π(y)/π_ref(y)), Eq. (1).

    Args:
        log_ratio: ln π − ln π_ref, nats; [..., K].
        reward: reward units; [..., K].
        beta: KL coefficient β > 0; scalar.

    Returns:
        Reward units; [..., K].
    """
    chex.assert_equal_shape([log_ratio, reward])
    return reward - beta * log_ratio


def copg_gradient(log_ratio: Array, reward: Array, *, beta: float | Array) -> Array:
    """∂ℓ_CoPG/∂λ_i of a group, Eq. (9) and (16) averaged over the partners of i; ascent direction.

    Sums Eq. (9) over the k − 1 pairs that contain i and divides by k − 1:
    ``w_i = 1/(k−1) Σ_{j≠i} (R^π_β(y_i) − R^π_β(y_j))``. The full R^π_β appears, not R^π_{β/2}.

    Args:
        log_ratio: nats; [..., K].
        reward: reward units; [..., K].
        beta: KL coefficient β > 0; scalar.

    Returns:
        Coefficients of ∇ln π(y_i), reward units; [..., K].
    """
    value = regularized_reward(log_ratio, reward, beta=beta)
    pair = value[..., :, None] - value[..., None, :]
    return pair.sum(-1) / (value.shape[-1] - 1)


def cross_copg_gradient(
    log_ratio: Array, reward: Array, origin: Array, *, beta: float | Array
) -> Array:
    """∂/∂λ_i of CoPG over the pairs of different origins of a group; ascent direction.

    Sums Eq. (9) over the partners of i, the completions of other origins, and divides by their
    average number m̄: ``w_i = 1/m̄ Σ_{j: o_j ≠ o_i} (R^π_β(y_i) − R^π_β(y_j))``.

    Args:
        log_ratio: nats; [..., K].
        reward: reward units; [..., K].
        origin: which µ each completion is from; [..., K]. Two of them at least.
        beta: KL coefficient β > 0; scalar.

    Returns:
        Coefficients of ∇ln π(y_i), reward units; [..., K].
    """
    chex.assert_equal_shape([log_ratio, origin])
    value = regularized_reward(log_ratio, reward, beta=beta)
    apart = origin[..., :, None] != origin[..., None, :]
    pair = jnp.where(apart, value[..., :, None] - value[..., None, :], 0.0)
    return pair.sum(-1) / apart.sum(-1).mean(-1)[..., None]


def rloo_gradient(log_ratio: Array, reward: Array, *, beta: float | Array) -> Array:
    """RLOO-k coefficients R^π_β(y_i) − mean_{j≠i} R^π_β(y_j) (proof of Prop. 2); ascent direction.

    Args and returns are those of `copg_gradient`; it equals that function (Prop. 2).
    """
    value = regularized_reward(log_ratio, reward, beta=beta)
    leave_one_out = (value.sum(-1, keepdims=True) - value) / (value.shape[-1] - 1)
    return value - leave_one_out


def pg_gradient(
    log_ratio: Array, reward: Array, *, beta: float | Array, baseline: float | Array
) -> Array:
    """Policy gradient coefficients R^π_β(y_i) − b (Eq. 3; ∇ℓ_PG of Sec. 5); ascent direction.

    Args:
        log_ratio: nats; [..., K].
        reward: reward units; [..., K].
        beta: KL coefficient β > 0; scalar.
        baseline: b, reward units; scalar or [...].

    Returns:
        Coefficients of ∇ln π(y_i), reward units; [..., K].
    """
    value = regularized_reward(log_ratio, reward, beta=beta)
    return value - jnp.broadcast_to(jnp.asarray(baseline), value.shape[:-1])[..., None]


def ipo_gradient(log_ratio: Array, reward: Array, *, beta: float | Array) -> Array:
    """∂/∂λ of the IPO loss (½ − βΔ)² of a pair (proof of Prop. 3); descent is along its negative.

    The paper's Prop. 3 lacks a ∇ on its right-hand side and its proof once writes −¼ for the
    preferred reward; with both mended, this is −2β times Eq. (9) at R = ±¼.

    Args:
        log_ratio: nats; [..., 2].
        reward: only its order matters; a tie gives 0; [..., 2].
        beta: KL coefficient β > 0; scalar.

    Returns:
        Coefficients of ∇ln π; [..., 2].
    """
    chex.assert_equal_shape([log_ratio, reward])
    chex.assert_axis_dimension(log_ratio, -1, 2)
    sign = jnp.sign(reward[..., 0] - reward[..., 1])
    gap = sign * (log_ratio[..., 0] - log_ratio[..., 1])
    first = -2.0 * beta * sign * (0.5 - beta * gap)
    return jnp.stack([first, -first], axis=-1)


def dpo_gradient(log_ratio: Array, reward: Array, *, beta: float | Array) -> Array:
    """∂/∂λ of the DPO loss −ln σ(βΔ) of a pair: −β σ(−βΔ) on the winner; descent is along its
    negative.

    Args and returns are those of `ipo_gradient`.
    """
    chex.assert_equal_shape([log_ratio, reward])
    chex.assert_axis_dimension(log_ratio, -1, 2)
    sign = jnp.sign(reward[..., 0] - reward[..., 1])
    gap = sign * (log_ratio[..., 0] - log_ratio[..., 1])
    first = -beta * sign * jax.nn.sigmoid(-beta * gap)
    return jnp.stack([first, -first], axis=-1)


def regression_gradient(
    log_ratio: Array, reward: Array, *, beta: float | Array, baseline: float | Array
) -> Array:
    """∂/∂λ_i of ½Σ(R_i − b − βλ_i)²: −β(R^π_β(y_i) − b), i.e. −β times a policy gradient with the
    baseline b, but from any data; descent is along its negative.

    Args and returns are those of `pg_gradient`.
    """
    return -beta * pg_gradient(log_ratio, reward, beta=beta, baseline=baseline)


def topr_gradient(logp: Array, mu_logp: Array, reward: Array) -> Array:
    """R where R ≥ 0 and min(π/µ, 1)·R elsewhere (Le Roux et al. 2025); ascent direction.

    Args:
        logp: ln π, nats; [..., K].
        mu_logp: ln µ of the policy that wrote the completion, nats; [..., K].
        reward: reward units; [..., K].

    Returns:
        Coefficients of ∇ln π(y_i), reward units; [..., K].
    """
    chex.assert_equal_shape([logp, mu_logp, reward])
    return jnp.where(reward < 0, jnp.clip(jnp.exp(logp - mu_logp), 0.0, 1.0), 1.0) * reward


def population_copg_gradient(
    log_ratio: Array, reward: Array, mu1: Array, mu2: Array, *, beta: float | Array
) -> Array:
    """∂L/∂ln π(a) of every arm, Eq. (7); ascent direction.

    ``μ1(a)(R^π_β(a) − E_μ2[R^π_β]) + μ2(a)(R^π_β(a) − E_μ1[R^π_β])``: each distribution's baseline
    is the expected regularised reward under the *other* one.

    Args:
        log_ratio: ln π(a) − ln π_ref(a), nats; [..., A].
        reward: reward units; [..., A].
        mu1: sampling distribution of y; [..., A].
        mu2: sampling distribution of y'; [..., A].
        beta: KL coefficient β > 0; scalar.

    Returns:
        Coefficients of ∇ln π(a), summed (not averaged) over arms to give ∇L; [..., A].
    """
    chex.assert_equal_shape([log_ratio, reward, mu1, mu2])
    value = regularized_reward(log_ratio, reward, beta=beta)
    mean1 = (mu1 * value).sum(-1, keepdims=True)
    mean2 = (mu2 * value).sum(-1, keepdims=True)
    return mu1 * (value - mean2) + mu2 * (value - mean1)


def population_pg_gradient(
    log_ratio: Array, reward: Array, mu: Array, *, beta: float | Array, baseline: float | Array
) -> Array:
    """E_{y∼μ}[(R^π_β(y) − b) ∇ln π(y)] as coefficients on every arm (Eq. 3 with μ in place of π);
    ascent direction.

    Args:
        log_ratio: nats; [..., A].
        reward: reward units; [..., A].
        mu: sampling distribution; [..., A]. With μ = π it is ∇J for any baseline; otherwise the
            baseline matters.
        beta: KL coefficient β > 0; scalar.
        baseline: b, reward units; scalar or [...].

    Returns:
        Coefficients of ∇ln π(a); [..., A].
    """
    chex.assert_equal_shape([log_ratio, reward, mu])
    return mu * pg_gradient(log_ratio, reward, beta=beta, baseline=baseline)


def population_rloo_gradient(
    log_ratio: Array, reward: Array, samplers: Array, *, beta: float | Array
) -> Array:
    """E[Σ_i w_i ∇ln π(y_i)] of RLOO-k, equally CoPG-k, when y_i ∼ μ_i independently; ascent
    direction.

    ``Σ_i μ_i(a)(R^π_β(a) − mean_{j≠i} E_μj[R^π_β])``: Eq. (7) at k = 2, and ``k μ(a)(R^π_β(a) −
    E_μ[R^π_β])`` when all samplers are μ: more samples average the baseline, they do not move the
    stationary point.

    Args:
        log_ratio: ln π(a) − ln π_ref(a), nats; [..., A].
        reward: reward units; [..., A].
        samplers: μ_1 … μ_k; [..., K, A].
        beta: KL coefficient β > 0; scalar.

    Returns:
        Coefficients of ∇ln π(a); [..., A].
    """
    value = regularized_reward(log_ratio, reward, beta=beta)[..., None, :]
    mean = (samplers * value).sum(-1, keepdims=True)
    others = (mean.sum(-2, keepdims=True) - mean) / (samplers.shape[-2] - 1)
    return (samplers * (value - others)).sum(-2)


def _population_preference_gradient(weights: Array, residual: Array) -> Array:
    """Sums Σ_b (μ1(a)μ2(b) + μ1(b)μ2(a)) residual_ab for an antisymmetric residual; [..., A]."""
    return ((weights + jnp.swapaxes(weights, -1, -2)) * residual).sum(-1)


def population_ipo_gradient(
    log_ratio: Array, reward: Array, mu1: Array, mu2: Array, *, beta: float | Array
) -> Array:
    """E of `ipo_gradient` when a beats b with probability σ(R(a) − R(b)) (Sec. 5); descent is along
    its negative.

    ``−2β Σ_b W_ab (σ(ΔR_ab) − ½ − βΔ_ab)`` with W_ab = μ1(a)μ2(b) + μ1(b)μ2(a): CoPG with the
    reward gap replaced by the expected preference, which is why it settles elsewhere.

    Args:
        log_ratio: ln π(a) − ln π_ref(a), nats; [..., A].
        reward: Bradley–Terry scores of the preferences, reward units; [..., A].
        mu1: sampling distribution of y; [..., A].
        mu2: sampling distribution of y'; [..., A].
        beta: KL coefficient β > 0; scalar.

    Returns:
        Coefficients of ∇ln π(a); [..., A].
    """
    chex.assert_equal_shape([log_ratio, reward, mu1, mu2])
    gap = log_ratio[..., :, None] - log_ratio[..., None, :]
    win = jax.nn.sigmoid(reward[..., :, None] - reward[..., None, :])
    weights = mu1[..., :, None] * mu2[..., None, :]
    return -2.0 * beta * _population_preference_gradient(weights, win - 0.5 - beta * gap)


def population_dpo_gradient(
    log_ratio: Array, reward: Array, mu1: Array, mu2: Array, *, beta: float | Array
) -> Array:
    """E of `dpo_gradient` when a beats b with probability σ(R(a) − R(b)); descent is along its
    negative.

    ``−β Σ_b W_ab (σ(ΔR_ab) − σ(βΔ_ab))``: zero at βΔ = ΔR, i.e. at π*, because the preferences are
    Bradley–Terry.

    Args and returns are those of `population_ipo_gradient`.
    """
    chex.assert_equal_shape([log_ratio, reward, mu1, mu2])
    gap = log_ratio[..., :, None] - log_ratio[..., None, :]
    win = jax.nn.sigmoid(reward[..., :, None] - reward[..., None, :])
    weights = mu1[..., :, None] * mu2[..., None, :]
    residual = win - jax.nn.sigmoid(beta * gap)
    return -beta * _population_preference_gradient(weights, residual)
