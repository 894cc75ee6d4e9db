"""Which runs come after the grid: those at the best β of each method (paper: Fig. 6)."""

from experiments.studies.axes import Values
from experiments.studies.grid import Grid, Point
from experiments.studies.outcomes import best_values, read_curves
from experiments.studies.runner import DONE, Runner


def ended(point: Point, runner: Runner) -> str | None:
    """How a point ended: as its last job, or the first without a result; None if it has not."""
    for job in point.jobs:
        record = runner.record(job)
        if record is None or record.status != DONE:
            return record and record.status
    return DONE


def second_look(grid: Grid, runner: Runner) -> list[Point]:
    """The runs at the best β of each method; none before the whole grid has ended, and none of a
    method without a β whose seeds are all done.
    """
    if not grid.has_second_look:
        return []
    found = [(point, ended(point, runner)) for point in grid.points]
    if any(status is None for _, status in found):
        return []
    chosen: list[Values] = []
    for group in dict.fromkeys(point.group for point in grid.points):
        own = [(point, status) for point, status in found if point.group == group]
        chosen += best_values(read_curves(own))
    return grid.best_points(chosen)
