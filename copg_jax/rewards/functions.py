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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from copg_jax.config.schema import FLOAT32_MAX, as_stored, map_leaves
from copg_jax.config.sections import RewardSpec
from copg_jax.dotted import describe, find, shown
from copg_jax.errors import Ended, InputError

RewardFn = Callable[..., Sequence[Any]]
OWN = "rewards"
"""The column of the rewards that rows bring along."""


class Missing(NamedTuple):
    """Stands for a reward that a completion does not have, like None, and says why in a word."""

    reason: str  # of letters and underscores: it is part of a metric's name


class FaultyEntry(InputError):
    """What the row of one completion has cannot be used; raised by a reward function."""

    def __init__(self, index: int, text: str) -> None:
        super().__init__(text)
        self.index = index


def reading(column: str, function: RewardFn) -> RewardFn:
    """Notes that a function needs a column, of which it gets what each row has, whole."""
    vars(function)["row_columns"] = (column,)
    return function


def load_reward(spec: RewardSpec) -> RewardFn:
    """Resolves a spec to a callable.

    Raises:
        InputError: no such module or attribute, no function, a factory that does not take the
            arguments, one that fails, or one that makes no function.
    """
    function: Any = find(spec.function, "reward function", "copg_jax.rewards.rouge_l")
    if not spec.arguments and isinstance(function, type):
        raise InputError(
            f"reward function {spec.function!r} is not a function; a class needs `arguments`"
        )
    try:
        plain = lambda value: str(value) if isinstance(value, str) else value
        function = function(**map_leaves(plain, spec.arguments)) if spec.arguments else function
    except (KeyboardInterrupt, Ended):
        raise
    except InputError as error:
        raise InputError(f"reward function {spec.function!r}: {error}") from error
    except BaseException as error:
        what = "arguments do not fit" if isinstance(error, TypeError) else "its factory failed"
        raise InputError(f"reward function {spec.function!r}: {what}: {describe(error)}") from error
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise InputError(
            f"reward function {spec.function!r}: wanted a function, and none that is async, got "
            f"{shown(function)}{' from its factory' * bool(spec.arguments)}"
        )
    return cast(RewardFn, function)


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
    taken = _taken(function, columns, name)

    own = {column: copy.deepcopy(columns[column]) for column in columns if column in taken}
    try:
        answer: Any = function(prompts=list(prompts), completions=list(completions), **own)
        if hasattr(answer, "__array__") and np.ndim(answer) == 1:
            answer = _listed(answer)
    except FaultyEntry as error:
        raise InputError(f"{where[error.index]}: reward function {name}: {error}") from error
    except (InputError, KeyboardInterrupt, Ended):
        raise
    except BaseException as error:
        # Not called again for the one row that it fails at: calls may be slow, or paid.
        ends = dict.fromkeys([*where[:1], *where[-1:]])
        raise InputError(
            f"{' to '.join(ends)}: reward function {name} failed: {describe(error)}"
        ) from error
    return _checked(answer, completions, where, name)


def _taken(function: RewardFn, columns: Collection[str], name: str) -> set[str]:
    """The columns that a function gets: all, but the rows' own rewards only if it takes them.

    Raises:
        InputError: it cannot be called with them.
    """
    for column in getattr(function, "row_columns", ()):
        if column not in columns:
            raise InputError(
                f"reward function {name}: wanted the column {column!r}, got data with the columns "
                f"{sorted(columns)}. Fix: name the column in its arguments, or add it to the rows."
            )
    taken = {column for column in columns if column != OWN or takes_own(function, required=False)}
    try:
        inspect.signature(function).bind(prompts=[], completions=[], **{key: [] for key in taken})
    except (TypeError, ValueError) as error:
        raise InputError(
            f"reward function {name}: cannot be called as f(prompts, completions, **columns) with "
            f"the columns of this data, {sorted(taken)}: {error}. A factory needs `arguments`."
        ) from error
    return taken


def _checked(
    answer: Any, completions: Sequence[str], where: Sequence[str], name: str
) -> np.ndarray:
    """The numbers that a function returned, NaN for None; arguments and errors of `score_texts`."""
    if not isinstance(answer, list | tuple):
        raise InputError(
            f"reward function {name}: wanted a list of {len(completions)} numbers or None, got "
            f"{shown(answer)}{'; a `return` missing?' * (answer is None)}"
        )
    if len(answer) != len(completions):
        raise InputError(
            f"reward function {name}: wanted {len(completions)} rewards, one a completion, "
            f"got {len(answer)}"
        )
    answer = [None if isinstance(value, Missing) else value for value in answer]
    for place, text, value in zip(where, completions, answer, strict=True):
        if value is not None and math.isnan(_number(value)):
            raise InputError(
                f"{place}: reward function {name}: wanted a finite number (of float32), or None to "
                f"leave the completion out, got {shown(value)} for completion {text!r:.80}"
            )
    return np.array([math.nan if value is None else _number(value) for value in answer])


def _listed(answer: Any) -> list[Any]:
    """The entries of an array of one axis; None where it is masked."""
    try:
        return np.ma.asarray(answer).tolist()
    except Exception:  # a tensor of an accelerator, of bfloat16 or with a gradient
        return [float(value) for value in answer]


def _number(value: Any) -> float:
    """A reward; NaN for what float32 cannot hold, or is no number."""
    if hasattr(value, "item") and np.ndim(value) == 0:  # of NumPy or JAX
        value = value.item()
    fits = isinstance(value, int | float) and abs(value) <= FLOAT32_MAX
    return float(value) if fits else math.nan


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
        no_own: why completions bring no rewards of their own along; None where they do.
    """

    def __init__(
        self, specs: Sequence[RewardSpec], *, no_own: str | None = "what a model generates has none"
    ):
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
            if no_own is not None and takes_own(function):
                raise InputError(
                    f"reward function {spec.function}: wanted a reward that each completion brings "
                    f"along, but {no_own}. Fix: name another function."
                )

    @property
    def fingerprint(self) -> str:
        """Hash of all of them."""
        return hashlib.sha256(repr(self.provenance).encode()).hexdigest()

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """Each spec with a hash of what computes it: a model's weights, or a function's source."""
        return [
            as_stored(spec) | {"hash": _fingerprint(spec.function, function)}
            for spec, function in self._parts
        ]

    def require_columns(self, columns: Collection[str]) -> None:
        """Raises InputError unless all functions can be called with these columns."""
        for spec, function in self._parts:
            _taken(function, columns, spec.function)

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
        for index in np.flatnonzero(np.abs(total) > FLOAT32_MAX).tolist():
            raise InputError(
                f"{where[index] if where else f'prompt {prompts[index]!r:.60}'}: the weighted sum "
                f"of the rewards is {total[index]:.4g}: wanted a finite number of float32. Fix: "
                "smaller weights, or rewards of another unit."
            )
        return total, parts


def _fingerprint(name: str, function: RewardFn) -> str:
    """The function's own `fingerprint`, else a hash of the module that defines it."""
    own = getattr(function, "fingerprint", None)
    if own is not None:
        return own
    try:
        source = inspect.getsource(inspect.getmodule(function) or type(function))
    except (OSError, TypeError) as error:
        raise InputError(
            f"reward function {name!r}: its source cannot be read ({error}), by which scored "
            "data knows it. Write a function in a file of your own that calls it."
        ) from error
    return hashlib.sha256(source.encode()).hexdigest()
