"""Scored data: completions with rewards and reference log-probabilities, as Parquet.

1. `write_part` writes groups as `part-00000.parquet`, ...; a part exists only when it is whole, so
   `finished_parts` tells where an interrupted run goes on.
2. `write_side_car` says beside them which tokenizer, reference model and rewards they come from.
3. `verify` refuses data of another tokenizer or reference model, or half-scored data.

Reading is that of any other data: `data.path` may point at the folder.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from copg_jax.data.groups import TokenGroup
from copg_jax.data.rows import SIDE_CAR
from copg_jax.errors import InputError
from copg_jax.files import write_text

FORMAT = 1
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "completions": pa.list_(pa.string()),
        "rewards": pa.list_(pa.float32()),
        "ref_logps": pa.list_(pa.float32()),
        "prompt_token_count": pa.int32(),
        "completion_token_counts": pa.list_(pa.int32()),
        "sources": pa.map_(pa.string(), pa.list_(pa.float32())),
        "columns": pa.string(),
    }
)


class ScoredGroup(NamedTuple):
    """A group with its scores, one per completion; NaN and None mean that there is none.

    `ref_logps` are in nats, summed over the completion; `sources` has the rewards of each function
    whose (weighted) sum `rewards` is.
    """

    group: TokenGroup
    rewards: Sequence[float | None]
    ref_logps: Sequence[float]
    sources: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class SideCar:
    """Where scored data comes from; written as `scored.json`."""

    tokenizer_hash: str
    reference_hash: str
    rewards: Any
    limits: dict[str, Any]
    complete: bool
    counts: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def write_part(folder: epath.Path, index: int, groups: Sequence[ScoredGroup]) -> epath.Path:
    """Writes one part, at once or not at all, and returns its path.

    Raises:
        InputError: an infinite reward, or a reference log-probability that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"part-{index:05d}.parquet"
    part = folder / f".{path.name}.{os.getpid()}"
    table = pa.Table.from_pylist([_row(scored) for scored in groups], _SCHEMA)
    try:
        with part.open("wb") as file:
            pq.write_table(table, file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def finished_parts(folder: epath.Path) -> list[int]:
    """Returns the indices of the parts that are there, in order."""
    return sorted(int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.parquet"))


def write_side_car(folder: epath.Path, side_car: SideCar) -> None:
    """Writes the side-car, in place of an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SIDE_CAR, json.dumps(asdict(side_car), indent=2) + "\n")


def count_rewards(folder: epath.Path) -> dict[str, int]:
    """Returns how many completions the parts hold and how many have no reward."""
    total = absent = 0
    for path in sorted(folder.glob("part-*.parquet")):
        with path.open("rb") as file:
            column = pq.read_table(file, columns=["rewards"])["rewards"]
        rewards = column.combine_chunks().flatten()
        total, absent = total + len(rewards), absent + rewards.null_count
    return {"completions scored": total, "without a reward": absent}


def read_side_car(folder: epath.Path) -> SideCar:
    """Reads the side-car of a scored folder.

    Raises:
        InputError: none there, or not one of this format.
    """
    path = folder / SIDE_CAR
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}). Wanted a folder that the score "
            "stage wrote; run it first, or correct data.path."
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: malformed JSON: {error.msg}. Score again."
        ) from error
    names = {item.name for item in fields(SideCar)}
    if values.get("format") != FORMAT or set(values) != names:
        raise InputError(
            f"{path}: wanted scored data of format {FORMAT} with fields {sorted(names)}, got "
            f"format {values.get('format')} with fields {sorted(values)}. Score again with this "
            "version."
        )
    return SideCar(**values)


def verify(folder: epath.Path, *, tokenizer_hash: str, reference_hash: str) -> SideCar:
    """Returns the side-car of data that was scored, to its end, with this tokenizer and reference.

    Raises:
        InputError: another tokenizer, another reference model, or scoring was interrupted.
    """
    side_car = read_side_car(folder)
    path = folder / SIDE_CAR
    if not side_car.complete:
        raise InputError(
            f"{path}: scoring was interrupted after {len(finished_parts(folder))} parts. Run the "
            "same score command again to finish it."
        )
    for name, got in (("tokenizer_hash", tokenizer_hash), ("reference_hash", reference_hash)):
        wanted = getattr(side_car, name)
        if wanted != got:
            what = name.removesuffix("_hash").replace("reference", "reference model")
            raise InputError(
                f"{path}: field '{name}': the data was scored with the {what} {wanted}, but this "
                f"run has {got}. Train from the model that the data was scored with, or score "
                "again."
            )
    return side_car


def _row(scored: ScoredGroup) -> dict[str, Any]:
    group = scored.group
    count = len(group.completions)
    for name in ("rewards", "ref_logps"):
        if len(getattr(scored, name)) != count:
            raise InputError(
                f"{group.where}: got {len(getattr(scored, name))} {name} for {count} completions."
            )
    for index, value in enumerate(scored.ref_logps):
        if not math.isfinite(value):
            raise InputError(
                f"{group.where}: the reference log-probability of completion {index} is {value}. "
                "Check the reference model and its dtype."
            )
    return {
        "id": group.id,
        "prompt": group.prompt,
        "completions": group.completions,
        "rewards": _finite_or_none(group, scored.rewards, "reward"),
        "ref_logps": scored.ref_logps,
        "prompt_token_count": len(group.prompt_tokens),
        "completion_token_counts": [len(ids) for ids in group.completion_tokens],
        "sources": [
            (name, _finite_or_none(group, values, f"reward '{name}'"))
            for name, values in scored.sources.items()
        ],
        "columns": json.dumps(group.columns, default=str),
    }


def _finite_or_none(
    group: TokenGroup, values: Sequence[float | None], name: str
) -> list[float | None]:
    for index, value in enumerate(values):
        if value is not None and math.isinf(value):
            raise InputError(
                f"{group.where}: the {name} of completion {index} is {value}: wanted a finite "
                "number, or None or NaN to leave the completion out."
            )
    return [None if value is None or math.isnan(value) else float(value) for value in values]
