"""Where arrays live: the mesh, the table from logical to mesh axes, and the shardings that follow
from it.

1. `make_mesh` lays the devices out as (data, fsdp, tensor);
2. `LOGICAL_TO_MESH` says which mesh axis cuts which logical axis; models speak logical axes only;
3. `shardings` turns a tree of logical axes into shardings; `batch_sharding` cuts batches along
   groups, and `constrain_batch` the activations that come of them;
4. `place` makes global arrays from what each host holds.

This is the only file that names a mesh axis.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from copg_jax.cli import option
from copg_jax.errors import InputError

LOGICAL_TO_MESH: Mapping[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}
"""Logical axes that are cut; any other (`layers`, `head_dim`, None) is whole on every device."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be −1 for "all remaining devices"."""

    data: int = option(1, "replicas of the model (pure data parallelism)")
    fsdp: int = option(-1, "shards of parameters, optimiser state and batch; -1 = all that remain")
    tensor: int = option(1, "shards of heads, MLP and vocabulary (tensor parallelism)")

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(
                f"mesh: wanted positive sizes, at most one of them -1, got data={self.data} "
                f"fsdp={self.fsdp} tensor={self.tensor}"
            )


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Lays out devices as a (data, fsdp, tensor) mesh with Auto axis types.

    Args:
        config: sizes, one of which may be −1.
        devices: devices to use; default all.

    Raises:
        InputError: the sizes do not multiply to the number of devices; the message gives sizes that
            would.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        legal = [size for size in range(1, len(devices) + 1) if len(devices) % size == 0]
        raise InputError(
            f"mesh: data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} does not lay "
            f"out {len(devices)} device(s) ({devices[0].device_kind}). Sizes must multiply to "
            f"{len(devices)}, so each must be one of {legal}; mesh.fsdp=-1 takes all that remain."
        )
    return jax.make_mesh(
        tuple(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def num_batch_shards(mesh: Mesh) -> int:
    """Number of pieces a batch is cut into; the global microbatch must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that are whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch array [B, ...]: groups over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]))


_activations: ContextVar[NamedSharding | None] = ContextVar("activations", default=None)


@contextmanager
def batch_parallel(mesh: Mesh) -> Iterator[None]:
    """While a function is traced in here, `constrain_batch` pins its activations to the batch axis.

    Without it the compiler may keep the `embed` axis of the weights cut, and then computes the
    whole batch on every device and gathers activations instead of weights.
    """
    token = _activations.set(batch_sharding(mesh))
    try:
        yield
    finally:
        _activations.reset(token)


def constrain_batch(x: jax.Array) -> jax.Array:
    """Cuts an activation [B, ...] along B only, inside `batch_parallel`; elsewhere does nothing."""
    layout = _activations.get()
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout)


def shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """Turns a tree of logical axes into a tree of shardings.

    Args:
        mesh: the device mesh.
        logical_axes: tree whose leaves are tuples of logical axis names, one an array axis.
        shapes: tree of the same structure with `.shape`, to check divisibility before anything is
            placed.

    Raises:
        InputError: lists every parameter axis that the mesh does not divide.
    """
    problems = []

    def leaf(path, axes, array):
        names = tuple(LOGICAL_TO_MESH.get(axis) for axis in axes)
        for axis, name, size in zip(axes, names, array.shape, strict=True):
            pieces = 1 if name is None else mesh.shape[name]
            if size % pieces:
                problems.append(
                    f"  {jax.tree_util.keystr(path, simple=True, separator='.')}: axis '{axis}' of "
                    f"size {size} is not divisible by mesh.{name}={pieces}"
                )
        return NamedSharding(mesh, PartitionSpec(*names))

    tree = jax.tree_util.tree_map_with_path(
        leaf, logical_axes, shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    if problems:
        raise InputError(
            "mesh: this model cannot be cut that way; choose sizes that divide:\n"
            + "\n".join(problems)
        )
    return tree


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Makes global arrays, sharded along their first axis, from the rows this host holds.

    Args:
        tree: NumPy arrays [B / num_hosts, ...]: this host's contiguous slice of the global batch.
        sharding: usually `batch_sharding(mesh)`.

    Returns:
        Same structure of global `jax.Array`s [B, ...].
    """
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def host_rows(tree: Any) -> Any:
    """This host's contiguous slice of a batch that every host holds whole; [B, ...] → [B /
    num_hosts, ...].
    """
    hosts, host = jax.process_count(), jax.process_index()

    def rows(x: np.ndarray) -> np.ndarray:
        size = len(x) // hosts
        return x[host * size : (host + 1) * size]

    return jax.tree.map(rows, tree)
