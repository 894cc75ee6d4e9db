"""Rows of scored data, format 2: what training reads, as token ids, with rewards and ln π_ref.

One for each group of K completions, in Parquet:

| column | type | meaning |
|---|---|---|
| `id` | string | the row's own id, else the file and line it came from |
| `prompt` | string | text of the prompt, as it was cut |
| `prompt_token_ids` | [p] int32 | the prompt as models read it, BOS included |
| `completions` | [K] string | texts, as the reward functions saw them |
| `completion_token_ids` | [K] [c] int32 | the completions as they were scored |
| `has_eos` | [K] bool | whether the completion really ended; then its last id is the end token |
| `origin` | [K] int8 | which µ the completion is from; 0 for data as given |
| `rewards` | name → [K] float32 | each reward's numbers; null: it has none |
| `reward` | [K] float32 | their weighted sum, which is trained on; null: completion to leave out |
| `ref_logp` | [K] float32 | ln π_ref of the completion's ids, nats, summed |
| `logp_mu` | [K] float32 or null | ln µ of the completion's ids where a sampler knows it, nats |
| `columns` | string | the row's other columns, as JSON |

Texts of the format `chat` are messages, as JSON.
`make_row` makes the row of a group. `read_row` reads it back, number for number. What a sampler
wrote, see `sampled`, has the same rows, with null in place of `reward` and `ref_logp`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from copg_jax.data.combine import require_float32
from copg_jax.data.formats.texts import given_text, stored_text
from copg_jax.data.groups import NUMBERS, TokenGroup
from copg_jax.data.rows import Row
from copg_jax.errors import InputError

FORMAT = 2
_MOST_LOGP = 0.1  # nats; what float32 may add to a sum over thousands of tokens
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "prompt_token_ids": pa.list_(pa.int32()),
        "completions": pa.list_(pa.string()),
        "completion_token_ids": pa.list_(pa.list_(pa.int32())),
        "has_eos": pa.list_(pa.bool_()),
        "origin": pa.list_(pa.int8()),
        "rewards": pa.map_(pa.string(), pa.list_(pa.float32())),
        "reward": pa.list_(pa.float32()),
        "ref_logp": pa.list_(pa.float32()),
        "logp_mu": pa.list_(pa.float32()),
        "columns": pa.string(),
    }
)


class ScoredGroup(NamedTuple):
    """A group with its rewards and ref_logps, and the numbers of each reward function, [K] by name,
    whose (weighted) sum the rewards are; NaN means that there is none.
    """

    group: TokenGroup
    by_name: Mapping[str, np.ndarray]


def make_row(scored: ScoredGroup) -> Row:
    """The row of a group, as SCHEMA has it.

    Raises:
        InputError: other numbers of ids and scores than completions, an infinite reward, or a
            reference log-probability that is not finite or that is positive.
    """
    group = scored.group
    _check(group)
    _check_logps(group.where, "reference log-probability", group.ref_logps)
    _check_finite(group.where, "reward", group.rewards, or_nan=True)
    for name, values in scored.by_name.items():
        _check_finite(group.where, f"reward '{name}'", values, or_nan=True)
    return make_sampled_row(group) | {
        "rewards": [(name, _or_null(values)) for name, values in scored.by_name.items()],
        "reward": _or_null(group.rewards),
        "ref_logp": group.ref_logps,
    }


def make_sampled_row(group: TokenGroup) -> Row:
    """The row of a group without rewards and ln π_ref, as SCHEMA has it.

    Raises:
        InputError: other numbers of ids than completions, or ln µ that is not finite or positive.
    """
    count = len(group.completions)
    _check(group)
    return {
        "id": group.id,
        "prompt": stored_text(group.prompt),
        "prompt_token_ids": group.prompt_tokens,
        "completions": [stored_text(text) for text in group.completions],
        "completion_token_ids": group.completion_tokens,
        "has_eos": [True] * count if group.has_eos is None else group.has_eos,
        "origin": [0] * count if group.origin is None else group.origin,
        "logp_mu": group.mu_logps,
        "columns": json.dumps(group.columns, default=str),
    }


def read_row(
    where: str,
    row: Row,
    *,
    text_format: str,
    combination: Callable[[Mapping[str, np.ndarray]], np.ndarray] | None = None,
) -> TokenGroup:
    """Makes a group of one row of scored data: the ids and numbers that are stored.

    Args:
        where: part and number of the row.
        row: of SCHEMA.
        text_format: name of the format of its texts.
        combination: makes the reward of the values of each reward by name, [K]; None: the stored
            one.

    Raises:
        InputError: a column that is missing, or numbers that do not fit the completions.
    """
    group = read_sampled_row(where, row, text_format=text_format)
    try:
        if combination is None:
            rewards = np.array(row["reward"], np.float32)
        else:
            stored = {name: np.array(values, np.float32) for name, values in row["rewards"]}
            rewards = combination(stored)
            require_float32(rewards, [where] * len(rewards))
        group = replace(
            group,
            rewards=rewards.astype(np.float32),
            ref_logps=np.array(row["ref_logp"], np.float32),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _no_row(where, error) from error
    _check(group)
    _check_finite(where, "reward", group.rewards, or_nan=True)
    _check_logps(where, "reference log-probability", group.ref_logps)
    return group


def read_sampled_row(where: str, row: Row, *, text_format: str) -> TokenGroup:
    """Makes a group of one row of a part, but for rewards and ln π_ref; arguments are those of
    `read_row`.

    Raises:
        InputError: a column that is missing, or numbers that do not fit the completions.
    """
    mu_logps = row.get("logp_mu")
    try:
        group = TokenGroup(
            id=row["id"],
            where=where,
            prompt=given_text(row["prompt"], text_format),
            prompt_tokens=np.array(row["prompt_token_ids"], np.int32),
            completions=tuple(given_text(text, text_format) for text in row["completions"]),
            completion_tokens=tuple(np.array(i, np.int32) for i in row["completion_token_ids"]),
            has_eos=np.array(row["has_eos"], bool),
            origin=np.array(row["origin"], np.int8),
            mu_logps=None if mu_logps is None else np.array(mu_logps, np.float32),
            columns=json.loads(row["columns"]),
            format=text_format,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _no_row(where, error) from error
    _check(group)
    return group


def _no_row(where: str, error: Exception) -> InputError:
    return InputError(
        f"{where}: not a row of data of format {FORMAT}: {type(error).__name__}: {error}. Sample "
        "or score again."
    )


def _check(group: TokenGroup) -> None:
    """Raises InputError unless there are ids and finite numbers for each completion."""
    count, ids = len(group.completions), [group.prompt_tokens, *group.completion_tokens]
    numbers = {name: getattr(group, name) for name in NUMBERS}
    sizes = {name: len(values) for name, values in numbers.items() if values is not None}
    if {len(ids) - 1, *sizes.values()} != {count} or not all(map(len, ids)):
        raise InputError(
            f"{group.where}: wanted ids of the prompt and, for each of {count} completions, ids "
            f"and numbers, got {list(map(len, ids))} ids and {sizes} numbers. Sample or score "
            "again."
        )
    if group.mu_logps is not None:
        _check_logps(group.where, "log-probability under µ", group.mu_logps)


def _check_logps(where: str, what: str, values: Any) -> None:
    """Raises InputError unless these are sums of logarithms of probabilities."""
    _check_finite(where, what, values, or_nan=False)
    for index in np.flatnonzero(np.asarray(values) > _MOST_LOGP):
        raise InputError(
            f"{where}: the {what} of completion {index} is {values[index]}: wanted one of at most "
            "0 nats, to rounding. Sample or score again."
        )


def _check_finite(where: str, what: str, values: Any, *, or_nan: bool) -> None:
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.float32)  # as it will be written
    bad = np.isinf(values) if or_nan else ~np.isfinite(values)
    for index in np.flatnonzero(bad):
        raise InputError(
            f"{where}: the {what} of completion {index} is {values[index]}: wanted a finite number"
            f"{', or None or NaN to leave the completion out' if or_nan else ''}. Check what "
            "computes it, and its dtype."
        )


def _or_null(values: Any) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]
