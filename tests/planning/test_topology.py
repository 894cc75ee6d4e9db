"""Topologies: what can be compiled for, and how much the worst-placed chip hears."""

import importlib.util
import math

import pytest

from copg_jax.errors import InputError
from experiments.planning.topology import open_topology
from tests import toys

needs_compiler = pytest.mark.oracle("libtpu")


def test_gpus_are_as_many_virtual_devices_with_the_numbers_of_the_gpu():
    topology = open_topology("gpu:2xh200")
    assert len(topology.devices) == 2 and topology.is_estimate
    assert topology.chip is not None and topology.chip.peak_tflops == 989
    assert topology.bytes_per_sec == 450e9


def test_of_cpus_nothing_is_published():
    topology = open_topology("cpu:8")
    assert len(topology.devices) == 8 and topology.chip is None


@pytest.mark.parametrize("name", ["v5e", "v5e:4*4", "gpu:8", "gpu:9xh200", "gpu:2xa1", "cpu:0", ""])
def test_another_form_is_refused_with_examples(name: str):
    with pytest.raises(InputError) as caught:
        open_topology(name)
    toys.names_all(str(caught.value), ["--topology", name, "v5e:4x4", "gpu:8xh200", "cpu:8"])


def test_more_virtual_devices_than_there_are_is_refused():
    with pytest.raises(InputError, match="wanted 9 virtual CPU devices, got 8"):
        open_topology("cpu:9")


def test_without_the_tpu_compiler_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"libtpu.*\.\[tpu\].*cpu:8"):
        open_topology("v5e:4x4")


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
    assert len(topology.devices) == num_chips and not topology.is_estimate
    assert topology.bytes_per_sec == links * gb_per_sec * 1e9


@needs_compiler
def test_a_slice_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="v5p:1x1x3: the TPU compiler refuses it"):
        open_topology("v5p:1x1x3")
