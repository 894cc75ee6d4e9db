"""Runs of rounds that end before their time: the moments of a run, what a process leaves that is
killed there, and what differs in the end.
"""

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import pytest

from copg_jax import generation
from copg_jax.data import parts
from copg_jax.rewards.functions import WeightedRewards
from copg_jax.train import fresh
from copg_jax.train.checkpoint import Checkpoints
from copg_jax.train.online import ReportHook, RoundHook
from tests.runs import json_rows


class Watched:
    """Calls a function after each call of others, which are named."""

    def __init__(self, patch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
        self._patch, self._act = patch, act
        self._count: Counter[str] = Counter()

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Calls it with the label and the number of the call."""
        function = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            self._count[label] += 1
            self._act(f"{label} {self._count[label]}")
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
    watched.watch(Checkpoints, "_seal", "sealed a checkpoint, not named")  # in a thread of Orbax
    watched.watch(Checkpoints, "__exit__", "ended to save")


def kept_moments(
    run: Callable[[], Any],
    folder: Path,
    place: Path,
    *,
    before: Callable[[str], None] = lambda moment: None,
) -> dict[str, Path]:
    """What was on disk at each moment of a run: what a process leaves that is killed there.

    Args:
        run: runs it.
        folder: of the run.
        place: where the copies go.
        before: called with each moment before it is copied.
    """
    found: dict[str, Path] = {}
    one_at_a_time = threading.Lock()

    def keep(moment: str) -> None:
        before(moment)
        with one_at_a_time:
            copy = place / str(len(found))
            # A kill leaves one moment; a copy takes a while, in which another thread goes on.
            names: list[str] | None = None
            while names != (names := _files(folder)) or not copy.exists():
                shutil.rmtree(copy, ignore_errors=True)
                with suppress(shutil.Error, OSError):
                    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".lock*"))
            found[moment] = copy

    with pytest.MonkeyPatch.context() as patch:
        watch_all(patch, keep)
        run()
    return found


def _files(folder: Path) -> list[str]:
    """Names and sizes of all files, but for the lock."""
    with suppress(OSError):  # a save ends meanwhile
        found = [path for path in folder.rglob("*") if not path.name.startswith(".lock")]
        return sorted(f"{path} {path.stat().st_size}" for path in found)
    return []


def results(folder: Path) -> dict[str, bytes]:
    """By file, what no kill may change: weights, numbers without clocks, and all rounds."""
    wanted = ("*/*.safetensors", "rounds/**/*.parquet", "rounds/**/*.json")
    found = {path: path.read_bytes() for pattern in wanted for path in folder.glob(pattern)}
    for path in [folder / "metrics.jsonl", *folder.glob("rounds/**/metrics.jsonl")]:
        rows = [
            {name: value for name, value in row.items() if name != "time" and name[:5] != "perf/"}
            for row in sorted(json_rows(path), key=lambda row: row["step"])  # remade parts are last
        ]
        found[path] = json.dumps(rows).encode()
    return {str(path.relative_to(folder)): raw for path, raw in found.items()}


def differing_bits(got: Path, wanted: Path) -> dict[str, int]:
    """How many bits of the results of two runs differ, by the files in which any do."""
    ours, theirs = results(got), results(wanted)
    assert "model/model.safetensors" in theirs and len(theirs["metrics.jsonl"]) > 100
    found = {}
    for name in sorted(ours.keys() | theirs.keys()):
        pair = ours.get(name, b""), theirs.get(name, b"")
        size = max(map(len, pair))
        one, other = (int.from_bytes(raw.ljust(size, b"\0")) for raw in pair)
        missing = 8 * (size - min(map(len, pair)))
        if one != other or missing:
            found[name] = (one ^ other).bit_count() + missing
    return found


@contextmanager
def compilations_by_round() -> Iterator[Counter[int]]:
    """How many programs are compiled in the body, by the step at which the round began."""
    counts: Counter[int] = Counter()
    newest = [-1]
    begin = RoundHook.__call__

    def noted(self: RoundHook, step: int, state: Any) -> None:
        newest[0] = step
        begin(self, step, state)

    def count(event: str, duration_secs: float, **_: Any) -> None:
        counts[newest[0]] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RoundHook, "__call__", noted)
            yield counts
    finally:
        jax.monitoring.clear_event_listeners()


def wait_for(path: Path) -> None:
    """Until it is there: what is saved in the background."""
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.01)
