"""Relatives of CoPG: what other papers do with the same groups, as pure functions of arrays.

1. `regression_loss`, ½Σ(R − b − βλ)² for a given b, and with the two b in use: `opmd_loss` (the
   mean reward) and `oapl_loss` (the value of π_ref, from samples);
2. `asymre_objective`, REINFORCE with a baseline below the mean;
3. `topr_objective`, REINFORCE with importance weights where the reward is negative, and `topr_loss`
   with a KL.

With means over the k completions of a group, every b splits the regression so:

    ½Σ(R − b − βλ)² = ½Σ((R − R̄) − β(λ − λ̄))² + (k/2)·(R̄ − b − βλ̄)²

The first part is −β(k−1)/k times CoPG's objective, up to a constant; the best b leaves it alone.
The second part says where λ̄ should be, which depends on π* and µ together: with b from the data it
is right for µ = π_ref at most. The losses of GVPO, TBA, REBEL, RPO and Command A are the first part
alone, so that they are `losses.copg_loss` times a constant and have no function here.

Names, units, signs and masks are those of `losses`. All of these average over the groups with two
or more completions, as a loss without `counts` does.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from copg_jax import losses


def regression_loss(
    log_ratio: Array,
    reward: Array,
    *,
    beta: float | Array,
    baseline: float | Array,
    mask: Array | None = None,
) -> Array:
    """½Σ_i(R_i − b − βλ_i)² with a given b; minimised.

    It is zero for π*, λ = (R − V*)/β, at b = V* = β ln E_{π_ref}[e^{R/β}] only. Its gradient is −β
    times that of `losses.pg_objective` with the baseline b.

    Args:
        log_ratio: nats, summed over tokens; [..., K].
        reward: reward units; [..., K].
        beta: KL coefficient β > 0; scalar.
        baseline: b, reward units; scalar or [...].
        mask: true where a completion is present; [..., K].

    Returns:
        Reward units squared; [...].
    """
    chex.assert_equal_shape([log_ratio, reward])
    mask = losses.present(mask, log_ratio)
    baseline = jnp.broadcast_to(jnp.asarray(baseline), log_ratio.shape[:-1])[..., None]
    return 0.5 * (losses.masked(reward - baseline - beta * log_ratio, mask) ** 2).sum(-1)


def opmd_loss(
    log_ratio: Array, reward: Array, *, beta: float | Array, mask: Array | None = None
) -> Array:
    """`regression_loss` with b = mean reward of the group; minimised.

    Online policy mirror descent of Kimi k1.5 (Kimi Team 2025, Sec. 2.3.2), which takes the mean of
    the rewards for β ln Z. Their update averages over the group: −1/(βk) times this gradient.

    Args and returns are those of `losses.copg_objective`, but that a lone completion gives ½(βλ)².
    """
    chex.assert_equal_shape([log_ratio, reward])
    mask = losses.present(mask, log_ratio)
    baseline = losses.group_mean(reward, mask)
    return regression_loss(log_ratio, reward, beta=beta, baseline=baseline, mask=mask)


def oapl_loss(
    log_ratio: Array, reward: Array, *, beta: float | Array, mask: Array | None = None
) -> Array:
    """`regression_loss` with b = β ln mean e^{R/β}, the value V* of π_ref from the rewards of the
    group; minimised.

    (β ln(π/π_ref) − (R − V̂))² of OAPL (Ritter et al. 2026) and A*-PO (Brantley et al. 2025), at
    their β1 = β2 = β; A*-PO takes V̂ from samples of its own. Theirs has no ½.

    Args and returns are those of `losses.copg_objective`, but that a lone completion gives ½(βλ)².

    Note:
        V̂ is V* for many samples of π_ref. From k samples it is too low on average, and from others
        it is another number.
    """
    chex.assert_equal_shape([log_ratio, reward])
    mask = losses.present(mask, log_ratio)
    scaled = jnp.where(mask, reward / beta, -jnp.inf)
    count = jnp.maximum(mask.sum(-1), 1)
    baseline = beta * (jax.nn.logsumexp(scaled, axis=-1) - jnp.log(count))
    return regression_loss(log_ratio, reward, beta=beta, baseline=baseline, mask=mask)


def asymre_objective(
    log_ratio: Array,
    reward: Array,
    *,
    beta: float | Array,
    delta_v: float | Array,
    mask: Array | None = None,
) -> Array:
    """AsymRE surrogate Σ_i sg[R^π_β(y_i) − (V̂ + δV)]·λ_i with V̂ the mean R^π_β of the group (Arnal
    et al. 2025: advantage r − (V̂ + δV), δV = −0.1 for rewards 0 and 1); maximised.

    The paper's r has no KL: that is β = 0. Its average over the group is a sum here. At δV = 0 the
    gradient is (k−1)/k of CoPG's; δV < 0 adds |δV| times maximum likelihood of the data.

    Args:
        log_ratio: nats, summed over tokens; [..., K].
        reward: reward units; [..., K].
        beta: KL coefficient β ≥ 0; scalar.
        delta_v: δV, reward units; scalar or [...].
        mask: true where a completion is present; [..., K].

    Returns:
        The surrogate, of which only the gradient means something; [...].
    """
    chex.assert_equal_shape([log_ratio, reward])
    mask = losses.present(mask, log_ratio)
    baseline = losses.group_mean(reward - beta * log_ratio, mask) + delta_v
    return losses.pg_objective(log_ratio, reward, beta=beta, baseline=baseline, mask=mask)


def asymre_loss(
    log_ratio: Array,
    reward: Array,
    *,
    beta: float | Array,
    delta_v: float | Array,
    mask: Array | None = None,
) -> Array:
    """Negative `asymre_objective`; minimised. Same arguments, [..., K] → [...]."""
    return -asymre_objective(log_ratio, reward, beta=beta, delta_v=delta_v, mask=mask)


def topr_objective(
    logp: Array, mu_logp: Array, reward: Array, *, mask: Array | None = None
) -> Array:
    """TOPR surrogate Σ_i sg[α_i R_i]·ln π(y_i), α = min(π/µ, 1) where R < 0, else 1 (tapered
    off-policy REINFORCE, Le Roux et al. 2025); maximised.

    What is good is learned as it is; what is bad is unlearned only as long as π still writes it. It
    has no KL: only π and the policy µ that wrote the completions are in it.

    Args:
        logp: ln π, nats, summed over tokens; [..., K].
        mu_logp: ln µ, nats, summed over tokens; [..., K].
        reward: reward units, negative for what is bad: its zero matters; [..., K].
        mask: true where a completion is present; [..., K].

    Returns:
        The surrogate, of which only the gradient means something; [...].
    """
    chex.assert_equal_shape([logp, mu_logp, reward])
    mask = losses.present(mask, logp)
    # The ratio is cut before exp, so that a policy far from µ cannot overflow.
    taper = jnp.where(reward < 0, jnp.exp(jnp.minimum(logp - mu_logp, 0.0)), 1.0)
    weight = jax.lax.stop_gradient(losses.masked(taper * reward, mask))
    return (weight * losses.masked(logp, mask)).sum(-1)


def topr_loss(
    log_ratio: Array,
    reward: Array,
    *,
    beta: float | Array,
    mu_log_ratio: Array,
    baseline: float | Array,
    mask: Array | None = None,
) -> Array:
    """Negative `topr_objective` of the rewards R^π_β − b; minimised.

    The paper's has no KL: β = 0. b is the zero of what is good, a choice. Log-ratios do for
    log-probabilities, since π/µ is a difference of either.

    Args:
        log_ratio: ln π − ln π_ref, nats, summed over tokens; [..., K].
        reward: reward units; [..., K].
        beta: KL coefficient β ≥ 0; scalar.
        mu_log_ratio: ln µ − ln π_ref, nats, summed over tokens; [..., K].
        baseline: b, reward units; scalar or [...].
        mask: true where a completion is present; [..., K].

    Returns:
        The surrogate, of which only the gradient means something; [...].
    """
    chex.assert_equal_shape([log_ratio, mu_log_ratio, reward])
    mask = losses.present(mask, log_ratio)
    baseline = jnp.broadcast_to(jnp.asarray(baseline), log_ratio.shape[:-1])[..., None]
    value = jax.lax.stop_gradient(losses.masked(reward - beta * log_ratio - baseline, mask))
    return -topr_objective(log_ratio, mu_log_ratio, value, mask=mask)
