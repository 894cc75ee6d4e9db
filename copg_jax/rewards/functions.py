"""Reward functions (see `protocol`), named by their dotted paths.

1. `load_reward` resolves a spec; with arguments, the path names a factory that is called with them.
2. `WeightedRewards` is the weighted sum of several, each called here or in processes of its own.
"""

import hashlib
import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from copg_jax.config.reward_spec import RewardSpec
from copg_jax.config.schema import as_stored, map_leaves
from copg_jax.data.combine import combine, require_float32
from copg_jax.data.formats.texts import Text
from copg_jax.data.groups import TokenGroup
from copg_jax.dotted import describe, find, forks_end, shown
from copg_jax.errors import Ended, InputError
from copg_jax.rewards.protocol import (
    COLUMNS,
    Answer,
    RewardFn,
    ask,
    check_entries,
    columns_taken,
    has_check,
    takes_own,
)
from copg_jax.rewards.workers import WorkerPool

log = logging.getLogger(__name__)

DROPPED = "/dropped/"
"""In the name of a count of missing rewards, `rewards/<name>/dropped/<reason>`."""


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
        if spec.arguments:
            with forks_end():
                function = function(**map_leaves(plain, spec.arguments))
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
        for name, count in Counter(spec.label for spec in specs).items():
            if count > 1:
                raise InputError(
                    f"rewards: wanted a name of its own for each, got {count} that are named "
                    f"{name!r}. Fix: give them a `name`, such as {{function: ..., name: {name}_2}}."
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
            as_stored(_what_it_computes(spec))
            | {"name": spec.label, "hash": _fingerprint(spec.function, function)}
            for spec, function in self._parts
        ]

    def require_columns(self, columns: Collection[str]) -> None:
        """Raises InputError unless all functions can be called with these columns."""
        for spec, function in self._parts:
            columns_taken(function, columns, spec.function)

    def __len__(self) -> int:
        """How many functions there are."""
        return len(self._parts)

    def check_rows(self, rows: Iterable[TokenGroup]) -> None:
        """Raises InputError, before any work, for a row that a function cannot use."""
        checked = [(spec, function) for spec, function in self._parts if has_check(function)]
        for row in rows if checked else ():
            for spec, function in checked:
                entries = {name: [row.columns.get(name)] for name in getattr(function, COLUMNS)}
                check_entries(function, entries, [row.where], spec.function)

    @property
    def row_columns(self) -> set[str]:
        """Columns of which a function gets what each row has, whole."""
        return {name for _, function in self._parts for name in getattr(function, COLUMNS, {})}

    @property
    def names(self) -> list[str]:
        """Their names, in the order of the config."""
        return [spec.label for spec, _ in self._parts]

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Sequence[Any]],
        where: Sequence[str] | None = None,
        *,
        num_tokens: Sequence[int],
        counts: Counter[str] | None = None,
        update: Callable[[int], object] = lambda done: None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Calls each function and adds up what they return, by weight.

        Args:
            prompts: one a completion; [N].
            completions: [N].
            columns: further fields of the data set, each [N].
            where: `file:line` of each completion, for messages; [N].
            num_tokens: of each completion, end token included; [N].
            counts: increased by the rewards that are missing, by name and reason, and by the values
                that a spec's `clip` and `overlong` change, by name.
            update: is told how many rewards are done, of N times the number of functions.

        Returns:
            Total [N], NaN where a reward is absent whose weight is not 0; and each reward by its
            name, [N].

        Raises:
            InputError: a function that misbehaves, or a total that float32 cannot hold.
        """
        where = where or [f"prompt {prompt!r:.60}" for prompt in prompts]
        counts = Counter() if counts is None else counts
        parts = {}
        for number, (spec, _) in enumerate(self._parts):
            before = number * len(completions)
            told = lambda done, before=before: update(before + done)
            answer = self._ask(number, prompts, completions, columns, where, told)
            self._report(spec, answer, counts)
            parts[spec.label] = _shaped(answer.values, spec, np.asarray(num_tokens, int), counts)
        total = combine(parts, {spec.label: spec.weight for spec, _ in self._parts})
        require_float32(total, where)
        return total, parts

    def _ask(
        self,
        number: int,
        prompts: Sequence[Text],
        completions: Sequence[Text],
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
        missing = filter(None, answer.reasons)
        counts.update(f"rewards/{spec.label}{DROPPED}{reason}" for reason in missing)
        for kind, text in answer.remarks.items():
            if (spec.function, kind) not in self._said:
                self._said.add((spec.function, kind))
                log.warning("reward function %s %s", spec.function, text)


def _what_it_computes(spec: RewardSpec) -> RewardSpec:
    """The spec without what only says how. Of the workers it counts whether there are any: what a
    function raises drops a completion there, and ends the run elsewhere.
    """
    return replace(spec, num_workers=min(spec.num_workers, 1), batch_size=None)


def _shaped(
    values: np.ndarray, spec: RewardSpec, num_tokens: np.ndarray, counts: Counter[str]
) -> np.ndarray:
    """The values of a function, clipped and less what long completions cost; [N]."""
    if spec.clip is not None:
        lo, hi = spec.clip
        clipped = np.clip(values, lo, hi)
        counts[f"rewards/{spec.label}/clipped"] += int((np.abs(clipped - values) > 0).sum())
        values = clipped
    if spec.overlong is not None:
        most, buffer = spec.overlong.max_tokens, spec.overlong.buffer_tokens
        over = num_tokens - most
        share = np.clip((over + buffer) / buffer, 0, 1) if buffer else (over > 0).astype(float)
        counts[f"rewards/{spec.label}/overlong"] += int(((share > 0) & ~np.isnan(values)).sum())
        values = values - spec.overlong.penalty * share
    return values


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
