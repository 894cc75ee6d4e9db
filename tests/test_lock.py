"""One run, one folder: of several one goes on, the dead are taken over, the living named."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from copg_jax import lock
from copg_jax.errors import InputError
from tests.bucket import make_bucket
from tests.toys import names_all

_HOLDER = """
import sys, time
from pathlib import Path
from copg_jax.errors import InputError
from copg_jax.lock import hold

folder, go = map(Path, sys.argv[1:])
print("ready", flush=True)
while not go.exists():
    pass
try:
    with hold(folder):
        print("holds", flush=True)
        sys.stdin.read()
except InputError as error:
    print(error, flush=True)
"""


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path, monkeypatch) -> epath.Path:
    """An empty folder."""
    if request.param == "bucket":
        make_bucket(monkeypatch)
        return epath.Path("gs://bucket/run")
    return epath.Path(tmp_path)


@pytest.fixture
def quick(monkeypatch) -> None:
    """Heartbeats that need no patience."""
    monkeypatch.setattr(lock, "_BEAT_SEC", 0.02)
    monkeypatch.setattr(lock, "_DEAD_SEC", 0.5)
    monkeypatch.setattr(lock, "_POLL_SEC", 0.01)


def start_holder(folder: Path, go: Path) -> subprocess.Popen:
    """A process that waits for `go` and then holds the folder until it is ended."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _HOLDER, str(folder), str(go)]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert line_of(process) == "ready"
    return process


def line_of(process: subprocess.Popen) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def claims(folder: epath.Path) -> list[epath.Path]:
    """The claims that are there."""
    return list(folder.glob(f"{lock.PREFIX}*"))


def refusal(folder: epath.Path) -> str:
    """Why a folder is not held."""
    with pytest.raises(InputError) as caught, lock.hold(folder):
        raise AssertionError("not reached")
    return str(caught.value)


def write_claim(folder: epath.Path, name: str = "0", **changed: Any) -> epath.Path:
    """A claim as another run writes it."""
    values = {
        "host": "elsewhere",
        "machine": "elsewhere",
        "pid": 17,
        "process_start": "1",
        "since": "2026-01-01 00:00:00",
        "heartbeat": "2026-01-01 00:00:07",
        "is_held": True,
    }
    path = folder / f"{lock.PREFIX}{name}"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values | changed))
    return path


def test_a_folder_is_held_by_one_run_at_a_time_and_free_afterwards(folder):
    for _ in range(2):
        with lock.hold(folder):
            text = refusal(folder)
            names_all(text, [f"output_dir {folder}", f"process {os.getpid()}"])
            names_all(text, [socket.gethostname(), "since 20", "last heartbeat 20", "Fix"])
    assert claims(folder) == []


