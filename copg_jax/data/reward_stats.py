"""What the rewards of a scored folder are like: each by its name, and the one that is trained on.

1. `read_rewards` reads them as flat arrays, `stored_names` their names alone.
2. `describe_rewards` measures each; `format_rewards` makes a table of that.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from copg_jax.data.combine import Moments
from copg_jax.errors import InputError

TOTAL = "total reward"
"""What the table calls the one that is trained on; the name of a stored one has no blank."""
Stats = dict[str, float | int | None]
_COLUMNS = ("rewards", "reward", "completion_token_ids")


class StoredRewards(NamedTuple):
    """Rewards of all N completions of a scored folder, in the order of its parts."""

    group: np.ndarray  # [N] int: which group each is of
    num_tokens: np.ndarray  # [N] int, end token included
    by_name: dict[str, np.ndarray]  # [N] float64 each, reward units; NaN: it has none
    total: np.ndarray  # [N] float64: the one that is trained on


def stored_names(folder: epath.PathLike) -> list[str]:
    """Names of the rewards that a scored folder has, as its first row has them."""
    for path in _parts(folder):
        with path.open("rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1, columns=["rewards"]):
                return [name for name, _ in batch["rewards"][0].as_py()]
    return []


def read_rewards(folder: epath.PathLike) -> StoredRewards:
    """Reads the rewards of a scored folder whose parts are as they were written.

    Raises:
        InputError: rows that do not all have the same rewards.
    """
    names = stored_names(folder)
    sizes, num_tokens, totals = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)]
    by_name = {name: [np.zeros(0)] for name in names}
    for path in _parts(folder):
        with path.open("rb") as file:  # one by one: ids are many, and only counted
            table = pq.read_table(file, columns=list(_COLUMNS))
        rewards, total, ids = (table[name].combine_chunks() for name in _COLUMNS)
        sizes.append(total.value_lengths().to_numpy())
        num_tokens.append(ids.flatten().value_lengths().to_numpy())
        of_name = rewards.keys.to_numpy(zero_copy_only=False)
        totals.append(_numbers(total))
        for name in names:
            values = _numbers(rewards.items.filter(pa.array(of_name == name)))
            if len(values) != len(totals[-1]):
                raise InputError(f"{path}: rows without the reward {name!r}. Score again.")
            by_name[name].append(values)
    each = np.concatenate(sizes)
    return StoredRewards(
        group=np.repeat(np.arange(len(each)), each),
        num_tokens=np.concatenate(num_tokens),
        by_name={name: np.concatenate(values) for name, values in by_name.items()},
        total=np.concatenate(totals),
    )


def moments(values: np.ndarray) -> Moments:
    """Mean and standard deviation of the values that are there, NaN being none."""
    known = values[~np.isnan(values)]
    if not len(known):
        return Moments(math.nan, math.nan)
    return Moments(float(known.mean()), float(known.std()))


def describe_rewards(stored: StoredRewards) -> dict[str, Stats]:
    """Measures each reward by its name, and the one that is trained on; see `_describe`."""
    columns = stored.by_name | {TOTAL: stored.total}
    return {
        name: _describe(values, stored.group, stored.num_tokens) for name, values in columns.items()
    }


def format_rewards(stats: Mapping[str, Stats]) -> str:
    """A table of what `describe_rewards` returns, one line a reward."""
    heads = list(next(iter(stats.values())))
    rows = [["", *heads], *([name, *map(_shown, row.values())] for name, row in stats.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads) + 1)]
    align = lambda row: "  ".join(
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "\n".join(map(align, rows))


def _describe(values: np.ndarray, group: np.ndarray, num_tokens: np.ndarray) -> Stats:
    """Statistics of one reward R; None where they say nothing, as of equal values.

    - `mean`, `std`: over completions, reward units;
    - `gap_std`: √E[ΔR²] over the pairs within groups, the unit of β, since R → cR does what
      β → β/c does;
    - `ties`: share of these pairs with ΔR = 0;
    - `length_corr`: correlation with the number of tokens, over completions;
    - `gap_length_corr`: that of ΔR with the difference of the numbers of tokens, over pairs, which
      is what a policy can learn of it;
    - `missing`: how many completions have none.

    Args:
        values: reward units, NaN where there is none; [N].
        group: which group each completion is of; [N].
        num_tokens: of each completion; [N].
    """
    known = ~np.isnan(values)
    values, length = values[known], num_tokens[known].astype(float)
    _, group = np.unique(group[known], return_inverse=True)
    size = np.bincount(group)
    num_pairs = int((size * (size - 1) // 2).sum())
    # Σ over pairs of Δx·Δy is n·Σ of the products of what is left without the group's mean.
    within = [x - (np.bincount(group, x) / size)[group] for x in (values, length)]
    order = np.lexsort((values, group))
    is_new = (np.diff(values[order]) != 0) | (np.diff(group[order]) != 0)
    runs = np.bincount(np.cumsum(np.append(0, is_new))) if len(values) else np.zeros(0, int)
    num_ties = int((runs * (runs - 1) // 2).sum())
    mean, std = moments(values)
    differ, gaps_differ = len(values) and np.ptp(values) > 0, num_ties < num_pairs
    weight = size[group]
    return {
        "mean": mean if len(values) else None,
        "std": std if len(values) else None,
        "gap_std": float(np.sqrt((weight * within[0] ** 2).sum() / num_pairs))
        if num_pairs
        else None,
        "ties": num_ties / num_pairs if num_pairs else None,
        "length_corr": _correlation(values - mean, length - length.mean()) if differ else None,
        "gap_length_corr": _correlation(within[0], within[1], weight) if gaps_differ else None,
        "missing": int((~known).sum()),
    }


def _correlation(x: np.ndarray, y: np.ndarray, weight: Any = 1.0) -> float | None:
    """Σ w·x·y / √(Σ w·x² · Σ w·y²); None where y is 0 everywhere."""
    scale = np.sqrt((weight * x**2).sum() * (weight * y**2).sum())
    return float((weight * x * y).sum() / scale) if scale > 0 else None


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _parts(folder: epath.PathLike) -> list[epath.Path]:
    return sorted(epath.Path(folder).glob("part-*.parquet"))


def _numbers(lists: Any) -> np.ndarray:
    """The float32 numbers of an array of lists, null as NaN; float64 [N]."""
    return lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
