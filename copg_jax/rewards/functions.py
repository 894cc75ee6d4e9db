"""Reward functions: any callable ``f(prompts, completions, **columns) -> list[float | None]`` (the
contract of TRL and tunix), named by its dotted path.

1. `load_reward` resolves a spec; with arguments, the path names a factory that is called with them.
2. `score_texts` calls a function, checks what it returns and turns None and NaN into absent
   rewards.
3. `WeightedRewards` is the weighted sum of several.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np

from copg_jax.config.sections import RewardSpec
from copg_jax.dotted import find
from copg_jax.errors import InputError

RewardFn = Callable[..., Sequence[float | None]]


def load_reward(spec: RewardSpec) -> RewardFn:
    """Resolves a spec to a callable.

    Raises:
        InputError: no such module or attribute, not callable, or arguments that the factory does
            not take.
    """
    function: Any = find(spec.function, "reward function", "copg_jax.rewards.rouge_l")
    if not spec.arguments:
        if isinstance(function, type):
            raise InputError(
                f"reward function {spec.function!r} is not a function; a class needs `arguments`"
            )
        return cast(RewardFn, function)
    try:
        return function(**spec.arguments)
    except TypeError as error:
        raise InputError(
            f"reward function {spec.function!r}: arguments do not fit: {error}"
        ) from error


def score_texts(
    function: RewardFn,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    name: str,
) -> np.ndarray:
    """Calls a reward function and checks its answer.

    Args:
        function: the reward function.
        prompts: one a completion; [N].
        completions: [N].
        columns: further fields of the data set, each [N].
        name: the function's name, for messages.

    Returns:
        float64 [N]; None becomes NaN, which marks the completion as to be dropped.

    Raises:
        InputError: columns that do not fit the function, another number of rewards than
            completions, an infinite one, or something that is no number.
    """
    try:
        inspect.signature(function).bind(prompts=[], completions=[], **columns)
    except TypeError as error:
        raise InputError(
            f"reward function {name}: cannot be called as f(prompts, completions, **columns) with "
            f"the columns of this data, {sorted(columns)}: {error}"
        ) from error
    values = function(prompts=list(prompts), completions=list(completions), **columns)
    try:
        values = list(values)
    except TypeError:
        raise InputError(
            f"reward function {name}: wanted a list of {len(completions)} numbers or None, got "
            f"{values!r:.80}; is a `return` missing?"
        ) from None
    if len(values) != len(completions):
        raise InputError(
            f"reward function {name}: wanted {len(completions)} rewards, one a completion, "
            f"got {len(values)}"
        )
    try:
        rewards = np.array([math.nan if value is None else float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise InputError(f"reward function {name}: wanted numbers or None, got {error}") from error
    if np.isinf(rewards).any():
        where = int(np.flatnonzero(np.isinf(rewards))[0])
        raise InputError(
            f"reward function {name}: infinite reward for completion {completions[where][:80]!r}; "
            "return None to drop a completion"
        )
    return rewards


class WeightedRewards:
    """The weighted sum of several reward functions, keeping each one's numbers.

    Args:
        specs: at least one.
    """

    def __init__(self, specs: Sequence[RewardSpec]):
        if not specs:
            raise InputError(
                "rewards: wanted at least one reward function, got none; e.g. "
                "rewards='[{function: copg_jax.rewards.rouge_l}]'"
            )
        self._parts = [(spec, load_reward(spec)) for spec in specs]

    @property
    def fingerprint(self) -> str:
        """Hash of all of them."""
        return hashlib.sha256(repr(self.provenance).encode()).hexdigest()

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """Each spec with a hash of what computes it: a model's weights, or a function's source."""
        return [asdict(spec) | {"hash": _fingerprint(function)} for spec, function in self._parts]

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Total [N] (NaN where any part is absent) and the parts by dotted path, each [N]."""
        total, parts = np.zeros(len(completions)), {}
        for number, (spec, function) in enumerate(self._parts):
            values = score_texts(function, prompts, completions, columns, name=spec.function)
            name = spec.function if spec.function not in parts else f"{spec.function}[{number}]"
            parts[name] = values
            total = total + spec.weight * values
        return total, parts


def _fingerprint(function: RewardFn) -> str:
    """The function's own `fingerprint`, else a hash of the module that defines it."""
    own = getattr(function, "fingerprint", None)
    if own is not None:
        return own
    module = inspect.getmodule(function)
    return hashlib.sha256(inspect.getsource(module or type(function)).encode()).hexdigest()
