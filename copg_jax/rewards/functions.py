"""Reward functions (see `protocol`), named by their dotted paths.

1. `load_reward` resolves a spec; with arguments, the path names a factory that is called with them.
2. `WeightedRewards` is the weighted sum of several, each called here or in processes of its own.
"""

import hashlib
import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import numpy as np

from copg_jax.config.schema import FLOAT32_MAX, as_stored, map_leaves
from copg_jax.config.sections import RewardSpec
from copg_jax.data.formats.texts import Text
from copg_jax.dotted import describe, find, shown
from copg_jax.errors import Ended, InputError
from copg_jax.rewards.protocol import COLUMNS, Answer, RewardFn, ask, columns_taken, takes_own
from copg_jax.rewards.workers import WorkerPool

log = logging.getLogger(__name__)

DROPPED = "/dropped/"
"""In the name of a count of missing rewards, `rewards/<function>/dropped/<reason>`."""
_MAY_DIFFER = ("num_workers", "batch_size")  # fields of a spec that only say how it is computed


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
    if spec.num_workers and getattr(function, "on_accelerator", False):
        raise InputError(
            f"reward function {spec.function!r}: num_workers must be 0, got {spec.num_workers}: "
            "its model is on the accelerator, which worker processes do not have"
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
        self._pools = [WorkerPool(spec) if spec.num_workers else None for spec in specs]
        self._said: set[tuple[str, str]] = set()
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
            {name: value for name, value in as_stored(spec).items() if name not in _MAY_DIFFER}
            | {"hash": _fingerprint(spec.function, function)}
            for spec, function in self._parts
        ]

    def require_columns(self, columns: Collection[str]) -> None:
        """Raises InputError unless all functions can be called with these columns."""
        for spec, function in self._parts:
            columns_taken(function, columns, spec.function)

    def __len__(self) -> int:
        """How many functions there are."""
        return len(self._parts)

    @property
    def row_columns(self) -> set[str]:
        """Columns of which a function gets what each row has, whole."""
        return {name for _, function in self._parts for name in getattr(function, COLUMNS, ())}

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Sequence[Any]],
        where: Sequence[str] | None = None,
        *,
        counts: Counter[str] | None = None,
        update: Callable[[int], object] = lambda done: None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Total [N] (NaN where any part is absent) and the parts by dotted path, each [N].

        Args:
            prompts: one a completion; [N].
            completions: [N].
            columns: further fields of the data set, each [N].
            where: `file:line` of each completion, for messages; [N].
            counts: increased by the rewards that are missing, by function and reason.
            update: is told how many rewards are done, of N times the number of functions.
        """
        where = where or [f"prompt {prompt!r:.60}" for prompt in prompts]
        total, parts = np.zeros(len(completions)), {}
        for number, (spec, _) in enumerate(self._parts):
            before = number * len(completions)
            told = lambda done, before=before: update(before + done)
            answer = self._ask(number, prompts, completions, columns, where, told)
            self._report(spec, answer, Counter() if counts is None else counts)
            name = spec.function if spec.function not in parts else f"{spec.function}[{number}]"
            parts[name] = answer.values
            total = total + spec.weight * answer.values
        for index in np.flatnonzero(np.abs(total) > FLOAT32_MAX).tolist():
            raise InputError(
                f"{where[index]}: the weighted sum of the rewards is {total[index]:.4g}: wanted a "
                "finite number of float32. Fix: smaller weights, or rewards of another unit."
            )
        return total, parts

    def _ask(
        self,
        number: int,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        where: Sequence[str],
        update: Callable[[int], object],
    ) -> Answer:
        """The answer of a function: of its workers, or of calls here, batch by batch."""
        (spec, function), pool = self._parts[number], self._pools[number]
        if pool is not None:
            columns_taken(function, columns, spec.function)
            return pool(prompts, completions, columns, where, update)
        size, found = spec.batch_size or max(1, len(completions)), []
        for begin in range(0, max(1, len(completions)), size):
            cut = slice(begin, begin + size)
            further = {name: values[cut] for name, values in columns.items()}
            batch = prompts[cut], completions[cut], further
            found.append(ask(function, *batch, name=spec.function, where=where[cut]))
            update(min(begin + size, len(completions)))
        values, reasons, remarks = zip(*found, strict=True)
        merged = {kind: text for remark in remarks for kind, text in remark.items()}
        return Answer(np.concatenate(values), [*itertools.chain(*reasons)], merged)

    def _report(self, spec: RewardSpec, answer: Answer, counts: Counter[str]) -> None:
        """Counts the rewards that are missing, and says once what is to be said of a function."""
        name = spec.function.rpartition(".")[2]
        counts.update(f"rewards/{name}{DROPPED}{reason}" for reason in answer.reasons if reason)
        for kind, text in answer.remarks.items():
            if (spec.function, kind) not in self._said:
                self._said.add((spec.function, kind))
                log.warning("reward function %s %s", spec.function, text)


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
