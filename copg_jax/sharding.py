"""Where arrays live: the mesh, the table from logical to mesh axes, and the shardings that follow
from it.

1. `make_mesh` lays the devices out as (data, fsdp, tensor);
2. `LOGICAL_TO_MESH` says which mesh axis cuts which logical axis; models speak logical axes only;
3. `shardings` turns a tree of logical axes into shardings; `batch_sharding` cuts batches along
   groups;
4. a `Partitioner`, which a model is given, cuts its activations and gathers its weights;
5. `batch_share` says which part of every batch a host has to load; `distributed` puts it there.

This is the only file that names a mesh axis.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from copg_jax.config.sections import MeshConfig
from copg_jax.errors import InputError

LOGICAL_TO_MESH: Mapping[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "q_width": "tensor",
    "kv_width": "tensor",
    "mlp": "tensor",
}
"""Logical axes that are cut; any other (`layers`, `head_dim`, None) is whole on every device."""

Axes = tuple[str | None, ...]
"""Logical axis names, one an array axis."""


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
        raise InputError(
            f"mesh: data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} does not lay "
            f"out {len(devices)} device(s) ({devices[0].device_kind}): sizes must multiply to "
            f"{len(devices)}. Nearest that do: {_nearest(config, len(devices))}; mesh.fsdp=-1 "
            "takes all that remain."
        )
    axes = ("data", "fsdp", "tensor")
    return Mesh(_lay_out(sizes, devices), axes, axis_types=(AxisType.Auto,) * 3)


def _nearest(config: MeshConfig, num_devices: int) -> str:
    """The three meshes of `num_devices` whose sizes are closest in ratio to those asked for."""
    factors = _divisors(num_devices)
    asked = (config.data, config.fsdp, config.tensor)

    def distance(sizes: tuple[int, ...]) -> float:
        pairs = zip(sizes, asked, strict=True)
        return sum(abs(math.log(size / wanted)) for size, wanted in pairs if wanted != -1)

    legal = [
        (data, num_devices // (data * tensor), tensor)
        for data in factors
        for tensor in factors
        if num_devices % (data * tensor) == 0
    ]
    names = ("data={} fsdp={} tensor={}".format(*sizes) for sizes in sorted(legal, key=distance))
    return ", ".join(itertools.islice(names, 3))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _lay_out(sizes: list[int], devices: list) -> np.ndarray:
    """Devices in the shape `sizes`, near ones along the last axes, which talk to each other most.

    Not `jax.make_mesh`: it refuses more than one host of GPUs, and meshes that cut an axis of a
    v4 or v5p torus in two.
    """
    if devices[0].platform != "tpu":
        return np.array(sorted(devices, key=lambda device: device.id)).reshape(sizes)
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        raise InputError(
            f"mesh: wanted the devices of one TPU slice, got {len(devices)} of several. Fix: one "
            "run per slice; take a larger slice for a larger run."
        )
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def num_batch_shards(mesh: Mesh) -> int:
    """Number of pieces a batch is cut into; the global microbatch must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that are whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch array [B, ...]: groups over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(LOGICAL_TO_MESH["batch"]))


