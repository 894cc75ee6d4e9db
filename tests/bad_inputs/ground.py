"""What a case of bad input starts from: a folder with good inputs, and the stages on them.

1. `Ground` makes the good inputs once; no case changes them.
2. A `Case` is one row of the matrix. What it does is a function of the ground and of an empty
   folder of its own, `here`; `settings`, `runs` and `rows` make most of them.
3. The `copy_*` and `edit_*` functions give a case its own model, scored data or run, with a fault.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from copg_jax import checksums
from copg_jax.checksums import file_sum, write_record
from copg_jax.config.load import load_config
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.hf import weights
from copg_jax.models.params import init_params
from tests.workplace import DATA, MAINS, TRAINING, Workplace

Act = Callable[["Ground", Path], object]
RELATIVE = ["model.path=./model", "data.path=rows.jsonl", "validation.path=rows.jsonl"]
LENGTH = "rewards=[{function: copg_jax.rewards.length}]"
NEEDED = {
    "score": ["output_dir=a", "reference.path=m", "data.path=d"],
    "evaluate": ["output_dir=a", "model.path=m", "evaluation.data.path=d"],
}
GOOD = {"prompt": "Say a.", "completion": "a"}
GOOD_PAIR = {"prompt": "Say a.", "chosen": "a", "rejected": "b"}


class Case(NamedTuple):
    """One row of the matrix.

    `words` stand in the message: the file, line or field at fault. `HERE` in one is the folder of
    the case.
    """

    name: str
    act: Act
    words: tuple[str, ...]


class Ground:
    """Good inputs: data, a base model, a reward model, scored data and a finished run of SFT."""

    def __init__(self, folder: Path) -> None:
        self.place = place = Workplace(folder)
        self.posts, self.comparisons = place.posts, place.comparisons
        self.base, self.scored = folder / "base", folder / "score"
        self.reward_model = folder / "reward"
        for stage in ("sft", "policy"):
            shutil.copytree(self.base, folder / stage / "model")
        arch = weights.read_architecture(self.base)
        params = init_params(arch, jax.random.key(1), head="score")
        tokenizer = load_tokenizer(self.base)
        weights.save_pretrained(self.reward_model, arch, params, head="score", tokenizer=tokenizer)
        place.run("score", LENGTH)
        # A run whose data and model a case can exchange, under the same names.
        self.finished = folder / "finished" / "run"
        shutil.copytree(self.base, folder / "finished" / "model")
        shutil.copy(self.posts, folder / "finished" / "rows.jsonl")
        with contextlib.chdir(folder / "finished"):
            self.run("sft", folder / "finished", *RELATIVE)

    def arguments(self, stage: str) -> list[str]:
        """A run of the stage that nothing is wrong with, without its folder."""
        evaluation = [
            f"evaluation.data.path={self.posts}",
            f"evaluation.{LENGTH}",
            *(f"evaluation.generation.{size}=4" for size in ("num_prompts", "max_new_tokens")),
        ]
        training = [f"model.path={self.base}", *TRAINING, "training.max_steps=1"]
        own = {
            "sft": [*training, f"data.path={self.posts}"],
            "reward": [*training, f"data.path={self.comparisons}"],
            "sample": [f"model.path={self.base}", f"data.path={self.posts}"],
            "score": [f"reference.path={self.base}", f"data.path={self.comparisons}", LENGTH],
            "policy": [*training, f"data.path={self.scored}"],
            "evaluate": [f"model.path={self.base}", *evaluation],
        }[stage]
        name = "reference" if stage == "score" else "model"
        return [f"{name}.dtype=float32", *own, *([] if stage == "evaluate" else DATA)]

    def run(self, stage: str, here: Path, *more: str) -> object:
        """Runs a stage into `here`/run."""
        main, cls = MAINS[stage]
        arguments = [*self.arguments(stage), f"output_dir={here / 'run'}"]
        return main(load_config(cls, [*arguments, *(x.replace("HERE", str(here)) for x in more)]))


def settings(
    stage: str, *arguments: str, make: Callable[["Ground", Path], object] | None = None
) -> Act:
    """Loads the config of a stage: HERE/run.yaml, where `make` makes it, and these arguments."""

    def act(ground: Ground, here: Path) -> object:
        if make is not None:
            make(ground, here)
        first = [str(path) for path in (here / "run.yaml",) if path.exists()]
        needed = NEEDED.get(stage, ["output_dir=a", "model.path=m", "data.path=d"])
        return load_config(MAINS[stage][1], [*first, *needed, *arguments])

    return act


def runs(stage: str, *arguments: str, make: Callable[[Ground, Path], object] | None = None) -> Act:
    """Runs a stage with these arguments, on what `make` has made; a dict of names to contents."""

    def act(ground: Ground, here: Path) -> object:
        if make is not None:
            make(ground, here)
        return ground.run(stage, here, *arguments)

    return act


def files(**contents: str | bytes) -> Act:
    """Writes files; `__` in a name is a dot, `___` a slash."""

    def act(ground: Ground, here: Path) -> None:
        for name, content in contents.items():
            write(here / name.replace("___", "/").replace("__", "."), content)

    return act


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def lines(*rows: Any) -> bytes:
    """JSON lines of objects; texts and bytes are lines as they are."""
    texts = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    return b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in texts)


def rows(stage: str, *given: Any, more: Sequence[str] = ()) -> Act:
    """Runs a stage on HERE/rows.jsonl with these rows."""
    make = files(rows__jsonl=lines(*given))
    return runs(stage, "data.path=HERE/rows.jsonl", "data.max_rows=null", *more, make=make)


def parquet(stage: str, *columns: tuple[str, Any]) -> Act:
    """Runs a stage on HERE/rows.parquet with these columns."""

    def make(ground: Ground, here: Path) -> None:
        names, arrays = zip(*columns, strict=True)
        pq.write_table(pa.Table.from_arrays(list(arrays), list(names)), here / "rows.parquet")

    return runs(stage, "data.path=HERE/rows.parquet", "data.max_rows=null", make=make)


# --- models ---


def model(change: Callable[[Path], object], stage: str = "sft", *, is_sealed: bool = False) -> Act:
    """Runs a stage on a copy of the base model, HERE/model, after a change of it.

    Unless `is_sealed`, the checksums go too, as they do where a user changes a model on purpose.
    """
    name = "reference" if stage == "score" else "model"

    def make(ground: Ground, here: Path) -> None:
        shutil.copytree(ground.base, here / "model")
        change(here / "model")
        if not is_sealed:
            unseal(here / "model")

    return runs(stage, f"{name}.path=HERE/model", make=make)


def unseal(folder: Path) -> None:
    """Removes the checksums of a model's folder."""
    (folder / checksums.NAME).unlink()


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Sets fields of a JSON file of a folder; a function gets the old value; `...` removes one."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        for field, value in changes.items():
            values[field] = value(values[field]) if callable(value) else value
        kept = {field: value for field, value in values.items() if value is not ...}
        write(folder / name, json.dumps(kept))

    return change


