"""Does the runs of a study, each once, whoever asks for it.

1. A job is one run of a stage. `Runner` claims it, does it, and keeps a record of how it ended:
   done, failed or diverged. What is done or diverged is not done again; what failed is.
2. A job that another worker has claimed is that worker's; where it is needed, it is waited for.
3. A failure is that of the points which need the job, and no other point knows of it.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from etils import epath

from copg_jax import distributed
from copg_jax.checksums import read_record, write_record
from copg_jax.config.load import to_yaml
from copg_jax.errors import InputError
from copg_jax.lock import Taken, hold
from copg_jax.train.metrics import NonFiniteLoss
from experiments.studies.grid import Job, Point

log = logging.getLogger("copg_jax.study")

DONE, FAILED, DIVERGED = "done", "failed", "diverged"
_OURS, _TAKEN = "ours", "taken"  # of a job that has not ended
_POLL_SEC = 5.0


@dataclass(frozen=True)
class Record:
    """How a job ended."""

    status: str
    seconds: float = 0.0
    reason: str = ""  # why it has no result


class Runner:
    """The jobs of one study.

    Args:
        folder: of the study.
        mains: what runs a stage, by its name: config → anything.
        poll_sec: seconds between looks at a job that another worker does.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        mains: Mapping[str, Callable[[Any], object]],
        *,
        poll_sec: float = _POLL_SEC,
    ) -> None:
        self._folder, self._mains, self._poll_sec = epath.Path(folder), mains, poll_sec
        self._failed: dict[str, Record] = {}  # here and now: not tried again for the next point

    def _path(self, job: Job) -> epath.Path:
        return self._folder / "records" / f"{job.name}.json"

    def record(self, job: Job) -> Record | None:
        """How a job ended; None where it has not, or was another run than this one."""
        path = self._path(job)
        if not path.exists():
            return None
        found = read_record(path, fix="Fix: delete it, and the same command looks at the run anew.")
        if found["config"] != to_yaml(job.config):
            return None  # the run itself says whether it may go on with this one
        record = Record(found["status"], found["seconds"], found["reason"])
        # Of a folder that was deleted nothing is done.
        is_there = record.status != DONE or epath.Path(job.config.output_dir).exists()
        return record if is_there else None

    def run_points(self, points: Iterable[Point]) -> list[Point]:
        """Does the jobs of these points; returns those that another worker is at, and whose jobs
        are therefore not all done.
        """
        busy = []
        for point in points:
            try:
                self._run_point(point)
            except Taken as error:
                log.info("%s: left to another worker (%s)", point.name, error)
                busy.append(point)
        return busy

    def _run_point(self, point: Point) -> None:
        for job in point.jobs:
            record = self.run_job(job, wait=job not in (point.policy, point.evaluation))
            if record.status != DONE:
                log.warning("%s: %s %s: %s", point.name, job.name, record.status, record.reason)
                return

    def run_job(self, job: Job, *, wait: bool) -> Record:
        """Does a job that is not done; says how it ended.

        Args:
            job: what to do.
            wait: for another worker that does it.

        Raises:
            Taken: another worker does it, and it is not waited for.
        """
        if job.name in self._failed:
            return self._failed[job.name]
        while True:
            with ExitStack() as claim:
                found = self._look(job, claim)
                if found.status == _OURS:
                    found = self._do(job)
                    self._write(job, found)
                    self._failed |= {job.name: found} if found.status == FAILED else {}
                if found.status != _TAKEN:
                    return found
            if not wait:
                raise Taken(found.reason)
            time.sleep(self._poll_sec)

    def _look(self, job: Job, claim: ExitStack) -> Record:
        """Claims a job and says how it ended, that it is ours to do, or another worker's: of
        several processes the first, for all of them.
        """
        found = Record(_OURS)
        if distributed.is_main_process():
            folder = self._folder / "claims" / job.name
            folder.mkdir(parents=True, exist_ok=True)
            try:
                claim.enter_context(hold(folder))
            except Taken as error:
                found = Record(_TAKEN, reason=str(error))
            else:
                record = self.record(job)
                found = found if record is None or record.status == FAILED else record
                if found.status == _OURS:  # an older record is not of what begins now
                    self._path(job).unlink(missing_ok=True)
        return Record(**json.loads(distributed.from_all(json.dumps(vars(found)))[0]))

    def _do(self, job: Job) -> Record:
        log.info("%s: %s begins", job.name, job.stage)
        begin = time.monotonic()
        try:
            self._mains[job.stage](job.config)
        except Taken:
            raise
        except NonFiniteLoss as error:
            return Record(DIVERGED, time.monotonic() - begin, str(error))
        except Exception as error:  # whatever it is, it is this point's, and others go on
            log.debug("%s", job.name, exc_info=True)
            is_named = isinstance(error, InputError)
            text = str(error) if is_named else f"{type(error).__name__}: {error}"
            return Record(FAILED, time.monotonic() - begin, text)
        return Record(DONE, time.monotonic() - begin)

    def _write(self, job: Job, record: Record) -> None:
        path = self._path(job)
        with distributed.main_first(path):
            if distributed.is_main_process():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_record(path, {**vars(record), "config": to_yaml(job.config)})
