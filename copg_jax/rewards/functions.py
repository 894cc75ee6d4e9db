"""Reward functions: any callable ``f(prompts, completions, **columns) -> list[float | None]`` (the
contract of TRL and tunix), named by its dotted path.

1. `load_reward` resolves a spec; with arguments, the path names a factory that is called with them.
2. `score_texts` calls a function, checks what it returns and turns None and NaN into absent
   rewards.
3. `WeightedRewards` is the weighted sum of several.
"""

import copy
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from copg_jax.config.schema import FLOAT32_MAX, as_stored, map_leaves
from copg_jax.config.sections import RewardSpec
from copg_jax.dotted import describe, find
from copg_jax.errors import InputError

RewardFn = Callable[..., Sequence[float | None]]
OWN = "rewards"
"""The column of the rewards that rows bring along."""


def load_reward(spec: RewardSpec) -> RewardFn:
    """Resolves a spec to a callable.

    Raises:
        InputError: no such module or attribute, not callable, a factory that does not take the
            arguments, or one that fails.
    """
    function: Any = find(spec.function, "reward function", "copg_jax.rewards.rouge_l")
    if not spec.arguments:
        if isinstance(function, type):
            raise InputError(
                f"reward function {spec.function!r} is not a function; a class needs `arguments`"
            )
        return cast(RewardFn, function)
    try:
        plain = lambda value: str(value) if isinstance(value, str) else value
        return function(**map_leaves(plain, spec.arguments))
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        what = "arguments do not fit" if isinstance(error, TypeError) else "its factory failed"
        raise InputError(f"reward function {spec.function!r}: {what}: {describe(error)}") from error


def score_texts(
    function: RewardFn,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    name: str,
    where: Sequence[str] | None = None,
) -> np.ndarray:
    """Calls a reward function and checks its answer.

    Args:
        function: the reward function; it gets copies, and the column `rewards` only if it takes it.
        prompts: one a completion; [N].
        completions: [N].
        columns: further fields of the data set, each [N].
        name: the function's name, for messages.
        where: `file:line` of each completion, for messages; [N].

    Returns:
        float64 [N]; None becomes NaN, which marks the completion as to be dropped.

    Raises:
        InputError: columns that do not fit the function, an exception in it, or an answer other
            than one finite float32 number or None a completion.
    """
    where = where or [f"prompt {prompt!r:.60}" for prompt in prompts]
    try:
        if not takes_own(function, required=False):
            columns = {column: values for column, values in columns.items() if column != OWN}
        inspect.signature(function).bind(prompts=[], completions=[], **columns)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"reward function {name}: cannot be called as f(prompts, completions, **columns) with "
            f"the columns of this data, {sorted(columns)}: {error}"
        ) from error

    def call(rows: range) -> Any:
        here = slice(rows.start, rows.stop)
        own = {column: copy.deepcopy(values[here]) for column, values in columns.items()}
        texts = {"prompts": list(prompts[here]), "completions": list(completions[here])}
        answer: Any = function(**texts, **own)
        is_array = hasattr(answer, "__array__") and np.ndim(answer) == 1
        return np.asarray(answer).tolist() if is_array else answer

    try:
        answer = call(range(len(completions)))
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        failing = _narrow(call, range(len(completions)))
        ends = dict.fromkeys([where[failing[0]], where[failing[-1]]])
        raise InputError(
            f"{' to '.join(ends)}: reward function {name} failed: {describe(error)}"
        ) from error
    return _checked(answer, completions, where, name)


