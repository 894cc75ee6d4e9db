"""How far a study is, and how long the rest takes."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich.table import Table

from experiments.studies.grid import Job, Point, jobs_of
from experiments.studies.runner import DIVERGED, DONE, FAILED, Record


class Left(NamedTuple):
    """The jobs of one stage."""

    stage: str
    done: int
    failed: int
    diverged: int
    left: int  # of these, what failed is tried again
    seconds_each: float | None  # median of those that are done; None where none is


def count_jobs(points: Sequence[Point], record: Callable[[Job], Record | None]) -> list[Left]:
    """Counts the jobs of some points by stage and by how they ended.

    Args:
        points: of the study, or of a shard.
        record: how a job ended, `Runner.record`.
    """
    by_stage: dict[str, list[Record | None]] = {}
    for job in jobs_of(points):
        by_stage.setdefault(job.stage, []).append(record(job))
    found = []
    for stage, records in by_stage.items():
        counts = {
            s: sum(r is not None and r.status == s for r in records)
            for s in (DONE, FAILED, DIVERGED)
        }
        seconds = [r.seconds for r in records if r is not None and r.status == DONE]
        found.append(
            Left(
                stage,
                *counts.values(),
                left=len(records) - counts[DONE] - counts[DIVERGED],
                seconds_each=statistics.median(seconds) if seconds else None,
            )
        )
    return found


def estimate_left(rows: Iterable[Left]) -> float | None:
    """Seconds that one worker needs for the rest; None where a stage has not been timed yet."""
    total = 0.0
    for row in rows:
        if row.left and row.seconds_each is None:
            return None
        total += row.left * (row.seconds_each or 0.0)
    return total


def progress_table(rows: Sequence[Left]) -> Table:
    """The jobs of a study, stage by stage."""
    table = Table(title="Runs", title_justify="left")
    table.add_column("stage")
    for name in ("done", "failed", "diverged", "left", "s each"):
        table.add_column(name, justify="right")
    for row in rows:
        each = "?" if row.seconds_each is None else f"{row.seconds_each:.0f}"
        table.add_row(row.stage, *map(str, (row.done, row.failed, row.diverged, row.left)), each)
    return table
