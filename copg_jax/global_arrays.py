"""Global arrays, made of what the hosts hold, and what each host holds of them.

1. `place` makes global arrays of the rows that each host loads, `place_whole` of arrays that every
   host holds whole;
2. `host_rows` finds the rows of this host in a result for the whole batch;
3. `make_host_max` lets hosts agree on a number.

Where arrays lie, `sharding` says; no mesh axis is named here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from copg_jax.sharding import replicated


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Makes global arrays, sharded along their first axis, from the rows that each host loads.

    Args:
        tree: NumPy arrays [B / number of shares, ...]: this host's `sharding.batch_share`.
        sharding: usually `sharding.batch_sharding(mesh)`.

    Returns:
        Same structure of global `jax.Array`s [B, ...]. Shares lie where the devices of their host
        lie in the mesh, so that rows may come in another order than shares.
    """
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
    )


def place_whole(tree: Any, sharding: NamedSharding) -> Any:
    """Makes global arrays from arrays that every host holds whole, rows in their order."""

    def whole(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(whole, tree)


def host_rows(x: np.ndarray, sharding: NamedSharding) -> np.ndarray:
    """Of a global batch array, the rows that this host gave to `place`, in its order."""
    held = sharding.addressable_devices_indices_map(x.shape).values()
    cuts = sorted({cut[0].indices(len(x))[:2] for cut in held if cut is not None})
    return np.concatenate([x[start:stop] for start, stop in cuts])


def make_host_max(mesh: Mesh) -> Callable[[int], Any]:
    """Builds number of this host → the largest of all hosts' numbers, an array not waited for.

    Every host has to call it equally often. With one host it is the number itself.
    """
    if jax.process_count() == 1:
        return lambda value: value
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    largest = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def host_max(value: int) -> jax.Array:
        shape, mine = (mesh.devices.size,), np.full(1, value, np.int32)
        return largest(jax.make_array_from_callback(shape, everywhere, lambda _: mine))

    return host_max
