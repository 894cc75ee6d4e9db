"""The process around a run: its memory, its device, how far it is, how signals end it."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress

import pytest

from copg_jax import runtime
from copg_jax.errors import InputError
from copg_jax.runtime import GracefulExit, Progress

_FAULTS = """
import resource, sys
import numpy as np
from copg_jax import runtime

if sys.argv[1] == "keep":
    runtime.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    before = faults()
    np.ones(2**24, np.float32)  # 64 MiB, freed at once
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="NOT CHECKED: glibc keeps memory on Linux only")
def test_memory_of_one_step_is_kept_for_the_next_where_all_is_computed_on_cpus():
    def faults(how: str, **env: str) -> int:
        command = [sys.executable, "-c", _FAULTS, how]
        environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0", **env}
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    mapped, kept = faults("leave"), faults("keep", JAX_PLATFORMS="cpu")
    # Each fault clears a page, of 4 KiB or, where the kernel gives large ones by itself, of 2 MiB.
    assert mapped >= 32 > 4 * kept


def test_progress_has_a_rate_and_the_time_left_from_the_second_update_on(monkeypatch):
    clock = iter([0.0, 100.0])  # of the start and of the first update, which compiled
    monkeypatch.setattr(runtime.time, "monotonic", lambda: next(clock))
    progress = Progress("scores", 13, "groups")
    assert progress.line(60.0) == "scores: 0 of 13, running for 60 s"
    progress.update(1)
    assert progress.line(101.0) == "scores: 1 of 13, running for 101 s"
    progress.update(4)
    assert progress.line(106.0) == "scores: 4 of 13, 0.5 groups/s, 18 s left"


def test_work_of_one_piece_says_how_long_it_runs():
    progress = Progress("rewards of 7 completions")
    assert re.fullmatch("rewards of 7 completions, running for [0-9]+ s", progress.line(1e9))


def test_a_long_batch_speaks_while_it_runs(monkeypatch):
    heard = threading.Event()
    texts: list[str] = []

    def hear(text: str, *values: object) -> None:
        texts.append(text % values)
        heard.set()

    monkeypatch.setattr(runtime, "_PROGRESS_SEC", 0.01)
    monkeypatch.setattr(runtime.log, "info", hear)
    with Progress("scores", 13, "groups"):
        assert heard.wait(60)
    assert texts[0].startswith("scores: 0 of 13, running for ")


def test_compilation_is_said_before_and_after(caplog):
    caplog.set_level("INFO", "copg_jax")
    with Progress("scores", 13, "groups", compiles=True) as progress:
        progress.update(4)
        progress.update(8)
    assert [re.sub("[0-9]+ s$", "_ s", text) for text in caplog.messages] == [
        "scores: compiling, then 13 groups",
        "scores: compiled, first 4 in _ s",
    ]


def test_a_signal_whose_exit_was_lost_in_a_callback_is_still_a_request():
    with runtime.signals_as_exits():
        with suppress(SystemExit):  # as Python does where an exception has nowhere to go
            os.kill(os.getpid(), signal.SIGHUP)
        with GracefulExit() as graceful:
            assert graceful.exit_code == 129
    with GracefulExit() as graceful:
        assert graceful.exit_code == 0


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_becomes_a_flag_and_an_exit_code(name, code):
    previous = signal.getsignal(signal.Signals[name])
    with GracefulExit() as graceful:
        assert (graceful.requested, graceful.exit_code) == (None, 0)
        os.kill(os.getpid(), signal.Signals[name])
        assert (graceful.requested, graceful.exit_code) == (name, code)
    assert signal.getsignal(signal.Signals[name]) is previous


def test_a_second_signal_exits_at_once():
    script = """
        import os, signal
        from copg_jax.runtime import GracefulExit
        with GracefulExit():
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("not reached", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout == "still here\n"
    assert "SIGTERM: saving after this step" in done.stderr


_WAITING = """
import ctypes, os, signal, sys
from copg_jax import runtime

runtime._PATIENCE_SEC, signals = float(sys.argv[1]), int(sys.argv[2])
with runtime.signals_as_exits() as before_exit:
    before_exit.append(lambda: print("let go", flush=True))
    shell = f"for i in $(seq {signals}); do sleep 0.5; kill -TERM {os.getpid()}; done"
    os.posix_spawn("/bin/sh", ["sh", "-c", shell], os.environ)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):  # the second one waits for ever, also after a signal
        libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(("patience", "signals"), [(0.2, 1), (600, 2)])
def test_a_process_that_waits_in_a_library_ends_by_a_signal_in_time_and_by_a_second_one_at_once(
    patience, signals
):
    command = [sys.executable, "-c", _WAITING, str(patience), str(signals)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "let go\n")


@pytest.mark.parametrize("names", ["cuda,cpu", "cuda", "tpu,cpu", "rocm"])
def test_an_accelerator_that_is_asked_for_and_not_there_is_named(names, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", names)
    with pytest.raises(
        InputError, match=f"JAX_PLATFORMS={names}: wanted {names.split(',')[0]}, got"
    ):
        runtime.check_platform()


@pytest.mark.parametrize("names", ["", "cpu", "cpu,cuda"])
def test_a_cpu_that_is_asked_for_or_left_to_jax_is_used(names, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", names)
    runtime.check_platform()


_FAILING = """
from jax._src import xla_bridge
from copg_jax import runtime

def fail():
    raise RuntimeError("the device is in use")

xla_bridge.register_backend_factory("rocm", fail, priority=500, fail_quietly=False)
runtime.check_platform()
"""


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("", "RuntimeError: Unable to initialize backend 'rocm': the device is in use"),
        ("rocm,cpu", "RuntimeError: Unable to initialize backend 'rocm': the device is in use"),
        ("cuda", "InputError: JAX_PLATFORMS=cuda: wanted cuda, got nothing."),
    ],
)
def test_a_device_that_does_not_start_is_never_replaced_by_the_cpu(names, text):
    command = [sys.executable, "-c", _FAILING]
    environment = {**os.environ, "JAX_PLATFORMS": names}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and text in done.stderr


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_the_compilation_cache_has_a_default_and_obeys_the_environment(tmp_path, given):
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if given:
        environment["JAX_COMPILATION_CACHE_DIR"] = given
    script = (
        "import jax; from copg_jax import runtime; runtime.setup();"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == (given or str(tmp_path / ".cache" / "copg_jax" / "xla"))
