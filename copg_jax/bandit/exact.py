"""Exact quantities of a KL-regularised bandit, by enumeration of its arms.

1. `make_bandit` checks a problem: the one place where bad input is refused;
2. `optimal_policy` π*, `rl_objective` J (Eq. 2 and 11), `kl`, `regret`;
3. `copg_population_objective` L (Eq. 6 and 13), through `losses.copg_objective`, and its square
   form (Eq. 15);
4. `pair_weights`, `pair_laplacian`, `pair_components`: which arms the pairs compare, i.e. when L
   has one maximiser;
5. `reward_pull`, `copg_maximiser`: that maximiser by linear algebra, for the population or for a
   data set.

A policy is given as `log_policy` = ln π, [..., A]; leading axes are contexts (prompts).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.typing import ArrayLike

from copg_jax import losses
from copg_jax.errors import InputError


class Bandit(NamedTuple):
    """A problem: what is rewarded, what is the reference, where the data come from. Leading axes
    are contexts."""

    reward: Array  # R(x, a), reward units; [..., A]
    ref: Array  # π_ref(a|x); [..., A]
    mu1: Array  # distribution of the first arm of a pair; [..., A]
    mu2: Array  # distribution of the second arm; [..., A]
    beta: Array  # KL coefficient, reward units per nat; scalar
    context_prob: Array  # ρ(x); [...], a scalar 1 without contexts


def _check_distribution(name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise InputError(
            f"{name}: wanted the shape of reward, {shape}, got {values.shape}."
            " Give one number per arm (and per context)."
        )
    bad = np.argwhere(~(values > 0))
    if bad.size:
        *context, arm = bad[0].tolist()
        where = f"context {context[0]}, arm {arm}" if context else f"arm {arm}"
        raise InputError(
            f"{name}: wanted a positive probability for every arm, got"
            f" {values[tuple(bad[0])]} at {where}. Theorem 1 needs ref, mu1 and mu2 to have the"
            " same support: drop the arm from the problem, or give it probability in all three."
        )
    _check_total(name, values)


def _check_total(name: str, values: np.ndarray) -> None:
    total = values.sum(-1)
    if not np.allclose(total, 1.0, atol=1e-6):
        raise InputError(
            f"{name}: wanted probabilities that sum to 1, got sums {total}. Normalise them."
        )


def _check_reward(reward: np.ndarray) -> None:
    if reward.ndim not in (1, 2) or reward.shape[-1] < 2:
        raise InputError(
            f"reward: wanted shape [A] or [contexts, A] with at least 2 arms, got {reward.shape}."
        )
    if not np.isfinite(reward).all():
        raise InputError(f"reward: wanted finite numbers, got {reward.tolist()}.")


def make_bandit(
    reward: npt.ArrayLike,
    *,
    mu1: npt.ArrayLike,
    mu2: npt.ArrayLike,
    beta: float,
    ref: npt.ArrayLike | None = None,
    context_prob: npt.ArrayLike | None = None,
) -> Bandit:
    """Builds a checked float64 `Bandit`; `Bandit(...)` itself checks nothing.

    Args:
        reward: R, reward units; [A] or [X, A].
        mu1: distribution of the first arm of a pair; shape of reward.
        mu2: distribution of the second arm; shape of reward.
        beta: KL coefficient β > 0, reward units per nat.
        ref: π_ref; shape of reward. None means uniform.
        context_prob: ρ; [X]. None means uniform.

    Raises:
        InputError: a non-positive β or probability, sums that are not 1, shapes that differ; or
            float32 mode.
    """
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise InputError(
            "bandit: exact quantities want float64, got JAX in 32-bit mode."
            " Wrap the call in `with jax.enable_x64(True):`."
        )
    rewards = np.asarray(reward, np.float64)
    _check_reward(rewards)
    if not (np.isfinite(beta) and beta > 0):
        raise InputError(
            f"beta: wanted a positive number, got {beta}. Without KL term there is no π*."
        )
    uniform = np.full(rewards.shape, 1 / rewards.shape[-1])
    distributions = {
        "ref": uniform if ref is None else np.asarray(ref, np.float64),
        "mu1": np.asarray(mu1, np.float64),
        "mu2": np.asarray(mu2, np.float64),
    }
    for name, values in distributions.items():
        _check_distribution(name, values, rewards.shape)
    contexts = rewards.shape[:-1]
    rho = (
        np.full(contexts, 1 / np.prod(contexts))
        if context_prob is None
        else np.asarray(context_prob)
    )
    if rho.shape != contexts or not (rho > 0).all():
        raise InputError(
            f"context_prob: wanted positive probabilities of shape {contexts}, got {rho}."
        )
    _check_total("context_prob", rho.reshape(-1))
    arrays = {name: jnp.asarray(values) for name, values in distributions.items()}
    return Bandit(
        jnp.asarray(rewards), beta=jnp.asarray(float(beta)), context_prob=jnp.asarray(rho), **arrays
    )


def log_ratio(log_policy: Array, bandit: Bandit) -> Array:
    """ln π(a) − ln π_ref(a), nats; [..., A]."""
    return log_policy - jnp.log(bandit.ref)


def policy_from_value(value: Array, bandit: Bandit) -> Array:
    """ln π of the policy with β ln(π/π_ref) = V − β ln Σ_a π_ref(a) exp(V(a)/β), Eq. (14)
    corrected.

    The paper prints ``V − ln Z_V`` with ``Z_V = β Σ π_ref exp V``: V lacks its 1/β and the factor β
    stands inside the logarithm; line (a) of Eq. (15) then writes Z for ln Z. With the form above
    the proof goes through as printed.

    Args:
        value: V, reward units, defined up to a constant per context; [..., A].
        bandit: the problem.

    Returns:
        ln π; [..., A].
    """
    return jax.nn.log_softmax(jnp.log(bandit.ref) + value / bandit.beta, axis=-1)


def optimal_policy(bandit: Bandit) -> Array:
    """ln π* with π*(a) ∝ π_ref(a) exp(R(a)/β), Eq. (12): the value function is the reward; [...,
    A]."""
    return policy_from_value(bandit.reward, bandit)


def rl_objective(log_policy: Array, bandit: Bandit) -> Array:
    """J(π) = E_ρ[E_π[R] − β KL(π‖π_ref)], Eq. (2) and (11); maximised; scalar, reward units."""
    regularized = bandit.reward - bandit.beta * log_ratio(log_policy, bandit)
    return (bandit.context_prob * (jnp.exp(log_policy) * regularized).sum(-1)).sum()


def optimal_value(bandit: Bandit) -> Array:
    """J(π*) = E_ρ[β ln Z*(x)], the free energy; scalar, reward units."""
    log_z = jax.nn.logsumexp(jnp.log(bandit.ref) + bandit.reward / bandit.beta, axis=-1)
    return (bandit.context_prob * bandit.beta * log_z).sum()


def expected_reward(log_policy: Array, bandit: Bandit) -> Array:
    """E_ρ E_π[R], without the KL term; scalar, reward units."""
    return (bandit.context_prob * (jnp.exp(log_policy) * bandit.reward).sum(-1)).sum()


def kl(log_policy: Array, bandit: Bandit) -> Array:
    """E_ρ KL(π‖π_ref); scalar, nats."""
    return (
        bandit.context_prob * (jnp.exp(log_policy) * log_ratio(log_policy, bandit)).sum(-1)
    ).sum()


def regret(log_policy: Array, bandit: Bandit) -> Array:
    """J(π*) − J(π) = β E_ρ KL(π‖π*) ≥ 0, in the second form, which does not cancel near π*; scalar,
    reward units."""
    gap = log_policy - optimal_policy(bandit)
    return bandit.beta * (bandit.context_prob * (jnp.exp(log_policy) * gap).sum(-1)).sum()


def total_variation(log_policy: Array, other: Array) -> Array:
    """Largest total variation distance ½ Σ_a |π − π'| over contexts; scalar in [0, 1]."""
    return 0.5 * jnp.abs(jnp.exp(log_policy) - jnp.exp(other)).sum(-1).max()


