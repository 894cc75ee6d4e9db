"""Loss functions of the stages and the one train step that they all share.

1. `make_nll_loss`, `make_bradley_terry_loss`, `make_policy_loss` close over an architecture and
   turn parameters and a batch into a summed loss with its weight: here, and only here, the maths of
   `losses.py` meets the model;
2. `make_train_step` closes over such a loss and an optax transform, accumulates gradients over
   microbatches, pins every sharding and donates the state;
3. `make_loss_step` is the same without a gradient, for held-out data.

CoPG, DPO, IPO, PG and RLOO differ by one pure function from `POLICY_LOSSES`.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.ref import freeze, new_ref
from jax.sharding import NamedSharding

from copg_jax import losses, policy, sharding
from copg_jax.data.groups import GroupBatch
from copg_jax.models.llama import LlamaConfig
from copg_jax.models.reward import reward as model_reward
from copg_jax.train_state import TrainState

Metrics = dict[str, tuple[Array, Array]]
"""Name → (sum, weight): sums add over microbatches, batches and hosts; the metric is their ratio.
"""


class LossOutput(NamedTuple):
    """What a loss function returns beside the sum that is differentiated."""

    weight: Array  # scalar: the loss is sum / weight over the *global* batch
    per_group: Array  # [B]: contribution of each group, to name the culprits of a non-finite loss
    metrics: Metrics


LossFn = Callable[[Any, GroupBatch], tuple[Array, LossOutput]]
"""(params, batch) → (summed loss, LossOutput)."""


def _ratio(values: Array, weight: Array) -> tuple[Array, Array]:
    """Sum of `values` over entries of positive `weight`, and the total weight."""
    weight = weight.astype(jnp.float32)
    return jnp.where(weight > 0, values * weight, 0.0).sum(), weight.sum()


def _present(batch: GroupBatch) -> Array:
    return batch.completion_length > 0


def make_nll_loss(config: LlamaConfig, *, chunk: int | None = None) -> LossFn:
    """SFT: negative log-likelihood of completions only, averaged over the tokens of the global
    batch; minimised.

    Args:
        config: architecture with a language-model head.
        chunk: see `logprobs.token_logp`.
    """

    def loss_fn(params: Any, batch: GroupBatch) -> tuple[Array, LossOutput]:
        logp = policy.seq_logp(config, params, batch, chunk=chunk)
        per_group = losses.nll_loss(logp, mask=_present(batch))
        tokens = batch.completion_length.sum(-1).astype(jnp.float32)
        total, weight = per_group.sum(), tokens.sum()
        return total, LossOutput(weight, per_group, {"loss": (total, weight)})

    return loss_fn


def make_bradley_terry_loss(config: LlamaConfig) -> LossFn:
    """Reward model: −ln σ(s⁺ − s⁻) on human labels, averaged over groups with a preference;
    minimised.

    Args:
        config: architecture; the parameters carry a score head.
    """

    def loss_fn(params: Any, batch: GroupBatch) -> tuple[Array, LossOutput]:
        mask = _present(batch)
        score = model_reward(config, params, batch)
        per_group = losses.bradley_terry_loss(score, batch.reward, mask=mask)
        preferred = losses.preferences(batch.reward, mask)
        gap = score[:, :, None] - score[:, None, :]
        total, weight = _ratio(per_group, preferred.any((-2, -1)))
        metrics = {
            "loss": (total, weight),
            "rewards/accuracies": _ratio((gap > 0).astype(jnp.float32), preferred),
            "rewards/margins": _ratio(gap, preferred),
            "rewards/mean": _ratio(score, mask),
        }
        return total, LossOutput(weight, per_group, metrics)

    return loss_fn


POLICY_LOSSES: dict[str, Callable[..., Array]] = {
    "copg": losses.copg_loss,
    "dpo": losses.dpo_loss,
    "ipo": losses.ipo_loss,
    "pg": lambda *args, **kwargs: -losses.pg_objective(*args, **kwargs),
    "rloo": lambda *args, **kwargs: -losses.rloo_objective(*args, **kwargs),
}
"""(log_ratio [B, K], reward [B, K], beta=, mask=) → loss [B], by the name in `loss.name`."""

PREFERENCE_LOSSES = ("dpo", "ipo")
"""Losses that see only the order of rewards: groups of ties carry no information and leave the
average.
"""


def make_policy_loss(
    config: LlamaConfig,
    name: str,
    *,
    beta: float,
    baseline: float = 0.0,
    chunk: int | None = None,
) -> LossFn:
    """Policy optimisation on scored groups, averaged over the groups that count; minimised.

    Args:
        config: architecture with a language-model head.
        name: key of `POLICY_LOSSES`.
        beta: the paper's β, reward units per nat.
        baseline: b of `pg`, reward units; no other loss has one.
        chunk: see `logprobs.token_logp`.
    """
    group_loss = POLICY_LOSSES[name]
    if name == "pg":
        group_loss = partial(group_loss, baseline=baseline)

    def loss_fn(params: Any, batch: GroupBatch) -> tuple[Array, LossOutput]:
        mask = _present(batch)
        logp = policy.seq_logp(config, params, batch, chunk=chunk)
        log_ratio = jnp.where(mask, logp - batch.ref_logp, 0.0)
        per_group = group_loss(log_ratio, batch.reward, beta=beta, mask=mask)
        counted = mask.sum(-1) >= 2
        if name in PREFERENCE_LOSSES:
            counted = losses.preferences(batch.reward, mask).any((-2, -1))
        total, weight = _ratio(per_group, counted)
        metrics = policy_metrics(logp, log_ratio, batch.reward, mask, beta=beta)
        return total, LossOutput(weight, per_group, {"loss": (total, weight), **metrics})

    return loss_fn


def policy_metrics(
    logp: Array, log_ratio: Array, reward: Array, mask: Array, *, beta: float
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
    pair = mask.sum(-1) >= 2
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


def _split(x: Array, num: int, num_shards: int) -> Array:
    """[B, ...] → [num, B / num, ...]; every shard gives the same number of its rows to each."""
    pieces = x.reshape(num_shards, num, -1, *x.shape[1:])
    return pieces.swapaxes(0, 1).reshape(num, -1, *x.shape[1:])


def _loss_and_grads(
    loss_fn: LossFn, params: Any, batch: GroupBatch, num_microbatches: int, num_shards: int
):
    """Sums of loss, gradients, weight and metrics over the microbatches of a global batch."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        return value_and_grad(params, batch)
    micro = jax.tree.map(lambda x: _split(x, num_microbatches, num_shards), batch)
    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(loss_fn, params, first)
    loss, aux = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    # The backward pass adds into these, layer by layer: one set of gradients exists and not two.
    sums = jax.tree.map(lambda p: new_ref(jnp.zeros_like(p)), params)

    def body(carry, microbatch):
        loss, vjp, aux = jax.vjp(lambda p: loss_fn(p, microbatch), params, has_aux=True)
        vjp.with_refs(sums)(jnp.ones_like(loss))
        return jax.tree.map(jnp.add, carry, (loss, aux.weight, aux.metrics)), aux.per_group

    carry = (loss, aux.weight, aux.metrics)
    (loss, weight, metrics), per_group = jax.lax.scan(body, carry, micro)
    grads = jax.tree.map(freeze, sums)
    # Back in the order of the batch: the same split with the roles exchanged.
    per_group = _split(per_group.reshape(-1), num_shards, num_microbatches).reshape(-1)
    return (loss, LossOutput(weight, per_group, metrics)), grads


