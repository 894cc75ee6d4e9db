"""The processes of a run, one or many: how they start together, wait for each other and agree.

1. `start` joins the processes that a cluster, or JAX's environment variables, name.
2. `main_first` lets process 0 do what is done once, such as writing a file, before the others go
   on.
3. `from_main` gives every process what process 0 holds, `from_all` what each says.

4. `place` makes global arrays of the rows that each host loads, `place_whole` of arrays that every
   host holds whole; `host_rows` finds the rows of this host in a result for the whole batch.

All processes see one output folder: a shared file system, or a bucket. With one process nothing
here does anything.
"""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from copg_jax.errors import InputError
from copg_jax.sharding import replicated

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_VISIBLE_SEC = 90.0  # by then any network file system shows what another host has written
_LONGEST_MS = 24 * 3600 * 1000  # a process that has died ends the others long before
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
_turns = itertools.count()


class _Member(NamedTuple):
    """This process among those of the run."""

    address: str
    count: int
    index: int


def start(mode: str, *, timeout_sec: float = 300.0) -> int:
    """Joins this process to the others of its run, before anything uses a device.

    Args:
        mode: "auto" joins where JAX detects a cluster (TPU pod, SLURM, Open MPI, Kubernetes) or its
            environment variables name one, "on" insists on it, "off" runs alone.
        timeout_sec: how long processes wait for each other. After it the process ends with status
            2 and a text that names the address: JAX itself could only abort.

    Returns:
        Index of this process.

    Raises:
        InputError: no cluster with mode "on", one described in part, or JAX refuses it.
    """
    if jax.distributed.is_initialized():
        return jax.process_index()
    member = None if mode == "off" else _detect(timeout_sec)
    if member is None and mode == "on":
        raise InputError(
            "distributed=on: wanted a TPU pod, SLURM, Open MPI or Kubernetes job, or the variables "
            f"{_ADDRESS}=HOST:PORT, {_COUNT} and {_INDEX}; got none of them. Fix: set these in "
            "every process, or distributed=off for a run of one process."
        )
    if member is None or member.count == 1:
        return 0
    _join(member, timeout_sec)
    return member.index


def is_main_process() -> bool:
    """Whether this is process 0, the only one that writes logs and files."""
    return jax.process_index() == 0


@contextmanager
def main_first(path: Any, is_there: Callable[[], bool] | None = None) -> Iterator[None]:
    """Process 0 runs the body, which makes `path`; then the others run it.

    Args:
        path: file or folder (`pathlib` or `epath`) that all processes see.
        is_there: whether this process sees what process 0 made; default: `path` exists.

    Raises:
        InputError: in the others, where process 0 failed or `path` does not appear.
    """
    if jax.process_count() == 1:
        yield
    elif is_main_process():
        done, turn = False, next(_turns)
        try:
            yield
            done = True
        finally:
            _say(turn, str(done))
    else:
        if _hear(next(_turns), 0) != str(True):
            raise InputError(f"{path}: process 0 could not make it; see its message.")
        _wait_until(is_there or path.exists, path)
        yield


def from_main(value: Any) -> Any:
    """What process 0 holds: a number, bool or array; of equal shape and dtype in every process."""
    return multihost_utils.broadcast_one_to_all(np.asarray(value))


def from_all(text: str) -> list[str]:
    """What each process says, by its index; waits for the last of them as long as it takes."""
    if jax.process_count() == 1:
        return [text]
    turn = next(_turns)
    _say(turn, text)
    return [_hear(turn, index) for index in range(jax.process_count())]


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


# These go through the coordinator, since devices give up on a process that is busy for minutes. JAX
# has no public way to it, nor to ask for a cluster (`_ask_cluster`); both stay in this file.
def _say(turn: int, text: str) -> None:
    cast(Any, global_state.client).key_value_set(f"copg_jax/{turn}/{jax.process_index()}", text)


def _hear(turn: int, index: int) -> str:
    key = f"copg_jax/{turn}/{index}"
    return cast(Any, global_state.client).blocking_key_value_get(key, _LONGEST_MS)


