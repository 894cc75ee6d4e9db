"""Output folders that cannot be written or are in use, and runs whose folder was changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.bad_inputs.ground import (
    Act,
    Case,
    Ground,
    damage,
    edit_json,
    files,
    resumed,
    runs,
    write,
)

CONFIG, INPUTS = "run/config.yaml", "run/inputs.json"
LONG = "x" * 300


def output(name: str, path: str, *words: str, stage: str = "sft", make: Act | None = None) -> Case:
    """An output folder that cannot be one."""
    return Case(name, runs(stage, f"output_dir={path}", make=make), words or (path,))


def taken(name: str, is_folder: bool, stage: str = "sft") -> Case:
    """A name in the output folder that something of another kind has."""

    def make(ground: Ground, here: Path) -> None:
        if is_folder:
            write(here / "run" / name / "notes.txt", "mine")
        else:
            write(here / "run" / name, "mine")

    kind = "folder" if is_folder else "file"
    return Case(f"a {kind} named {name} where {stage} writes", runs(stage, make=make), (name,))


def linked(name: str, target: str, stage: str = "sft") -> Case:
    """A name in the output folder that is a link."""

    def make(ground: Ground, here: Path) -> None:
        (here / "run").mkdir()
        (here / "elsewhere").mkdir()
        (here / "run" / name).symlink_to(here / target)

    return Case(f"a link to {target} named {name}", runs(stage, make=make), (name,))


def overlap(name: str, stage: str, make: Act, *arguments: str) -> Case:
    """Inputs and outputs that coincide; the output folder is named."""
    return Case(name, runs(stage, *arguments, make=make), ("output_dir", "HERE"))


def copied(**names: str) -> Act:
    """Copies of good inputs of the ground under other names."""

    def make(ground: Ground, here: Path) -> None:
        for name, target in names.items():
            source, place = getattr(ground, name), here / target
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, place)

    return make


FOLDERS = [
    output("an output folder below a file", "HERE/file/run", "HERE/file", make=files(file="mine")),
    output("an output folder far below a file", "HERE/file/a/b", "HERE/file", stage="score",
           make=files(file="mine")),
    output("a file as the output folder", "HERE/file", make=files(file="mine"), stage="evaluate"),
    output("an output folder in /proc", "/proc/copg"),
    output("an output folder in /sys", "/sys/copg", stage="score"),
    output("an output folder below a device", "/dev/null/run", stage="evaluate"),
    output("an output folder with a long name", f"HERE/{LONG}", LONG[:50]),
    output("an output folder with a long name above", f"HERE/{LONG}/run", LONG[:50], stage="score"),
    output("a link to nothing as the output folder", "HERE/gone", stage="policy",
           make=lambda ground, here: (here / "gone").symlink_to(here / "nowhere" / "deep")),
    output("a link to itself as the output folder", "HERE/loop",
           make=lambda ground, here: (here / "loop").symlink_to(here / "loop")),
    output("an unknown kind of bucket", "nowhere://bucket/run", "nowhere://"),
    *(taken(name, is_folder=False) for name in ("model", "checkpoints", "tokens")),
    *(taken(name, is_folder=True) for name in ("model", "metrics.jsonl", "config.yaml")),
    taken("best", is_folder=False, stage="policy"),
    taken("inputs.json", is_folder=True, stage="reward"),
    taken("scored.json", is_folder=True, stage="score"),
    taken("part-00000.parquet", is_folder=True, stage="score"),
    taken("evaluation.json", is_folder=True, stage="evaluate"),
    taken("generations.jsonl", is_folder=True, stage="evaluate"),
    linked("model", "elsewhere"),
    linked("model", "nowhere"),
    linked("checkpoints", "nowhere/deep"),
]  # fmt: skip
POSTS = copied(posts="data/rows.jsonl")
OVERLAPS = [
    overlap("an output folder inside the data", "sft", POSTS,
            "data.path=HERE/data", "output_dir=HERE/data/run"),
    overlap("data inside the output folder", "sft", POSTS,
            "data.path=HERE/data/rows.jsonl", "output_dir=HERE/data"),
    overlap("a pattern inside the output folder", "sft", POSTS,
            "data.path=HERE/data/*.jsonl", "output_dir=HERE/data"),
    overlap("validation inside the output folder", "sft", POSTS,
            "validation.path=HERE/data/rows.jsonl", "output_dir=HERE/data"),
    overlap("the data itself as the output folder", "score", copied(scored="scored"),
            "data.path=HERE/scored", "output_dir=HERE/scored"),
    overlap("prompts inside the output folder", "evaluate", POSTS,
            "evaluation.data.path=HERE/data/rows.jsonl", "output_dir=HERE/data"),
    overlap("a model that the run would replace", "sft", copied(base="run/model"),
            "model.path=HERE/run/model", "output_dir=HERE/run"),
    overlap("the model itself as the output folder", "evaluate", copied(base="m"),
            "model.path=HERE/m", "output_dir=HERE/m"),
    overlap("an output folder inside the model", "policy", copied(base="m"),
            "model.path=HERE/m", "output_dir=HERE/m/run"),
    overlap("a reward model inside the output folder", "score", copied(reward_model="run/model"),
            "rewards=[{function: copg_jax.rewards.RewardModel, arguments: {path: HERE/run/model}}]",
            "output_dir=HERE/run"),
    overlap("data inside the output folder by another name", "sft",
            lambda ground, here: [POSTS(ground, here), (here / "name").symlink_to(here / "data")],
            "data.path=HERE/data", "output_dir=HERE/name/run"),
]  # fmt: skip


def changed(
    name: str, change: Callable[[Path], object], *words: str, more: tuple[str, ...] = ()
) -> Case:
    """The same command once more after something was exchanged."""
    return Case(name, resumed(change, "sft", *more), words)


def state(name: str, file: str, change: Callable[[bytes], bytes]) -> Case:
    """A file of the run with other bytes."""
    return Case(name, resumed(damage(file, change)), (Path(file).name,))


def one_row_less(old: bytes) -> bytes:
    """Data without its first row."""
    return old.partition(b"\n")[2]


def other_words(old: bytes) -> bytes:
    """Data of the same length with other words."""
    return old.replace(b"dog", b"cat")


def other_blanks(old: bytes) -> bytes:
    """A tokenizer that puts a blank in front of a text."""
    assert b'"add_prefix_space": false' in old
    return old.replace(b'"add_prefix_space": false', b'"add_prefix_space": true')


RUNS = [
    changed("a row less in the data of a finished run", damage("rows.jsonl", one_row_less), "data"),
    changed("other words in the data of a finished run", damage("rows.jsonl", other_words), "data"),
    changed("no data for a finished run", lambda here: (here / "rows.jsonl").unlink(), "rows."),
    changed("a finished run with another model",
            edit_json("model/config.json", rms_norm_eps=0.5), "model"),
    changed("a finished run with other weights",
            damage("model/model.safetensors", lambda old: old[:-4] + b"\0\0\0\0"), "model"),
    changed("a finished run with another tokenizer", damage("model/tokenizer.json", other_blanks),
            "run"),
    changed("a finished run with another seed", lambda here: None, "seed", more=("seed=7",)),
    changed("a finished run without validation", lambda here: None, "validation",
            more=("validation=null",)),
    state("an empty config.yaml", CONFIG, lambda old: b""),
    state("half a config.yaml", CONFIG, lambda old: old[: len(old) // 2]),
    state("a config.yaml that is a list", CONFIG, lambda old: b"[1, 2]\n"),
    state("a config.yaml that is a text", CONFIG, lambda old: b"seed\n"),
    state("a config.yaml that is no UTF-8", CONFIG, lambda old: old + b"\xff"),
    state("a config.yaml nested deep", CONFIG, lambda old: b"[" * 5000),
    state("a config.yaml with a list as a key", CONFIG, lambda old: b"? [a]\n: b\n" + old),
    state("an empty inputs.json", INPUTS, lambda old: b""),
    state("half an inputs.json", INPUTS, lambda old: old[: len(old) // 2]),
    state("an inputs.json that is a list", INPUTS, lambda old: b"[]"),
    state("an inputs.json that is null", INPUTS, lambda old: b"null"),
    state("an inputs.json that is no UTF-8", INPUTS, lambda old: b"\xff" + old),
    state("an inputs.json nested deep", INPUTS, lambda old: b"[" * 10_000),
    state("an inputs.json of another run", INPUTS, lambda old: old.replace(b"0", b"1")),
]  # fmt: skip

CASES = [*FOLDERS, *OVERLAPS, *RUNS]
