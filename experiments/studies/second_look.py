"""Which runs come after the grid: those at the best β of each method (paper: Fig. 6)."""

from experiments.studies.grid import Grid, Point
from experiments.studies.outcomes import best_values, read_outcome
from experiments.studies.runner import DONE, Runner


def ended(point: Point, runner: Runner) -> str | None:
    """How a point ended: as its last job, or the first without a result; None if it has not."""
    for job in point.jobs:
        record = runner.record(job)
        if record is None or record.status != DONE:
            return record and record.status
    return DONE


def second_look(grid: Grid, runner: Runner) -> list[Point]:
    """The runs at the best β of each method; none before the whole grid has ended."""
    found = [(point, ended(point, runner)) for point in grid.points]
    if any(status is None for _, status in found):
        return []
    done = [point for point, status in found if status == DONE]
    return grid.best_points(best_values(map(read_outcome, done)))
