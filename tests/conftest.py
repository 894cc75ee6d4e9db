"""Test session: CPU, strict shapes, a compilation cache of its own; warnings are errors.

1. JAX fixes its number of devices when its backend starts. Tests of one device and tests of eight
   virtual ones therefore run in processes of their own: `--devices 1` and `--devices 8` leave out
   the files of the other kind, and `make test` runs both. Without the option, one file of eight
   among those named is enough for eight.
2. An oracle is another program that a test compares with (torch, the TPU compiler, ...). The
   suite's environment has none of them: such tests are marked, skip with a word about it, and run
   by `make oracles`, where `--oracles` makes a missing one a failure.

The environment is set before anything imports jax; scripts that tests start inherit it.
"""

import importlib.util
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# Files and folders whose tests ask for eight devices.
EIGHT_DEVICES = (
    "benchmark",
    "hf/test_weights.py",
    "models/test_forward.py",
    "models/test_kernels.py",
    "planning",
    "rewards",
    "test_arrays.py",
    "test_collectives.py",
    "test_distributed.py",
    "test_evaluate.py",
    "test_evaluate_held_out.py",
    "test_files.py",
    "test_infer.py",
    "test_meshes.py",
    "test_run_folder.py",
    "test_runtime.py",
    "test_sampling.py",
    "test_scoring.py",
    "test_sharding.py",
    "test_stages.py",
    "test_stages_refusals.py",
    "train",
)

# Files that take longest, so that none of them is left over for one worker at the end.
LONGEST = (
    "test_distributed.py",
    "test_meshes.py",
    "models/test_forward.py",
    "train/test_step.py",
    "test_stages.py",
    "benchmark/test_floor.py",
    "test_notebooks.py",
    "benchmark/test_train.py",
)

os.environ["JAX_PLATFORMS"] = "cpu"
# Shared by the workers and by scripts that tests start, and kept from run to run for speed.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "copg_jax_test_xla")
)
# Half the time of a first run is LLVM's, and the tests' programs are small. What XLA itself does
# (partitioning, fusion, buffers) stays as it is.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A third of what is left is a second way to make code of fusions, which later compilers always use.
if version("jaxlib").startswith("0.10."):
    flags = "--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", "")  # yours win
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
# Small programs too, which the two workers and those scripts share.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tests never reach a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).parent


def asks_for_eight(path: Path) -> bool:
    """Whether the tests of a file run on eight devices."""
    return any(path.is_relative_to(ROOT / name) for name in EIGHT_DEVICES)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--devices", type=int, choices=(1, 8), help="only the tests of so many")
    parser.addoption("--oracles", action="store_true", help="a missing oracle fails its tests")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = config.getoption("devices")
    if wanted is None or not collection_path.match("test_*.py"):
        return None
    return asks_for_eight(collection_path) != (wanted == 8) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        name = item.path.relative_to(ROOT).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=turn)  # stable


def pytest_configure(config: pytest.Config) -> None:
    """Sets the number of devices, before a test file is imported, which may start JAX."""
    named = [Path(argument.split("::")[0]).absolute() for argument in config.args]
    eight = any(
        path.is_relative_to(ROOT / name) or (ROOT / name).is_relative_to(path)
        for path in named
        for name in EIGHT_DEVICES
    )
    number = config.getoption("devices") or (8 if eight else 1)
    os.environ["JAX_NUM_CPU_DEVICES"] = str(number)
    jax.config.update("jax_num_cpu_devices", number)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("oracle"):
        (name,) = marker.args
        if importlib.util.find_spec(name) is None:
            refuse = pytest.fail if item.config.getoption("oracles") else pytest.skip
            refuse(f"the oracle {name} is not installed: make oracles")


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy generator with a fixed seed."""
    return np.random.default_rng(0)