def test_of_many_that_start_at_once_exactly_one_goes_on(folder, quick):
    for _ in range(5):
        number, outcomes = 6, []
        start, all_done = threading.Barrier(number), threading.Barrier(number)

        def run(start=start, all_done=all_done, outcomes=outcomes) -> None:
            start.wait()
            with ExitStack() as stack:
                try:
                    stack.enter_context(lock.hold(folder))
                    outcomes.append("held")
                except InputError:
                    outcomes.append("refused")
                all_done.wait()  # so that nobody comes after the holder has left

        threads = [threading.Thread(target=run) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["held"] + ["refused"] * (number - 1)
        assert claims(folder) == []


def test_of_two_processes_that_start_at_once_exactly_one_goes_on(tmp_path):
    run, go = tmp_path / "run", tmp_path / "go"
    run.mkdir()
    processes = [start_holder(run, go) for _ in range(2)]
    go.write_text("")
    said = sorted(map(line_of, processes), reverse=True)  # the reason begins with output_dir
    for process in processes:
        process.communicate()
    assert said[1] == "holds"
    assert said[0].startswith(f"output_dir {run}: wanted a folder for this run alone")


@pytest.mark.parametrize("is_awaited", [True, False], ids=["gone", "zombie"])
def test_a_killed_process_is_taken_over_at_once_on_its_host(tmp_path, caplog, is_awaited):
    go = tmp_path / "go"
    go.write_text("")
    run = epath.Path(tmp_path / "run")
    run.mkdir()
    process = start_holder(Path(run), go)
    assert line_of(process) == "holds"
    names_all(refusal(run), [f"process {process.pid} "])
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended
    if is_awaited:
        process.wait()
    caplog.set_level("INFO", "copg_jax")
    with lock.hold(run):
        assert len(claims(run)) == 1
    assert f"taken over from process {process.pid} on host" in caplog.text
    process.communicate()


@pytest.mark.parametrize(
    "of_another", [{"pid": 2**22 + 1}, {"pid": os.getpid(), "process_start": "1"}]
)
def test_a_process_that_is_gone_or_another_of_its_number_is_dead(folder, of_another):
    write_claim(folder, machine=lock._machine(), **of_another)
    with lock.hold(folder):
        assert len(claims(folder)) == 1


def raise_permission(pid: int, number: int) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("kill", [None, raise_permission], ids=["same user", "another user"])
def test_where_processes_are_hidden_a_live_run_is_told_by_its_heartbeat(
    tmp_path, quick, monkeypatch, kill
):
    monkeypatch.setattr(lock, "_process_start", lambda pid: None)  # /proc with hidepid
    monkeypatch.setattr(lock, "_DEAD_SEC", 60.0)
    if kill:
        monkeypatch.setattr(lock.os, "kill", kill)
    folder = epath.Path(tmp_path)
    ended, thread = beating(folder, machine=lock._machine(), pid=os.getpid())
    names_all(refusal(folder), [f"process {os.getpid()} on host elsewhere", "beat "])
    ended.set()
    thread.join()


@pytest.mark.parametrize("fails", [False, True])
def test_a_claim_that_cannot_be_removed_neither_ends_a_run_nor_hides_its_error(
    folder, monkeypatch, caplog, fails
):
    def refuse(path: epath.Path) -> None:
        raise OSError(30, "Read-only file system")

    with pytest.raises(KeyError) if fails else nullcontext(), lock.hold(folder):
        monkeypatch.setattr(lock, "_remove", refuse)
        if fails:
            raise KeyError("of the run")
    names_all(caplog.text, [str(folder / lock.PREFIX), "Read-only file system", "remove it"])


@pytest.mark.parametrize("is_held", [True, False])
def test_a_run_on_another_host_is_taken_over_once_its_heartbeat_stands_still(
    folder, quick, caplog, is_held
):
    path = write_claim(folder, is_held=is_held)
    caplog.set_level("INFO", "copg_jax")
    with lock.hold(folder):
        assert not path.exists()
    names_all(caplog.text, ["process 17 on host elsewhere", "since 2026-01-01", str(path)])
    names_all(caplog.text, ["waiting up to 0.5 s", "which is dead"])


def beating(folder: epath.Path, **changed: Any) -> tuple[threading.Event, threading.Thread]:
    """A run on another host, with a heartbeat; the event ends it and removes its claim."""
    ended, path = threading.Event(), write_claim(folder, **changed)

    def beat() -> None:
        count = 0
        while not ended.wait(0.02):
            count += 1
            write_claim(folder, **changed, heartbeat=f"beat {count}")
        path.unlink()

    thread = threading.Thread(target=beat)
    thread.start()
    return ended, thread


def test_a_run_on_another_host_that_gives_heartbeats_keeps_its_folder(folder, quick, monkeypatch):
    monkeypatch.setattr(lock, "_DEAD_SEC", 60.0)
    ended, thread = beating(folder)
    names_all(refusal(folder), ["process 17 on host elsewhere", "since 2026", "beat ", "60 s"])
    ended.set()
    thread.join()
    with lock.hold(folder):
        assert len(claims(folder)) == 1


def test_a_run_waits_for_one_that_comes_after_it_to_give_up(folder, quick, monkeypatch):
    monkeypatch.setattr(lock, "_DEAD_SEC", 60.0)
    ended, thread = beating(folder, name="~", is_held=False)  # behind any name of hex digits
    threading.Timer(0.3, ended.set).start()
    with lock.hold(folder):
        assert ended.is_set()
    thread.join()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0" * 64, '{"pid": 1}', "\x80", "[" * 9999])
def test_a_damaged_claim_is_taken_over_once_it_stands_still(folder, quick, text):
    write_claim(folder).write_bytes(text.encode("latin-1"))
    with lock.hold(folder):
        assert len(claims(folder)) == 1


def wait_until(holds: Callable[[], bool]) -> None:
    """Returns once something is so."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_heartbeat_goes_on_while_the_folder_is_held(folder, quick):
    with lock.hold(folder):
        (path,) = claims(folder)
        before = path.read_text()
        wait_until(lambda: path.read_text() != before)
        assert json.loads(path.read_text())["is_held"] is True


_TAKEN_OVER = """
import sys, time
from pathlib import Path
from copg_jax import lock

folder, is_removed = Path(sys.argv[1]), sys.argv[2] == "removed"
lock._BEAT_SEC = 0.02
with lock.hold(folder):
    (path,) = folder.glob(".lock-*")
    if is_removed:
        path.unlink()
    else:  # as where it was suspended before it wrote a heartbeat, which made its claim anew
        (folder / ".lock-other").write_text(path.read_text())
    time.sleep(20)
"""


@pytest.mark.parametrize(("how", "left"), [("removed", []), ("held", [".lock-other"])])
def test_a_run_whose_folder_was_taken_over_ends_at_once(tmp_path, how, left):
    command = [sys.executable, "-c", _TAKEN_OVER, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    names_all(done.stderr, [f"error: {tmp_path}", "another run has taken it over"])
    assert [path.name for path in tmp_path.iterdir()] == left
