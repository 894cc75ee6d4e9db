"""Low-rank adapters (LoRA, arXiv 2106.09685): x W + s (x A) B, where W is frozen.

1. `lora_specs` describes A and B of every layer, from the one table of parameters. They lie beside
   the weights: a tree of parameters that has "lora", with the stacks of layers below it, and
   "lora_scale", the number s, is a model with its adapters; without them it is the base.
2. `adapted` is the product; `factors` finds what it needs among the weights of a layer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import initializers

from copg_jax.errors import InputError
from copg_jax.models.ops import linear
from copg_jax.models.params import LAYER_PARAMS, Architecture, ParamSpec, layer_specs, stacked

TARGETS = tuple(name for name, param in LAYER_PARAMS.items() if len(param.axes) > 1)
"""The linear layers of a decoder layer."""
A, B = "_a", "_b"  # after the name of the weight that they are added to


class Factors(NamedTuple):
    """An adapter of one matrix [D, F]."""

    a: jax.Array  # [D, r]
    b: jax.Array  # [r, F], of the same dtype
    scale: jax.Array  # s, float32


def find_targets(names: Sequence[str] | None) -> tuple[str, ...]:
    """The linear layers of these names, in the order of the table; all where there are none.

    Raises:
        InputError: there is no such layer, or no name.
    """
    wanted = TARGETS if names is None else names
    unknown = [name for name in wanted if name not in TARGETS]
    if unknown or not wanted:
        raise InputError(
            f"lora.targets: wanted some of {', '.join(TARGETS)}, or null for all of them, got "
            f"{', '.join(unknown) or 'none'}"
        )
    return tuple(name for name in TARGETS if name in wanted)


def check_rank(arch: Architecture, rank: int, targets: Sequence[str]) -> None:
    """Raises InputError unless adapters of this rank are smaller than what they are added to."""
    specs = layer_specs(arch)
    for name in targets:
        size = min(map(math.prod, _in_out(specs[name])))
        if rank >= size:
            raise InputError(
                f"lora.rank: wanted less than {size}, the smaller side of {name}, got {rank}: such "
                "an adapter has more numbers than the matrix. Fix: a lower rank, or other "
                "lora.targets."
            )


def layer_lora_specs(
    arch: Architecture, rank: int, targets: Sequence[str] = TARGETS
) -> dict[str, ParamSpec]:
    """Adapters of one layer, without the leading `layers` axis.

    A begins uniform in ±1/sqrt(D), B as zeros, so that an adapter begins by adding nothing.

    Args:
        arch: the architecture.
        rank: r.
        targets: weights that have one.
    """
    specs = layer_specs(arch)
    found = {}
    for name in targets:
        inputs, outputs = _in_out(specs[name])
        axes = specs[name].axes
        a_axes, b_axes = axes[: len(inputs)], axes[len(inputs) :]
        found[name + A] = ParamSpec((*inputs, rank), (*a_axes, "rank"), _uniform)
        found[name + B] = ParamSpec((rank, *outputs), ("rank", *b_axes), initializers.zeros)
    return found


def lora_specs(
    arch: Architecture, rank: int, targets: Sequence[str] = TARGETS
) -> dict[str, dict[str, ParamSpec]]:
    """The adapters of all layers, stacked as the layers are; args as `layer_lora_specs`."""
    return stacked(arch, layer_lora_specs(arch, rank, targets))


def factors(weights: Mapping[str, jax.Array], scale: jax.Array | None) -> dict[str, Factors]:
    """The adapters among the weights of a layer, by the name of what they are added to."""
    found = {}
    for name in TARGETS:
        if name + A in weights and scale is not None:
            a, b = weights[name + A], weights[name + B]
            found[name] = Factors(a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1), scale)
    return found


def adapted(x: jax.Array, matrix: jax.Array, adapter: Factors | None) -> jax.Array:
    """x W + s (x A) B; without an adapter x W.

    Args:
        x: [..., D].
        matrix: W [D, F], of the same dtype.
        adapter: A, B and s.

    Returns:
        [..., F].
    """
    y = linear(x, matrix)
    if adapter is None:
        return y
    inner = linear(x, adapter.a).astype(jnp.float32) * adapter.scale
    return y + linear(inner.astype(x.dtype), adapter.b)


def _in_out(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return spec.shape[: spec.num_inputs], spec.shape[spec.num_inputs :]


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Uniform in ±1/sqrt(D) for a stack of A, [layers, D or its axes, r]."""
    limit = math.prod(shape[1:-1]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)
