"""Devices to compile for, without having them.

TPU slices and GPUs come from the descriptions that their compilers have of them; the step is then
compiled by that very compiler. Virtual CPU devices may stand in for GPUs, for an estimate.
"""

import importlib.util
import math
import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from copg_jax.errors import InputError
from copg_jax.flops import CHIPS, Chip

_TPUS = ("v5e", "v5p", "v6e")


class _Gpu(NamedTuple):
    kind: str  # key of CHIPS
    described_as: str  # by its compiler
    stand_in: str | None = None  # what that describes, if it is another GPU


_GPUS = {
    "h100": _Gpu("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
    "h200": _Gpu("NVIDIA H200", "NVIDIA H200 141GB HBM3e"),
    # The compiler describes no card of 24 GiB.
    "rtx3090": _Gpu(
        "NVIDIA GeForce RTX 3090", "NVIDIA RTX A6000", "an RTX A6000, which has the same GA102 chip"
    ),
}
_PLUGIN = "xla_cuda13"
_BASE_SHARE = 0.8  # of the memory in a description, which the compiler takes a program to have


class Topology(NamedTuple):
    """Devices to compile for."""

    name: str
    devices: Sequence[Any]
    chip: Chip | None  # None where nothing is published: a CPU
    bytes_per_sec: float  # that the worst-placed chip can receive from the others
    stand_in: str | None = None  # the device that is compiled for in its place, if another is

    @property
    def is_cpu(self) -> bool:
        """Whether the CPU's compiler compiles."""
        return self.devices[0].platform == "cpu"


def open_topology(name: str) -> Topology:
    """Devices of `v5e:4x4` or `v5p:2x2x1` (TPU), `gpu:8xh200`, `cpu:8` (virtual CPU devices) or
    `cpu:8xh200` (virtual CPU devices with the numbers of those GPUs).

    Raises:
        InputError: another form, a slice that does not exist, or a compiler that is not here.
    """
    kind, _, shape = name.partition(":")
    if kind in _TPUS and re.fullmatch(r"\d+(x\d+)*", shape):
        return _open_tpu(name, [int(size) for size in shape.split("x")])
    gpus = re.fullmatch(rf"([gc]pu):([1-8])x({'|'.join(_GPUS)})", name)
    cpus = re.fullmatch(r"cpu:([1-9]\d*)", name)
    if gpus is None and cpus is None:
        raise InputError(
            f"--topology {name}: wanted a TPU slice ({', '.join(_TPUS)}) such as v5e:4x4 or "
            f"v5p:2x2x1, one node of GPUs such as gpu:8xh200 ({', '.join(_GPUS)}), the same by "
            "the CPU's compiler, cpu:8xh200, or cpu:8"
        )
    if gpus is None:
        return Topology(name, _cpu_devices(name, int(cpus[1])), None, math.inf)  # pyright: ignore[reportOptionalSubscript]
    gpu, count = _GPUS[gpus[3]], int(gpus[2])
    chip, is_cpu = CHIPS[gpu.kind], kind == "cpu"
    devices = _cpu_devices(name, count) if is_cpu else _gpu_devices(name, count, gpu)
    stand_in = "this CPU" if is_cpu else gpu.stand_in
    return Topology(name, devices, chip, chip.link_gb_per_sec * 1e9, stand_in)


def _cpu_devices(name: str, count: int) -> Sequence[Any]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"--topology {name}: wanted {count} virtual CPU devices, got {len(devices)}"
        )
    return devices[:count]


def _gpu_devices(name: str, count: int, gpu: _Gpu) -> Sequence[Any]:
    spec = importlib.util.find_spec("jax_plugins")
    folders = [
        Path(folder) / _PLUGIN for folder in (spec and spec.submodule_search_locations) or ()
    ]
    libraries = [folder / "xla_cuda_plugin.so" for folder in folders]
    library = next(filter(Path.is_file, libraries), None)
    instead = f"Or plan with the CPU's compiler, an estimate: {name.replace('gpu', 'cpu')}."
    if library is None:
        raise InputError(
            f"--topology {name}: wanted the GPU compiler, got no module jax_plugins.{_PLUGIN}. "
            f"Fix: pip install -e '.[plan-gpu]'; it needs no GPU and no driver. {instead}"
        )
    description = _read_description(library, gpu.described_as)
    if description is None:
        raise InputError(
            f"--topology {name}: wanted a GPU compiler that describes the {gpu.described_as}, got "
            f"that of JAX {jax.__version__}. Fix: JAX 0.12, which needs Python 3.12. {instead}"
        )
    memory = int(CHIPS[gpu.kind].hbm_gib * 2**30 / _BASE_SHARE)
    description = re.sub(r"(device_memory_size): \d+", rf"\1: {memory}", description)
    # It calls a program that does not fit an error in its own sums; the plan says so in words.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return topologies.get_topology_desc(
            "", platform="cuda", topology=f"1x1x{count}", target_config=description
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"--topology {name}: the GPU compiler refuses it: {error}") from error


def _read_description(library: Path, name: str) -> str | None:
    """The text with which the GPU compiler describes a GPU, from its library; None without one.

    JAX has no way to ask for it: compiling for a GPU that is not here wants it as an argument.
    """
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = data.find(f'device_description_str: "{name}"'.encode())
        if found < 0:
            return None
        return data[data.rfind(b"gpu_device_info {", 0, found) : data.find(b"\0", found)].decode()


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