def _averages(metrics: Metrics) -> dict[str, Array]:
    """Sum / weight of each metric; NaN where nothing was counted."""
    return {name: total / weight for name, (total, weight) in metrics.items()}


def _traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Raises when `function` is traced a second time: a recompilation in the middle of a run.

    Unlike `chex.assert_max_traces`, which counts by source text, it counts by object, so that one
    process may build several steps (the quickstart trains three policies).
    """
    known: list[Any] = []

    def traced(*args: Any) -> Any:
        known.append(jax.tree.map(jnp.shape, args[-1]))
        if len(known) > 1:
            raise RuntimeError(
                f"{function.__name__} was traced again: dtypes are fixed for a run and all batches "
                f"have one shape. Before {known[0]}, now {known[1]}"
            )
        return function(*args)

    return wraps(function)(traced)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: jax.sharding.Mesh,
    state_shardings: TrainState,
    num_microbatches: int = 1,
    schedule: optax.Schedule | None = None,
) -> Callable[[TrainState, GroupBatch], tuple[TrainState, dict[str, Array]]]:
    """Builds the jitted optimiser step (state, batch) → (state, metrics).

    The gradient is that of Σ loss / Σ weight over the global batch, whatever the number of
    microbatches and devices. A step whose loss or gradient is not finite halts the state: it and
    all later steps change nothing, so that the loop, which reads metrics one step late, still saves
    the state from just before the offending batch.

    Args:
        loss_fn: one of the loss functions above.
        optimizer: optax transform.
        mesh: the device mesh.
        state_shardings: from `train_state.state_shardings`.
        num_microbatches: pieces the batch is processed in; divides B / (data·fsdp). Batches have
            data·fsdp·num_microbatches blocks.
        schedule: the optimiser's learning rate by step, to report as `optim/learning_rate`.

    Returns:
        A function that donates its state. Metrics: averages by name, `optim/grad_norm`, `finite`
        (bool) and `per_group` [B]. Being traced twice raises.
    """
    num_shards = sharding.num_batch_shards(mesh)

    def train_step(state: TrainState, batch: GroupBatch):
        (loss, aux), grads = _loss_and_grads(
            loss_fn, state.params, batch, num_microbatches, num_shards
        )
        # A batch of ties has weight 0 and gradient 0: no update, rather than 0/0.
        scale = 1.0 / jnp.maximum(aux.weight, 1e-6)
        grads = jax.tree.map(lambda g: g * scale, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        halted = state.halted | ~finite
        new = TrainState(state.step + 1, params, opt_state, halted)
        new = jax.tree.map(lambda a, b: jnp.where(halted, b, a), new, state)._replace(halted=halted)
        metrics = _averages(aux.metrics) | {"optim/grad_norm": grad_norm}
        if schedule is not None:
            metrics["optim/learning_rate"] = jnp.asarray(schedule(state.step))
        return new, metrics | {"finite": finite, "per_group": aux.per_group}

    whole = sharding.replicated(mesh)
    return jax.jit(
        _traced_once(sharding.batch_parallel(mesh)(train_step)),
        in_shardings=(state_shardings, sharding.batch_sharding(mesh)),
        out_shardings=(state_shardings, whole),
        donate_argnums=0,
    )


def make_loss_step(
    loss_fn: LossFn, *, mesh: jax.sharding.Mesh, param_shardings: Any
) -> Callable[[Any, GroupBatch], Metrics]:
    """Builds the jitted (params, batch) → metrics as (sum, weight) pairs, for averages over a
    held-out set.
    """

    def loss_step(params: Any, batch: GroupBatch) -> Metrics:
        return loss_fn(params, batch)[1].metrics

    batch_sharding: NamedSharding = sharding.batch_sharding(mesh)
    return jax.jit(
        _traced_once(sharding.batch_parallel(mesh)(loss_step)),
        in_shardings=(param_shardings, batch_sharding),
        out_shardings=sharding.replicated(mesh),
    )
