"""A run of rounds that was ended anywhere goes on to the bits of one that was not."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from copg_jax import generation, reuse
from copg_jax.data import parts
from copg_jax.rewards.functions import WeightedRewards
from copg_jax.train import fresh
from copg_jax.train.checkpoint import Checkpoints
from copg_jax.train.online import ReportHook, RoundHook
from tests.runs import json_rows
from tests.test_online import arguments
from tests.workplace import MAINS, Workplace

SETTINGS = ("replay_rounds=2", "steps_per_round=2", "training.save_every=3", "rounds=3")


class Watched:
    """Calls a function after each call of others, which are named."""

    def __init__(self, patch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
        self._patch, self._act = patch, act
        self._count: dict[str, int] = {}

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Calls it with the label and the number of the call."""
        function = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            number = self._count[label] = self._count.get(label, 0) + 1
            self._act(f"{label} {number}")
            return result

        self._patch.setattr(owner, name, watched)


def watch_all(patch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
    """Acts after what each phase of a round does."""
    watched = Watched(patch, act)
    watched.watch(generation.Completer, "__call__", "sampled a part, not written")
    watched.watch(parts, "write_rows", "wrote a part")
    watched.watch(WeightedRewards, "__call__", "judged a part")
    watched.watch(fresh.RoundMaker, "make", "made a round")
    watched.watch(RoundHook, "__next__", "fetched a batch")
    watched.watch(ReportHook, "__call__", "reported")
    watched.watch(Checkpoints, "save", "began to save")
    watched.watch(Checkpoints, "__exit__", "ended to save")


def results(folder: Path) -> tuple[bytes, list[dict[str, Any]], dict[str, bytes]]:
    """Weights, numbers without clocks, and the parts of all rounds."""
    rows = [
        {name: value for name, value in row.items() if name != "time" and name[:5] != "perf/"}
        for row in json_rows(folder / "metrics.jsonl")
    ]
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "rounds").rglob("part-*.parquet"))
    }
    return (folder / "model" / "model.safetensors").read_bytes(), rows, found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Workplace]:
    """A base model; runs share what they compile."""
    place = Workplace(tmp_path_factory.mktemp("resumed"))
    with reuse.shared_by_runs():
        yield place


def files(folder: Path) -> list[str]:
    """Names and sizes of all files, but for the lock."""
    with suppress(OSError):  # a save ends meanwhile
        found = [path for path in folder.rglob("*") if not path.name.startswith(".lock")]
        return sorted(f"{path} {path.stat().st_size}" for path in found)
    return []


@pytest.fixture(scope="module")
def moments(place) -> dict[str, Path]:
    """What was on disk at each moment of a run: what a process leaves that is killed there."""
    folder, found = place.folder / "whole", {}

    def keep(moment: str) -> None:
        copy = place.folder / "moments" / str(len(found))
        # A kill leaves one moment; a copy takes a while, in which a save goes on in the background.
        before: list[str] | None = None
        while before != (before := files(folder)) or not copy.exists():
            shutil.rmtree(copy, ignore_errors=True)
            with suppress(shutil.Error, OSError):
                shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".lock*"))
        found[moment] = copy

    with pytest.MonkeyPatch.context() as patch:
        watch_all(patch, keep)
        place.run("online", *arguments(place, "whole", *SETTINGS))
    return found


def check(place: Workplace, moments: dict[str, Path], chosen: list[str]) -> None:
    """Goes on from these moments."""
    wanted = results(place.folder / "whole")
    for moment in chosen:
        folder = moments[moment]
        place.run("online", *arguments(place, "x", *SETTINGS), f"output_dir={folder}")
        for got, own in zip(results(folder), wanted, strict=True):
            assert got == own, moment


CHOSEN = ["wrote a part 6", "judged a part 4", "fetched a batch 4", "began to save 1"]


def test_a_run_that_was_killed_in_any_phase_ends_with_the_bits_of_one_that_was_not(place, moments):
    check(place, moments, CHOSEN)


@pytest.mark.slow
def test_a_run_that_was_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(place, moments):
    others = [moment for moment in moments if moment not in CHOSEN]
    assert len(others) > 30
    check(place, moments, others[::4])


@pytest.mark.parametrize("moment", ["sampled a part, not written 4", "judged a part 3"])
def test_a_signal_while_a_round_is_made_saves_the_policy_and_goes_on(place, moments, moment):
    """Between two parts; the policy of the moment has no checkpoint of its own yet."""
    name = "left " + moment
    with pytest.MonkeyPatch.context() as patch:
        watch_all(
            patch, lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == moment else None
        )
        with pytest.raises(SystemExit) as caught:
            place.run("online", *arguments(place, name, *SETTINGS))
    assert caught.value.code == 143
    folder = place.folder / name
    assert (folder / "checkpoints" / "2").is_dir()
    place.run("online", *arguments(place, name, *SETTINGS))
    assert results(folder) == results(place.folder / "whole")


KILLED = """
import os, signal, sys
import pytest
from copg_jax.config.load import load_config
from tests.test_online_resumed import watch_all
from tests.workplace import MAINS

moment, *arguments = sys.argv[1:]
watch_all(pytest.MonkeyPatch(), lambda now: now == moment and os.kill(os.getpid(), signal.SIGKILL))
run, cls = MAINS["online"]
run(load_config(cls, arguments))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_saves_leaves_what_the_next_one_goes_on_with(
    place, moments
):
    assert moments and "online" in MAINS
    own = [*place.arguments("online"), *arguments(place, "killed", *SETTINGS)]
    command = [sys.executable, "-c", KILLED, "began to save 1", *own]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    ended = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    place.run("online", *arguments(place, "killed", *SETTINGS))
    assert results(place.folder / "killed") == results(place.folder / "whole")
