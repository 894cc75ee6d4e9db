"""One run, one folder: a run holds its output folder against others, on a disk or in a bucket.

A run writes a claim, a file that only it writes, and then looks for the claims of others.
1. A claim is held once its run has seen no other that is held or comes first. Of two that are not
   held yet, the one of the lower name comes first. Whoever writes later sees the earlier claim, so
   that no two are ever held; nothing has to be created exclusively, which buckets cannot.
2. A claim is dead where its process is gone, on this machine, or where its heartbeat stands still,
   on another one. No name is used twice, so that anybody may remove a dead claim.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from etils import epath

from copg_jax.errors import InputError
from copg_jax.files import write_text

log = logging.getLogger(__name__)

PREFIX = ".lock-"
_BEAT_SEC = 15.0
_DEAD_SEC = 120.0  # without a heartbeat
_POLL_SEC = 0.2
_TAKEN = (
    "output_dir {}: wanted a folder for this run alone, got one that {} is writing. Fix: give "
    "another output_dir, or wait for that run or end it. The folder of a process that is gone is "
    "taken over: at once on its host, after {:g} s without a heartbeat on another."
)
_WATCHED = "%s: %s had it; waiting up to %g s for its heartbeat (remove %s if that run is gone)"


class Taken(InputError):
    """Another run has the folder."""


@dataclass(frozen=True)
class _Claim:
    """Who wants or has a folder."""

    host: str
    machine: str  # whose process numbers can be compared
    pid: int
    process_start: str | None
    since: str
    heartbeat: str
    is_held: bool = False


@contextmanager
def hold(folder: epath.PathLike) -> Iterator[Callable[[], None]]:
    """Holds a folder, which exists, while the body runs; gives what lets it go before that.

    Raises:
        Taken: another run has it; names that run and what to do.
    """
    claim = _OwnClaim(epath.Path(folder))
    try:
        claim.begin()
        claim.outwait_others()
        yield claim.release
    finally:
        claim.release()


class _OwnClaim:
    """The claim of this run, with its heartbeat."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder, self._path = folder, folder / f"{PREFIX}{uuid.uuid4().hex}"
        self._claim = _Claim(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
            since=_now(),
            heartbeat="",
        )
        self._released, self._writing = threading.Event(), threading.Lock()

    def begin(self) -> None:
        """Writes the claim, from now on with a heartbeat."""
        self._write()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def outwait_others(self) -> None:
        """Returns once the folder is held."""
        for path in self._folder.glob(f"{PREFIX}*"):
            if path != self._path and path.suffix != ".tmp":
                self._outwait(path)
        self._claim = replace(self._claim, is_held=True)
        self._write()

    def release(self) -> None:
        """Removes the claim."""
        with self._writing:
            self._released.set()
            try:
                _remove(self._path)
            except Exception as error:  # each kind of bucket fails in its own way
                log.warning("%s could not be removed (%s): remove it", self._path, error)

    def _outwait(self, path: epath.Path) -> None:
        """Returns once another claim is gone; raises Taken where that comes first."""
        moved, has_moved, is_watched = time.monotonic(), False, False
        text = _read(path)
        while text is not None:
            claim = _parse(text)
            is_running = claim and _is_running(claim, self._claim.machine)
            if is_running is not None:
                is_alive, is_dead = is_running, not is_running
            else:  # clocks of machines differ: it lives if its heartbeat moves
                is_alive, is_dead = has_moved, time.monotonic() - moved > _DEAD_SEC
                if not is_watched:
                    log.info(_WATCHED, self._folder, _name(claim), _DEAD_SEC, path)
                is_watched = True
            if is_dead:
                log.info("%s: taken over from %s, which is dead", self._folder, _name(claim))
                _remove(path)
                return
            is_first = claim is not None and (claim.is_held or path.name < self._path.name)
            if is_alive and is_first:
                raise Taken(_TAKEN.format(self._folder, _name(claim), _DEAD_SEC))
            time.sleep(_POLL_SEC)
            before, text = text, _read(path)
            if text != before:
                moved, has_moved = time.monotonic(), True

    def _write(self) -> None:
        with self._writing:
            if not self._released.is_set():
                text = json.dumps(asdict(replace(self._claim, heartbeat=_now())), indent=1)
                write_text(self._path, text + "\n")

    def _is_lost(self) -> bool:
        """Whether the claim was removed, or another run has come to hold the folder as well."""
        if not self._path.exists():
            return True
        paths = self._folder.glob(f"{PREFIX}*") if self._claim.is_held else ()
        others = (_read(path) for path in paths if path != self._path and path.suffix != ".tmp")
        claims = (_parse(text) for text in others if text is not None)
        return any(claim is not None and claim.is_held for claim in claims)

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_SEC):
            try:
                is_lost = self._is_lost()
                if not is_lost:
                    self._write()
                    is_lost = self._is_lost()  # it may have been suspended since the look before
            except Exception as error:  # the run itself meets a disk or a bucket that fails
                log.debug("%s: no heartbeat: %s", self._path, error)
                continue
            if is_lost and not self._released.is_set():
                # Two runs in one folder would be worse than a run that ends without saving.
                message = (
                    f"\nerror: {self._folder}: another run has taken it over, since this one gave "
                    f"no heartbeat for {_DEAD_SEC:g} s or {self._path.name} was removed\n"
                )
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
                self.release()
                os._exit(2)


def _read(path: epath.Path) -> str | None:
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None


def _remove(path: epath.Path) -> None:
    for name in (path.name, f"{path.name}.tmp"):  # which a kill in `write_text` has left
        path.with_name(name).unlink(missing_ok=True)


def _parse(text: str) -> _Claim | None:
    """None where it is no claim: a damaged one, which its run mends at the next heartbeat."""
    try:
        return _Claim(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None


def _name(claim: _Claim | None) -> str:
    if claim is None:
        return "another run"
    return (
        f"process {claim.pid} on host {claim.host} (since {claim.since}, last heartbeat "
        f"{claim.heartbeat})"
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="milliseconds")


def _machine() -> str:
    """What has one set of process numbers: a host until its next start, a container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux: heartbeats tell
        return uuid.uuid4().hex


def _is_running(claim: _Claim, machine: str) -> bool | None:
    """Whether the process of a claim lives; None where this `machine` cannot tell."""
    if claim.machine != machine:
        return None
    try:
        os.kill(claim.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # there is a process, of another user
        pass
    start = _process_start(claim.pid)
    return None if start is None else start == claim.process_start


def _process_start(pid: int) -> str | None:
    """When a process began, in ticks; "ended" for one that nobody has waited for; None where it
    is gone, or /proc does not show the processes of other users.
    """
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if state in "ZX" else numbers[18]
