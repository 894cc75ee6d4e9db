"""Scored data that was changed, cut or mixed up after it was written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs.ground import (
    LENGTH,
    Act,
    Case,
    Ground,
    damage,
    edit_json,
    edit_part,
    resealed,
    runs,
    scored,
)

SIDE_CAR, PART, LAST = "scored.json", "part-00000.parquet", "part-00001.parquet"
Rows = list[dict[str, Any]]


def field(name: str, value: Any) -> Case:
    """A field of the side-car with another value; `...` takes it away."""
    shown = "missing" if value is ... else json.dumps(value)
    act = scored(edit_json(SIDE_CAR, **{name: value}))
    return Case(f"{name} of the side-car {shown}", act, (SIDE_CAR,))


def side_car(name: str, change: Callable[[bytes], bytes]) -> Case:
    """A side-car that nobody wrote so, for training and for who goes on scoring."""
    return Case(name, scored(damage(SIDE_CAR, change)), (SIDE_CAR,))


def part(name: str, change: Callable[[Rows], Rows], *words: str) -> Case:
    """A part with other rows."""
    return Case(name, scored(edit_part(change)), words or (PART,))


def file(name: str, change: Callable[[Path], object], *words: str) -> Case:
    """Other files in the folder."""
    return Case(name, scored(change), words)


def row(name: str, column: str, value: Any) -> Case:
    """The second row of a part with another value; a function gets the old one."""

    def change(rows: Rows) -> Rows:
        rows[1][column] = value(rows[1][column]) if callable(value) else value
        return rows

    return part(name, change)


def rolled(column: str) -> Callable[[Rows], Rows]:
    """A column whose values have moved by a row."""

    def change(rows: Rows) -> Rows:
        values = [row[column] for row in rows]
        return [row | {column: values[i - 1]} for i, row in enumerate(rows)]

    return change


def swapped(rows: Rows) -> Rows:
    """The numbers of the two completions of each row, exchanged."""
    return [row | {"reward": row["reward"][::-1]} for row in rows]


def flipped(position: float) -> Callable[[bytes], bytes]:
    """A bit that is another."""

    def change(old: bytes) -> bytes:
        new = bytearray(old)
        new[int(position * len(new))] ^= 4
        return bytes(new)

    return change


def again(change: Callable[[Path], object]) -> Act:
    """Goes on with scoring in a folder, after a change of it."""

    def act(ground: Ground, here: Path) -> object:
        shutil.copytree(ground.scored, here / "run")
        change(here / "run")
        return ground.place.run("score", LENGTH, f"output_dir={here / 'run'}")

    return act


def pooled(name: str, change: Callable[[Path], object], *words: str, more: str = "seed=0") -> Case:
    """Two sources of a pool, the second with a fault."""

    def make(ground: Ground, here: Path) -> None:
        for folder in ("first", "second"):
            shutil.copytree(ground.scored, here / folder)
        change(here / "second")

    sources = "data.sources=[{path: HERE/first}, {path: HERE/second}]"
    return Case(name, runs("policy", "data.path=null", sources, more, make=make), words)


def other(name: str) -> Case:
    """A pool whose second source was scored with another thing of this name."""
    change = edit_json(SIDE_CAR, **{name: "bfloat16" if name == "reference_dtype" else "other"})
    change = resealed(SIDE_CAR, change)
    return pooled(f"a pool with another {name}", change, f"second/{SIDE_CAR}", name)


def one_completion(rows: Rows) -> Rows:
    """Groups of which only the first completion is left."""
    lists = [name for name, value in rows[0].items() if isinstance(value, list)]
    lists = [name for name in lists if name not in ("prompt_token_ids", "rewards")]
    cut = [{name: row[name][:1] for name in lists if row[name]} for row in rows]
    return [row | own for row, own in zip(rows, cut, strict=True)]


def alone(folder: Path) -> None:
    """Both parts have such groups alone."""
    for part in (0, 1):
        edit_part(one_completion, part)(folder)


OLD_PART = lambda folder: shutil.copy(folder / PART, folder / "part-old.parquet")
FIELDS = [
    field("format", 99),
    field("format", "2"),
    field("format", None),
    field("format", True),
    field("tokenizer_hash", "other"),
    field("tokenizer_hash", None),
    field("reference_hash", "other"),
    field("reference_hash", 3),
    field("reference_dtype", "bfloat16"),
    field("reference_dtype", ["float32"]),
    field("complete", "yes"),
    field("complete", 1),
    field("counts", [24]),
    field("counts", None),
    field("counts", {}),
    field("limits", [512, 192]),
    field("limits", {"max_prompt_tokens": "many"}),
    field("rewards", {}),
    field("rewards", "length"),
    field("rewards", ...),
    field("reference_dtype", ...),
    field("unknown", 1),
]
SIDE_CARS = [
    side_car("a side-car that is a list", lambda old: b"[]"),
    side_car("a side-car that is a text", lambda old: b'"scored"'),
    side_car("a side-car that is null", lambda old: b"null"),
    side_car("a side-car that is a number", lambda old: b"2"),
    side_car("an empty side-car", lambda old: b""),
    side_car("half a side-car", lambda old: old[: len(old) // 2]),
    side_car("a side-car that is no UTF-8", lambda old: old.replace(b"length", b"l\xe9ngth")),
    side_car("a side-car nested deep", lambda old: b"[" * 10_000),
    side_car("a side-car with 5,000 digits", lambda old: b'{"format": ' + b"9" * 5000 + b"}"),
]
PARTS = [
    part("half the rows of a part", lambda rows: rows[: len(rows) // 2], "scored"),
    part("a row twice", lambda rows: [*rows, rows[0]], "scored"),
    part("no row at all", lambda rows: [], "scored"),
    part("rows in another order", lambda rows: rows[::-1], "scored"),
    *(
        part(f"{column} of the row above", rolled(column), "scored")
        for column in ("ref_logp", "reward", "prompt_token_ids", "completion_token_ids")
    ),
    part("rewards of the other completion", swapped, "scored"),
    file("a part that is missing", lambda folder: (folder / LAST).unlink(), "scored"),
    file("a part twice", lambda folder: shutil.copy(folder / PART, folder / "part-00002.parquet"),
         "scored"),
    file("no part at all", lambda folder: [x.unlink() for x in folder.glob("part-*")], "scored"),
    file("a part of another name", OLD_PART, "part-old.parquet"),
    file("a part whose number is short",
         lambda folder: (folder / LAST).rename(folder / "part-1.parquet"), "part-"),
    file("an empty part", damage(PART, lambda old: b""), PART),
    file("half a part", damage(PART, lambda old: old[: len(old) // 2]), PART),
    file("a part that is text", damage(PART, lambda old: b"prompt,reward\n"), PART),
    *(
        file(f"a bit that is another at {place:.0%}", damage(PART, flipped(place)), PART)
        for place in (0.1, 0.3, 0.5, 0.7, 0.9)
    ),
    file("64 zeros in a part", damage(PART, lambda old: old[:500] + bytes(64) + old[564:]), PART),
    file("a part that is a folder",
         lambda folder: [(folder / PART).unlink(), (folder / PART).mkdir()], PART),
]  # fmt: skip
ROWS = [
    row("a probability over 1", "ref_logp", lambda old: [1e6, *old[1:]]),
    row("a probability a little over 1", "ref_logp", lambda old: [*old[:-1], 5.0]),
    row("ln π_ref of no number", "ref_logp", lambda old: [float("nan"), *old[1:]]),
    row("an infinite reward", "reward", lambda old: [float("inf"), *old[1:]]),
    row("rewards whose difference is infinite", "reward", [3e38, -3e38]),
    row("columns that are a list", "columns", "[1]"),
    row("columns that are half a JSON", "columns", '{"a": '),
    row("columns nested deep", "columns", "[" * 10_000),
    row("an id below zero", "prompt_token_ids", [-1]),
    row("an id beyond the vocabulary", "completion_token_ids", [[5000], [1]]),
    row("fewer texts than ids", "completions", ["a"]),
    row("a null in place of ids", "prompt_token_ids", None),
    row("a null among texts", "completions", [None, "a"]),
    row("a text that is null", "prompt", None),
]
OTHERS = [
    Case("a list as a side-car, and more to score", again(damage(SIDE_CAR, lambda old: b"[]")),
         (SIDE_CAR,)),
    Case("bytes as a side-car, and more to score", again(damage(SIDE_CAR, lambda old: b"\xff\xfe")),
         (SIDE_CAR,)),
    Case("a side-car as the data", runs("policy", "data.path=HERE/scored.json",
         make=lambda ground, here: shutil.copy(ground.scored / SIDE_CAR, here)), (SIDE_CAR,)),
]  # fmt: skip

POOLS = [
    *map(other, ("tokenizer_hash", "text_format_hash", "reference_hash", "reference_dtype")),
    pooled("a pool with a folder that is not scored", lambda folder: (folder / SIDE_CAR).unlink(),
           "second"),
    pooled("a pool with a half-scored folder",
           resealed(SIDE_CAR, edit_json(SIDE_CAR, complete=False)),
           f"second/{SIDE_CAR}", "interrupted"),
    pooled("pairs across the origins of a pool that has one", lambda folder: None, "pairs=cross",
           "origin", more="loss.pairs=cross"),
    Case("a pool whose glob matches nothing", runs("policy", "data.path=null",
         "data.sources=[{path: HERE/round-*}]"), ("round-*", "matches nothing")),
    Case("one completion for a loss of pairs",
         scored(resealed(SIDE_CAR, alone)), ("2 or more completions",)),
]  # fmt: skip

CASES = [*FIELDS, *SIDE_CARS, *PARTS, *ROWS, *POOLS, *OTHERS]
