"""Scored data, format 2: what training reads, as token ids, with rewards and ln π_ref, in Parquet.

A folder has `part-00000.parquet`, ..., one row for each group of K completions:

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

1. `write_part` writes groups. `read_row` reads them back, number for number.
2. `write_side_car` says beside them, in `scored.json`, what decides these numbers, and the checksum
   of each part: `whole_parts` are finished, and an interrupted run goes on with the others.
3. `verify` refuses data of another tokenizer, text format, reference or dtype, or half-scored data;
   `check_parts` refuses parts that are not as they were written.
"""

import json
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from copg_jax.checksums import check_file, file_sum, read_object, read_record, write_record
from copg_jax.data.groups import NUMBERS, TokenGroup
from copg_jax.data.rows import Row
from copg_jax.data.sources import SIDE_CAR
from copg_jax.errors import InputError
from copg_jax.files import bucket_errors

log = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class SideCar:
    """What decides the numbers of scored data; written as `scored.json`."""

    tokenizer_hash: str
    text_format: str
    text_format_hash: str
    reference_hash: str
    reference_dtype: str  # in which ln π_ref was computed
    rewards: Any
    limits: dict[str, Any]
    complete: bool
    counts: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)  # finished ones: name → checksum
    format: int = FORMAT


# What `verify` compares: its name, what is wrong with another one, and what to do.
_COMPARED = {
    "tokenizer_hash": ("tokenizer", "the token ids of the data mean nothing to it"),
    "text_format_hash": ("text format", "prompts of this run would be others"),
    "reference_hash": ("reference model", "training starts at the reference"),
    "reference_dtype": ("compute dtype of ln π_ref", "the difference would read as KL"),
}


def part_name(index: int) -> str:
    """Name of the file of a part."""
    return f"part-{index:05d}.parquet"


def write_part(folder: epath.Path, index: int, groups: Sequence[ScoredGroup]) -> dict[str, str]:
    """Writes one part, at once or not at all, and returns its name with its checksum.

    Raises:
        InputError: other numbers of ids and scores than completions, an infinite reward, or a
            reference log-probability that is not finite or that is positive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".part-*"):
        left.unlink()  # of a process that was ended
    path = folder / part_name(index)
    part = folder / f".{path.name}.tmp"
    table = pa.Table.from_pylist([_row(scored) for scored in groups], SCHEMA)
    try:
        with part.open("wb") as file:
            pq.write_table(table, file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return {path.name: file_sum(path)}


def read_row(where: str, row: Row) -> TokenGroup:
    """Makes a group of one row of a part: the ids and numbers that are stored.

    Raises:
        InputError: a column that is missing, or numbers that do not fit the completions.
    """
    try:
        group = TokenGroup(
            id=row["id"],
            where=where,
            prompt=row["prompt"],
            prompt_tokens=np.array(row["prompt_token_ids"], np.int32),
            completions=tuple(row["completions"]),
            completion_tokens=tuple(np.array(i, np.int32) for i in row["completion_token_ids"]),
            rewards=np.array(row["reward"], np.float32),
            ref_logps=np.array(row["ref_logp"], np.float32),
            has_eos=np.array(row["has_eos"], bool),
            origin=np.array(row["origin"], np.int8),
            columns=json.loads(row["columns"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{where}: not a row of scored data of format {FORMAT}: {type(error).__name__}: "
            f"{error}. Score again."
        ) from error
    _check(group)
    return group


def whole_parts(folder: epath.Path) -> dict[str, str]:
    """Returns names and checksums of the parts of a scored folder, finished or not, that are as
    they were written; names the others in the log, since they are to be scored again.

    Raises:
        InputError: the side-car cannot be read.
    """
    whole = {}
    for name, wanted in read_side_car(folder).parts.items() if is_scored(str(folder)) else ():
        try:
            check_file(folder / name, wanted, fix="It is scored again.")
        except InputError as error:
            log.warning("%s", error)
        else:
            whole[name] = wanted
    return whole


def check_parts(folder: epath.PathLike, side_car: SideCar) -> None:
    """Raises InputError unless the parts are those that the side-car names, as they were written.

    Args:
        folder: the scored folder.
        side_car: from `verify`.
    """
    folder = epath.Path(folder)
    fix = "Fix: run the same score command again, which does this part alone anew."
    for name, wanted in side_car.parts.items():
        check_file(folder / name, wanted, fix=fix)
    for path in sorted(folder.glob("part-*.parquet")):
        if path.name not in side_car.parts:
            raise InputError(
                f"{path}: no part of this data: {SIDE_CAR} does not name it. Fix: move it away."
            )


def count_rewards(folder: epath.Path) -> dict[str, int]:
    """Returns how many completions the parts hold and how many have no reward."""
    total = absent = 0
    for path in sorted(folder.glob("part-*.parquet")):
        with path.open("rb") as file:
            column = pq.read_table(file, columns=["reward"])["reward"]
        rewards = column.combine_chunks().flatten()
        total, absent = total + len(rewards), absent + rewards.null_count
    return {"completions scored": total, "without a reward": absent}


def is_scored(path: str) -> bool:
    """Whether `path` is a folder that the score stage wrote."""
    with bucket_errors(path):
        return (epath.Path(path) / SIDE_CAR).exists()


def write_side_car(folder: epath.Path, side_car: SideCar) -> None:
    """Writes the side-car, in place of an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = dict(sorted(side_car.parts.items()))
    write_record(folder / SIDE_CAR, asdict(side_car) | {"parts": parts})