def _detect(timeout_sec: float) -> _Member | None:
    """What the environment says of this process; None outside a cluster."""
    given = os.environ.get(_ADDRESS), _number(_COUNT), _number(_INDEX)
    address, count, index = given if None not in given else _ask_cluster(given, timeout_sec)
    if (address, count, index) == (None, None, None):
        return None
    if address is None or count is None or index is None:
        found = dict(zip((_ADDRESS, _COUNT, _INDEX), (address, count, index), strict=True))
        missing = [name for name, value in found.items() if value is None]
        raise InputError(
            f"distributed: wanted {', '.join(found)} together, got no {', '.join(missing)}. Fix: "
            "set all three in every process, or none."
        )
    if not address.rpartition(":")[2].isdigit() or not 0 <= index < count:
        raise InputError(
            f"distributed: wanted {_ADDRESS}=HOST:PORT and 0 <= {_INDEX} < {_COUNT}, got "
            f"'{address}', {index} and {count}."
        )
    return _Member(address, count, index)


def _ask_cluster(given: tuple[str | None, int | None, int | None], timeout_sec: float) -> Any:
    """What is given, the rest filled in from the cluster that JAX detects, if any."""
    try:
        # Not public, but the only way to ask whether there is a cluster before joining it.
        found = ClusterEnv.auto_detect_unset_distributed_params(
            *given, None, None, int(timeout_sec)
        )
    except Exception as error:  # each kind of cluster fails in its own way
        raise InputError(
            f"distributed: JAX detects a cluster but cannot read its description: {error}\nFix: "
            f"set {_ADDRESS}, {_COUNT} and {_INDEX} in every process, or distributed=off for a run "
            "of this process alone."
        ) from error
    return found[:3]


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdigit():
        raise InputError(f"distributed: {name}: wanted a number, got '{text}'.")
    return None if text is None else int(text)


def _join(member: _Member, timeout_sec: float) -> None:
    def give_up() -> None:
        print(
            f"error: distributed: process {member.index} waited {timeout_sec:g} s for all "
            f"{member.count} processes to meet at the coordinator {member.address} (process 0), "
            "and they did not. Fix: start every process, with the same address and number of "
            "processes; see that process 0 lives and that its port can be reached from here; or "
            f"distributed=off for a run of this process alone.{_proxy_hint(member)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(timeout_sec, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            member.address,
            member.count,
            member.index,
            initialization_timeout=int(timeout_sec) + 60,  # ours comes first
            shutdown_timeout_seconds=60,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"distributed: process {member.index} of {member.count} could not join at "
            f"{member.address}: {error}{_proxy_hint(member)}"
        ) from error
    finally:
        timer.cancel()
    # JAX catches SIGTERM for a service that nothing here reads, and a scoring run would outlive it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _proxy_hint(member: _Member) -> str:
    """Names the variables that send the connection to the coordinator to a proxy."""
    host = member.address.rpartition(":")[0].strip("[]")
    proxies = [name for name in os.environ if name.lower() in _PROXIES and os.environ[name]]
    exceptions = {name: os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")}
    listed = {
        entry.strip().lstrip(".") for text in exceptions.values() for entry in text.split(",")
    }
    is_excepted = any(entry and (host == entry or host.endswith("." + entry)) for entry in listed)
    if not proxies or is_excepted or "*" in listed:
        return ""
    return (
        f" {', '.join(proxies)} is set here, and no_proxy does not name {host}: the connection may "
        f"go to that proxy. Fix: export no_proxy={host} in every process, or unset {proxies[0]}."
    )


def _wait_until(is_there: Callable[[], bool], path: Any) -> None:
    deadline = time.monotonic() + _VISIBLE_SEC
    while not is_there():
        if time.monotonic() > deadline:
            raise InputError(
                f"{path}: process 0 wrote it, process {jax.process_index()} does not see it. "
                "Wanted one output_dir for all processes. Fix: a folder on a shared file system, "
                "or a bucket (gs://...)."
            )
        time.sleep(0.2)
