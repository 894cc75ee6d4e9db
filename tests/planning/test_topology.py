"""Topologies: what can be compiled for, and how much the worst-placed chip hears."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies

from copg_jax.errors import InputError
from experiments.planning.topology import open_topology
from tests import toys

needs_compiler = pytest.mark.oracle("libtpu")
DESCRIPTION = """gpu_device_info {{
  core_count: {cores}
  device_memory_size: 84942979072
}}
platform_name: "CUDA"
device_description_str: "{name}"
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU compiler that describes two GPUs, among other things."""
    file = tmp_path / "xla_cuda13" / "xla_cuda_plugin.so"
    file.parent.mkdir()
    first = DESCRIPTION.format(cores=131, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    second = DESCRIPTION.format(cores=132, name="NVIDIA H100 80GB HBM3")
    texts = ["\x7fELF", first, second, "device_description_str: "]
    file.write_bytes("\0".join(texts).encode())
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "other"), str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", {"jax_plugins": spec}.get)
    return file


def test_gpus_come_from_the_description_in_the_library_of_their_compiler(
    library: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def describe(name: str, **options: str) -> SimpleNamespace:
        asked.append((name, options))
        return SimpleNamespace(devices=[SimpleNamespace(platform="gpu")] * 8)

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    topology = open_topology("gpu:8xh100")
    assert len(topology.devices) == 8 and not topology.is_cpu
    assert topology.chip is not None and topology.chip.hbm_gib == 72
    ((name, options),) = asked
    text = options.pop("target_config")
    assert (name, options) == ("", {"platform": "cuda", "topology": "1x1x8"})
    assert text.startswith("gpu_device_info {") and text.endswith('"NVIDIA H100 80GB HBM3"\n')
    assert "core_count: 132" in text and "core_count: 131" not in text
    # The compiler takes four fifths of it for the program.
    assert f"device_memory_size: {72 * 2**30 * 5 // 4}" in text


def test_a_card_of_24_gib_is_compiled_for_as_another_of_its_chip(
    library: Path, monkeypatch: pytest.MonkeyPatch
):
    library.write_text(DESCRIPTION.format(cores=84, name="NVIDIA RTX A6000"))
    devices = [SimpleNamespace(platform="gpu")]
    monkeypatch.setattr(
        topologies, "get_topology_desc", lambda name, **options: SimpleNamespace(devices=devices)
    )
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    topology = open_topology("gpu:1xrtx3090")
    assert topology.chip is not None and topology.chip.hbm_gib == 21.6
    assert topology.stand_in is not None and "RTX A6000" in topology.stand_in


def test_a_gpu_that_the_compiler_does_not_describe_is_refused(library: Path):
    with pytest.raises(InputError, match=r"H200 141GB HBM3e, got that of JAX.*cpu:2xh200"):
        open_topology("gpu:2xh200")


def test_what_the_gpu_compiler_says_is_passed_on(library: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str, **options: str) -> None:
        raise jax.errors.JaxRuntimeError("no field named x")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    with pytest.raises(InputError, match="gpu:1xh100: the GPU compiler refuses it: no field"):
        open_topology("gpu:1xh100")


def test_virtual_devices_stand_in_for_gpus_with_the_numbers_of_the_gpu():
    topology = open_topology("cpu:2xh200")
    assert len(topology.devices) == 2 and topology.is_cpu
    assert topology.chip is not None and topology.chip.peak_tflops == 989
    assert topology.bytes_per_sec == 450e9


def test_of_cpus_nothing_is_published():
    topology = open_topology("cpu:8")
    assert len(topology.devices) == 8 and topology.chip is None


@pytest.mark.parametrize("name", ["v5e", "v5e:4*4", "gpu:8", "gpu:9xh200", "gpu:2xa1", "cpu:0", ""])
def test_another_form_is_refused_with_examples(name: str):
    with pytest.raises(InputError) as caught:
        open_topology(name)
    toys.names_all(
        str(caught.value), ["--topology", name, "v5e:4x4", "gpu:8xh200", "cpu:8xh200", "cpu:8"]
    )


def test_more_virtual_devices_than_there_are_is_refused():
    with pytest.raises(InputError, match="wanted 9 virtual CPU devices, got 8"):
        open_topology("cpu:9")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e:4x4", ["libtpu", ".[tpu]", "cpu:8"]),
        ("gpu:2xh200", ["jax_plugins.xla_cuda13", ".[plan-gpu]", "cpu:2xh200"]),
    ],
)
def test_without_a_compiler_the_error_says_how_to_get_it(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        open_topology(name)
    toys.names_all(str(caught.value), words)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "num_chips", "links", "gb_per_sec"),
    [
        ("v5e:1x1", 1, math.inf, 1),
        ("v5e:2x4", 8, 2, 50),  # a corner has two neighbours
        ("v5e:8x16", 128, 3, 50),  # 16 closes to a ring
        ("v5p:2x2x1", 4, 2, 100),
        ("v5p:4x4x4", 64, 6, 100),  # a whole cube is a torus
    ],
)
def test_a_slice_hears_through_the_links_of_its_corner(
    name: str, num_chips: int, links: float, gb_per_sec: float
):
    topology = open_topology(name)
    assert len(topology.devices) == num_chips and not topology.is_cpu
    assert topology.bytes_per_sec == links * gb_per_sec * 1e9


@needs_compiler
def test_a_slice_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="v5p:1x1x3: the TPU compiler refuses it"):
        open_topology("v5p:1x1x3")
