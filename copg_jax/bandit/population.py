"""What each algorithm does with infinitely many samples: expected gradients, and where following
them ends.

1. `GRADIENTS`: the expected ascent direction of each algorithm, as coefficients on ∇ln π(a) (from
   `gradients.py`), `group_coefficients`: that of any loss on groups of k, by enumeration;
2. `logit_gradient`: those coefficients as a direction for softmax logits;
3. `fixed_point`: where the flow d(logits)/dt = direction settles, `end_of`: for an algorithm;
4. `flow_spectrum`: whether it attracts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from copg_jax import gradients
from copg_jax.bandit import exact
from copg_jax.bandit.exact import Bandit

Coefficients = Callable[[Array, Bandit], Array]


def _copg(log_policy: Array, bandit: Bandit) -> Array:
    ratio = exact.log_ratio(log_policy, bandit)
    return gradients.population_copg_gradient(
        ratio, bandit.reward, bandit.mu1, bandit.mu2, beta=bandit.beta
    )


def _rloo(log_policy: Array, bandit: Bandit) -> Array:
    samplers = jnp.stack([bandit.mu1, bandit.mu2], axis=-2)
    ratio = exact.log_ratio(log_policy, bandit)
    return gradients.population_rloo_gradient(ratio, bandit.reward, samplers, beta=bandit.beta)


def _pg(log_policy: Array, bandit: Bandit, baseline: Array | float) -> Array:
    ratio = exact.log_ratio(log_policy, bandit)
    both = bandit.mu1 + bandit.mu2
    return gradients.population_pg_gradient(
        ratio, bandit.reward, both, beta=bandit.beta, baseline=baseline
    )


def _pg_value(log_policy: Array, bandit: Bandit) -> Array:
    return _pg(log_policy, bandit, (jnp.exp(log_policy) * bandit.reward).sum(-1))


def _ipo(log_policy: Array, bandit: Bandit) -> Array:
    ratio = exact.log_ratio(log_policy, bandit)
    return -gradients.population_ipo_gradient(
        ratio, bandit.reward, bandit.mu1, bandit.mu2, beta=bandit.beta
    )


def _dpo(log_policy: Array, bandit: Bandit) -> Array:
    ratio = exact.log_ratio(log_policy, bandit)
    return -gradients.population_dpo_gradient(
        ratio, bandit.reward, bandit.mu1, bandit.mu2, beta=bandit.beta
    )


def _mixture(bandit: Bandit) -> Array:
    """µ of one completion: that of y or of y', each as often."""
    return 0.5 * (bandit.mu1 + bandit.mu2)


def _opmd(log_policy: Array, bandit: Bandit) -> Array:
    return _pg(log_policy, bandit, (_mixture(bandit) * bandit.reward).sum(-1))


def _oapl(log_policy: Array, bandit: Bandit) -> Array:
    log_mean = jax.nn.logsumexp(jnp.log(_mixture(bandit)) + bandit.reward / bandit.beta, axis=-1)
    return _pg(log_policy, bandit, bandit.beta * log_mean)


def asymre(log_policy: Array, bandit: Bandit, *, delta_v: float) -> Array:
    """µ(a)(R^π_β(a) − E_µ[R^π_β] − δV), AsymRE on groups without number; ascent direction.

    Args:
        log_policy: ln π; [..., A].
        bandit: the problem; β = 0 is the loss as printed, without KL.
        delta_v: δV, reward units.
    """
    value = gradients.regularized_reward(
        exact.log_ratio(log_policy, bandit), bandit.reward, beta=bandit.beta
    )
    return _pg(log_policy, bandit, (_mixture(bandit) * value).sum(-1) + delta_v)


def topr(log_policy: Array, bandit: Bandit, *, baseline: float | Array) -> Array:
    """µ(a)·α(a)·(R(a) − b), TOPR on rewards of which b is the zero; ascent direction.

    Args:
        log_policy: ln π; [..., A].
        bandit: the problem, whose β and π_ref TOPR does not know.
        baseline: b, reward units.
    """
    mixture = _mixture(bandit)
    reward = bandit.reward - baseline
    return mixture * gradients.topr_gradient(log_policy, jnp.log(mixture), reward)


# Expected ascent directions in the setting of Sec. 5: y ∼ μ1, y' ∼ μ2, preferences Bradley–Terry.
# The relatives' baselines are those of groups without number, from the mixture of μ1 and μ2.
GRADIENTS: dict[str, Coefficients] = {
    "copg": _copg,
    "rloo": _rloo,
    "pg_none": lambda log_policy, bandit: _pg(log_policy, bandit, 0.0),
    "pg_value": _pg_value,
    "ipo": _ipo,
    "dpo": _dpo,
    "opmd": _opmd,
    "oapl": _oapl,
}


