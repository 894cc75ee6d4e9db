"""A run of rounds that was ended anywhere goes on to the bits of one that was not."""

import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from etils import epath

from copg_jax import reuse
from copg_jax.files import GrowingFile
from tests.interrupted import differing_bits, kept_moments, wait_for, watch_all
from tests.test_damage import flipped
from tests.test_disk import full
from tests.test_online import arguments
from tests.toys import names_all
from tests.workplace import MAINS, Workplace

SETTINGS = ("replay_rounds=2", "steps_per_round=2", "training.save_every=3", "rounds=3")

# Of three rounds with two parts of samples and two of scores each; saved at steps 3 and 6.
PHASES = {
    "sampling": ["wrote a part 6", "sampled a part, not written 3"],
    "scoring": ["judged a part 4", "wrote a part 7"],
    "training": ["fetched a batch 4", "reported 2"],
    "saving": ["sealed a checkpoint, not named 1", "began to save 1"],
}
LATER = "made a round 3"  # with the checkpoint of step 3, whose round trains on that before it


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Workplace]:
    """A base model; runs share what they compile."""
    place = Workplace(tmp_path_factory.mktemp("resumed"))
    with reuse.shared_by_runs():
        yield place


@pytest.fixture(scope="module")
def moments(place) -> dict[str, Path]:
    """What a process leaves that is killed at a moment of a run, by moment."""
    folder = place.folder / "whole"
    saved = lambda now: wait_for(folder / "checkpoints" / "3") if now == LATER else None
    run = lambda: place.run("online", *arguments(place, "whole", *SETTINGS))
    found = kept_moments(run, folder, place.folder / "moments", before=saved)
    half = found[PHASES["saving"][0]] / "checkpoints"
    assert {path.name.partition(".")[0] for path in half.iterdir()} == {"3"}
    assert not (half / "3").exists()
    return found


def go_on(place: Workplace, folder: Path) -> dict[str, int]:
    """Goes on in a folder; by file, how many bits differ in the end."""
    place.run("online", *arguments(place, "x", *SETTINGS), f"output_dir={folder}")
    return differing_bits(folder, place.folder / "whole")


def check(place: Workplace, folders: list[Path], phase: str) -> None:
    """Goes on in these folders, and prints and compares what differs in the end."""
    found = [go_on(place, folder) for folder in folders]
    bits = sum(sum(by_file.values()) for by_file in found)
    print(f"killed while {phase}: {len(found)} kills, {bits} bits differ")
    assert found == [{}] * len(folders)


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(place, moments, phase):
    check(place, [moments[PHASES[phase][0]]], phase)


@pytest.mark.slow
def test_a_run_that_was_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(place, moments):
    chosen = {LATER, *(moment for moment, *_ in PHASES.values())}
    others = [folder for moment, folder in moments.items() if moment not in chosen]
    assert len(others) > 30
    check(place, others[::4], "anything")


def left(place: Workplace, name: str, moment: str) -> Path:
    """The folder of a run that a signal has ended at a moment."""
    end = lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == moment else None
    with pytest.MonkeyPatch.context() as patch:
        watch_all(patch, end)
        with pytest.raises(SystemExit) as caught:
            place.run("online", *arguments(place, name, *SETTINGS))
    assert caught.value.code == 143
    return place.folder / name


@pytest.mark.parametrize("moment", ["sampled a part, not written 4", "judged a part 3"])
def test_a_signal_while_a_round_is_made_saves_the_policy_and_goes_on(place, moments, moment):
    """Between two parts; the policy of the moment has no checkpoint of its own yet."""
    assert moments
    folder = left(place, "left " + moment, moment)
    assert (folder / "checkpoints" / "2").is_dir()
    assert go_on(place, folder) == {}


def test_rounds_after_the_newest_checkpoint_are_removed_and_made_again(place, moments):
    folder = copied(moments, "marked")
    marks = [folder / "rounds" / f"{number:05d}" / "mark" for number in range(3)]
    for mark in marks:
        mark.touch()
    assert go_on(place, folder) == {}
    assert [mark.exists() for mark in marks] == [True, True, False]


def copied(moments: dict[str, Path], name: str) -> Path:
    """A copy of what was on disk in the third round, after the checkpoint of the second."""
    found = moments[LATER].parent / name
    shutil.copytree(moments[LATER], found)
    return found


def change(path: Path) -> None:
    """Flips a bit in the middle."""
    path.write_bytes(flipped(path.read_bytes()))