def all_pairs(values: Array) -> Array:
    """Enumerates ordered pairs: [..., A] → [..., A, A, 2] with entry (a, b) = (values[a],
    values[b])."""
    first, second = values[..., :, None], values[..., None, :]
    return jnp.stack(jnp.broadcast_arrays(first, second), axis=-1)


def copg_population_objective(log_policy: Array, bandit: Bandit) -> Array:
    """L(π) = E_ρ E_{y∼μ1, y'∼μ2}[ℓ_CoPG(y, y'; π)], Eq. (6) and (13), pair by pair; maximised;
    scalar."""
    pair = losses.copg_objective(
        all_pairs(log_ratio(log_policy, bandit)), all_pairs(bandit.reward), beta=bandit.beta
    )
    weight = bandit.mu1[..., :, None] * bandit.mu2[..., None, :]
    return (bandit.context_prob * (weight * pair).sum((-2, -1))).sum()


def copg_square_form(log_policy: Array, bandit: Bandit) -> Array:
    """L(π) by Eq. (15): E[ΔR² − (ΔR − βΔ)²] / (2β): a least-squares fit of reward gaps; scalar."""
    ratio = all_pairs(log_ratio(log_policy, bandit))
    rewards = all_pairs(bandit.reward)
    reward_gap = rewards[..., 0] - rewards[..., 1]
    residual = reward_gap - bandit.beta * (ratio[..., 0] - ratio[..., 1])
    weight = bandit.mu1[..., :, None] * bandit.mu2[..., None, :]
    square = (weight * (reward_gap**2 - residual**2)).sum((-2, -1)) / (2 * bandit.beta)
    return (bandit.context_prob * square).sum()


