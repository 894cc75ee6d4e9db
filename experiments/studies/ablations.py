"""What finite, noisy, off-policy data cost CoPG, without an optimiser in the way.

In the logits the empirical objective is a quadratic, so its maximiser is a linear solve and
thousands of data sets cost nothing:

1. `finite_data_regret`: regret of that maximiser on random data sets of pairs;
2. `predicted_regret`: the law that these follow, σ²/(nβ)·tr(F* Laplacian⁺);
3. `group_regret`: the same with groups of k, i.e. k − 1 samples for the inner expectation;
4. `tilted_sampler`: sampling distributions at a chosen distance from π*;
5. `trained_regret`: figure 1's stochastic training over a range of β.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from copg_jax.bandit import exact, train
from copg_jax.bandit.exact import Bandit


@jax.jit
def _empirical_regret(weights: Array, pull: Array, bandit: Bandit) -> Array:
    """Regret of the maximiser of each empirical objective; [sets, A, A], [sets, A] → [sets]."""
    ratio = exact.copg_maximiser(weights, pull, bandit.beta)
    log_policy = jax.nn.log_softmax(jnp.log(bandit.ref)[None, :] + ratio, axis=-1)
    return jax.vmap(exact.regret, (0, None))(log_policy, bandit)


def _antisymmetric(values: np.ndarray) -> np.ndarray:
    return values - np.swapaxes(values, -1, -2)


def finite_data_regret(
    rng: np.random.Generator,
    bandit: Bandit,
    num_pairs: int,
    *,
    reward_noise: float = 0.0,
    num_sets: int = 1000,
) -> dict[str, np.ndarray]:
    """Regret of the exact maximiser of the empirical objective, Eq. (8), over random data sets.

    Args:
        rng: source of the data sets.
        bandit: the problem, without contexts.
        num_pairs: n.
        reward_noise: σ of independent Gaussian noise on each observed reward, reward units.
        num_sets: number of data sets.

    Returns:
        For "copg" and "ipo" (preferences Bradley–Terry), regret of each data set, [num_sets]; and
        "connected", whether its pairs connect all arms, i.e. whether it determines a policy.
    """
    reward = np.asarray(bandit.reward)
    gap = reward[:, None] - reward[None, :]
    meet = np.asarray(bandit.mu1)[:, None] * np.asarray(bandit.mu2)[None, :]
    counts = rng.multinomial(num_pairs, meet.reshape(-1) / meet.sum(), size=num_sets)
    counts = counts.reshape(num_sets, *meet.shape)
    weights = counts + np.swapaxes(counts, -1, -2)
    noise = reward_noise * np.sqrt(2 * counts) * rng.normal(size=counts.shape)
    pull = (counts * gap + noise, rng.binomial(counts, 1 / (1 + np.exp(-gap))) - 0.5 * counts)
    regrets = [
        np.asarray(
            _empirical_regret(jnp.asarray(weights, float), _antisymmetric(p).sum(-1), bandit)
        )
        for p in pull
    ]
    connected = [exact.pair_components(w).max() == 0 for w in weights]
    return {"copg": regrets[0], "ipo": regrets[1], "connected": np.array(connected)}


def predicted_regret(bandit: Bandit, num_pairs: ArrayLike, *, reward_noise: ArrayLike) -> Array:
    """Mean regret of CoPG to first order in 1/n: ``σ²/(nβ) · tr((diag π* − π*π*ᵀ) Laplacian(W)⁺)``.

    The noise of a pair has variance 2σ², so the implicit reward βλ has covariance (2σ²/n)
    Laplacian⁺, and near π* the regret is the variance of its error under π*, over 2β.

    Args:
        bandit: the problem, without contexts.
        num_pairs: n.
        reward_noise: σ, reward units.

    Returns:
        Reward units; scalar.
    """
    best = jnp.exp(exact.optimal_policy(bandit))
    fisher = jnp.diag(best) - best[:, None] * best[None, :]
    laplacian = exact.pair_laplacian(exact.pair_weights(bandit.mu1, bandit.mu2))
    inverse = jnp.linalg.pinv(laplacian, rtol=1e-12, hermitian=True)
    return jnp.trace(fisher @ inverse) * jnp.square(reward_noise) / (num_pairs * bandit.beta)


def group_regret(
    rng: np.random.Generator,
    bandit: Bandit,
    *,
    num_samples: int,
    k: int,
    reward_noise: float,
    num_sets: int = 300,
) -> np.ndarray:
    """Regret of CoPG-k's empirical maximiser at a fixed budget of samples: num_samples / k groups.

    To first order it is ``k / (2(k − 1))`` times `predicted_regret` of as many samples in pairs:
    the baseline of k − 1 samples adds 1/(k − 1) of the noise variance of the sample itself.

    Args:
        rng: source of the data sets.
        bandit: the problem, without contexts; all members of a group come from μ1.
        num_samples: scored samples in total, a multiple of k.
        k: group size; k − 1 samples estimate the inner expectation.
        reward_noise: σ, reward units.
        num_sets: number of data sets.

    Returns:
        Regret of each data set; [num_sets].
    """
    shape = (num_sets, num_samples // k, k)
    arm = rng.choice(bandit.mu1.size, size=shape, p=np.asarray(bandit.mu1))
    reward = np.asarray(bandit.reward)[arm] + reward_noise * rng.normal(size=shape)
    advantage = (reward - reward.mean(-1, keepdims=True)) * k / (k - 1)
    one_hot = np.eye(bandit.mu1.size)[arm]
    pull = np.einsum("sgka,sgk->sa", one_hot, advantage)
    counts = one_hot.sum(2)
    meet = np.einsum("sga,sgb->sab", counts, counts) / (k - 1)
    # The diagonal cancels in the Laplacian: a sample is not compared with itself.
    return np.asarray(_empirical_regret(jnp.asarray(meet), jnp.asarray(pull), bandit))


def tilted_sampler(bandit: Bandit, tilt: ArrayLike) -> Bandit:
    """Replaces μ1 and μ2 by μ ∝ π*^(1 − tilt): π* at 0, uniform at 1, its opposite beyond."""
    mu = jax.nn.softmax((1 - jnp.asarray(tilt)) * exact.optimal_policy(bandit))
    return bandit._replace(mu1=mu, mu2=mu)


def trained_regret(
    key: Array,
    bandit: Bandit,
    betas: Array,
    *,
    algorithms: Sequence[str],
    num_seeds: int = 8,
    num_pairs: int = 2048,
    num_epochs: int = 475,
    learning_rate: float = 1e-3,
) -> Array:
    """Final regret of stochastic training (Adam, batch 512), against the optimum of the *same* β.

    Args:
        key: PRNG key.
        bandit: the problem; its β is replaced.
        betas: KL coefficients; [n].
        algorithms: names in `train.OBJECTIVES`.
        num_seeds: data sets per β.
        num_pairs: pairs per data set.
        num_epochs: passes; 475 of 4 batches are figure 1's 1,900 steps.
        learning_rate: Adam step size, nats.

    Returns:
        [n, num_seeds, algorithms].
    """
    run = train.make_run(
        optax.adam(learning_rate), algorithms=algorithms, batch_size=512, num_epochs=num_epochs
    )
    order_key, data_key = jax.random.split(key)
    pairs = train.distinct_pairs(bandit)

    def one(beta: Array, key: Array) -> Array:
        problem = bandit._replace(beta=beta)
        path = run(order_key, pairs, train.sample_pairs(key, bandit, num_pairs), problem)
        end = jax.nn.log_softmax(path[-1], axis=-1)
        return jax.vmap(exact.regret, (0, None))(end, problem)

    over_seeds = jax.vmap(one, (None, 0))
    return jax.jit(jax.vmap(over_seeds, (0, None)))(betas, jax.random.split(data_key, num_seeds))
