"""The folder of scored data: `part-00000.parquet`, ..., of `scored_rows`, and `scored.json`.

1. `write_part` writes groups, see `parts`.
2. `write_side_car` says beside them, in `scored.json`, what decides these numbers, and the checksum
   of each part: `whole_parts` are finished, and an interrupted run goes on with the others.
3. `verify` refuses data of another tokenizer, text format, reference or dtype, or half-scored data;
   `check_parts` refuses parts that are not as they were written.
"""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow.parquet as pq
from etils import epath

from copg_jax.checksums import read_object, read_record, write_record
from copg_jax.data import parts
from copg_jax.data.scored_rows import FORMAT, ScoredGroup, make_row
from copg_jax.data.sources import SIDE_CAR
from copg_jax.errors import InputError
from copg_jax.files import bucket_errors

_DROPPED = b"copg_jax.dropped"  # in the metadata of a part


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
        key: what decides the parts of this folder, see `parts.find_whole`.
        dropped: how many rewards are missing, by function and reason.

    Raises:
        InputError: other numbers of ids and scores than completions, an infinite reward, or a
            reference log-probability that is not finite or that is positive.
    """
    counts = json.dumps(dict(dropped or {})).encode()
    rows = [make_row(scored) for scored in groups]
    return parts.write_rows(folder, index, rows, key, {_DROPPED: counts})


def whole_parts(folder: epath.Path, key: str) -> dict[str, str]:
    """`parts.find_whole` of a scored folder, finished or not.

    Raises:
        InputError: the side-car or a part cannot be read.
    """
    named = read_side_car(folder).parts if is_scored(str(folder)) else {}
    return parts.find_whole(folder, named, key)


def check_parts(folder: epath.PathLike, side_car: SideCar, *, fix: str = "") -> None:
    """Raises InputError unless the parts are those that the side-car names, as they were written.

    Args:
        folder: the scored folder.
        side_car: from `verify`.
        fix: the way out; without one, the command that wrote them.
    """
    fix = fix or "Fix: run the same score command again, which does this part alone anew."
    parts.check_named(epath.Path(folder), side_car.parts, SIDE_CAR, fix=fix)


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
    named = dict(sorted(side_car.parts.items()))
    write_record(folder / SIDE_CAR, asdict(side_car) | {"parts": named})


def read_side_car(folder: epath.Path, *, fix: str = "") -> SideCar:
    """Reads the side-car of a scored folder.

    Args:
        folder: the scored folder.
        fix: the way out of one that is damaged; without one, the command that wrote it.

    Raises:
        InputError: none there, damaged, or not one of this format.
    """
    path = folder / SIDE_CAR
    fix = fix or (
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