def read_side_car(folder: epath.Path) -> SideCar:
    """Reads the side-car of a scored folder.

    Raises:
        InputError: none there, damaged, or not one of this format.
    """
    path = folder / SIDE_CAR
    fix = (
        "Wanted a folder that the score stage wrote. Fix: correct the path; or, where this file is "
        "damaged, delete it and run the same score command again."
    )
    values = read_object(path, fix=fix)
    names = {item.name for item in fields(SideCar)}
    if values.get("format") != FORMAT or not names < set(values):
        raise InputError(
            f"{path}: wanted scored data of format {FORMAT}, got format {values.get('format')} "
            f"(fields missing: {sorted(names - set(values))}). Score again:\n"
            f"    {_score_command(folder, values)}"
        )
    values = read_record(path, fix=fix)
    return SideCar(**{name: values[name] for name in names})


def verify(folder: epath.PathLike, **found: str) -> SideCar:
    """Returns the side-car of data that was scored to its end and fits what a run has.

    Args:
        folder: the scored folder.
        found: what the run has, by field of the side-car: any of `tokenizer_hash`,
            `text_format_hash`, `reference_hash`, `reference_dtype`.

    Raises:
        InputError: another one of these in the data, or scoring was interrupted.
    """
    folder = epath.Path(folder)
    side_car, path = read_side_car(folder), folder / SIDE_CAR
    if not side_car.complete:
        raise InputError(
            f"{path}: scoring was interrupted after {len(side_car.parts)} parts. Run the "
            "same score command again to finish it."
        )
    for name, got in found.items():
        wanted = getattr(side_car, name)
        if wanted == got:
            continue
        what, wrong = _COMPARED[name]
        fix = "Take the model that the data was scored with"
        if name == "reference_dtype":
            fix = f"Set model.dtype={wanted}"
            got += f" (or score with reference.dtype={got})"
        raise InputError(
            f"{path}: field '{name}': the data was scored with the {what} {wanted}, but this run "
            f"has {got}: {wrong}. {fix}, or score again."
        )
    return side_car


def _score_command(folder: epath.Path, values: Mapping[str, Any]) -> str:
    """The command that scores the data of an older folder anew, as far as it is known."""
    arguments = [str(folder / "config.yaml")]
    if not epath.Path(arguments[0]).exists():
        specs = [spec for spec in values.get("rewards") or () if isinstance(spec, dict)]
        rewards = [{name: spec[name] for name in spec if name != "hash"} for spec in specs]
        limits = dict(values.get("limits") or {})
        arguments = ["reference.path=MODEL", "data.path=DATA", f"rewards={json.dumps(rewards)}"]
        arguments += [f"data.{name}={value}" for name, value in limits.items()]
    arguments.append(f"output_dir={folder}-format{FORMAT}")
    return shlex.join(["python", "-m", "experiments.score", *arguments])


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


def _row(scored: ScoredGroup) -> dict[str, Any]:
    group, count = scored.group, len(scored.group.completions)
    _check(group)
    for name, values in scored.by_name.items():
        _check_finite(group.where, f"reward '{name}'", values, or_nan=True)
    return {
        "id": group.id,
        "prompt": group.prompt,
        "prompt_token_ids": group.prompt_tokens,
        "completions": group.completions,
        "completion_token_ids": group.completion_tokens,
        "has_eos": [True] * count if group.has_eos is None else group.has_eos,
        "origin": [0] * count if group.origin is None else group.origin,
        "rewards": [(name, _or_null(values)) for name, values in scored.by_name.items()],
        "reward": _or_null(group.rewards),
        "ref_logp": group.ref_logps,
        "columns": json.dumps(group.columns, default=str),
    }


def _or_null(values: Any) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]
