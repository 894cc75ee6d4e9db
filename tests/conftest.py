"""Test session: CPU with 8 virtual devices, strict shapes, a compilation cache of its own.

The environment is set before anything imports jax; warnings are errors (see pyproject.toml).
"""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Shared by the workers and by scripts that tests start, and kept from run to run for speed.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "copg_jax_test_xla")
)
# Tests never reach a network; scripts that they start inherit this too.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy generator with a fixed seed."""
    return np.random.default_rng(0)
