"""Draws what a study has measured so far, and writes the numbers beside it.

    python -m experiments.figures configs/studies/quickstart.yaml

Writes into figures/ of the study: curves (the paper's figures 2-4), beta (5), best (6), frontier
and held_out (ours), each as .png and .csv; differences.csv and table.md with paired differences.
The table also goes into the model cards of the policies. Runs that are not done are left out, and
their number is said.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from etils import epath

from copg_jax import checksums, runtime
from copg_jax.config.load import run_main
from copg_jax.errors import InputError
from copg_jax.files import write_text
from copg_jax.hf.card import add_to_card
from experiments.studies import pictures, tables
from experiments.studies.comparison import Policy
from experiments.studies.grid import Grid, Point
from experiments.studies.outcomes import (
    Curve,
    above_baseline,
    best_curves,
    curves,
    read_outcome,
    reward_gap_sd,
)
from experiments.studies.runner import DONE, Runner
from experiments.studies.second_look import ended, second_look
from experiments.studies.study_config import StudyConfig

log = logging.getLogger("copg_jax.figures")


def main(study: StudyConfig) -> None:
    """Draws every group of runs that differ in loss, β and seed only."""
    runtime.setup()
    grid = Grid(study)
    runner = Runner(study.output_dir, {})
    done = [point for point in grid.points if ended(point, runner) == DONE]
    best = [point for point in second_look(grid, runner) if ended(point, runner) == DONE]
    if len(done) < len(grid.points):
        log.warning(
            "%d of %d runs are not done: left out", len(grid.points) - len(done), len(grid.points)
        )
    if not done:
        raise InputError(f"{study.output_dir}: wanted runs of the study that are done, got none")
    for group in dict.fromkeys(point.group for point in done):
        own, looked = ([p for p in points if p.group == group] for points in (done, best))
        folder = epath.Path(study.output_dir) / "figures" / group
        folder.mkdir(parents=True, exist_ok=True)
        draw(study, own, looked, folder)
        log.info("wrote %s", folder)


def draw(
    study: StudyConfig, points: Sequence[Point], second: Sequence[Point], folder: epath.Path
) -> None:
    """Draws one group of runs.

    Args:
        study: says what to draw.
        points: of the grid, done.
        second: runs at the best β of each method, done; none where there are none.
        folder: to write into.
    """
    found = curves(map(read_outcome, points))
    looked = curves(map(read_outcome, second))
    beta = points[0].evaluation.config.beta
    sd = reward_gap_sd(points[0].policy.config.data)
    over_steps = tables.rows_over_steps(found)
    by_beta = tables.rows_by_beta(found, beta=beta, sd=sd)
    best = {
        name: looked or best_curves(found, partial(_end, value=value))
        for name, value in tables.measures(beta).items()
    }
    best_over_steps = tables.rows_over_steps(best["reward"])
    differences = tables.rows_of_differences(best, beta=beta)
    drawn = {
        "curves": lambda: (pictures.curves_figure(over_steps), over_steps),
        "beta": lambda: (pictures.beta_figure(by_beta), by_beta),
        "best": lambda: (pictures.best_figure(best_over_steps), best_over_steps),
        "frontier": lambda: (pictures.frontier_figure(over_steps, by_beta, beta=beta), by_beta),
        "held_out": lambda: (pictures.held_out_figure(over_steps), over_steps),
    }
    for name in study.figures:
        figure, rows = drawn[name]()
        pictures.write_picture(figure, folder / f"{name}.png")
        write_text(folder / f"{name}.csv", tables.to_csv(rows))
    write_text(folder / "differences.csv", tables.to_csv(differences))
    num_prompts = len(best["reward"][0].runs[0].final.reward)
    table = tables.to_markdown(by_beta, differences, beta=beta, num_prompts=num_prompts)
    write_text(folder / "table.md", table)
    for point in (*points, *second):
        for name in ("model", "best"):
            model = epath.Path(point.policy.config.output_dir) / name
            if checksums.is_sealed(model):
                add_to_card(model, "The study that it is of", table)


def _end(curve: Curve, value: Callable[[Policy], np.ndarray]) -> float:
    return above_baseline(curve, value).mean


if __name__ == "__main__":
    run_main(main, StudyConfig, description=__doc__)
