"""What a disk refuses becomes one sentence, whoever was writing; too little room is said early."""

import errno
import logging
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from copg_jax import disk, inputs
from copg_jax.config.sections import DataConfig
from copg_jax.data import scored
from copg_jax.disk import disk_errors
from copg_jax.errors import InputError
from copg_jax.files import GrowingFile, write_text
from tests.toys import names_all
from tests.workplace import Workplace

FULL = "RESOURCE_EXHAUSTED: Error writing local file: [OS error 28: ENOSPC No space left on device]"


def said(folder: Path, error: BaseException) -> str:
    """What becomes of an error in a run."""
    with pytest.raises(InputError) as caught, disk_errors(folder):
        raise error
    return str(caught.value)


def of(cause: BaseException, error: Exception, attribute: str = "__cause__") -> Exception:
    """An error that came of another one."""
    setattr(error, attribute, cause)
    return error


def by_library(error: Exception, name: str = "orbax.checkpoint") -> Exception:
    """An error that a library has raised."""
    try:
        exec("raise error", {"__name__": name, "error": error})
    except Exception as raised:
        return raised
    raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), ["No space left", "free some space"]),
        (OSError(errno.EDQUOT, "x"), [os.strerror(errno.EDQUOT), "quota raised"]),
        (OSError(errno.EROFS, "x"), ["Read-only file system", "writable again"]),
        (OSError(errno.EIO, "x"), ["Input/output error", "dmesg"]),
        (by_library(ValueError(FULL)), ["No space left"]),  # TensorStore
        (
            by_library(RuntimeError("I/O error: Read-only file system"), "pyarrow.lib"),
            ["Read-only"],
        ),
        (of(by_library(ValueError(FULL)), RuntimeError("save failed")), ["No space left"]),
        (
            by_library(of(OSError(errno.EIO, "x"), KeyError("a"), "__context__")),
            ["Input/output error"],
        ),
    ],
)
def test_what_a_disk_says_through_any_library_is_one_sentence(tmp_path, error, words):
    text = said(tmp_path, error)
    names_all(text, [f"free at {tmp_path})", "Nothing that was finished is lost", "Fix", *words])
    names_all(text, ["the same command again"])
    assert "\n" not in text


@pytest.mark.parametrize(
    ("free", "start"),
    [(2**20, "{folder}: No space left"), (2**40, "a disk (of output_dir {folder}")],
)
def test_the_output_folder_is_blamed_only_where_it_is_full(tmp_path, monkeypatch, free, start):
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(free))
    text = said(tmp_path, OSError(errno.ENOSPC, "x"))
    assert text.startswith(start.format(folder=tmp_path))


