"""One file of a run's folder is damaged: the same command ends as it did, or names the file.

Every file × {deleted, emptied, halved, one byte flipped, 64 bytes zeroed}. What lasts longest is
done at checkpoints by opening and restoring them, elsewhere by the whole command.
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from copg_jax import checksums, sharding
from copg_jax.checksums import file_sum
from copg_jax.config.sections import DataConfig, Limits, MeshConfig, ModelConfig
from copg_jax.data import scored
from copg_jax.data.dataset import prepare
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import load_tokenizer, tokenizer_hash
from copg_jax.errors import InputError
from copg_jax.files import read_json_lines
from copg_jax.hf.card import CARD_NAME
from copg_jax.hf.pretrained import open_model
from copg_jax.train import exports
from copg_jax.train import run as training
from copg_jax.train.checkpoint import Checkpoints
from experiments import evaluate
from tests.toys import leaves
from tests.workplace import Workplace

LENGTH = "rewards=[{function: copg_jax.rewards.length}]"
SHORT = "rewards=[{function: copg_jax.rewards.length, weight: -1.0}]"  # best before the last step
CLOCKS = ("time", "perf/")
METRIC = "eval/reward_mean"
UNIQUE = ("metrics.jsonl", "versions.json")  # of a complete run
SAID = ("damaged", "deleted", "cannot be read")


def flipped(raw: bytes) -> bytes:
    """One bit, in the middle."""
    at = len(raw) // 2
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def zeroed(raw: bytes) -> bytes:
    """64 bytes in the middle, or fewer in a small file."""
    first = max(0, len(raw) // 2 - 32)
    part = raw[first : first + 64]
    return raw[:first] + bytes(len(part)) + raw[first + 64 :]


OPERATIONS: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda raw: None,
    "emptied": lambda raw: b"",
    "halved": lambda raw: raw[: len(raw) // 2],
    "flipped": flipped,
    "zeroed": zeroed,
}
QUICK = ("emptied", "flipped")
operations = pytest.mark.parametrize(
    "operation",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in OPERATIONS],
)


class Place:
    """Runs of `score`, `train_policy` and `evaluate`, and copies of their folders as they were."""

    def __init__(self, folder: Path) -> None:
        base = folder / "base"
        self.workplace, self.folder = Workplace(folder), folder
        self.more = {
            "score": [f"reference.path={base}", LENGTH],
            "policy": [f"model.path={base}", f"evaluation.{SHORT}"],
            "evaluate": [f"reference.path={base}", f"evaluation.{LENGTH}"],
        }
        for stage in self.more:
            self.run(stage)
            shutil.copytree(folder / stage, self.kept(stage))

    def kept(self, stage: str) -> Path:
        """The folder of a stage, as its run left it."""
        return self.folder / "kept" / stage

    def run(self, stage: str) -> None:
        """The stage's command."""
        self.workplace.run(stage, *self.more[stage])


def results(folder: Path, left_out: str = "") -> dict[str, Any]:
    """What a run leaves, without clocks."""
    found: dict[str, Any] = {}
    for path in files(folder):
        name = str(path.relative_to(folder))
        if name != left_out and not name.startswith("checkpoints"):
            found[name] = log_of(path) if name == "metrics.jsonl" else path.read_bytes()
    return found


