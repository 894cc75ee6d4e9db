"""The contract of reward functions, that of TRL and tunix: any callable
``f(prompts, completions, **columns) -> list[float | None]``.

`ask` calls one, checks what it returns and notes what else it does. `Missing` is a None that says
why.
"""

import contextlib
import copy
import inspect
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TextIO, cast

import numpy as np

from copg_jax.config.schema import FLOAT32_MAX
from copg_jax.dotted import describe, forks_end, shown
from copg_jax.errors import Ended, InputError

RewardFn = Callable[..., Sequence[Any]]
OWN = "rewards"
"""The column of the rewards that rows bring along."""
COLUMNS = "row_columns"  # attribute of a function: columns that it needs, each with its check


class Missing(NamedTuple):
    """Stands for a reward that a completion does not have, like None, and says why in a word."""

    reason: str  # of letters and underscores: it is part of a metric's name


class FunctionFailed(InputError):
    """A reward function raised something."""


class Answer(NamedTuple):
    """What a reward function said of N completions."""

    values: np.ndarray  # float64 [N]; NaN where there is no reward
    reasons: list[str]  # why there is none, in a word; "" where there is one; [N]
    remarks: dict[str, str]  # what else is to be said of the function; one for each kind


def reading(
    column: str, function: RewardFn, check: Callable[[Any], object] | None = None
) -> RewardFn:
    """Notes that a function needs a column, of which it gets what each row has, whole.

    Args:
        column: its name.
        function: the function.
        check: raises InputError for an entry that the function cannot use.
    """
    vars(function)[COLUMNS] = {column: check}
    return function


def has_check(function: RewardFn) -> bool:
    """Whether a function can tell from the columns alone that it cannot use a row."""
    return any(getattr(function, COLUMNS, {}).values())


def check_entries(
    function: RewardFn, columns: Mapping[str, Sequence[Any]], where: Sequence[str], name: str
) -> None:
    """Raises InputError, with the row, for an entry that a function cannot use."""
    for column, check in getattr(function, COLUMNS, {}).items():
        for place, entry in zip(where, columns[column] if check else [], strict=False):
            try:
                check(entry)
            except InputError as error:
                raise InputError(
                    f"{place}: reward function {name}: column {column!r}: {error}"
                ) from error


def score_texts(
    function: RewardFn,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    name: str,
    where: Sequence[str] | None = None,
) -> np.ndarray:
    """The numbers of `ask`: float64 [N], NaN where a completion is to be dropped."""
    return ask(function, prompts, completions, columns, name=name, where=where).values


def ask(
    function: RewardFn,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    name: str,
    where: Sequence[str] | None = None,
) -> Answer:
    """Calls a reward function and checks its answer.

    Args:
        function: the reward function; it gets copies, and the column `rewards` only if it takes it.
        prompts: one a completion, texts or lists of messages; [N].
        completions: [N].
        columns: further fields of the data set, each [N].
        name: the function's name, for messages.
        where: `file:line` of each completion, for messages; [N].

    Returns:
        The numbers; None and `Missing` become NaN, which marks the completion as to be dropped.

    Raises:
        InputError: columns that do not fit the function, an exception in it, or an answer other
            than one finite float32 number or None a completion.
    """
    where = where or [f"prompt {prompt!r:.60}" for prompt in prompts]
    taken = columns_taken(function, columns, name)
    check_entries(function, columns, where, name)
    given = {"prompts": list(prompts), "completions": list(completions)}
    given |= {column: columns[column] for column in columns if column in taken}
    own, heard = copy.deepcopy(given), _Heard(sys.stdout)
    try:
        with forks_end(), contextlib.redirect_stdout(cast(TextIO, heard)):
            answer: Any = function(**own)
            if hasattr(answer, "__array__") and np.ndim(answer) == 1:
                answer = _listed(answer)
    except (InputError, KeyboardInterrupt, Ended):
        raise
    except BaseException as error:
        # Not called again for the one row that it fails at: calls may be slow, or paid.
        ends = dict.fromkeys([*where[:1], *where[-1:]])
        raise FunctionFailed(
            f"{' to '.join(ends)}: reward function {name} failed: {describe(error)}"
        ) from error
    remarks = {}
    if heard.text:
        remarks["prints"] = f"prints, such as {heard.text!r}"
    if changed := [key for key, value in given.items() if _differ(own.get(key), value)]:
        remarks["changes"] = f"changes what it is given ({', '.join(changed)}): copies of its own"
    return Answer(*_checked(answer, completions, where, name), remarks)


def _differ(one: Any, other: Any) -> bool:
    """Whether two values differ; what cannot be compared, such as arrays in a list, does."""
    try:
        return bool(one != other)
    except Exception:
        return True


class _Heard:
    """Standard output that keeps the beginning of what is printed."""

    def __init__(self, stdout: Any) -> None:
        self.text, self._stdout = "", stdout

    def write(self, text: str) -> int:
        self.text += text[: max(0, 80 - len(self.text))]
        return self._stdout.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stdout, name)


def columns_taken(function: RewardFn, columns: Collection[str], name: str) -> set[str]:
    """The columns that a function gets: all, but the rows' own rewards only if it takes them.

    Raises:
        InputError: it cannot be called with them.
    """
    for column in getattr(function, COLUMNS, {}):
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
    answer: Any, completions: Sequence[Any], where: Sequence[str], name: str
) -> tuple[np.ndarray, list[str]]:
    """The numbers that a function returned, NaN for None, and why there is none; arguments
    and errors of `ask`.
    """
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
    reasons = [
        value.reason if isinstance(value, Missing) else "none" * (value is None) for value in answer
    ]
    for reason in filter(None, reasons):
        if not (isinstance(reason, str) and re.fullmatch(r"\w+", reason, re.ASCII)):
            raise InputError(
                f"reward function {name}: Missing: wanted a reason of letters, digits and _, got "
                f"{shown(reason)}"
            )
    answer = [None if reason else value for value, reason in zip(answer, reasons, strict=True)]
    for place, text, value in zip(where, completions, answer, strict=True):
        if value is not None and math.isnan(_number(value)):
            raise InputError(
                f"{place}: reward function {name}: wanted a finite number (of float32), or None to "
                f"leave the completion out, got {shown(value)} for completion {text!r:.80}"
            )
    values = [math.nan if value is None else _number(value) for value in answer]
    return np.array(values), reasons


def _listed(answer: Any) -> list[Any]:
    """The entries of an array of one axis; None where it is masked."""
    try:
        return np.ma.asarray(answer).tolist()
    except Exception:  # a tensor of an accelerator, of bfloat16 or with a gradient
        return [float(value) for value in answer]


def _number(value: Any) -> float:
    """A reward; NaN for what float32 cannot hold, or is no number."""
    try:
        if hasattr(value, "item") and np.ndim(value) == 0:  # of NumPy or JAX
            value = value.item()
        fits = isinstance(value, int | float) and abs(value) <= FLOAT32_MAX
        return float(value) if fits else math.nan
    except Exception:  # a class of the user's own, or a tensor without values
        return math.nan


def takes_own(function: RewardFn, *, required: bool = True) -> bool:
    """Whether a function takes the column of the rows' own rewards, or cannot do without."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # not callable, or a builtin: said where it is called
        return False
    if OWN in parameters:
        return not required or parameters[OWN].default is inspect.Parameter.empty
    return not required and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
