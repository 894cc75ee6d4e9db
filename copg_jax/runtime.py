"""What a run needs from the process around it.

1. `setup`: logging, the persistent compilation cache, and the other processes of the run;
   `check_platform` for the accelerator that was asked for, `keep_freed_memory` for steps on CPUs.
2. `Progress`: how far a long piece of work is.
3. Signals: `signals_as_exits` ends a run in order; in a `GracefulExit` they become a flag that the
   loop reads between two steps, and a long evaluation between two batches (`make_pause`).
"""

import ctypes
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

import jax

from copg_jax import distributed
from copg_jax.errors import Ended, InputError

log = logging.getLogger(__name__)

_PROGRESS_SEC = 30.0
_PATIENCE_SEC = 10.0  # between a signal and what Python makes of it
_MALLOPT = {  # of malloc.h
    -4: 0,  # M_MMAP_MAX: take large pieces from the heap
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: leave what is free at its end
    -8: 1,  # M_ARENA_MAX: one heap for all threads; others cannot hold large pieces
}


class Progress:
    """Says every 30 seconds how far a long piece of work is; silent where it is short.

    A context manager. From the second update on a line has the rate and the time left, without what
    the first one took, which often is compilation.

    Args:
      name: What is done.
      total: Number of items; None where the work is one piece.
      unit: What an item is.
      compiles: Whether the first items wait for compilation: its begin and end are said.
    """

    def __init__(
        self, name: str, total: int | None = None, unit: str = "items", *, compiles: bool = False
    ) -> None:
        self._name, self._total, self._unit, self._compiles = name, total, unit, compiles
        self._start = time.monotonic()
        self._first: tuple[int, float] | None = None  # items and time of the first update
        self._done = 0
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if self._compiles:
            log.info("%s: compiling, then %s %s", self._name, self._total, self._unit)
        threading.Thread(target=self._say, name="progress", daemon=True).start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()

    def update(self, done: int) -> None:
        """Note that `done` items are finished."""
        self._done = done
        if self._first is None and done:
            self._first = done, time.monotonic()
            if self._compiles:
                seconds = self._first[1] - self._start
                log.info("%s: compiled, first %d in %.0f s", self._name, done, seconds)

    def line(self, now: float) -> str:
        """How far it is at a time of `time.monotonic`."""
        text = self._name if self._total is None else f"{self._name}: {self._done} of {self._total}"
        if self._first is None or self._done == self._first[0] or self._total is None:
            return f"{text}, running for {now - self._start:.0f} s"
        rate = (self._done - self._first[0]) / (now - self._first[1])
        left = (self._total - self._done) / rate
        return f"{text}, {rate:.3g} {self._unit}/s, {left:.0f} s left"

    def _say(self) -> None:
        while not self._ended.wait(_PROGRESS_SEC):
            log.info("%s", self.line(time.monotonic()))


def setup(mode: str = "off") -> None:
    """Set up logging and the persistent compilation cache, and join the processes of the run.

    The environment variable JAX_COMPILATION_CACHE_DIR moves the cache; the default is
    `~/.cache/copg_jax/xla`.

    Args:
      mode: See `distributed.start`.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    keep_freed_memory()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path.home() / ".cache" / "copg_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    index = distributed.start(mode)
    check_platform()
    logging.getLogger("copg_jax").setLevel(logging.WARNING if index else logging.INFO)
    if jax.distributed.is_initialized():
        log.info("process 0 of %d, %d devices", jax.process_count(), jax.device_count())


def check_platform() -> None:
    """Refuse to compute on a CPU where JAX_PLATFORMS names an accelerator first.

    JAX leaves `cuda` out of `cuda,cpu` where it sees no GPU, without a word. Of a device that is
    there and does not start it says so itself.

    Raises:
      InputError: The accelerator is not there.
    """
    names = os.environ.get("JAX_PLATFORMS", "")
    wanted = names.split(",")[0]
    try:
        got = jax.default_backend()
    except AssertionError:  # no name is left
        got = "nothing"
    if wanted not in ("", "cpu") and got in ("cpu", "nothing"):
        raise InputError(
            f"JAX_PLATFORMS={names}: wanted {wanted}, got {got}. Fix: see that the device and its "
            "driver are there (nvidia-smi lists a GPU); or compute on the CPU, with "
            "JAX_PLATFORMS=cpu."
        )


def keep_freed_memory() -> None:
    """Where all is computed on CPUs, have glibc keep the memory of a step for the next one.

    A step's temporary arrays are allocated anew each time. glibc would map such large pieces and
    unmap them afterwards, and the kernel clear every page again: 12 % of a step's time. To be
    called before JAX starts its threads; does nothing beside an accelerator or another libc.
    """
    if any(map(find_spec, ("libtpu", "jax_plugins"))) and os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in _MALLOPT.items():
            mallopt(option, value)


class LeaveRequest(Exception):
    """The run was told to leave: raised between two batches of an evaluation, or two steps."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(signal.Signals(exit_code - 128).name)
        self.exit_code = exit_code