@dataclass(frozen=True)
class Partitioner:
    """Where the activations and the gathered weights of a model lie while it is computed.

    The compiler alone may keep the `embed` axis of the weights cut, and then computes the whole
    batch on every device and gathers activations; or gathers a weight once for each of its uses.

    Args:
        mesh: the device mesh; None, for one device, constrains nothing.
        weights_in_place: weights stay cut and activations go to them, as in a step of decoding:
            those of a single token are thousands of times smaller than the weights, of which every
            device then reads its own part only.
    """

    mesh: Mesh | None = None
    weights_in_place: bool = False

    def constrain_batch(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Cuts an activation [B, ...] along B, and along those logical axes of the others that are
        named.
        """
        return self._constrain(x, _spec(("batch", *axes)))

    def constrain_residual(self, x: jax.Array) -> jax.Array:
        """Cuts the residual stream [B, ..., D] like `constrain_batch`, or where weights stay in
        place, along D as they are.
        """
        if not self.weights_in_place:
            return self.constrain_batch(x)
        along = LOGICAL_TO_MESH["embed"]
        rest = tuple(name for name in LOGICAL_TO_MESH["batch"] if name != along)
        return self._constrain(x, PartitionSpec(rest, *(None,) * (x.ndim - 2), along))

    def gather_weight(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Makes a weight whole along the axes that share mesh axes with the batch (FSDP).

        Its gradient comes back cut like the weight: a reduce-scatter.

        Args:
            x: in the dtype in which it travels.
            axes: its logical axes.
        """
        if self.mesh is None or self.weights_in_place:
            return x
        cut = _spec(axes)
        whole = PartitionSpec(*(None if name in LOGICAL_TO_MESH["batch"] else name for name in cut))
        return _reshard(x, NamedSharding(self.mesh, cut), NamedSharding(self.mesh, whole))

    def on_shards(
        self, function: Callable[..., jax.Array], *, in_axes: Sequence[Axes], out_axes: Axes
    ) -> Callable[..., jax.Array]:
        """Each device runs the function on its pieces of the arguments.

        For kernels that the compiler cannot cut.

        Args:
            function: arrays → array; the axes that are cut must be independent of each other.
            in_axes: logical axes of each argument.
            out_axes: logical axes of the result.
        """
        if self.mesh is None:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(map(_spec, in_axes)),
            out_specs=_spec(out_axes),
            check_vma=False,  # kernels do not say along which mesh axes their results vary
        )

    def _constrain(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


ONE_DEVICE = Partitioner()


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(x: jax.Array, source: NamedSharding, target: NamedSharding) -> jax.Array:
    """From one sharding to another; the gradient goes the way back."""
    return _reshard_forward(x, source, target)[0]


def _reshard_forward(x: jax.Array, source: NamedSharding, target: NamedSharding):
    # Not by way of `_reshard`, inside of which no rematerialisation policy would see a constraint.
    x = jax.lax.with_sharding_constraint(x, source)
    return jax.lax.with_sharding_constraint(x, target), None


def _reshard_backward(source: NamedSharding, target: NamedSharding, _: None, dx: jax.Array):
    del target
    return (jax.lax.with_sharding_constraint(dx, source),)


_reshard.defvjp(_reshard_forward, _reshard_backward)


def _spec(axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(axis and LOGICAL_TO_MESH.get(axis) for axis in axes))


def shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """Turns a tree of logical axes into a tree of shardings.

    Args:
        mesh: the device mesh.
        logical_axes: tree whose leaves are tuples of logical axis names, one an array axis.
        shapes: tree of the same structure with `.shape`, to check divisibility before anything is
            placed.

    Raises:
        InputError: lists every axis of the model that the mesh does not divide, with sizes that do.
    """
    cut: dict[Any, dict[int, str]] = {}  # mesh axis → sizes that it cuts, with a name of each

    def leaf(path, axes, array):
        names = tuple(LOGICAL_TO_MESH.get(axis) for axis in axes)
        for axis, name, size in zip(axes, names, array.shape, strict=True):
            if name is not None:
                where = jax.tree_util.keystr(path, simple=True, separator=".")
                cut.setdefault(name, {}).setdefault(size, f"'{axis}' ({where})")
        return NamedSharding(mesh, PartitionSpec(*names))

    tree = jax.tree_util.tree_map_with_path(
        leaf, logical_axes, shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    problems = [
        f"  mesh.{name}={mesh.shape[name]} does not divide axis {where} of size {size}; "
        f"mesh.{name} may be one of {_divisors(math.gcd(mesh.size, *sizes))}"
        for name, sizes in cut.items()
        for size, where in sizes.items()
        if size % mesh.shape[name]
    ]
    if problems:
        raise InputError(
            f"mesh: this model cannot be cut that way over {mesh.size} device(s):\n"
            + "\n".join(problems)
        )
    return tree


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this host loads: its index, and the number of equal shares.

    Hosts that hold the same rows (where `tensor` spans hosts) load the same share.

    Raises:
        InputError: a host's devices hold rows that it shares with another host in part.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(num_batch_shards(mesh), -1)  # rows in the order of `batch_sharding`
    rows = {host: tuple(np.flatnonzero((owners == host).any(1))) for host in np.unique(owners)}
    shares = sorted(set(rows.values()))
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != len(owners):
        raise InputError(
            f"mesh: tensor={mesh.shape['tensor']} cuts across the devices of hosts, so that they "
            "cannot load equal shares of a batch. Fix: a mesh.tensor that divides the "
            f"{mesh.devices.size // len(rows)} devices of a host, or a multiple of them."
        )
    return shares.index(rows[jax.process_index()]), len(shares)
