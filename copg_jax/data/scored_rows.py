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
| `rewards` | name → [K] float32 | each reward function's numbers; null: it gave none |
| `reward` | [K] float32 | their weighted sum, which is trained on; null: completion to leave out |
| `ref_logp` | [K] float32 | ln π_ref of the completion's ids, nats, summed |
| `logp_mu` | [K] float32 or null | ln µ of the completion's ids where a sampler knows it, nats |
| `columns` | string | the row's other columns, as JSON |

Texts of the format `chat` are messages, as JSON.
`make_row` makes the row of a group. `read_row` reads it back, number for number.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

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
    group, count = scored.group, len(scored.group.completions)
    _check(group)
    for name, values in scored.by_name.items():
        _check_finite(group.where, f"reward '{name}'", values, or_nan=True)
    return {
        "id": group.id,
        "prompt": stored_text(group.prompt),
        "prompt_token_ids": group.prompt_tokens,
        "completions": [stored_text(text) for text in group.completions],
        "completion_token_ids": group.completion_tokens,
        "has_eos": [True] * count if group.has_eos is None else group.has_eos,
        "origin": [0] * count if group.origin is None else group.origin,
        "rewards": [(name, _or_null(values)) for name, values in scored.by_name.items()],
        "reward": _or_null(group.rewards),
        "ref_logp": group.ref_logps,
        "columns": json.dumps(group.columns, default=str),
    }


def read_row(where: str, row: Row, *, text_format: str) -> TokenGroup:
    """Makes a group of one row of a part: the ids and numbers that are stored.

    Args:
        where: file and line of the row.
        row: the row.
        text_format: name of the format of its texts.

    Raises:
        InputError: a column that is missing, or numbers that do not fit the completions.
    """
    try:
        group = TokenGroup(
            id=row["id"],
            where=where,
            prompt=given_text(row["prompt"], text_format),
            prompt_tokens=np.array(row["prompt_token_ids"], np.int32),
            completions=tuple(given_text(text, text_format) for text in row["completions"]),
            completion_tokens=tuple(np.array(i, np.int32) for i in row["completion_token_ids"]),
            rewards=np.array(row["reward"], np.float32),
            ref_logps=np.array(row["ref_logp"], np.float32),
            has_eos=np.array(row["has_eos"], bool),
            origin=np.array(row["origin"], np.int8),
            columns=json.loads(row["columns"]),
            format=text_format,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{where}: not a row of scored data of format {FORMAT}: {type(error).__name__}: "
            f"{error}. Score again."
        ) from error
    _check(group)
    return group


def _check(group: TokenGroup) -> None:
    """Raises InputError unless there are ids and finite numbers for each completion."""
    count, ids = len(group.completions), [group.prompt_tokens, *group.completion_tokens]
    numbers = {name: getattr(group, name) for name in NUMBERS}
    sizes = {name: len(values) for name, values in numbers.items() if values is not None}
    if {len(ids) - 1, *sizes.values()} != {count} or not all(map(len, ids)):
        raise InputError(
            f"{group.where}: wanted ids of the prompt and, for each of {count} completions, ids "
            f"and numbers, got {list(map(len, ids))} ids and {sizes} numbers. Score again."
        )
    _check_finite(group.where, "reward", group.rewards, or_nan=True)
    _check_finite(group.where, "reference log-probability", group.ref_logps, or_nan=False)
    ref_logps = np.asarray(group.ref_logps)
    for index in np.flatnonzero(ref_logps > _MOST_LOGP):
        raise InputError(
            f"{group.where}: the reference log-probability of completion {index} is "
            f"{ref_logps[index]}: wanted one of at most 0 nats, to rounding. Score again."
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
