"""Devices to compile for, without having them.

A TPU slice comes from the description that the TPU compiler has of it; the step is then compiled by
that compiler. GPUs have none that runs here: as many virtual CPU devices stand in for them.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from copg_jax.errors import InputError
from copg_jax.flops import CHIPS, Chip

_TPUS = ("v5e", "v5p", "v6e")
_GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}


class Topology(NamedTuple):
    """Devices to compile for."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None  # None where nothing is published: a CPU
    bytes_per_sec: float  # that the worst-placed chip can receive from the others

    @property
    def is_estimate(self) -> bool:
        """Whether another compiler than its own compiles."""
        return self.devices[0].platform != "tpu"


def open_topology(name: str) -> Topology:
    """Devices of `v5e:4x4` or `v5p:2x2x1` (TPU), `gpu:8xh200` or `cpu:8` (virtual CPU devices).

    Raises:
        InputError: another form, a slice that does not exist, or no TPU compiler.
    """
    kind, _, shape = name.partition(":")
    if kind in _TPUS and re.fullmatch(r"\d+(x\d+)*", shape):
        return _open_tpu(name, [int(size) for size in shape.split("x")])
    gpus = re.fullmatch(rf"gpu:([1-8])x({'|'.join(_GPUS)})", name)
    cpus = re.fullmatch(r"cpu:([1-9]\d*)", name)
    if gpus is None and cpus is None:
        raise InputError(
            f"--topology {name}: wanted a TPU slice ({', '.join(_TPUS)}) such as v5e:4x4 or "
            f"v5p:2x2x1, one node of GPUs such as gpu:8xh200 ({', '.join(_GPUS)}), or cpu:8"
        )
    count = int(gpus[1] if gpus else cpus[1])  # pyright: ignore[reportOptionalSubscript]
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"--topology {name}: wanted {count} virtual CPU devices, got {len(devices)}"
        )
    chip = CHIPS[_GPUS[gpus[2]]] if gpus else None
    return Topology(name, devices[:count], chip, chip.link_gb_per_sec * 1e9 if chip else math.inf)


def _open_tpu(name: str, shape: list[int]) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {name}: wanted the TPU compiler, got no module libtpu. Fix: pip install "
            "-e '.[tpu]'; it needs no TPU. Or plan on virtual devices: cpu:8, gpu:8xh200."
        )
    # The compiler would look for the TPU's host and say, on stderr, that there is none; and one
    # process at a time could load it, as if each needed the TPU.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # any that it knows
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(shape) == 1 else {}
    try:
        devices = topologies.get_topology_desc(name, platform="tpu", **alone).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology {name}: the TPU compiler refuses it: {error}") from error
    chip = CHIPS[devices[0].device_kind]
    if len(shape) == 2:
        wraps = [size == 16 for size in shape]
    else:
        wraps = [all(size % 4 == 0 for size in shape)] * len(shape)
    links = sum((size > 1) + (size > 1 and wrap) for size, wrap in zip(shape, wraps, strict=True))
    return Topology(name, devices, chip, links * chip.link_gb_per_sec * 1e9 or math.inf)
