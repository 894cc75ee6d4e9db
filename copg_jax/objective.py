"""The seam: from a model and an objective to a loss with metrics.

To everything here a language model is one pure function `seq_logp(params, batch) → [B, K]`, ln π of
every completion in nats, and a reward model is `score(params, batch) → [B, K]`. An objective sees
log-ratios and rewards only (see `losses`).

1. `make_nll_loss`, `make_bradley_terry_loss` and `make_policy_loss` join the two into a `LossFn`,
   which `train.step` differentiates.
2. `find_objective` finds an objective by name or dotted path, `find_coefficients` the numbers that
   it takes beside β, and `batch_arguments` what else of a batch.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from copg_jax import losses, relatives
from copg_jax.config.sections import POLICY_LOSSES, LossConfig
from copg_jax.data.groups import GroupBatch
from copg_jax.dotted import find
from copg_jax.errors import InputError

Metrics = dict[str, tuple[Array, Array]]
"""Name → (sum, weight): sums add over microbatches, batches and hosts; the metric is their ratio.
"""


class LossOutput(NamedTuple):
    """What a loss function returns."""

    total: Array  # scalar: what is differentiated
    weight: Array  # scalar: the loss is total / weight over the *global* batch
    per_group: Array  # [B]: contribution of each group, to name the culprits of a non-finite loss
    metrics: Metrics


LossFn = Callable[..., LossOutput]
"""(params, batch, **coefficients) → LossOutput; coefficients are numbers such as beta."""

ModelFn = Callable[[Any, GroupBatch], Array]
"""(params, batch) → [B, K]."""


def _ratio(values: Array, weight: Array) -> tuple[Array, Array]:
    """Sum of `values` over entries of positive `weight`, and the total weight."""
    weight = weight.astype(jnp.float32)
    return jnp.where(weight > 0, values * weight, 0.0).sum(), weight.sum()


def _present(batch: GroupBatch) -> Array:
    return batch.completion_length > 0


_FIELDS = {"origin": "origin", "mu_log_ratio": "mu_logp"}  # argument → field of a batch


def batch_arguments(objective: Callable[..., Array]) -> list[str]:
    """What an objective takes of a batch beside log-ratios and rewards, by the names of its
    parameters: `origin`, int8 [B, K], and `mu_log_ratio`, ln µ − ln π_ref in nats, [B, K].
    """
    return [name for name in inspect.signature(objective).parameters if name in _FIELDS]


def _argument(name: str, batch: GroupBatch) -> Array:
    values = getattr(batch, _FIELDS[name])
    if values is None:
        raise InputError(
            f"GroupBatch.{_FIELDS[name]}: wanted [B, K], as the loss takes {name}, got None"
        )
    values = values - batch.ref_logp if name == "mu_log_ratio" else values
    return jnp.where(_present(batch), values, 0)


def make_nll_loss(seq_logp: ModelFn) -> LossFn:
    """SFT: negative log-likelihood of completions only, averaged over the tokens of the global
    batch; minimised.

    Args:
        seq_logp: the language model.
    """

    def loss_fn(params: Any, batch: GroupBatch) -> LossOutput:
        per_group = losses.nll_loss(seq_logp(params, batch), mask=_present(batch))
        tokens = batch.completion_length.sum(-1).astype(jnp.float32)
        total, weight = per_group.sum(), tokens.sum()
        return LossOutput(total, weight, per_group, {"loss": (total, weight)})

    return loss_fn


def make_bradley_terry_loss(score: ModelFn) -> LossFn:
    """Reward model: −ln σ(s⁺ − s⁻) on human labels, averaged over groups with a preference;
    minimised.

    Args:
        score: the reward model.
    """

    def loss_fn(params: Any, batch: GroupBatch) -> LossOutput:
        mask = _present(batch)
        scores = score(params, batch)
        per_group = losses.bradley_terry_loss(scores, batch.reward, mask=mask)
        preferred = losses.preferences(batch.reward, mask)
        gap = scores[:, :, None] - scores[:, None, :]
        longer = batch.completion_length[:, :, None] - batch.completion_length[:, None, :]
        total, weight = _ratio(per_group, preferred.any((-2, -1)))
        metrics = {
            "loss": (total, weight),
            "rewards/accuracies": _ratio((gap > 0).astype(jnp.float32), preferred),
            # What "the longer one, in tokens" would have, guessing between equals.
            "data/longer_accuracies": _ratio((1 + jnp.sign(longer)) / 2, preferred),
            "rewards/margins": _ratio(gap, preferred),
            "rewards/mean": _ratio(scores, mask),
        }
        return LossOutput(total, weight, per_group, metrics)

    return loss_fn


def make_policy_loss(
    seq_logp: ModelFn,
    objective: Callable[..., Array],
    counts: Callable[[Array, Array], Array] | None = None,
) -> LossFn:
    """Policy optimisation on scored groups, averaged over the groups that count; minimised.

    Args:
        seq_logp: the language model.
        objective: (log_ratio [B, K], reward [B, K], beta=, mask=, **coefficients) → loss [B], such
            as `losses.copg_loss`; `batch_arguments` that it takes are given to it.
        counts: (reward, mask), and origin= where the objective takes it → which groups are in the
            average [B]; None takes the attribute of that name of the objective, also below
            `functools.partial`, else `losses.has_pair` or `losses.has_cross_pair`.

    Returns:
        (params, batch, beta, **coefficients) → LossOutput.
    """
    taken = batch_arguments(objective)
    default = losses.has_cross_pair if "origin" in taken else losses.has_pair
    is_counted = counts or getattr(getattr(objective, "func", objective), "counts", default)

    def loss_fn(
        params: Any, batch: GroupBatch, beta: float | Array, **coefficients: float | Array
    ) -> LossOutput:
        mask = _present(batch)
        logp = seq_logp(params, batch)
        log_ratio = jnp.where(mask, logp - batch.ref_logp, 0.0)
        own = {name: _argument(name, batch) for name in taken}
        per_group = objective(log_ratio, batch.reward, beta=beta, mask=mask, **own, **coefficients)
        origin = {name: value for name, value in own.items() if name == "origin"}
        total, weight = _ratio(per_group, is_counted(batch.reward, mask, **origin))
        metrics = policy_metrics(logp, log_ratio, batch.reward, mask, beta=beta)
        return LossOutput(total, weight, per_group, {"loss": (total, weight), **metrics})

    return loss_fn


def policy_metrics(
    logp: Array, log_ratio: Array, reward: Array, mask: Array, *, beta: float | Array
) -> Metrics:
    """Diagnostics of a policy batch, under TRL's names where the quantity is TRL's.

    Each group is seen through its best and its worst present completion (for pairs: chosen and
    rejected).

    Args:
        logp: ln π, nats; [B, K].
        log_ratio: ln π − ln π_ref, nats; [B, K].
        reward: reward units; [B, K].
        mask: true where a completion is present; [B, K].
        beta: the paper's β.
    """
    best = jnp.where(mask, reward, -jnp.inf).argmax(-1, keepdims=True)
    worst = jnp.where(mask, reward, jnp.inf).argmin(-1, keepdims=True)

    def at(index: Array, x: Array) -> Array:
        return jnp.take_along_axis(x, index, axis=-1)[:, 0]

    chosen, rejected = partial(at, best), partial(at, worst)
    pair = losses.has_pair(reward, mask)
    reward_gap = chosen(reward) - rejected(reward)
    gap = chosen(log_ratio) - rejected(log_ratio)
    ordered = pair & (reward_gap > 0)
    residual = reward_gap - beta * gap
    explained, total = _ratio(reward_gap**2 - residual**2, pair), _ratio(reward_gap**2, pair)
    return {
        "rewards/chosen": _ratio(beta * chosen(log_ratio), pair),
        "rewards/rejected": _ratio(beta * rejected(log_ratio), pair),
        "rewards/margins": _ratio(beta * gap, ordered),
        "rewards/accuracies": _ratio((gap > 0).astype(jnp.float32), ordered),
        "logps/chosen": _ratio(chosen(logp), pair),
        "logps/rejected": _ratio(rejected(logp), pair),
        "copg/residual": _ratio(residual, pair),
        # 1 − E[(ΔR−βΔ)²]/E[ΔR²], written as one ratio so that it adds over batches like the rest.
        "copg/reward_r2": (explained[0], total[0]),
        "data/ties": _ratio((reward_gap == 0).astype(jnp.float32), pair),
        "data/reward": _ratio(reward, mask),
    }


def find_objective(config: LossConfig) -> Callable[..., Array]:
    """The objective of `loss.name` and `loss.pairs`: one of ours, or a user's by its dotted path.

    Raises:
        InputError: no such function, or one that does not take the numbers of `loss.arguments`.
    """
    if config.name in POLICY_LOSSES:
        name = f"{'cross_' * (config.pairs == 'cross')}{config.name}_loss"
        objective = getattr(losses if hasattr(losses, name) else relatives, name)
    else:
        objective = find(config.name, "loss.name", "my_module.my_loss")
    numbers = find_coefficients(config)
    try:
        signature = inspect.signature(objective)
    except ValueError as error:  # some functions of C
        raise InputError(f"loss.name {config.name!r}: wanted a Python function; {error}") from error
    try:
        own = dict.fromkeys(batch_arguments(objective))
        signature.bind(None, None, mask=None, **own, **numbers)
    except TypeError as error:
        takes = [name for name in signature.parameters if name not in ("mask", *own)][2:]
        raise InputError(
            f"loss.arguments: {config.name} cannot be called as f(log_ratio, reward, mask=, "
            f"{', '.join(f'{name}=' for name in numbers)}): {error}. Beside log_ratio, reward and "
            f"mask it takes {', '.join(takes) or 'nothing'}."
        ) from error
    return objective


def find_coefficients(config: LossConfig, done: float = 1.0) -> dict[str, float]:
    """The numbers of the loss, which are arguments of the compiled step: β and `loss.arguments`.

    Args:
        config: of the loss.
        done: share of the steps; where there is a first β, β = first^(1 − done) · last^done.
    """
    first, beta = config.first_beta, config.beta
    if first is not None and done < 1.0:
        beta = first ** (1.0 - done) * beta**done
    return {"beta": beta, **config.arguments}
