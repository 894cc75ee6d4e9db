"""Numbers of a run, from the loop to disk and screen.

1. On resume, drop the lines that the interrupted run wrote after the step we restart from.
2. Each `log` appends one JSON line to metrics.jsonl and, on request, tells a tracker.
3. The console shows a progress bar on a terminal, otherwise a plain line every few steps.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from copg_jax.distributed import is_main_process
from copg_jax.errors import for_terminal
from copg_jax.files import GrowingFile, read_json_lines
from copg_jax.trackers import open_tracker

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"


class MetricsLogger:
    """Context manager that logs a run's metrics; does nothing on processes other than 0.

    Args:
      output_dir: Folder of metrics.jsonl and of a tracker's files.
      total_steps: Number of steps of the whole run, for the progress bar and the time left.
      unit: What a step is, in the console's lines: "step", or what an evaluation counts.
      log_every: Steps between console lines; "eval/" metrics and the last step always show.
      tracker: Service that gets the numbers too, see `trackers.open_tracker`.
      settings: Config of the run, for the tracker.
      quiet: No console output.
      resume_step: Last step already done, None for a fresh start. Lines of later steps are removed
        first, so that an interrupted and resumed run leaves the file of an uninterrupted one.
      is_done: Whether a step is done, where steps are not done in their order; its line stays.
      logged: Steps that have a line, as is known; those whose line is lost are named.

    Raises:
      InputError: The tracker is not installed, or refuses.
    """

    def __init__(
        self,
        output_dir: epath.PathLike,
        *,
        total_steps: int,
        unit: str = "step",
        log_every: int = 10,
        tracker: str = "none",
        settings: Mapping[str, Any] | None = None,
        quiet: bool = False,
        resume_step: int | None = None,
        is_done: Callable[[int], bool] | None = None,
        logged: Collection[int] = (),
    ) -> None:
        self._total_steps, self._unit = total_steps, unit
        self._log_every = log_every
        self._enabled = is_main_process()
        self._file = None
        self._tracker = None
        self._progress = None
        self._console = None if quiet else Console(soft_wrap=True, highlight=False)
        self._last_step = resume_step or 0
        self._last_time: float | None = None  # of the first step: what was before is compilation
        if not self._enabled:
            return
        folder = epath.Path(output_dir)
        self._tracker = open_tracker(tracker, folder, settings or {}, resume_step)
        path = folder / FILE_NAME
        kept: list[str] = []
        if (last := resume_step) is not None:
            warn_of_lost_lines(output_dir, logged)
            kept = _kept_lines(path, is_done or (lambda step: step <= last))
        elif count := len(list(_lines(path))):
            log.warning("%s: its %d lines are left out: the run begins anew", path, count)
        self._file = GrowingFile(path, kept)

    def __enter__(self) -> Self:
        if self._enabled and self._console is not None and self._console.is_terminal:
            columns = (
                TextColumn(self._unit),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[pace]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task(
                "", total=self._total_steps, completed=self._last_step, pace="", visible=False
            )
            self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._tracker is not None:
            self._tracker.close()
        if self._file is not None:
            self._file.close()

    def log(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        text: Mapping[str, str] | None = None,
        done: int | None = None,
    ) -> None:
        """Log scalars, and texts such as samples, of one step; NaN and infinities become null.

        Args:
          step: Steps done, counted from 1 (0 for numbers from before training).
          values: Metric name to scalar.
          text: Name to text, kept under the key "text".
          done: Steps done, where they are not done in their order; what the console shows.
        """
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in values.items()}
        line: dict[str, Any] = {"step": int(step), "time": time.time()}
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        if text:
            line["text"] = dict(text)
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        if self._tracker is not None:
            self._tracker.log(step, numbers, text or {})
        if self._console is not None:
            self._show(self._console, step if done is None else done, numbers, text or {})

    def sync(self) -> None:
        """Sees to it that what was logged outlives this process; a checkpoint comes after it."""
        if self._file is not None:
            self._file.sync()

    def _show(
        self, console: Console, step: int, numbers: Mapping[str, float], text: Mapping[str, str]
    ) -> None:
        is_evaluation = any(name.startswith("eval/") for name in numbers)
        due = step % self._log_every == 0 or step >= self._total_steps or is_evaluation
        pace, now = "", time.monotonic()
        if step > self._last_step and self._last_time is None:
            self._last_step, self._last_time = step, now
        elif due and step > self._last_step and self._last_time is not None:
            seconds = (now - self._last_time) / (step - self._last_step)
            pace = f"{seconds:.3g} s/{self._unit}"
            if self._progress is None:  # the bar shows the time left itself
                pace += f"  ETA {_duration(seconds * (self._total_steps - step))}"
            self._last_step, self._last_time = step, now
        if self._progress is not None:
            self._progress.update(self._task, completed=step, visible=self._last_time is not None)
            if pace:
                self._progress.update(self._task, pace=pace)
        if due:
            parts = [f"{self._unit} {step}/{self._total_steps}"]
            parts += [f"{name} {value:.4g}" for name, value in numbers.items()]
            parts += [pace] if pace and self._progress is None else []
            console.print("  ".join(parts), markup=False)
        for name, value in text.items():
            console.print(f"  {name}: {for_terminal(value)}", markup=False, emoji=False)


def warn_of_lost_lines(output_dir: epath.PathLike, logged: Collection[int]) -> None:
    """Names the steps whose lines are not in metrics.jsonl, though they were written; says how many
    are no lines of a log.
    """
    if not is_main_process():
        return
    path = epath.Path(output_dir) / FILE_NAME
    steps = [step for _, step in _lines(path)]
    if foreign := steps.count(None):
        log.warning("%s: damaged: %d lines are cut short or foreign", path, foreign)
    lost = sorted(set(logged).difference(steps))
    if lost:
        log.warning(
            "%s: deleted or damaged: the lines of %d steps from %d to %d are lost",
            path,
            len(lost),
            lost[0],
            lost[-1],
        )


def _kept_lines(path: epath.Path, is_done: Callable[[int], bool]) -> list[str]:
    """The lines of steps that are done."""
    return [line + "\n" for line, step in _lines(path) if step is not None and is_done(step)]


def _lines(path: epath.Path) -> Iterator[tuple[str, int | None]]:
    """Lines of a log and their steps; None for what is no line of a log."""
    for line, row in read_json_lines(path) if path.exists() else ():
        step = row.get("step") if isinstance(row, dict) else None
        yield line, step if isinstance(step, int) else None


def _duration(seconds: float) -> str:
    minutes, secs = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}"
