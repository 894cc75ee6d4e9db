"""Several rewards R_i on one bandit: optima of weighted sums, and what one run a reward gives.

The optimum π_i of R_i has β ln(π_i/π_ref) = R_i + const: log-ratios add as rewards do. So the
policies of one run a reward make that of any weighted sum, by their logits and without a run:

1. `weigh_rewards` makes the problem of a weighted sum;
2. `interpolate_logits` joins policies that are optimal for it, `mix_policies` those that are not;
3. `measure_front` gives the rewards, the KL and the regret of a policy for each of several weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from copg_jax.bandit import exact
from copg_jax.bandit.exact import Bandit


def weigh_rewards(rewards: Array, weights: ArrayLike, bandit: Bandit) -> Bandit:
    """The bandit with the reward Σ_i w_i R_i.

    Args:
        rewards: R_i, reward units; [N, ..., A].
        weights: w_i; [N].
        bandit: the problem; its own reward is not used.
    """
    return bandit._replace(reward=jnp.tensordot(jnp.asarray(weights), rewards, 1))


def interpolate_logits(log_policies: Array, weights: ArrayLike, bandit: Bandit) -> Array:
    """ln π with π ∝ π_ref Π_i (π_i/π_ref)^{w_i}: π* of Σ_i w_i R_i if each π_i is π* of R_i at the
    same β. With weights that sum to 1 this is Σ_i w_i ln π_i, normalised: π_ref is not needed.

    Args:
        log_policies: ln π_i; [N, ..., A].
        weights: w_i; [N].
        bandit: gives π_ref.

    Returns:
        ln π; [..., A].
    """
    ratios = jax.vmap(exact.log_ratio, (0, None))(log_policies, bandit)
    total = jnp.tensordot(jnp.asarray(weights), ratios, 1)
    return jax.nn.log_softmax(jnp.log(bandit.ref) + total, axis=-1)


def mix_policies(log_policies: Array, weights: ArrayLike) -> Array:
    """ln Σ_i w_i π_i: each answer is of one of the policies, drawn by weights w_i that sum to 1;
    [N, ..., A] and [N] → [..., A].
    """
    return jnp.log(jnp.tensordot(jnp.asarray(weights), jnp.exp(log_policies), 1))


class Front(NamedTuple):
    """One policy for each of W weights of N rewards."""

    rewards: Array  # E_π[R_i], reward units; [W, N]
    kl: Array  # KL(π‖π_ref), nats; [W]
    regret: Array  # J(π*) − J(π) for the weighted sum, reward units; [W]


def measure_front(log_policies: Array, rewards: Array, weights: Array, bandit: Bandit) -> Front:
    """Measures policies under the weighted sums that each is for.

    Args:
        log_policies: ln π; [W, ..., A].
        rewards: R_i, reward units; [N, ..., A].
        weights: w_i of each policy; [W, N].
        bandit: the problem; its own reward is not used.
    """

    def measure(log_policy: Array, weight: Array) -> Front:
        expected = lambda reward: exact.expected_reward(log_policy, bandit._replace(reward=reward))
        problem = weigh_rewards(rewards, weight, bandit)
        return Front(
            jax.vmap(expected)(rewards),
            exact.kl(log_policy, bandit),
            exact.regret(log_policy, problem),
        )

    return jax.vmap(measure)(log_policies, weights)
