"""The one train step of all stages; it knows neither a model nor an objective.

1. `make_train_step` closes over a loss function and an optax transform, accumulates gradients over
   microbatches, and donates the state.
2. `make_loss_step` is the same without a gradient, for held-out data.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.extend.core import jaxpr_as_fun
from jax.ref import freeze, new_ref

from copg_jax import sharding
from copg_jax.data.groups import GroupBatch
from copg_jax.objective import LossFn, LossOutput, Metrics
from copg_jax.train.state import TrainState, joined


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    mesh: jax.sharding.Mesh | None = None,
    state_shardings: TrainState | None = None,
    num_microbatches: int = 1,
) -> Any:
    """Builds the jitted optimiser step (state, batch, **coefficients) → (state, metrics).

    The gradient is that of Σ loss / Σ weight over the global batch, whatever the number of
    microbatches and devices. A step whose loss or gradient is not finite halts the state: it and
    all later steps change nothing, so that the loop, which reads metrics one step late, still saves
    the state from just before the offending batch.

    Args:
        loss_fn: of `objective`, or any other `LossFn`.
        optimizer: optax transform.
        mesh: the device mesh; None = one device.
        state_shardings: from `state.state_shardings`, where there is a mesh.
        num_microbatches: pieces the batch is processed in; divides B / (data·fsdp). Batches with a
            layout have a multiple of data·fsdp·num_microbatches bins.

    Returns:
        A function that donates its state. Its keywords are the numbers of the loss, such as beta;
        `learning_rate`, if the optimizer takes one with every update; and `frozen`, parameters that
        the loss reads and that are not trained (see `state.joined`), which have no gradient. They
        are arguments of the compiled step, so that other values of one type compile nothing.
        Metrics: averages by name,
        `optim/grad_norm`, `optim/learning_rate` if given, `finite` (bool) and `per_group` [B].
    """
    num_shards = 1 if mesh is None else sharding.num_batch_shards(mesh)
    update = optax.with_extra_args_support(optimizer).update

    def train_step(
        state: TrainState,
        batch: GroupBatch,
        *,
        learning_rate: Array | float | None = None,
        frozen: Mapping[str, Any] | None = None,
        **coefficients: Array | float,
    ) -> tuple[TrainState, dict[str, Array]]:
        def loss(params: Any, batch: GroupBatch) -> LossOutput:
            return loss_fn(joined(frozen, params), batch, **coefficients)

        output, grads = _loss_and_grads(loss, state.params, batch, num_microbatches, num_shards)
        # A batch of ties has weight 0 and gradient 0: no update, rather than 0/0.
        scale = 1.0 / jnp.maximum(output.weight, 1e-6)
        grads = jax.tree.map(lambda g: g * scale, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(output.total) & jnp.isfinite(grad_norm)
        given = {} if learning_rate is None else {"learning_rate": jnp.asarray(learning_rate)}
        updates, opt_state = _update(update, grads, state, given)
        params = optax.apply_updates(state.params, updates)
        halted = state.halted | ~finite
        new = TrainState(state.step + 1, params, opt_state, halted)
        new = jax.tree.map(lambda a, b: jnp.where(halted, b, a), new, state)._replace(halted=halted)
        metrics = _averages(output.metrics) | {"optim/grad_norm": grad_norm}
        metrics |= {f"optim/{name}": value for name, value in given.items()}
        return new, metrics | {"finite": finite, "per_group": output.per_group}

    placed = None if mesh is None else (state_shardings, sharding.replicated(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=placed)


def make_loss_step(loss_fn: LossFn, *, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Builds the jitted (params, batch, **coefficients) → metrics as (sum, weight) pairs, for
    averages over a held-out set.
    """

    def loss_step(params: Any, batch: GroupBatch, **coefficients: Array | float) -> Metrics:
        return loss_fn(params, batch, **coefficients).metrics

    return jax.jit(loss_step, out_shardings=None if mesh is None else sharding.replicated(mesh))


def _loss_and_grads(
    loss_fn: LossFn, params: Any, batch: GroupBatch, num_microbatches: int, num_shards: int
) -> tuple[LossOutput, Any]:
    """Sums of loss, gradients, weight and metrics over the microbatches of a global batch."""

    def with_output(params: Any, batch: GroupBatch) -> tuple[Array, LossOutput]:
        output = loss_fn(params, batch)
        return output.total, output

    if num_microbatches == 1:
        (_, output), grads = jax.value_and_grad(with_output, has_aux=True)(params, batch)
        return output, grads
    micro = jax.tree.map(lambda x: _split(x, num_microbatches, num_shards), batch)
    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(loss_fn, params, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    # The backward pass adds into these, layer by layer: one set of gradients exists and not two.
    sums = jax.tree.map(lambda p: new_ref(jnp.zeros_like(p)), params)

    def body(carry, microbatch):
        total, vjp, output = jax.vjp(lambda p: with_output(p, microbatch), params, has_aux=True)
        vjp.with_refs(sums)(jnp.ones_like(total))
        added = jax.tree.map(jnp.add, carry, (total, output.weight, output.metrics))
        return added, output.per_group

    carry = zeros.total, zeros.weight, zeros.metrics
    (total, weight, metrics), per_group = jax.lax.scan(body, carry, micro)
    grads = jax.tree.map(freeze, sums)
    # Back in the order of the batch: the same split with the roles exchanged.
    per_group = _split(per_group.reshape(-1), num_shards, num_microbatches).reshape(-1)
    return LossOutput(total, weight, per_group, metrics), grads


def _split(x: Array, num: int, num_shards: int) -> Array:
    """[B, ...] → [num, B / num, ...]; every shard gives the same number of its rows to each."""
    if len(x) % (num * num_shards):
        raise ValueError(f"{len(x)} groups or bins cannot be cut into {num_shards} x {num} pieces")
    pieces = x.reshape(num_shards, num, -1, *x.shape[1:])
    return pieces.swapaxes(0, 1).reshape(num, -1, *x.shape[1:])


def _update(
    update: Callable[..., Any], grads: Any, state: TrainState, given: dict[str, Array]
) -> tuple[Any, Any]:
    """Updates and the optimiser's new state; `given` is a learning rate, or nothing."""
    run = lambda given: update(grads, state.opt_state, state.params, **given)
    if not given:
        return run(given)
    program, shapes = jax.make_jaxpr(run, return_shape=True)(given)
    (rate,) = program.jaxpr.invars
    if not any(rate is used for eqn in program.jaxpr.eqns for used in eqn.invars):
        raise TypeError("learning_rate: this optimizer has its own and would ignore another")
    flat = jaxpr_as_fun(program)(*jax.tree.leaves(given))
    return jax.tree.unflatten(jax.tree.structure(shapes), flat)


def _averages(metrics: Metrics) -> dict[str, Array]:
    """Sum / weight of each metric; NaN where nothing was counted."""
    return {name: total / weight for name, (total, weight) in metrics.items()}