class GracefulExit:
    """Turns SIGTERM, SIGINT and SIGHUP into a flag: the loop saves and leaves after the current
    step, or the current batch of an evaluation.

    `requested` is None or the name of a signal. A second signal ends the process at once.
    Outside the `with` block the previous handlers are back.
    """

    in_force: "ClassVar[GracefulExit | None]" = None  # signals are of the process, so is this
    _before: str | None = None  # the signal that `signals_as_exits` got
    _is_heard = False  # whether a handler has run since that began

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """0 when nothing was requested, else the shell's 128 + signal, such as 143 or 130."""
        return 128 + signal.Signals[self.requested] if self.requested else 0

    def __enter__(self) -> Self:
        GracefulExit.in_force = self
        # Where Python cannot pass an exception on, as out of a callback, SystemExit was lost.
        self.requested = GracefulExit._before
        self._previous = _set_handlers(self._handle, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        GracefulExit.in_force = None
        _restore_handlers(self._previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        GracefulExit._is_heard = True
        # os.write and os._exit: neither allocates locks nor waits for threads of a pending save.
        if self.requested is not None:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nsecond signal: exit\n")
            os._exit(128 + signum)
        self.requested = signal.Signals(signum).name
        message = (
            f"\n{self.requested}: saving after this step or this batch of an evaluation; send it "
            "again to exit at once\n"
        )
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())


def make_pause(mesh: jax.sharding.Mesh) -> Callable[[], None]:
    """Builds what a long evaluation calls between two batches, in every process equally often.

    It raises `LeaveRequest` once a signal came to any process, inside a `GracefulExit`.
    """
    host_max, newest = distributed.make_host_max(mesh), 0

    def pause() -> None:
        nonlocal newest
        if GracefulExit.in_force is None:
            return
        before, newest = newest, host_max(GracefulExit.in_force.exit_code)
        # Of several processes the answer to the question before, which the device has by now.
        exit_code = int(newest if jax.process_count() == 1 else before)
        if exit_code:
            raise LeaveRequest(exit_code)

    return pause


@contextmanager
def signals_as_exits() -> Iterator[list[Callable[[], None]]]:
    """In the body, SIGTERM and SIGHUP raise Ended, as Ctrl-C raises KeyboardInterrupt.

    Where Python does not get to that within 10 seconds, since it waits in a library (as for a long
    compilation, or for another process), and at a second signal, the process ends at once.

    Returns:
        A list for what is to be done before it ends at once.
    """
    before_exit: list[Callable[[], None]] = []

    def leave(signum: int, frame: FrameType | None) -> None:
        GracefulExit._is_heard = True
        GracefulExit._before = signal.Signals(signum).name
        raise Ended(128 + signum)

    previous = _set_handlers(leave, signal.SIGTERM, signal.SIGHUP)
    try:
        with _signals_to(partial(_end_if_unheard, before_exit=before_exit)):
            yield before_exit
    finally:
        GracefulExit._before, GracefulExit._is_heard = None, False
        _restore_handlers(previous)


@contextmanager
def _signals_to(listen: Callable[[int], None]) -> Iterator[None]:
    """In the body, a thread reads the numbers of signals from a pipe, whatever Python waits for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    listener = threading.Thread(target=listen, args=(reading,), name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writing)  # which ends the thread
        listener.join()
        os.close(reading)


def _end_if_unheard(pipe: int, before_exit: Sequence[Callable[[], None]]) -> None:
    """Ends the process where Python does not get to a signal, and at a second one."""
    first = 0
    while True:
        if select.select([pipe], [], [], _PATIENCE_SEC if first else None)[0]:
            if not (received := os.read(pipe, 1)):
                return
            if received[0] not in (signal.SIGTERM, signal.SIGHUP) or GracefulExit.in_force:
                continue
            if not first:
                first = received[0]
                continue
        elif GracefulExit._is_heard:
            continue  # it leaves in order, as long as that takes
        message = f"\n{signal.Signals(first).name}: exit at once\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
        for act in before_exit:
            act()
        os._exit(128 + first)


def _set_handlers(handler: Any, *signums: signal.Signals) -> dict[signal.Signals, Any]:
    """Sets handlers and returns those before; an ignored SIGHUP (nohup) stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python takes signals in its main thread only
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    wanted = [signum for signum in signums if signum != signal.SIGHUP or not ignored]
    return {signum: signal.signal(signum, handler) for signum in wanted}


def _restore_handlers(previous: dict[signal.Signals, Any]) -> None:
    for signum, handler in previous.items():
        signal.signal(signum, handler)
