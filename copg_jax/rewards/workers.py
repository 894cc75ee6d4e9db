"""Reward functions in processes of their own, which can be stopped: `WorkerPool`.

1. A worker is a new Python (`worker_process`), never a fork: JAX has threads, which a fork breaks.
   It makes the function from its spec, and stays for all calls.
2. It gets a batch of completions at a time. Where it takes too long, or ends, it is replaced, and
   the completions of its batch are asked for one by one; the one at fault has no reward.
3. Workers end with the pool, and with the run however that ends: they hold a pipe from it.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from copg_jax.config.reward_spec import RewardSpec
from copg_jax.errors import InputError, hidden
from copg_jax.rewards.protocol import Answer

_START = (
    "import sys; sys.path[:] = {path}; from copg_jax.rewards import worker_process as w; w.serve()"
)
_REASONS = {"failed": "error", "ended": "crash", "late": "timeout"}
_TICK_SEC = 0.5  # between looks at whether the processes that are waited for still run
_CLOSING_SEC = 1.0  # for the process behind a connection that has ended
_STARTS = 3  # processes in a row that end before they are ready, after which none can be started
_PATIENCE = 32  # failures before the first reward, after which the function is at fault


class _Worker:
    """One process, and what it is doing."""

    def __init__(self, spec: RewardSpec, *, is_first: bool) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        start = _START.format(path=sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, str(theirs.fileno())],
            stdin=subprocess.PIPE,  # which ends when this process does
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the accelerator is the run's
            start_new_session=True,
        )
        theirs.close()
        self.is_ready = False
        self.batch: list[int] = []
        self.place = ""  # of the first of them
        self.deadline = float("inf")
        self.send((spec, is_first))

    def send(self, message: tuple[Any, ...]) -> bool:
        """Tells the process something; False where it has ended."""
        with suppress(OSError):
            if self.process.poll() is None:
                self.connection.send(message)
                return True
        return False

    def receive(self) -> tuple[str, Any]:
        """What the process says, or its end, which its connection does not show while a process
        that it forked holds that.
        """
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_CLOSING_SEC)
        status = self.process.poll()
        if status is None:
            return "ended", "its process closed the connection to the run"
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return "ended", f"its process ended ({how})"

    def end(self) -> None:
        """Ends the process and those of its own, and waits for that."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


class WorkerPool:
    """Calls a reward function in `num_workers` processes.

    Args:
        spec: `num_workers` of at least 1; `timeout_sec` a completion; `batch_size` completions at a
            time, 1 where it is null.
    """

    def __init__(self, spec: RewardSpec) -> None:
        self._spec = spec
        self._workers: list[_Worker] = []
        self._is_proven, self._num_failed, self._num_unready = False, 0, 0
        weakref.finalize(self, _end_all, self._workers)  # at the exit of Python too

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        where: Sequence[str],
        update: Callable[[int], object],
    ) -> Answer:
        """Asks for the rewards of N completions; a call at a time.

        Args:
            prompts: one a completion; [N].
            completions: [N].
            columns: further fields of the data set, each [N].
            where: `file:line` of each completion, for messages; [N].
            update: is told how many are done.

        Raises:
            InputError: a function that answers other than with rewards, that no process can make,
                or that fails for each of the first completions.
        """
        number, size = len(completions), self._spec.batch_size or 1
        todo = deque(list(range(i, min(i + size, number))) for i in range(0, number, size))
        answer = Answer(np.full(number, np.nan), [""] * number, {})
        take = lambda values, batch: [values[i] for i in batch]
        done = 0
        try:
            while todo or any(worker.batch for worker in self._workers):
                self._start(len(todo))
                for index, worker in enumerate(self._workers):
                    if worker.is_ready and not worker.batch and todo:
                        batch = todo[0]
                        texts = take(prompts, batch), take(completions, batch)
                        further = {name: take(values, batch) for name, values in columns.items()}
                        if not worker.send((*texts, further, take(where, batch))):
                            self._replace(index)  # it ended while it had nothing to do
                            continue
                        todo.popleft()
                        limit = (self._spec.timeout_sec or float("inf")) * len(batch)
                        worker.batch, worker.place = batch, where[batch[0]]
                        worker.deadline = time.monotonic() + limit
                for index, kind, content in self._heard():
                    done += self._settle(index, kind, content, todo, answer)
                update(done)
        except BaseException:  # what workers say now nobody waits for
            _end_all(self._workers)
            raise
        return answer

    def _start(self, num_batches: int) -> None:
        """As many processes as there is work for."""
        while len(self._workers) < min(self._spec.num_workers, num_batches):
            self._workers.append(_Worker(self._spec, is_first=not self._workers))

    def _replace(self, index: int) -> None:
        """A new process in place of one."""
        self._workers[index].end()
        self._workers[index] = _Worker(self._spec, is_first=False)

    def _heard(self) -> list[tuple[int, str, Any]]:
        """Waits until workers have something to say, or are late: index, what kind, content."""
        busy = {i: w for i, w in enumerate(self._workers) if w.batch or not w.is_ready}
        first = min((worker.deadline for worker in busy.values()), default=float("inf"))
        left = min(max(0.0, first - time.monotonic()), _TICK_SEC)
        speaking = multiprocessing.connection.wait([w.connection for w in busy.values()], left)
        heard = []
        for index, worker in busy.items():
            if worker.connection in speaking or worker.process.poll() is not None:
                heard.append((index, *worker.receive()))
            elif time.monotonic() >= worker.deadline:
                heard.append((index, "late", f"it took longer than {self._spec.timeout_sec} s"))
        return heard

    def _settle(
        self, index: int, kind: str, content: Any, todo: deque[list[int]], answer: Answer
    ) -> int:
        """Acts on what a worker said; returns how many completions that settles."""
        worker, name = self._workers[index], self._spec.function
        if kind == "refused":
            raise InputError(hidden(content))
        if kind == "ready":
            worker.is_ready, self._num_unready = True, 0
            return 0
        if not worker.is_ready:
            self._num_unready += 1
            if self._num_unready == _STARTS:
                raise InputError(
                    f"reward function {name}: no worker can be started: {hidden(content)}"
                )
            self._replace(index)
            return 0
        batch, worker.batch, worker.deadline = worker.batch, [], float("inf")
        if kind == "answer":
            self._is_proven = True
            for i, value, reason in zip(batch, content.values, content.reasons, strict=True):
                answer.values[i], answer.reasons[i] = value, reason
            answer.remarks.update(content.remarks)
            return len(batch)
        if kind != "failed":
            self._replace(index)
        if len(batch) > 1:
            todo.extendleft([i] for i in reversed(batch))
            return 0
        text = hidden(content if kind == "failed" else f"{worker.place}: {content}")
        answer.reasons[batch[0]] = reason = _REASONS[kind]
        answer.remarks.setdefault(reason, f"gave no reward: {text}")
        self._num_failed += 1
        if not self._is_proven and self._num_failed >= _PATIENCE:
            raise InputError(
                f"reward function {name}: the first {_PATIENCE} completions all failed, the last "
                f"one so: {text}"
            )
        return 1
