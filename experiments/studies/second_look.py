"""Which runs come after the grid: those at the best β of each method (paper: Fig. 6)."""

import json

from copg_jax import distributed
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
    method without a β whose seeds are all done. Every process calls it.
    """
    if not grid.has_second_look:
        return []
    # Other workers go on writing records: all processes take what the first has seen.
    chosen = _chosen(grid, runner) if distributed.is_main_process() else []
    return grid.best_points(json.loads(distributed.from_all(json.dumps(chosen))[0]))


def _chosen(grid: Grid, runner: Runner) -> list[Values]:
    found = [(point, ended(point, runner)) for point in grid.points]
    if any(status is None for _, status in found):
        return []
    chosen: list[Values] = []
    for group in dict.fromkeys(point.group for point in grid.points):
        own = [(point, status) for point, status in found if point.group == group]
        chosen += best_values(read_curves(own))
    return chosen
