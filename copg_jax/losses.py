"""Objectives and losses on groups of K completions of one prompt, as pure functions of arrays.

Every policy objective takes the log-ratios λ_i = ln π(y_i|x) − ln π_ref(y_i|x) and the rewards R_i
of a group and returns one number a group. In order below:

1. `copg_objective`, the paper's Eq. (5) for any K ≥ 2, in O(K), and `cross_copg_objective`, the
   same over pairs of different origins alone, Eq. (6) with µ1 ≠ µ2;
2. the direct alignment losses on the same rewards, `dpo_loss` and `ipo_loss`;
3. the policy gradient surrogates `pg_objective` (a given baseline) and `rloo_objective`;
4. the supervised losses `bradley_terry_loss` (reward model) and `nll_loss` (SFT).

A policy loss carries what an average over groups needs to know of it: `counts(reward, mask)` marks
the groups that teach it something (see `counting`). Any function of the signature of `copg_loss` is
one; without `counts`, groups of two or more completions count. One that also takes `origin`, as
`cross_copg_loss` does, is given it, and so are its `counts`; one that takes `mu_log_ratio` is given
ln µ − ln π_ref.

A name ending in `_objective` is maximised, one ending in `_loss` is minimised. Log-ratios are
*sums* over the tokens of a completion, in nats, never averages. `mask` marks the completions that
are present; an absent one changes neither value nor gradient, whatever its numbers are.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import Array

Loss = TypeVar("Loss", bound=Callable[..., Any])

NUM_ORIGINS = 8
"""Origins of completions that `cross_copg_objective` tells apart: 0 to 7."""


def present(mask: Array | None, like: Array) -> Array:
    """Returns `mask`, or all-true of the shape of `like` where no mask is given."""
    if mask is None:
        return jnp.ones(like.shape, bool)
    chex.assert_equal_shape([mask, like])
    return mask.astype(bool)


def masked(values: Array, mask: Array) -> Array:
    """Zeroes absent entries; `where`, not a product, so that NaN there stays out of gradients."""
    return jnp.where(mask, values, 0.0)


def group_mean(values: Array, mask: Array) -> Array:
    """Mean over the present completions of each group, 0 without any; [..., K] → [...]."""
    return masked(values, mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def _centred(values: Array, mask: Array) -> Array:
    """Subtracts the mean over the present completions of each group; absent entries are 0."""
    return masked(values - group_mean(values, mask)[..., None], mask)


def _num_others(mask: Array) -> Array:
    """Returns k − 1 per group, at least 1 so that it can divide."""
    return jnp.maximum(mask.sum(-1) - 1, 1)


def has_pair(reward: Array, mask: Array | None = None) -> Array:
    """Marks groups with two or more present completions; [..., K] → [...]."""
    return present(mask, reward).sum(-1) >= 2


def has_preference(reward: Array, mask: Array | None = None) -> Array:
    """Marks groups in which one completion is strictly preferred to another; [..., K] → [...].

    Groups of ties carry no information for losses that see only the order of rewards.
    """
    return preferences(reward, mask).any((-2, -1))


def _num_partners(mask: Array, origin: Array) -> Array:
    """How many present completions of its group have another origin than each present one; 0 for
    an absent one; [..., K].
    """
    of_origin = jax.nn.one_hot(origin, NUM_ORIGINS, dtype=jnp.int32) * mask[..., None]
    own = (of_origin * of_origin.sum(-2, keepdims=True)).sum(-1)
    return jnp.where(mask, mask.sum(-1, keepdims=True) - own, 0)


def has_cross_pair(reward: Array, mask: Array | None = None, *, origin: Array) -> Array:
    """Marks groups with two present completions of different origins; [..., K] → [...]."""
    return _num_partners(present(mask, reward), origin).any(-1)


def counting(counts: Callable[..., Array]) -> Callable[[Loss], Loss]:
    """Decorator: gives a loss its attribute `counts`, (reward, mask) → groups in its average."""

    def mark(loss: Loss) -> Loss:
        loss.counts = counts  # pyright: ignore[reportFunctionMemberAccess]
        return loss

    return mark


def copg_objective(
    log_ratio: Array, reward: Array, *, beta: float | Array, mask: Array | None = None
) -> Array:
    """CoPG objective of each group, Eq. (5) summed over pairs; maximised.

    For a pair, with Δ = λ_1 − λ_2 and ΔR = R_1 − R_2, Eq. (5) is ``ΔR·Δ − (β/2)·Δ²``. A group of k
    is the sum over its pairs divided by k − 1, which needs no pairs at all:

        1/(k−1) Σ_{i<j} ℓ(y_i, y_j) = k/(k−1) Σ_i [(R_i − R̄)(λ_i − λ̄) − (β/2)(λ_i − λ̄)²]

    Args:
        log_ratio: ln π − ln π_ref of each completion, nats, summed over tokens; [..., K].
        reward: reward of each completion, reward units; [..., K].
        beta: KL coefficient β > 0, reward units per nat; scalar.
        mask: true where a completion is present; [..., K]. None means all are.

    Returns:
        The objective; [...]. Groups of fewer than two present completions give 0.

    Note:
        The gradient must flow through the weight R^π_{β/2} as well. Stopping it there solves the
        problem of temperature β/2 instead of β.
    """
    chex.assert_equal_shape([log_ratio, reward])
    mask = present(mask, log_ratio)
    gap, reward_gap = _centred(log_ratio, mask), _centred(reward, mask)
    scale = mask.sum(-1) / _num_others(mask)
    return scale * (reward_gap * gap - 0.5 * beta * gap**2).sum(-1)


@counting(has_pair)
def copg_loss(
    log_ratio: Array, reward: Array, *, beta: float | Array, mask: Array | None = None
) -> Array:
    """Negative `copg_objective`; minimised. Same arguments, [..., K] → [...]."""
    return -copg_objective(log_ratio, reward, beta=beta, mask=mask)


def cross_copg_objective(
    log_ratio: Array,
    reward: Array,
    *,
    beta: float | Array,
    origin: Array,
    mask: Array | None = None,
) -> Array:
    """CoPG objective of each group over its pairs of different origins, Eq. (6) with µ1 ≠ µ2;
    maximised.

    With m_i the number of partners of i, the present completions of other origins, it is

        k / Σ_i m_i · Σ_{i<j, o_i ≠ o_j} ℓ(y_i, y_j)

    the mean over these pairs times k/2, as `copg_objective` is over all pairs. No pairs are needed:

        Σ_{i<j, o_i ≠ o_j} (a_i − a_j)(b_i − b_j) = Σ_i m_i a_i b_i − Σ_i a_i Σ_i b_i + Σ_o A_o B_o

    where A_o and B_o are the sums over the completions of origin o.

    Args:
        log_ratio: ln π − ln π_ref of each completion, nats, summed over tokens; [..., K].
        reward: reward of each completion, reward units; [..., K].
        beta: KL coefficient β > 0, reward units per nat; scalar.
        origin: which µ each completion is from, in [0, NUM_ORIGINS); int [..., K].
        mask: true where a completion is present; [..., K]. None means all are.

    Returns:
        The objective; [...]. Groups without two origins give 0.
    """
    chex.assert_equal_shape([log_ratio, reward, origin])
    mask = present(mask, log_ratio)
    partners = _num_partners(mask, origin)
    of_origin = jax.nn.one_hot(origin, NUM_ORIGINS, dtype=log_ratio.dtype)
    # Sums over all pairs and over those of one origin cancel less about the mean.
    gap, reward_gap = _centred(log_ratio, mask), _centred(reward, mask)

    def over_pairs(a: Array, b: Array) -> Array:
        own = (a[..., None] * of_origin).sum(-2) * (b[..., None] * of_origin).sum(-2)
        return (partners * a * b).sum(-1) - a.sum(-1) * b.sum(-1) + own.sum(-1)

    scale = mask.sum(-1) / jnp.maximum(partners.sum(-1), 1)
    total = over_pairs(reward_gap, gap) - 0.5 * beta * over_pairs(gap, gap)
    return jnp.where(partners.any(-1), scale * total, 0.0)


@counting(has_cross_pair)
def cross_copg_loss(
    log_ratio: Array,
    reward: Array,
    *,
    beta: float | Array,
    origin: Array,
    mask: Array | None = None,
) -> Array:
    """Negative `cross_copg_objective`; minimised. Same arguments, [..., K] → [...]."""
    return -cross_copg_objective(log_ratio, reward, beta=beta, origin=origin, mask=mask)


def preferences(reward: Array, mask: Array | None = None) -> Array:
    """Marks the ordered pairs in which completion i is strictly preferred to j, i.e. R_i > R_j.

    Args:
        reward: reward units; [..., K].
        mask: true where a completion is present; [..., K].

    Returns:
        Boolean [..., K, K]; ties and absent completions are in no pair.
    """
    mask = present(mask, reward)
    reward = masked(reward, mask)
    both = mask[..., :, None] & mask[..., None, :]
    return both & (reward[..., :, None] > reward[..., None, :])


def _mean_over_preferences(gap_loss: Callable[[Array], Array], score: Array, preferred: Array):
    """Averages `gap_loss(score_winner − score_loser)` over the preferred pairs of each group; 0
    without any.
    """
    score = masked(score, preferred.any(-1) | preferred.any(-2))
    gap = jnp.where(preferred, score[..., :, None] - score[..., None, :], 0.0)
    total = jnp.where(preferred, gap_loss(gap), 0.0).sum((-2, -1))
    return total / jnp.maximum(preferred.sum((-2, -1)), 1)


@counting(has_preference)
def dpo_loss(
    log_ratio: Array, reward: Array, *, beta: float | Array, mask: Array | None = None
) -> Array:
    """DPO loss −ln σ(βΔ) with the preference read off the rewards (Rafailov et al. 2023, Eq. 7);
    minimised.

    Args:
        log_ratio: nats, summed over tokens; [..., K].
        reward: only its order within a group matters; [..., K].
        beta: KL coefficient β > 0; scalar.
        mask: true where a completion is present; [..., K].

    Returns:
        Mean over the strictly ordered pairs of each group; [...]. A group of ties gives 0: leave it
        out of averages.
    """
    chex.assert_equal_shape([log_ratio, reward])
    return _mean_over_preferences(
        lambda gap: -jax.nn.log_sigmoid(beta * gap), log_ratio, preferences(reward, mask)
    )


@counting(has_preference)
def ipo_loss(
    log_ratio: Array, reward: Array, *, beta: float | Array, mask: Array | None = None
) -> Array:
    """IPO loss (½ − βΔ)² with the preference read off the rewards (the paper's form, Prop. 3);
    minimised.

    Its gradient is −2β times the gradient of Eq. (5) at R = ±¼. TRL's `loss_type="ipo"` is another
    function: (Δ̄ − 1/(2β))² on log-ratios *averaged* over tokens, i.e. divided by β² and blind to
    length.

    Args and returns are those of `dpo_loss`.
    """
    chex.assert_equal_shape([log_ratio, reward])
    return _mean_over_preferences(
        lambda gap: (0.5 - beta * gap) ** 2, log_ratio, preferences(reward, mask)
    )


def pg_objective(
    log_ratio: Array,
    reward: Array,
    *,
    beta: float | Array,
    baseline: float | Array = 0.0,
    mask: Array | None = None,
) -> Array:
    """Policy gradient surrogate Σ_i sg[R^π_β(y_i) − b]·λ_i, whose gradient is the paper's ∇ℓ_PG
    (Sec. 5); maximised.

    Only its gradient means something, and only where the y_i are samples of π: off-policy it
    converges elsewhere.

    Args:
        log_ratio: nats, summed over tokens; [..., K].
        reward: reward units; [..., K].
        beta: KL coefficient β > 0; scalar.
        baseline: b, reward units; scalar or [...].
        mask: true where a completion is present; [..., K].

    Returns:
        The surrogate; [...].
    """
    chex.assert_equal_shape([log_ratio, reward])
    mask = present(mask, log_ratio)
    baseline = jnp.broadcast_to(jnp.asarray(baseline), log_ratio.shape[:-1])[..., None]
    advantage = masked(reward - beta * log_ratio, mask) - baseline
    return (jax.lax.stop_gradient(masked(advantage, mask)) * masked(log_ratio, mask)).sum(-1)


@counting(has_pair)
def pg_loss(
    log_ratio: Array,
    reward: Array,
    *,
    beta: float | Array,
    baseline: float | Array = 0.0,
    mask: Array | None = None,
) -> Array:
    """Negative `pg_objective`; minimised. Same arguments, [..., K] → [...]."""
    return -pg_objective(log_ratio, reward, beta=beta, baseline=baseline, mask=mask)


def rloo_objective(
    log_ratio: Array, reward: Array, *, beta: float | Array, mask: Array | None = None
) -> Array:
    """RLOO-k surrogate Σ_i sg[R^π_β(y_i) − mean_{j≠i} R^π_β(y_j)]·λ_i (Ahmadian et al. 2024);
    maximised.

    Its gradient equals that of `copg_objective` (Prop. 2), its value does not.

    Args and returns are those of `copg_objective`.
    """
    chex.assert_equal_shape([log_ratio, reward])
    mask = present(mask, log_ratio)
    regularized = masked(reward - beta * log_ratio, mask)
    others = (regularized.sum(-1, keepdims=True) - regularized) / _num_others(mask)[..., None]
    advantage = masked(regularized - others, mask & (mask.sum(-1, keepdims=True) > 1))
    return (jax.lax.stop_gradient(advantage) * masked(log_ratio, mask)).sum(-1)


@counting(has_pair)
def rloo_loss(
    log_ratio: Array, reward: Array, *, beta: float | Array, mask: Array | None = None
) -> Array:
    """Negative `rloo_objective`; minimised. Same arguments, [..., K] → [...]."""
    return -rloo_objective(log_ratio, reward, beta=beta, mask=mask)


@counting(has_preference)
def bradley_terry_loss(score: Array, reward: Array, *, mask: Array | None = None) -> Array:
    """Reward model loss −ln σ(s⁺ − s⁻) (paper Sec. 6, ℓ_RM); minimised.

    Args:
        score: the reward model's output, reward units; [..., K].
        reward: human labels, larger is preferred; [..., K].
        mask: true where a completion is present; [..., K].

    Returns:
        Mean over the strictly ordered pairs of each group; [...].
    """
    chex.assert_equal_shape([score, reward])
    return _mean_over_preferences(
        lambda gap: -jax.nn.log_sigmoid(gap), score, preferences(reward, mask)
    )


def nll_loss(seq_logp: Array, *, mask: Array | None = None) -> Array:
    """Negative log-likelihood −Σ_i ln π(y_i|x) of the completions of each group (SFT); minimised.

    Args:
        seq_logp: ln π of each completion, nats, summed over tokens; [..., K].
        mask: true where a completion is present; [..., K].

    Returns:
        Nats, summed over completions; [...]. Divide by the number of tokens for the usual average.
    """
    return -masked(seq_logp, present(mask, seq_logp)).sum(-1)
