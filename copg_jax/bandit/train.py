"""Figure 1: every algorithm trained on the same sampled pairs, from data to regret curve in one
`jit`.

1. `BanditConfig`: the paper's setting by default;
2. `distinct_pairs` and `sample_pairs`: a data set as rows of the few pairs that can occur;
3. `OBJECTIVES`: the sample objective of each algorithm, from `losses.py`;
4. `make_run` scans over epochs and shuffled batches and records the exact regret after each step;
5. `make_train` closes over a config: ``train(key)``, to be mapped over seeds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from copg_jax import losses
from copg_jax.bandit import exact
from copg_jax.bandit.exact import Bandit
from copg_jax.config.options import option
from copg_jax.errors import InputError


@dataclass(frozen=True)
class BanditConfig:
    """The paper's Sec. 5 by default."""

    reward: list[float] = option([2.5, 2.0, 1.0], "reward of each arm, reward units")
    mu1: list[float] = option([0.1, 0.2, 0.7], "distribution of the first arm of a pair")
    mu2: list[float] = option([0.05, 0.05, 0.9], "distribution of the second arm of a pair")
    ref: list[float] | None = option(None, "reference policy; uniform when null")
    beta: float = option(0.5, "KL coefficient, reward units per nat")
    num_pairs: int = option(10_000, "pairs in the data set")
    batch_size: int = option(512, "pairs per step; an epoch drops its incomplete last batch")
    num_epochs: int = option(100, "passes over the data set")
    learning_rate: float = option(1e-3, "Adam step size, nats")
    num_seeds: int = option(64, "independent data sets and orders")
    seed: int = option(0, "seed of the data sets and of the order of batches")
    long_num_epochs: int = option(1000, "passes of the longer runs that show where curves end")
    long_num_seeds: int = option(8, "data sets of the longer runs")
    output_dir: str = option("runs/bandit", "where the figure, the CSV and summary.json go")

    def __post_init__(self) -> None:
        for field in ("pairs", "epochs", "seeds"):
            for name in (f"num_{field}", f"long_num_{field}"):
                if getattr(self, name, 1) < 1:
                    raise InputError(f"{name}: wanted at least 1, got {getattr(self, name)}.")
        if self.batch_size < 1:
            raise InputError(f"batch_size: wanted at least 1, got {self.batch_size}.")
        if self.batch_size > self.num_pairs:
            raise InputError(
                f"batch_size: wanted at most num_pairs ({self.num_pairs}), got {self.batch_size}."
            )
        for name in ("learning_rate", "beta"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name}: wanted a positive number, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed: wanted one in [0, 2**32), got {self.seed}.")


def bandit_from_config(config: BanditConfig) -> Bandit:
    """Builds the checked problem of a config."""
    return exact.make_bandit(
        config.reward, mu1=config.mu1, mu2=config.mu2, ref=config.ref, beta=config.beta
    )


class Pairs(NamedTuple):
    """Pairs of arms with what the algorithms may see of them; leading axes are the pairs."""

    arm: Array  # int [..., 2]
    reward: Array  # reward units; [..., 2]
    preference: Array  # 1 for the preferred arm, 0 for the other; [..., 2]


def distinct_pairs(bandit: Bandit) -> Pairs:
    """Lists every pair that can be drawn from a bandit without contexts: 2A² rows, (a, b, who is
    preferred)."""
    num_arms = bandit.reward.size
    first, second, loser = jnp.unravel_index(jnp.arange(2 * num_arms**2), (num_arms, num_arms, 2))
    arm = jnp.stack([first, second], axis=-1)
    preference = jnp.stack([1.0 - loser, loser], axis=-1).astype(bandit.reward.dtype)
    return Pairs(arm, bandit.reward[arm], preference)


def sample_pairs(key: Array, bandit: Bandit, num_pairs: int) -> Array:
    """Draws y ∼ μ1, y' ∼ μ2 and prefers y with probability σ(R(y) − R(y')) (Bradley–Terry, Sec. 5).

    Args:
        key: PRNG key.
        bandit: the problem, without contexts.
        num_pairs: n.

    Returns:
        Row numbers in `distinct_pairs`; int [n].
    """
    win = jax.nn.sigmoid(bandit.reward[:, None] - bandit.reward[None, :])
    meet = bandit.mu1[:, None] * bandit.mu2[None, :]
    probability = meet[..., None] * jnp.stack([win, 1 - win], axis=-1)
    return jax.random.categorical(key, jnp.log(probability).reshape(-1), shape=(num_pairs,))


Objective = Callable[[Array, Array, Pairs, Bandit], Array]


def _pg_value(log_policy: Array, ratio: Array, pairs: Pairs, bandit: Bandit) -> Array:
    value = jax.lax.stop_gradient(exact.expected_reward(log_policy, bandit))
    return losses.pg_objective(ratio, pairs.reward, beta=bandit.beta, baseline=value)


