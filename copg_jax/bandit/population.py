"""What each algorithm does with infinitely many samples: expected gradients, and where following
them ends.

1. `GRADIENTS`: the expected ascent direction of each algorithm, as coefficients on ∇ln π(a) (from
   `gradients.py`), `group_coefficients` and `cross_coefficients`: that of a loss on groups, by
   enumeration;
2. `logit_gradient`: those coefficients as a direction for softmax logits;
3. `fixed_point`: where the flow d(logits)/dt = direction settles, `end_of`: for an algorithm;
4. `flow_spectrum`: whether it attracts;
5. `truncated`: what top-p leaves of a distribution, `end_on_pairs`: where CoPG ends on pairs that
   may not compare all arms, `regret_by_round`: fresh data, replayed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from copg_jax import gradients, losses
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
    samplers = jnp.broadcast_to(_mixture(bandit), (k, bandit.reward.size))
    return _enumerated(loss, log_policy, bandit, samplers)


def cross_coefficients(log_policy: Array, bandit: Bandit, *, sizes: tuple[int, int]) -> Array:
    """Expected ascent direction of `losses.cross_copg_loss` on groups of so many arms drawn from μ1
    and from μ2, by enumeration; one context only.

    Args:
        log_policy: ln π; [A].
        bandit: the problem.
        sizes: completions from μ1 and from μ2.

    Returns:
        Coefficients on ∇ln π(a): k/2 times Eq. (7), whatever the sizes are; [A].
    """
    origin = jnp.repeat(jnp.arange(2), jnp.asarray(sizes), total_repeat_length=sum(sizes))
    samplers = jnp.stack([bandit.mu1, bandit.mu2])[origin]

    def loss(log_ratio: Array, reward: Array, *, beta: Array) -> Array:
        of_groups = jnp.broadcast_to(origin, log_ratio.shape)
        return losses.cross_copg_loss(log_ratio, reward, beta=beta, origin=of_groups)

    return _enumerated(loss, log_policy, bandit, samplers)


def _enumerated(
    loss: Callable[..., Array], log_policy: Array, bandit: Bandit, samplers: Array
) -> Array:
    """Expected ascent direction of a loss on groups whose arm i is drawn from samplers[i]; [A]."""
    k, num_arms = samplers.shape
    groups = jnp.stack(jnp.unravel_index(jnp.arange(num_arms**k), (num_arms,) * k), axis=-1)
    weight = samplers[jnp.arange(k), groups].prod(-1)

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


def truncated(policy: Array, top_p: float | Array) -> Array:
    """What top-p sampling draws from: the most likely arms, as many as a total of p takes, scaled
    to sum to 1.

    Args:
        policy: probabilities; [..., A].
        top_p: p in (0, 1].

    Returns:
        Probabilities, 0 where an arm is cut off; [..., A].
    """
    ordered = -jnp.sort(-policy, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    least = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
    kept = jnp.where(policy >= least, policy, 0.0)
    return kept / kept.sum(-1, keepdims=True)


def end_on_pairs(bandit: Bandit) -> Array:
    """Where gradient steps on L lead from π_ref, also where μ1 and μ2 do not have all arms; ln π.

    Within arms that pairs connect, the gaps of log-ratios are those of π*; the mean logit of such a
    set stays what it is in π_ref.
    """
    weights = exact.pair_weights(bandit.mu1, bandit.mu2)
    reward_gap = bandit.reward[..., :, None] - bandit.reward[..., None, :]
    pull = exact.reward_pull(weights, reward_gap)
    ratio = exact.copg_maximiser(weights, pull, bandit.beta)
    return jax.nn.log_softmax(jnp.log(bandit.ref) + ratio, axis=-1)


def regret_by_round(
    bandit: Bandit,
    samplers: Callable[[Array], tuple[Array, Array]],
    *,
    num_rounds: int,
    steps_per_round: int,
    replay_rounds: int = 1,
    draw: Callable[[Array], Array] = lambda policy: policy,
    learning_rate: float = 0.5,
) -> Array:
    """Regret before each round and after the last, of expected CoPG steps on fresh data.

    Each round draws from the policy as it is, and steps on the mean of the last rounds' samples.

    Args:
        bandit: the problem; its μ1 and μ2 are not used. One context.
        samplers: mean distribution of the replayed rounds [A] → μ1, μ2.
        num_rounds: rounds.
        steps_per_round: gradient steps on a round's data.
        replay_rounds: W, how many rounds the data are of.
        draw: policy [A] → what its samples are drawn from, e.g. `truncated`.
        learning_rate: of plain gradient steps on the logits.

    Returns:
        Reward units; [num_rounds + 1].
    """

    def one_round(carry: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], Array]:
        logits, rounds = carry
        log_policy = jax.nn.log_softmax(logits)
        rounds = jnp.roll(rounds, 1, axis=0).at[0].set(draw(jnp.exp(log_policy)))
        there = jnp.arange(replay_rounds) <= number
        mean = (rounds * there[:, None]).sum(0) / there.sum()
        mu1, mu2 = samplers(mean)
        data = bandit._replace(mu1=mu1, mu2=mu2)
        take_step = lambda _, z: z + learning_rate * direction("copg", z, data)
        logits = jax.lax.fori_loop(0, steps_per_round, take_step, logits)
        return (logits, rounds), exact.regret(log_policy, bandit)

    start = jnp.log(bandit.ref), jnp.zeros((replay_rounds, bandit.ref.size))
    (logits, _), regrets = jax.lax.scan(one_round, start, jnp.arange(num_rounds))
    last = exact.regret(jax.nn.log_softmax(logits), bandit)
    return jnp.append(regrets, last)