def test_the_file_is_named_where_the_disk_says_it(tmp_path):
    path = tmp_path / "absent" / "cache.bin"
    assert said(tmp_path / "run", OSError(errno.ENOSPC, "x", str(path))).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        OSError(errno.ENOENT, "x"),
        InputError(FULL),
        SystemExit(143),
        ValueError("a row says: Input/output error"),  # of a user's function
        of(OSError(errno.EROFS, "x"), KeyError("a"), "__context__"),  # in a handler of theirs
    ],
)
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_pages_of_a_failing_disk_are_for_developers_and_others_stay(tmp_path, caplog, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    raised = namedtuple("Raised", ["exc_value"])
    caplog.set_level("DEBUG", "copg_jax")
    for name in ("absl", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    with disk_errors(tmp_path):
        for name in ("absl", "asyncio"):
            logging.getLogger(name).error("disk", exc_info=by_library(ValueError(FULL)))
            logging.getLogger(name).error("disk", exc_info=ValueError(FULL))  # of no Python frame
            logging.getLogger(name).error("other", exc_info=KeyError("a"))
            logging.getLogger(name).warning("worth a look")
        sys.unraisablehook(raised(RuntimeError("Event loop is closed")))
        sys.unraisablehook(raised(RuntimeError("another")))
    loud = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert loud == ["other", "worth a look"] * 2
    quiet = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    wanted = ["absl", "absl", "asyncio", "asyncio", "a write ended late"]
    assert [text.split(":")[0] for text in quiet] == wanted
    assert [str(one.exc_value) for one in seen] == ["another"]
    assert sys.unraisablehook == seen.append
    assert logging.getLogger("absl").filters == []


def test_what_the_disk_said_is_there_for_developers(tmp_path, caplog):
    caplog.set_level("DEBUG", "copg_jax")
    error = OSError(errno.ENOSPC, "x")
    said(tmp_path, error)
    assert [record.exc_info and record.exc_info[1] for record in caplog.records] == [error]


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_header(folder: epath.Path) -> None:
    write_text(folder / "config.yaml", "a: 1\n")


def write_line(folder: epath.Path) -> None:
    with GrowingFile(folder / "metrics.jsonl") as file:
        file.write("{}\n")


def write_part(folder: epath.Path) -> None:
    scored.write_part(folder, 0, [], "key")


@pytest.mark.parametrize(
    ("write", "function"),
    [
        (write_header, "etils.epath.abstract_path.Path.write_text"),
        (write_line, "etils.epath.abstract_path.Path.write_text"),
        (write_part, "pyarrow.parquet.write_table"),
    ],
)
def test_a_file_that_a_full_disk_cuts_short_is_never_taken_to_be_whole(
    tmp_path, monkeypatch, write, function
):
    folder = epath.Path(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(function, full)
        with pytest.raises(InputError, match="No space left"), disk_errors(folder):
            write(folder)
    assert [path.name for path in folder.iterdir() if not path.name.endswith(".tmp")] == []
    write(folder)
    assert len([path for path in folder.iterdir() if not path.name.endswith(".tmp")]) == 1


def test_too_little_room_is_said_with_both_numbers(tmp_path, caplog, monkeypatch):
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(3 * 2**30))
    disk.warn_of_space(tmp_path, 3 * 2**30)
    assert caplog.text == ""
    disk.warn_of_space(tmp_path, 80 * 2**30)
    names_all(caplog.text, [f"output_dir {tmp_path}", "80 GiB", "3 GiB are free", "Fix"])


@pytest.mark.parametrize(
    ("stage", "models"),
    [("sft", ["model"]), ("score", ["reference"]), ("evaluate", ["model", "reference"])],
)
def test_too_little_room_is_said_before_data_is_tokenised(
    tmp_path, capsys, monkeypatch, stage, models
):
    def stop(*_: Any, **__: Any) -> Any:
        raise InputError("tokenising")

    place, usage = Workplace(tmp_path), namedtuple("usage", ["free"])
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(0))
    monkeypatch.setattr("copg_jax.inputs.prepare", stop)
    base = [f"{name}.path={place.folder / 'base'}" for name in models]
    assert place.refusal(stage, *base) == "tokenising"
    names_all(capsys.readouterr().err, ["the run may write", "0 B are free"])


def test_prepared_data_is_about_twice_its_files(tmp_path):
    section = DataConfig(path=str(tmp_path / "*.jsonl"))
    assert inputs.prepared_bytes(section, None) == 0
    (tmp_path / "a.jsonl").write_bytes(b"x" * 100)
    assert inputs.prepared_bytes(section, None) == 200
    assert inputs.prepared_bytes(DataConfig(path="gs://bucket/a.jsonl")) == 0


def test_what_is_there_counts_as_written(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    assert 100 <= disk.folder_bytes(tmp_path) < 300
    assert disk.folder_bytes(tmp_path / "absent") == 0
    assert disk.folder_bytes("gs://bucket/run") == 0


@pytest.mark.slow
@pytest.mark.parametrize("kib", [60, 300, 620])  # tokens, a checkpoint and the export
def test_a_disk_that_fills_up_ends_a_run_with_one_line_and_room_lets_it_go_on(tmp_path, kib):
    place, small = Workplace(tmp_path / "place"), tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("NOT CHECKED: a disk of its own is for those who may mount one")
    try:
        more = ["training.max_steps=6", "training.save_every=2", "validation=null"]
        arguments = [*place.arguments("sft"), *more, f"output_dir={small / 'run'}"]
        run = [sys.executable, "-m", "experiments.train_sft", *arguments]
        done = subprocess.run(run, capture_output=True, text=True)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        names_all(last, [f"free at {small / 'run'}", "No space left on device"])
        subprocess.run(["mount", "-o", "remount,size=9m", str(small)], check=True)
        assert subprocess.run(run, capture_output=True).returncode == 0
        assert (small / "run" / "model" / "config.json").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)
