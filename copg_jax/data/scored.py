"""The folder of scored data: `part-00000.parquet`, ..., of `scored_rows`, and `scored.json`.

1. `write_part` writes groups.
2. `write_side_car` says beside them, in `scored.json`, what decides these numbers, and the checksum
   of each part: `whole_parts` are finished, and an interrupted run goes on with the others. A part
   also tells by itself what it is of and whether it is whole, should `scored.json` be lost.
3. `verify` refuses data of another tokenizer, text format, reference or dtype, or half-scored data;
   `check_parts` refuses parts that are not as they were written.
"""

import json
import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from copg_jax.checksums import check_file, file_sum, read_object, read_record, write_record
from copg_jax.data.scored_rows import FORMAT, SCHEMA, ScoredGroup, make_row
from copg_jax.data.sources import SIDE_CAR
from copg_jax.errors import Damaged, InputError
from copg_jax.files import bucket_errors

log = logging.getLogger(__name__)

# In the metadata of a part.
_KEY = b"copg_jax.key"
_DROPPED = b"copg_jax.dropped"


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


def write_part(
    folder: epath.Path,
    index: int,
    groups: Sequence[ScoredGroup],
    key: str,
    dropped: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Writes one part, at once or not at all, and returns its name with its checksum.

    Args:
        folder: the scored folder.
        index: of the part.
        groups: what it holds.
        key: what decides the parts of this folder, see `whole_parts`.
        dropped: how many rewards are missing, by function and reason.

    Raises:
        InputError: other numbers of ids and scores than completions, an infinite reward, or a
            reference log-probability that is not finite or that is positive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".part-*"):
        left.unlink()  # of a process that was ended
    path = folder / part_name(index)
    part = folder / f".{path.name}.tmp"
    counts = json.dumps(dict(dropped or {})).encode()
    schema = SCHEMA.with_metadata({_KEY: _own_key(path, key), _DROPPED: counts})
    table = pa.Table.from_pylist([make_row(scored) for scored in groups], schema)
    try:
        with part.open("wb") as file:
            pq.write_table(table, file, write_page_checksum=True)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return {path.name: file_sum(path)}


def whole_parts(folder: epath.Path, key: str) -> dict[str, str]:
    """Returns names and checksums of the parts of a scored folder, finished or not, that are as
    they were written; names the others in the log, since they are to be scored again.

    Args:
        folder: the scored folder; need not exist.
        key: what decides its parts, and which rows are in which. A part that the side-car does not
            name was written with the same one.

    Raises:
        InputError: the side-car or a part cannot be read.
    """
    named = read_side_car(folder).parts if is_scored(str(folder)) else {}
    whole = {}
    for name, wanted in named.items():
        try:
            check_file(folder / name, wanted, fix="It is scored again.")
        except Damaged as error:
            log.warning("%s", error)
        else:
            whole[name] = wanted
    with bucket_errors(folder):
        others = [p for p in sorted(folder.glob("part-*.parquet")) if p.name not in named]
        return whole | {path.name: file_sum(path) for path in others if _is_whole(path, key)}


def _own_key(path: epath.Path, key: str) -> bytes:
    return f"{path.name} of {key}".encode()


def _is_whole(path: epath.Path, key: str) -> bool:
    """Whether a part is of this key, and all of its pages fit their checksums."""
    raw = pa.BufferReader(path.read_bytes())
    try:
        schema = pq.read_table(raw, page_checksum_verification=True).schema
    except (OSError, pa.ArrowException):
        return False
    return schema.equals(SCHEMA) and (schema.metadata or {}).get(_KEY) == _own_key(path, key)


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


def count_dropped(folder: epath.Path) -> dict[str, int]:
    """Returns how many rewards of all parts are missing, by function and reason."""
    total: Counter[str] = Counter()
    for path in folder.glob("part-*.parquet"):
        with path.open("rb") as file:
            metadata = pq.read_schema(file).metadata or {}
        total.update(json.loads(metadata.get(_DROPPED, b"{}")))
    return dict(sorted(total.items()))


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
    missing = ", ".join(sorted(names - values.keys()))
    if values.get("format") != FORMAT or missing:
        got = f"format {values.get('format')}"
        got += f" of an earlier version of copg_jax, without {missing}" if missing else ""
        raise InputError(
            f"{path}: wanted scored data of format {FORMAT}, got {got}. Score again:\n"
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