def pair_weights(mu1: Array, mu2: Array) -> Array:
    """Probability that arms a and b meet, in either order: μ1(a)μ2(b) + μ1(b)μ2(a); [..., A] →
    [..., A, A]."""
    weight = mu1[..., :, None] * mu2[..., None, :]
    return weight + jnp.swapaxes(weight, -1, -2)


def pair_laplacian(weights: Array) -> Array:
    """Graph Laplacian diag(W1) − W of the pairs; −β times it is the Hessian of L in the logits;
    [..., A, A]."""
    degree = weights.sum(-1, keepdims=True)
    return jnp.where(jnp.eye(weights.shape[-1], dtype=bool), degree, 0.0) - weights


def pair_components(weights: npt.ArrayLike) -> np.ndarray:
    """Numbers the sets of arms that pairs connect; L has one maximiser if and only if there is one
    set.

    Equal supports (Theorem 1) make every two arms meet. Less suffices: a chain of pairs between any
    two arms. Across sets the ratio of probabilities is not determined by L, for the population as
    for a finite data set.

    Args:
        weights: how often a and b meet (probabilities or counts), symmetric; [A, A].

    Returns:
        Set number of each arm, from 0; int [A].
    """
    meets = np.asarray(weights) > 0
    reach = meets | np.eye(len(meets), dtype=bool)
    for _ in range(len(meets)):
        reach = reach @ reach
    return np.unique(reach.argmax(-1), return_inverse=True)[1]


def reward_pull(weights: Array, reward_gap: Array) -> Array:
    """Gradient of L in the logits at π = π_ref: Σ_b W_ab ΔR_ab; [..., A, A] twice → [..., A],
    reward units."""
    return (weights * reward_gap).sum(-1)


def copg_maximiser(weights: Array, pull: Array, beta: ArrayLike) -> Array:
    """Log-ratios that maximise L, for a population or a data set, by linear algebra: β Laplacian(W)
    λ = pull.

    In the logits L is a quadratic: the normaliser of the softmax cancels in every gap Δ.

    Args:
        weights: how often a and b meet, symmetric; [..., A, A].
        pull: gradient of L at π_ref in the same units, see `reward_pull`; [..., A].
        beta: KL coefficient β > 0; scalar.

    Returns:
        λ in nats, summing to 0 over each connected set of arms, as gradient ascent from π_ref would
        leave it; [..., A].
    """
    inverse = jnp.linalg.pinv(pair_laplacian(weights), rtol=1e-12, hermitian=True)
    return (inverse @ pull[..., None])[..., 0] / beta
