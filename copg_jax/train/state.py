"""What a training step reads and writes: step counter, master parameters and optimiser state."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from copg_jax import sharding


def joined(frozen: Mapping[str, Any] | None, params: Any) -> Any:
    """All parameters that a loss reads, of which `params` are trained; the same where there are no
    others. What is trained takes the place of what is frozen under the same name.
    """
    return params if frozen is None else {**frozen, **params}


class TrainState(NamedTuple):
    """The whole state of training, donated to every step; or the shapes or shardings of it."""

    step: Any  # int32 scalar: number of updates applied
    params: Any  # nested dict of float32 arrays, those that are trained
    opt_state: Any
    halted: Any  # bool scalar: a step was not finite, and no step since then has changed anything


def abstract_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """Shapes and dtypes of the state without allocating anything; `params` may be abstract too."""
    return jax.eval_shape(lambda p: _new_state(optimizer, p), params)


def _new_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.bool_(False))


def state_shardings(
    mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation, params: Any, axes: Any
) -> TrainState:
    """Shardings of the whole state: moments lie where their parameter lies, scalars are replicated.

    Args:
        mesh: the device mesh.
        optimizer: the transform whose state is laid out.
        params: parameters or their shapes.
        axes: tree of logical axes, of the structure of `params`.
    """
    param_shardings = sharding.shardings(mesh, axes, params)
    state = abstract_state(optimizer, params)
    whole = sharding.replicated(mesh)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, s: s,
        state.opt_state,
        param_shardings,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, param_shardings, opt_state, whole)


def create_state(
    optimizer: optax.GradientTransformation, params: Any, shardings: TrainState | None = None
) -> TrainState:
    """Creates the state before the first step.

    Args:
        optimizer: the transform whose state is made.
        params: copied; or with shardings taken over, so that there is no second copy of them.
        shardings: where each array of the state shall lie; None = on one device.
    """
    if shardings is None:
        return _new_state(optimizer, jax.tree.map(jnp.copy, params))
    init = partial(_new_state, optimizer)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def with_shardings(state: TrainState, shardings: TrainState) -> TrainState:
    """Attaches shardings to shapes: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
    )