DAMAGES = {
    "a part is changed": (change, "scored/part-00001.parquet"),
    "a part is gone": (Path.unlink, "scored/part-00000.parquet"),
    "the record is changed": (change, "scored/scored.json"),
    "the record is gone": (Path.unlink, "scored/scored.json"),
    "the round is gone": (shutil.rmtree, ""),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_round_that_a_resumed_run_trains_on_is_refused_with_a_way_out(
    place, moments, case
):
    folder, (damage, name) = copied(moments, case), DAMAGES[case]
    path = folder / "rounds" / "00000" / name
    damage(path)
    own = arguments(place, "x", *SETTINGS)
    text = place.refusal("online", *own, f"output_dir={folder}")
    checkpoints = folder / "checkpoints"
    file = path if name else path / "scored" / "scored.json"
    names_all(text, [f"{file}: ", "Fix: restore", f"delete {checkpoints}", "begins anew"])
    assert text.count("Fix") == 1
    if case == "a part is changed":
        shutil.rmtree(checkpoints)
        assert go_on(place, folder) == {}


def test_a_damaged_round_that_no_step_needs_does_no_harm(place, moments, capsys):
    """A round that has left the window, and a part of the one that is being made."""
    assert moments
    folder = left(place, "damaged", "judged a part 5")
    assert (folder / "checkpoints" / "4").is_dir()
    gone, again = (
        "rounds/00000/scored/part-00000.parquet",
        "rounds/00002/samples/part-00000.parquet",
    )
    change(folder / gone)
    change(folder / again)
    capsys.readouterr()
    assert go_on(place, folder) == {gone: 1}
    names_all(capsys.readouterr().err, [f"{folder / again}: damaged", "made again"])


def test_old_rounds_are_removed_but_none_that_a_resumed_run_needs(place):
    own = arguments(place, "few", "steps_per_round=2", "training.save_every=3", "keep_rounds=1")
    folder = place.folder / "few"
    moments = kept_moments(lambda: place.run("online", *own), folder, place.folder / "of_few")
    rounds = lambda folder: sorted(path.name for path in folder.glob("rounds/*"))
    # Those of the checkpoints of steps 6 and 8, and of step 3 when the last round was made.
    assert rounds(folder) == ["00001", "00002", "00003"]
    assert rounds(moments["fetched a batch 5"]) == ["00001", "00002"]
    for moment, at in moments.items():
        steps = [int(path.name) for path in at.glob("checkpoints/*") if path.name.isdigit()]
        needed = {f"{step // 2:05d}" for step in sorted(steps)[-2:] if step % 2}
        assert needed <= set(rounds(at)), moment
    at = moments["fetched a batch 7"]
    shutil.rmtree(at / "checkpoints" / "6", ignore_errors=True)
    place.run("online", *own, f"output_dir={at}")
    assert differing_bits(at, folder) == {}


def write_nowhere(file: GrowingFile, lines: str) -> None:
    """As on a full disk, which also refuses what was left when the file is closed."""
    assert file._file is not None
    if file._file.name != "/dev/full":
        file._file.close()
        file._file = epath.Path("/dev/full").open("a")  # closed with the log
    file._file.write(lines)
    file._file.flush()


# By what the disk has no room for: the function that writes it, what it does then, and the call.
FULL = {
    "samples": ("pyarrow.parquet.write_table", full, 5),
    "scores": ("pyarrow.parquet.write_table", full, 7),
    "a record": ("copg_jax.data.scored.write_record", full, 4),
    "a checkpoint": ("copg_jax.checksums.seal", full, 1),
    "a line of the log": ("copg_jax.files.GrowingFile.write", write_nowhere, 12),
}
often = ("scores", "a checkpoint", "a line of the log")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in often else pytest.mark.slow) for case in FULL]
)
def test_a_disk_that_is_full_in_a_round_is_one_error_and_room_lets_the_run_go_on(
    place, moments, monkeypatch, case
):
    assert moments
    name, refuse, first = FULL[case]
    function, calls = pkgutil.resolve_name(name), count(1)
    write = lambda *args, **more: (refuse if next(calls) >= first else function)(*args, **more)
    own = arguments(place, "full " + case, *SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(name, write)
        text = place.refusal("online", *own)
    names_all(text, ["No space left on device", "Fix: free some space", "the same command again"])
    assert "\n" not in text and next(calls) > first
    assert go_on(place, place.folder / ("full " + case)) == {}


KILLED = """
import os, signal, sys
import pytest
from copg_jax.config.load import load_config
from tests.interrupted import watch_all
from tests.workplace import MAINS

moment, *arguments = sys.argv[1:]
watch_all(pytest.MonkeyPatch(), lambda now: now == moment and os.kill(os.getpid(), signal.SIGKILL))
run, cls = MAINS["online"]
run(load_config(cls, arguments))
"""


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_with(place, moments, phase):
    """By the system, at once; while it saves, a thread is at it."""
    assert moments and "online" in MAINS
    root, folders = Path(__file__).parents[1], []
    for at, moment in enumerate(PHASES[phase]):
        own = arguments(place, f"killed {phase} {at}", *SETTINGS)
        command = [sys.executable, "-c", KILLED, moment, *place.arguments("online"), *own]
        environment = os.environ | {"PYTHONPATH": str(root)}
        ended = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        folders.append(place.folder / f"killed {phase} {at}")
    check(place, folders, phase)