def group_coefficients(
    loss: Callable[..., Array], log_policy: Array, bandit: Bandit, *, k: int
) -> Array:
    """Expected ascent direction of a loss on groups of k arms drawn from the mixture of μ1 and μ2,
    by enumeration of the A^k groups; one context only.

    Args:
        loss: (log_ratio [n, k], reward [n, k], beta=) → [n], such as `losses.copg_loss`; minimised.
        log_policy: ln π; [A].
        bandit: the problem.
        k: completions of a group.

    Returns:
        Coefficients on ∇ln π(a); [A].
    """
    num_arms = bandit.reward.size
    groups = jnp.stack(jnp.unravel_index(jnp.arange(num_arms**k), (num_arms,) * k), axis=-1)
    weight = _mixture(bandit)[groups].prod(-1)

    def expected_loss(log_ratio: Array) -> Any:
        return (weight * loss(log_ratio[groups], bandit.reward[groups], beta=bandit.beta)).sum()

    return -jax.grad(expected_loss)(exact.log_ratio(log_policy, bandit))


def rl_gradient(log_policy: Array, bandit: Bandit) -> Array:
    """∇J as coefficients on ∇ln π(a): π(a) R^π_β(a) (Sec. 2), with any baseline; ascent; [...,
    A]."""
    ratio = exact.log_ratio(log_policy, bandit)
    policy = jnp.exp(log_policy)
    return gradients.population_pg_gradient(
        ratio, bandit.reward, policy, beta=bandit.beta, baseline=0.0
    )


def logit_gradient(coefficients: Array, log_policy: Array, bandit: Bandit) -> Array:
    """Σ_a c(a) ∇ln π(a) for a softmax policy: c − π Σ_b c(b), weighted by ρ(x).

    Args:
        coefficients: c, reward units; [..., A].
        log_policy: ln π; [..., A].
        bandit: the problem, for its context probabilities.

    Returns:
        The direction in the logits; [..., A]. Where the c sum to 0 (CoPG, RLOO, IPO, DPO) π drops
        out of it.
    """
    total = coefficients.sum(-1, keepdims=True)
    return bandit.context_prob[..., None] * (coefficients - jnp.exp(log_policy) * total)


def direction(algorithm: str, logits: Array, bandit: Bandit) -> Array:
    """Expected update direction of the logits under one of `GRADIENTS`; [..., A]."""
    log_policy = jax.nn.log_softmax(logits, axis=-1)
    return logit_gradient(GRADIENTS[algorithm](log_policy, bandit), log_policy, bandit)


def fixed_point(
    direction_fn: Callable[[Array], Array], logits: Array, *, num_steps: int = 150
) -> Array:
    """Follows d(logits)/dt = direction_fn(logits) to where it settles; returns ln π there.

    Implicit Euler steps that grow from 1 to 1e8: the first follow the flow (so the end is the one
    that small gradient steps from `logits` reach), the last are Newton steps, so it is exact to
    rounding.

    Args:
        direction_fn: update direction, not necessarily a gradient; [..., A] → [..., A].
        logits: start; [..., A].
        num_steps: implicit steps.

    Returns:
        ln π at the end; [..., A].
    """
    shape = logits.shape
    flat_fn = lambda flat: direction_fn(flat.reshape(shape)).reshape(-1)

    def step(flat: Array, time_step: Array) -> tuple[Array, None]:
        matrix = jnp.eye(flat.size) / time_step - jax.jacfwd(flat_fn)(flat)
        return flat + jnp.linalg.solve(matrix, flat_fn(flat)), None

    flat, _ = jax.lax.scan(step, logits.reshape(-1), jnp.geomspace(1.0, 1e8, num_steps))
    return jax.nn.log_softmax(flat.reshape(shape), axis=-1)


@partial(jax.jit, static_argnames="coefficients")
def end_of(coefficients: Coefficients, bandit: Bandit) -> Array:
    """Where the expected updates of an algorithm lead from π_ref; ln π, [..., A].

    Args:
        coefficients: one of `GRADIENTS`, or another function of (ln π, bandit); compiled once.
        bandit: the problem.
    """

    def follow(logits: Array) -> Array:
        log_policy = jax.nn.log_softmax(logits, axis=-1)
        return logit_gradient(coefficients(log_policy, bandit), log_policy, bandit)

    return fixed_point(follow, jnp.log(bandit.ref))


def flow_spectrum(direction_fn: Callable[[Array], Array], logits: Array) -> Array:
    """Real parts of the eigenvalues of the flow's Jacobian, ascending, without its zeros (shifts of
    the logits).

    All negative: the fixed point attracts. One context only.

    Args:
        direction_fn: update direction; [A] → [A].
        logits: where to look; [A].

    Returns:
        [A − 1].
    """
    # A softmax ignores shifts, so the Jacobian acts on differences to the last arm.
    jacobian = jax.jacfwd(direction_fn)(logits)
    reduced = jacobian[:-1, :-1] - jacobian[-1:, :-1]
    return jnp.sort(jnp.linalg.eigvals(reduced).real)
