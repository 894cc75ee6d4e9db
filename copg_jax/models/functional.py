"""The model as pure functions on nested dicts of arrays; nothing else splits or merges modules.

1. `init`, `abstract_params`, `logical_axes` read the parameter table.
2. `embed`, `scan_layers`, `last_layer` and `final_norm` are the pieces of a forward pass; which
   tokens there are, and who sees whom, is decided by their callers: `group_forward` for whole
   groups, `decoding` for one token at a time.

`config` is static everywhere; every array argument may be traced.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from copg_jax.models.llama import (
    REMAT_POLICIES,
    LlamaConfig,
    LlamaLayer,
    Params,
    ParamSpec,
    Rotation,
    layer_specs,
    param_specs,
)
from copg_jax.models.primitives import rms_norm
from copg_jax.sharding import Axes, constrain_residual, gather_weight

Attend = Callable[..., tuple[jax.Array, Any]]
"""(q, k, v, *slices) → (mixed values, extra); see `LlamaLayer`."""


def init(config: LlamaConfig, key: jax.Array, *, head: str = "lm") -> Params:
    """Draw float32 parameters: N(0, 0.02) matrices, unit norms, score head of std 1/sqrt(D+1)."""
    specs, tree = jax.tree.flatten(param_specs(config, head=head), is_leaf=_is_spec)
    keys = jax.random.split(key, len(specs))
    return jax.tree.unflatten(
        tree, [spec.init(k, spec.shape, jnp.float32) for spec, k in zip(specs, keys, strict=True)]
    )


def abstract_params(config: LlamaConfig, *, head: str = "lm") -> Params:
    """The tree of `init` as ShapeDtypeStructs."""
    return _map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), config, head)


def logical_axes(config: LlamaConfig, *, head: str = "lm") -> Params:
    """The tree of `init` with a tuple of logical axis names at each leaf."""
    return _map_specs(lambda spec: spec.axes, config, head)


def cast_matrices(config: LlamaConfig, params: Params) -> Params:
    """Cast the matrices to the compute dtype, which the forward pass does where it gathers them.

    Vectors (norm scales, score head) are used in float32 and stay, so that no result changes.
    """

    head = "score" if "score" in params else "lm"
    axes = logical_axes(config, head=head)
    cast = functools.partial(_cast_matrix, config)
    return jax.tree.map(cast, axes, params, is_leaf=lambda node: isinstance(node, tuple))


def output_matrix(config: LlamaConfig, params: Params) -> jax.Array:
    """The matrix [D, V] that turns hidden states into logits, compute dtype, gathered for use; the
    embedding's transpose if tied.
    """
    matrix = params["lm_head"] if "lm_head" in params else params["embed_tokens"].T
    return gather_weight(matrix.astype(config.dtype), ("embed", "vocab"))


def embed(config: LlamaConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """The first hidden states, compute dtype: ids [R, N] → [R, N, D]."""
    return constrain_residual(jnp.take(params["embed_tokens"], tokens, axis=0).astype(config.dtype))


def scan_layers(
    config: LlamaConfig,
    stack: Params,
    x: jax.Array,
    rotation: Rotation,
    attend: Attend,
    slices: tuple[Any, ...] = (),
) -> tuple[jax.Array, Any]:
    """Runs a stack of layers, each recomputed in the backward pass as `config.remat` says.

    Args:
        config: static.
        stack: weights with a leading axis of layers.
        x: [R, N, D].
        rotation: of the N tokens.
        attend: see `Attend`.
        slices: arrays with a leading axis of layers, handed to `attend` layer by layer.

    Returns:
        The new x, and the extras of all layers, stacked.
    """
    layer_step = _layer_step(config, rotation, attend)
    # Inside a scan the barrier against common-subexpression elimination is not needed.
    layer_step = jax.checkpoint(layer_step, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
    return jax.lax.scan(layer_step, x, (stack, slices))


def last_layer(
    config: LlamaConfig,
    stack: Params,
    x: jax.Array,
    rotation: Rotation,
    attend: Attend,
    slices: tuple[Any, ...] = (),
    *,
    read: Callable[[jax.Array], jax.Array] = lambda tokens: tokens,
) -> tuple[jax.Array, Any]:
    """Runs a stack of one layer for the tokens that `read` picks; see `LlamaLayer`.

    Its backward pass comes first of all, so nothing is gained by recomputing it.
    """
    inputs = jax.tree.map(lambda leaf: jnp.squeeze(leaf, axis=0), (stack, slices))
    x, extra = _layer_step(config, rotation, attend, read)(x, inputs)
    return x, jax.tree.map(lambda leaf: leaf[None], extra)


def final_norm(config: LlamaConfig, params: Params, x: jax.Array) -> jax.Array:
    """The norm after the last layer."""
    return rms_norm(x, params["norm"], config.rms_norm_eps)


def _layer_step(
    config: LlamaConfig,
    rotation: Rotation,
    attend: Attend,
    read: Callable[[jax.Array], jax.Array] = lambda tokens: tokens,
) -> Callable[..., tuple[jax.Array, Any]]:
    """One layer as a function (x, (weights, slices)) → (x, extra)."""
    graph, specs = _layer_graph(config), layer_specs(config)

    def layer_step(x, inputs):
        weights, slices = inputs
        weights = {
            name: gather_weight(_cast_matrix(config, specs[name].axes, weight), specs[name].axes)
            for name, weight in weights.items()
        }
        layer = nnx.merge(graph, weights)
        x, extra = layer(x, rotation, lambda q, k, v: attend(q, k, v, *slices), read)
        return constrain_residual(x), extra

    return layer_step


@functools.cache
def _layer_graph(config: LlamaConfig) -> nnx.GraphDef[LlamaLayer]:
    """The weightless structure of a layer, made without computing anything."""
    return nnx.split(nnx.eval_shape(lambda: LlamaLayer(config, nnx.Rngs(0))))[0]


def _cast_matrix(config: LlamaConfig, axes: Axes, leaf: jax.Array) -> jax.Array:
    is_vector = len(axes) - ("layers" in axes) == 1
    return leaf if is_vector else leaf.astype(config.dtype)


def _is_spec(node: Any) -> bool:
    return isinstance(node, ParamSpec)


def _map_specs(fn: Callable[[ParamSpec], Any], config: LlamaConfig, head: str) -> Params:
    return jax.tree.map(fn, param_specs(config, head=head), is_leaf=_is_spec)