# Sample objectives, maximised: (ln π [A], log-ratios of the arms of each pair [n, 2], pairs,
# problem) → [n]. The preference losses see the rewards only through who is preferred.
OBJECTIVES: dict[str, Objective] = {
    "copg": lambda _, ratio, p, b: losses.copg_objective(ratio, p.reward, beta=b.beta),
    "rloo": lambda _, ratio, p, b: losses.rloo_objective(ratio, p.reward, beta=b.beta),
    "pg_none": lambda _, ratio, p, b: losses.pg_objective(
        ratio, p.reward, beta=b.beta, baseline=0.0
    ),
    "pg_value": _pg_value,
    "ipo": lambda _, ratio, p, b: -losses.ipo_loss(ratio, p.preference, beta=b.beta),
    "dpo": lambda _, ratio, p, b: -losses.dpo_loss(ratio, p.preference, beta=b.beta),
}


def table_loss(
    logits: Array, pairs: Pairs, weight: Array, bandit: Bandit, objective: Objective
) -> Array:
    """Mean loss of a batch, given as how often each distinct pair is in it; minimised; scalar.

    The same number, and gradient, as the mean over the batch row by row: a batch of a bandit is a
    histogram.

    Args:
        logits: of a softmax policy; [A].
        pairs: the distinct pairs, n rows.
        weight: share of the batch that each row has; [n], sums to 1.
        bandit: the problem.
        objective: one of `OBJECTIVES`.
    """
    log_policy = jax.nn.log_softmax(logits)
    ratio = exact.log_ratio(log_policy, bandit)[pairs.arm]
    return -(weight * objective(log_policy, ratio, pairs, bandit)).sum()


def make_run(
    optimizer: optax.GradientTransformation,
    *,
    algorithms: Sequence[str],
    batch_size: int,
    num_epochs: int,
) -> Callable[[Array, Pairs, Array, Bandit], Array]:
    """Makes ``run(key, pairs, rows, bandit) -> logits [steps + 1, algorithms, A]``, all from π_ref
    on the same batches.

    Args:
        optimizer: elementwise (the algorithms are stacked), such as Adam or SGD.
        algorithms: names in `OBJECTIVES`.
        batch_size: pairs per step; an epoch drops its incomplete last batch.
        num_epochs: reshuffled passes over the data set, which is `rows` of the distinct `pairs`.
    """
    loss_grad = jax.grad(table_loss)

    def run(key: Array, pairs: Pairs, rows: Array, bandit: Bandit) -> Array:
        num_batches = rows.size // batch_size
        distinct = jnp.arange(pairs.arm.shape[0])

        def step(carry: tuple, batch: Array) -> tuple[tuple, Array]:
            logits, opt_state = carry
            weight = (batch[:, None] == distinct[None, :]).mean(0, dtype=logits.dtype)
            gradient = jnp.stack(
                [
                    loss_grad(row, pairs, weight, bandit, OBJECTIVES[name])
                    for row, name in zip(logits, algorithms, strict=True)
                ]
            )
            updates, opt_state = optimizer.update(gradient, opt_state, logits)
            logits = jnp.asarray(optax.apply_updates(logits, updates))
            return (logits, opt_state), logits

        def epoch(carry: tuple, key: Array) -> tuple[tuple, Array]:
            order = jax.random.permutation(key, rows.size)[: num_batches * batch_size]
            return jax.lax.scan(step, carry, rows[order].reshape(num_batches, batch_size))

        start = jnp.tile(jnp.log(bandit.ref), (len(algorithms), 1))
        carry = start, optimizer.init(start)
        _, path = jax.lax.scan(epoch, carry, jax.random.split(key, num_epochs))
        return jnp.concatenate([start[None], path.reshape(-1, *start.shape)])

    return run


def make_train(
    config: BanditConfig, algorithms: Sequence[str] = tuple(OBJECTIVES)
) -> Callable[[Array], Array]:
    """Makes ``train(key) -> regret [steps + 1, algorithms]``; `jax.vmap` it over keys for seeds.

    A key draws a data set. All keys share one sequence of shuffles: rows are i.i.d., so runs stay
    independent, and 64 seeds sort 100 times instead of 6,400.

    Args:
        config: the setting.
        algorithms: names in `OBJECTIVES`, the last axis of the result.

    Raises:
        InputError: a problem that `make_bandit` refuses.
    """
    bandit = bandit_from_config(config)
    pairs = distinct_pairs(bandit)
    run = make_run(
        optax.adam(config.learning_rate),
        algorithms=algorithms,
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
    )

    def train(key: Array) -> Array:
        rows = sample_pairs(key, bandit, config.num_pairs)
        order_key = jax.random.key(config.seed)
        log_policy = jax.nn.log_softmax(run(order_key, pairs, rows, bandit), axis=-1)
        return jax.vmap(jax.vmap(exact.regret, (0, None)), (0, None))(log_policy, bandit)

    return train
