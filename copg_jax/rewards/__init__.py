"""Rewards: the protocol, their combination, and those that come with the package."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copg_jax.rewards.answers import exact_match, math_answer, regex
    from copg_jax.rewards.ensemble import RewardEnsemble
    from copg_jax.rewards.model import RewardModel
    from copg_jax.rewards.nli import entailment
    from copg_jax.rewards.programs import unit_tests
    from copg_jax.rewards.protocol import Missing
    from copg_jax.rewards.text import given, length, rouge_l

__all__ = [
    "Missing",
    "RewardEnsemble",
    "RewardModel",
    "entailment",
    "exact_match",
    "given",
    "length",
    "math_answer",
    "regex",
    "rouge_l",
    "unit_tests",
]

_HOMES = {
    "Missing": "protocol",
    "RewardEnsemble": "ensemble",
    "RewardModel": "model",
    "entailment": "nli",
    "exact_match": "answers",
    "given": "text",
    "length": "text",
    "math_answer": "answers",
    "regex": "answers",
    "rouge_l": "text",
    "unit_tests": "programs",
}


def __getattr__(name: str) -> Any:
    # Found when asked for, so that a worker process starts without jax.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