def log_of(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl by step, without clocks."""
    rows = [row for _, row in read_json_lines(path) if isinstance(row, dict) and "step" in row]
    rows.sort(key=lambda row: row["step"])  # a part that is done again comes last
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def restore(kept: Path, folder: Path) -> None:
    """Makes a folder what it was."""
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)


def damages(kept: Path, folder: Path, operation: str, under: str = "") -> Iterator[str]:
    """Damages one file of `folder` after the other, yields its name, and makes the folder whole."""
    for original in files(kept / under):
        name = str(original.relative_to(kept))
        raw = OPERATIONS[operation](original.read_bytes())
        if raw is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(raw)
        yield name
        restore(kept, folder)


class Outcomes(dict[str, str]):
    """What came of each damage: "same", "named", or what went wrong."""

    def add(self, name: str, run: Callable[[], bool]) -> None:
        """Notes whether a run ends as it did, or names the file."""
        try:
            self[name] = "same" if run() else "SILENT"
        except InputError as error:
            self[name] = "named" if Path(name).name in str(error) else f"NOT NAMED: {error}"
        except Exception as error:
            self[name] = f"TRACEBACK: {type(error).__name__}: {error}"

    def verdict(self, label: str) -> dict[str, str]:
        """Those that went wrong; prints the counts."""
        wrong = {name: text for name, text in self.items() if text not in ("same", "named")}
        count = {kind: list(self.values()).count(kind) for kind in ("same", "named")}
        print(f"{label}: {len(self)} damages: {count}, wrong {len(wrong)}")
        return wrong


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("damage"))


@operations
@pytest.mark.parametrize("stage", ["score", "policy", "evaluate"])
def test_a_damaged_file_ends_in_the_same_run_or_is_named(place, stage, operation, capsys):
    kept, folder, outcomes = place.kept(stage), place.folder / stage, Outcomes()
    restore(kept, folder)
    for name in damages(kept, folder, operation):
        if name.startswith("checkpoints") or name.endswith(CARD_NAME):
            continue  # below; a card is for people, and theirs to change

        def run(name: str = name) -> bool:
            capsys.readouterr()
            place.run(stage)
            # These two cannot be made again; a warning says so. Lines of the log have no checksum.
            said = capsys.readouterr().err
            is_named = name in UNIQUE and any(f"{name}: {what}" in said for what in SAID)
            is_one_bit = name == "metrics.jsonl" and operation == "flipped"
            left_out = name if is_named or is_one_bit else ""
            return results(folder, left_out) == results(kept, left_out)

        outcomes.add(name, run)
    assert outcomes.verdict(f"{stage}, {operation}") == {}
    assert len(outcomes) >= 8


@pytest.fixture
def checkpoints(place, monkeypatch) -> Callable[[], Any]:
    """Gives the newest step of the policy's run, its arrays, and the parameters of the best one."""
    made: dict[str, Any] = {}
    prepare = training._prepare
    monkeypatch.setattr(training, "_prepare", lambda *of: made.setdefault("run", prepare(*of)))
    monkeypatch.setattr(training, "is_exported", lambda *of, **more: True)
    place.run("policy")
    run = made["run"]

    def read() -> Any:
        with Checkpoints(run.folder / "checkpoints", best_metric=METRIC) as opened:
            step, best = opened.latest_step, opened.best()
            state = opened.restore(step, run.shapes, run.shardings) if step else None
            params = best and opened.restore_params(best[0], run.shapes, run.shardings)
        return step, best, leaves(state), leaves(params)

    return read


@operations
@pytest.mark.parametrize("which", ["newest", "best"])
def test_no_damage_to_a_checkpoint_changes_a_bit(place, checkpoints, which, operation):
    kept, folder, outcomes = place.kept("policy"), place.folder / "policy", Outcomes()
    restore(kept, folder)
    newest, best, *wanted = checkpoints()
    assert best[0] == newest - 1  # whose own folder the two are
    (folder / "checkpoints" / str(newest)).rename(folder / "away")
    before, _, *arrays_before = checkpoints()
    restore(kept, folder)
    step = newest if which == "newest" else best[0]
    for name in damages(kept, folder, operation, f"checkpoints/{step}"):

        def read() -> bool:
            found, best_found, *arrays = checkpoints()
            if found == newest and (folder / "checkpoints" / f"damaged-{step}-0").exists():
                return same(arrays[:1], wanted[:1]) and best_found is None  # best/ is to be anew
            if found == newest:
                return same(arrays, wanted)
            # From the one before it, which is whole; the damaged one is out of the way.
            aside = folder / "checkpoints" / f"damaged-{newest}-0"
            return found == before and same(arrays, arrays_before) and aside.exists()

        outcomes.add(name, read)
    assert outcomes.verdict(f"{which} checkpoint, {operation}") == {}
    assert len(outcomes) >= 10


@operations
def test_no_stage_reads_a_damaged_model(place, operation):
    kept, folder, outcomes = place.kept("policy"), place.folder / "policy", Outcomes()
    restore(kept, folder)
    mesh = sharding.make_mesh(MeshConfig())

    def load() -> Any:
        model = open_model(ModelConfig(str(folder / "model"), dtype="float32"), mesh)
        return tokenizer_hash(model.tokenizer), leaves(model.load())

    hash_, wanted = load()
    for name in damages(kept, folder, operation, "model"):

        def read() -> bool:
            found, arrays = load()
            return found == hash_ and same(arrays, wanted)

        outcomes.add(name, read)
    assert outcomes.verdict(f"model, {operation}") == {}
    assert len(outcomes) >= 5


@operations
def test_no_stage_reads_damaged_scores(place, operation, tmp_path):
    kept, folder, outcomes = place.kept("score"), place.folder / "score", Outcomes()
    restore(kept, folder)
    tokenizer = load_tokenizer(place.folder / "base")

    def groups() -> Any:
        rows = GroupReader(DataConfig(path=str(folder)))
        path, limits = tmp_path / "groups.arrow", Limits(512, 512)
        dataset = prepare(rows, tokenizer, path=path, limits=limits, vocab_size=len(tokenizer))
        return [str(vars(group)) for group in dataset]

    wanted = groups()
    for name in damages(kept, folder, operation):
        if name.startswith(("part", "scored")):
            outcomes.add(name, lambda: groups() == wanted)
    assert outcomes.verdict(f"scored folder, {operation}") == {}
    assert set(outcomes.values()) == {"named"} and len(outcomes) == 3


def same(got: list[Any], wanted: list[Any]) -> bool:
    """Whether arrays are the same, bit for bit."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True))
    return all(np.array_equal(one, other) for one, other in pairs)


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_it_did(place):
    kept, folder = place.kept("policy"), place.folder / "policy"
    restore(kept, folder)
    arrays = max(files(folder / "checkpoints" / "3"), key=lambda path: path.stat().st_size)
    arrays.write_bytes(flipped(arrays.read_bytes()))
    place.run("policy")
    assert results(folder) == results(kept)
    restore(kept, folder)


@pytest.mark.parametrize("stage", ["score", "policy", "evaluate"])
def test_a_complete_run_keeps_what_says_how_it_was_made(place, stage):
    kept, folder = place.kept(stage), place.folder / stage
    restore(kept, folder)
    names = ("config.yaml", "versions.json", "inputs.json", "scored.json")
    there = [folder / name for name in names if (folder / name).exists()]
    before = [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in there]
    place.run(stage)
    assert before == [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in there]
    assert len(before) >= 3


def test_an_export_that_cannot_be_read_now_is_not_written_again(place, monkeypatch):
    restore(place.kept("policy"), place.folder / "policy")
    check = checksums.check

    def failing(folder: epath.Path, **more: Any) -> Any:
        if folder.name == "model":
            raise InputError("not now")
        return check(folder, **more)

    monkeypatch.setattr(checksums, "check", failing)
    monkeypatch.setattr(exports, "save_pretrained", None)
    with pytest.raises(InputError, match="not now"):
        place.run("policy")


@pytest.mark.parametrize("name", ["model/config.json", "best/model.safetensors"])
def test_a_file_of_no_bytes_completes_no_run(place, name):
    kept, folder = place.kept("policy"), place.folder / "policy"
    restore(kept, folder)
    (folder / name).write_bytes(b"")
    place.run("policy")
    assert (folder / name).read_bytes() == (kept / name).read_bytes()


@pytest.mark.parametrize(
    ("stage", "source", "text"),
    [
        ("policy", "base", "reference_hash"),  # of the data that it was scored with
        ("policy", "data/sft.jsonl", "another content of: evaluation.data "),
        ("policy", "score", "another content of: data, validation "),
        ("score", "data/comparisons.jsonl", "another content of: data "),
        ("score", "base", "another content of: reference "),
        ("evaluate", "policy/model", "another content of: model "),
        ("evaluate", "base", "another content of: reference "),
        ("evaluate", "data/sft.jsonl", "another content of: evaluation.data "),
    ],
)
def test_a_complete_run_is_not_complete_for_other_inputs(place, tmp_path, stage, source, text):
    own = place.folder / source
    restore(place.kept(stage), place.folder / stage)
    if source.split("/")[0] in place.more:
        restore(place.kept(source.split("/")[0]), place.folder / source.split("/")[0])
    own.rename(tmp_path / "own")
    try:
        exchange(tmp_path / "own", own)
        with pytest.raises(InputError, match=text):
            place.run(stage)
    finally:
        shutil.rmtree(own) if own.is_dir() else own.unlink()
        (tmp_path / "own").rename(own)


def exchange(own: Path, other: Path) -> None:
    """Makes a data set or model that is like `own`, and not the same."""
    if own.is_file():
        other.write_text("".join(own.read_text().splitlines(keepends=True)[1:]))
    elif (own / "scored.json").exists():
        shutil.copytree(own, other)
        side_car = scored.read_side_car(epath.Path(other))
        part = other / "part-00001.parquet"
        pq.write_table(pq.read_table(part).slice(1), part)
        parts = side_car.parts | {part.name: file_sum(part)}
        scored.write_side_car(epath.Path(other), dataclasses.replace(side_car, parts=parts))
    else:
        shutil.copytree(own, other)
        (other / "checksums.json").unlink()  # a model of the hub, say
        raw = bytearray((other / "model.safetensors").read_bytes())
        raw[-2] ^= 1
        (other / "model.safetensors").write_bytes(raw)


def test_an_ended_evaluation_has_a_line_for_what_it_has_generated(place, monkeypatch):
    kept, folder = place.kept("evaluate"), place.folder / "evaluate"
    shutil.rmtree(folder)
    write = evaluate.GrowingFile.write

    def ended(file: Any, lines: str) -> None:
        if "kl_k3" in lines and "eval/" not in lines:  # of generations, not of the log
            raise KeyboardInterrupt
        write(file, lines)

    monkeypatch.setattr(evaluate.GrowingFile, "write", ended)
    with pytest.raises(KeyboardInterrupt):
        place.run("evaluate")
    assert [row["step"] for row in log_of(folder / "metrics.jsonl")] == [5]
    monkeypatch.undo()
    place.run("evaluate")
    assert results(folder) == results(kept)
