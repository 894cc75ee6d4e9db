"""Contrastive Policy Gradient in JAX: a policy learns from scored completions, as if supervised.

The package is laid out in the order of a run: `data` turns rows into groups of completions,
`models` gives them log-probabilities, `losses` turns log-ratios and rewards into a number,
`objective` joins the two, `train` trains. `bandit` holds the theory. The scripts in `experiments/`
tie them together. What a program of one's own needs is at the top:
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copg_jax.data.groups import GroupBatch
    from copg_jax.losses import copg_loss, dpo_loss, ipo_loss, pg_loss, rloo_loss
    from copg_jax.objective import make_bradley_terry_loss, make_nll_loss, make_policy_loss
    from copg_jax.relatives import asymre_loss, oapl_loss, opmd_loss
    from copg_jax.train.state import create_state
    from copg_jax.train.step import make_train_step

__version__ = "0.1.0"
__all__ = [
    "GroupBatch",
    "asymre_loss",
    "copg_loss",
    "create_state",
    "dpo_loss",
    "ipo_loss",
    "make_bradley_terry_loss",
    "make_nll_loss",
    "make_policy_loss",
    "make_train_step",
    "oapl_loss",
    "opmd_loss",
    "pg_loss",
    "rloo_loss",
]

# transformers gives configs and tokenizers here; its advice to install PyTorch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOMES = ("data.groups", "losses", "relatives", "objective", "train.state", "train.step")


def __getattr__(name: str) -> Any:
    # Found when asked for, so that `copg_jax.data` can be imported without jax.
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