def _checked(
    answer: Any, completions: Sequence[str], where: Sequence[str], name: str
) -> np.ndarray:
    """The numbers that a function returned, NaN for None; arguments and errors of `score_texts`."""
    if not isinstance(answer, list | tuple):
        raise InputError(
            f"reward function {name}: wanted a list of {len(completions)} numbers or None, got "
            f"{answer!r:.80} ({type(answer).__name__}){'; a `return` missing?' * (answer is None)}"
        )
    if len(answer) != len(completions):
        raise InputError(
            f"reward function {name}: wanted {len(completions)} rewards, one a completion, "
            f"got {len(answer)}"
        )
    for place, text, value in zip(where, completions, answer, strict=True):
        if value is not None and math.isnan(_number(value)):
            raise InputError(
                f"{place}: reward function {name}: wanted a finite number (of float32), or None to "
                f"leave the completion out, got {value!r:.80} for completion {text!r:.80}"
            )
    return np.array([math.nan if value is None else _number(value) for value in answer])


def _number(value: Any) -> float:
    """A reward; NaN for what float32 cannot hold, or is no number."""
    if hasattr(value, "item") and np.ndim(value) == 0:  # of NumPy or JAX
        value = value.item()
    fits = isinstance(value, int | float) and abs(value) <= FLOAT32_MAX
    return float(value) if fits else math.nan


def _narrow(call: Callable[[range], Any], rows: range) -> range:
    """The row at which a call fails, by halves; all of them where it fails at none alone."""
    middle = len(rows) // 2
    for half in (rows[:middle], rows[middle:]) if middle else ():
        try:
            call(half)
        except (Exception, SystemExit):
            return _narrow(call, half)
    return rows


def takes_own(function: RewardFn, *, required: bool = True) -> bool:
    """Whether a function takes the column of the rows' own rewards, or cannot do without."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # not callable, or a builtin: said where it is called
        return False
    if OWN in parameters:
        return not required or parameters[OWN].default is inspect.Parameter.empty
    return not required and any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class WeightedRewards:
    """The weighted sum of several reward functions, keeping each one's numbers.

    Args:
        specs: at least one.
        own: whether completions bring rewards of their own along; those that a model generates do
            not.
    """

    def __init__(self, specs: Sequence[RewardSpec], *, own: bool = False):
        if not specs:
            raise InputError(
                "rewards: wanted at least one reward function, got none; e.g. "
                "rewards='[{function: copg_jax.rewards.rouge_l}]'"
            )
        if not any(spec.weight for spec in specs):
            raise InputError(
                "rewards: wanted a weight other than 0, got none: their sum says nothing"
            )
        self._parts = [(spec, load_reward(spec)) for spec in specs]
        for spec, function in self._parts:
            if not own and takes_own(function):
                raise InputError(
                    f"reward function {spec.function}: it needs a reward that each completion "
                    "brings along: of generated ones there is none, and in experiments.score every "
                    "row must have its own. Name another function."
                )

    @property
    def fingerprint(self) -> str:
        """Hash of all of them."""
        return hashlib.sha256(repr(self.provenance).encode()).hexdigest()

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """Each spec with a hash of what computes it: a model's weights, or a function's source."""
        return [
            as_stored(spec) | {"hash": _fingerprint(function)} for spec, function in self._parts
        ]

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        where: Sequence[str] | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Total [N] (NaN where any part is absent) and the parts by dotted path, each [N]."""
        total, parts = np.zeros(len(completions)), {}
        for number, (spec, function) in enumerate(self._parts):
            values = score_texts(
                function, prompts, completions, columns, name=spec.function, where=where
            )
            name = spec.function if spec.function not in parts else f"{spec.function}[{number}]"
            parts[name] = values
            total = total + spec.weight * values
        return total, parts


def _fingerprint(function: RewardFn) -> str:
    """The function's own `fingerprint`, else a hash of the module that defines it."""
    own = getattr(function, "fingerprint", None)
    if own is not None:
        return own
    try:
        source = inspect.getsource(inspect.getmodule(function) or type(function))
    except (OSError, TypeError) as error:
        raise InputError(
            f"reward function {function!r}: its source cannot be read ({error}), by which scored "
            "data knows it. Write a function in a file of your own that calls it."
        ) from error
    return hashlib.sha256(source.encode()).hexdigest()