def edit_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes the tensors of a model folder."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def put(**contents: str | bytes) -> Callable[[Path], None]:
    """Writes files into a folder, named as those of `files`."""

    def change(folder: Path) -> None:
        files(**contents)(None, folder)  # pyright: ignore[reportArgumentType]

    return change


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Changes the bytes of a file of a folder."""

    def edit(folder: Path) -> None:
        write(folder / name, change((folder / name).read_bytes()))

    return edit


def all_of(changes: Iterable[Callable[[Path], object]]) -> Callable[[Path], None]:
    """Makes several changes of a folder."""

    def change(folder: Path) -> None:
        for one in list(changes):
            one(folder)

    return change


# --- scored data and runs ---


def scored(change: Callable[[Path], object], stage: str = "policy", *more: str) -> Act:
    """Trains on a copy of the scored data, HERE/scored, after a change of it."""

    def make(ground: Ground, here: Path) -> None:
        shutil.copytree(ground.scored, here / "scored")
        change(here / "scored")

    return runs(stage, "data.path=HERE/scored", *more, make=make)


def edit_part(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], part: int = 0
) -> Callable[[Path], None]:
    """Changes the rows of a part of scored data."""

    def edit(folder: Path) -> None:
        path = folder / f"part-{part:05d}.parquet"
        schema = pq.read_schema(path)
        pq.write_table(pa.Table.from_pylist(change(pq.read_table(path).to_pylist()), schema), path)

    return edit


def resealed(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A change of a folder, whose record of this name and checksums then fit it again."""

    def edit(folder: Path) -> None:
        change(folder)
        values = json.loads((folder / name).read_text())
        del values["checksum"]
        values["parts"] = {part: file_sum(folder / part) for part in values["parts"]}
        write_record(folder / name, values)

    return edit


def resumed(change: Callable[[Path], object], stage: str = "sft", *more: str) -> Act:
    """Repeats the finished run of SFT in `here` after a change of its model, data or folder."""

    def act(ground: Ground, here: Path) -> object:
        for name in ("model", "run"):
            shutil.copytree(ground.finished.with_name(name), here / name)
        shutil.copy(ground.finished.with_name("rows.jsonl"), here)
        change(here)
        with contextlib.chdir(here):
            return ground.run(stage, here, *RELATIVE, *more)

    return act
