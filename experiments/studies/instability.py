"""Open question 1: when and why does stochastic CoPG become unstable at low β, and does normalising
ΔR help?

The suspects, each with its measurement:

1. curvature: `largest_stable_step`, for gradient descent; the Hessian is proportional to β, so low
   β is *safer*;
2. gradient noise and finite data: exact in `ablations`; noise-free rewards leave none at the
   optimum;
3. generalisation: `make_problem` draws a bandit with many arms and a log-linear policy of few
   parameters, trained on pairs from π_ref that never show most arms. `fit` trains it through
   `losses.copg_loss`, `measure` evaluates it.

In (3) CoPG is a regression of reward gaps on β·Δ: all β fit the *same* implicit reward V = βλ, and
π ∝ π_ref exp(V/β) then looks up its largest errors, the more sharply the lower β. The loss on pairs
from the data cannot see that. `normalise` transforms ΔR in the ways people do; `refreshed` puts
samples of the current policy among the pairs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from copg_jax import losses
from copg_jax.bandit import exact
from copg_jax.bandit.exact import Bandit


def largest_stable_step(bandit: Bandit) -> Array:
    """Largest step of gradient ascent on L that does not diverge: 2/(β λ_max(Laplacian)); scalar,
    nats per reward unit."""
    laplacian = exact.pair_laplacian(exact.pair_weights(bandit.mu1, bandit.mu2))
    return 2.0 / (bandit.beta * jnp.linalg.eigvalsh(laplacian)[..., -1].max())


class Problem(NamedTuple):
    """Many arms, few parameters: ln π = ln π_ref + φ·θ − ln Z."""

    reward: Array  # reward units; [A]
    log_ref: Array  # ln π_ref; [A]
    features: Array  # φ; [A, D]


def make_problem(
    key: Array,
    *,
    num_arms: int = 512,
    num_features: int = 12,
    misfit: float = 1.0,
    saturation: float = 0.0,
) -> Problem:
    """Draws a problem with reward s − ½·saturation·s² + misfit·noise, where s is linear in the
    features, s ~ N(0, 1).

    Args:
        key: PRNG key.
        num_arms: A, many more than the features.
        num_features: D.
        misfit: standard deviation of unsystematic rewards that no θ represents, reward units.
        saturation: more of a good thing stops helping at s = 1/saturation, and then hurts.
    """
    feature_key, linear_key, rest_key, ref_key = jax.random.split(key, 4)
    features = jax.random.normal(feature_key, (num_arms, num_features))
    direction = jax.random.normal(linear_key, (num_features,))
    linear = features @ (direction / jnp.linalg.norm(direction))
    reward = linear - 0.5 * saturation * linear**2
    reward = reward + misfit * jax.random.normal(rest_key, (num_arms,))
    # A peaked reference, as a language model's: most arms are rare in the data.
    tilt = features @ jax.random.normal(ref_key, (num_features,))
    return Problem(reward, jax.nn.log_softmax(tilt), features)


def sample_arms(key: Array, log_policy: Array, num_pairs: int) -> Array:
    """Draws pairs of arms from one policy; int [n, 2]."""
    return jax.random.categorical(key, log_policy, shape=(num_pairs, 2))


def normalise(reward: Array, how: str) -> Array:
    """Rescales the rewards of a batch of pairs.

    Args:
        reward: reward units; [n, 2].
        how: "none"; "batch", ΔR divided by its root mean square over the batch; "pair", ΔR
            divided by |ΔR|, leaving ±1, the signal of IPO.

    Returns:
        Rewards of mean 0 in each pair; [n, 2].
    """
    half_gap = 0.5 * (reward - reward[:, ::-1])
    root_mean_square = jnp.sqrt((4 * half_gap**2).mean())
    scale = {
        "none": jnp.ones_like(half_gap),
        "batch": jnp.full_like(half_gap, root_mean_square),
        "pair": jnp.where(half_gap == 0, 1.0, 2 * jnp.abs(half_gap)),
    }[how]
    return half_gap / scale


def pair_loss(
    theta: Array, problem: Problem, arms: Array, reward: Array, beta: Array | float
) -> Array:
    """Mean CoPG loss of a batch of pairs under the log-linear policy; minimised; scalar.

    The normaliser is left out: CoPG does not see a shift of both log-ratios.
    """
    return losses.copg_loss((problem.features @ theta)[arms], reward, beta=beta).mean()


def log_policy(theta: Array, problem: Problem) -> Array:
    """ln π of the log-linear policy; [A]."""
    return jax.nn.log_softmax(problem.log_ref + problem.features @ theta)


@partial(jax.jit, static_argnames=("how", "batch_size", "num_steps", "every"))
def fit(
    key: Array,
    problem: Problem,
    arms: Array,
    beta: Array | float,
    *,
    how: str = "none",
    batch_size: int = 64,
    num_steps: int = 4000,
    every: int = 100,
    learning_rate: float = 1e-2,
) -> Array:
    """Trains by Adam on batches drawn from a data set of pairs.

    Args:
        key: PRNG key of the batches.
        problem: the problem.
        arms: the data set; int [n, 2].
        beta: KL coefficient β; scalar.
        how: see `normalise`.
        batch_size: pairs per step, drawn with replacement.
        num_steps: steps.
        every: steps between recorded parameters.
        learning_rate: Adam step size.

    Returns:
        θ after every `every` steps, the start included; [num_steps / every + 1, D].
    """
    optimizer = optax.adam(learning_rate)

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        theta, state = carry
        batch = arms[jax.random.randint(key, (batch_size,), 0, arms.shape[0])]
        reward = normalise(problem.reward[batch], how)
        gradient = jax.grad(pair_loss)(theta, problem, batch, reward, beta)
        updates, state = optimizer.update(gradient, state)
        return (jnp.asarray(optax.apply_updates(theta, updates)), state), None

    def block(carry: tuple, keys: Array) -> tuple[tuple, Array]:
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, carry[0]

    start = jnp.zeros(problem.features.shape[1])
    keys = jax.random.split(key, (num_steps // every, every))
    _, path = jax.lax.scan(block, (start, optimizer.init(start)), keys)
    return jnp.concatenate([start[None], path])


@jax.jit
def least_squares(
    problem: Problem, arms: Array, beta: ArrayLike, reward: Array | None = None
) -> Array:
    """θ that maximises the empirical objective exactly: regress ΔR on β·Δφ.

    Args:
        problem: the problem.
        arms: the data set; int [n, 2].
        beta: KL coefficient β; scalar.
        reward: rewards of the pairs if not the problem's own; [n, 2].

    Returns:
        [D]. βθ is the same for all β.
    """
    reward = problem.reward[arms] if reward is None else reward
    rows = problem.features[arms]
    design, target = rows[:, 0] - rows[:, 1], reward[:, 0] - reward[:, 1]
    return jnp.linalg.solve(design.T @ design, design.T @ target) / beta


@partial(jax.jit, static_argnames=("rounds", "num_pairs"))
def refreshed(
    key: Array, problem: Problem, arms: Array, beta: ArrayLike, *, rounds: int, num_pairs: int
) -> Array:
    """Refits after adding pairs from the current policy to the data, round by round (off-policy
    data is never dropped).

    Args:
        key: PRNG key.
        problem: the problem.
        arms: the offline data set; int [n, 2].
        beta: KL coefficient β; scalar.
        rounds: times that the policy is asked for pairs.
        num_pairs: pairs per round.

    Returns:
        θ at the end; [D].
    """
    theta = least_squares(problem, arms, beta)
    for round_key in jax.random.split(key, rounds):
        fresh = sample_arms(round_key, log_policy(theta, problem), num_pairs)
        arms = jnp.concatenate([arms, fresh])
        theta = least_squares(problem, arms, beta)
    return theta


@jax.jit
def measure(theta: Array, problem: Problem, held_out: Array, beta: ArrayLike) -> dict[str, Array]:
    """Evaluates a policy as generation would, and as a validation loss would.

    Args:
        theta: parameters; [D].
        problem: the problem.
        held_out: pairs from π_ref that were not trained on; int [n, 2].
        beta: KL coefficient β; scalar.

    Returns:
        "reward" E_π[R] (exact, reward units); "kl" KL(π‖π_ref) (nats); "objective" J; and
        "residual", the held-out E[(ΔR − βΔ)²] / E[ΔR²]: the CoPG loss up to scale and constant.
    """
    policy = log_policy(theta, problem)
    probability = jnp.exp(policy)
    ratio = (problem.features @ theta)[held_out]
    gap = problem.reward[held_out] @ jnp.array([1.0, -1.0])
    residual = gap - beta * (ratio @ jnp.array([1.0, -1.0]))
    reward = probability @ problem.reward
    divergence = probability @ (policy - problem.log_ref)
    return {
        "reward": reward,
        "kl": divergence,
        "objective": reward - beta * divergence,
        "residual": (residual**2).mean() / (gap**2).mean(),
    }
