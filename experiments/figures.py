"""Draws what a study has measured so far, and writes the numbers beside it.

    python -m experiments.figures configs/studies/quickstart.yaml

Writes into figures/ of the study: curves (the paper's figures 2-4), beta (5), best (6), frontier
and held_out (ours), each as .png and .csv, named where there are several rewards, and residual
where evaluations have two samples a prompt; differences.csv and table.md with paired differences;
equal_kl.csv and equal_kl.md, what all runs had given by the time that they had the same KL; where
another setting varies, groups (.png, .csv, .md) of all its values, paths (.png, .csv) and, of two
or more rewards that are no parts of each other, front.png. The table also goes into the model cards
of the policies and of what they share. Runs that are not done are left out, and their number is
said.
"""

import logging
import math
from collections.abc import Mapping, Sequence

from etils import epath

from copg_jax import runtime
from copg_jax.config.load import run_main
from copg_jax.errors import InputError
from copg_jax.files import write_text
from copg_jax.hf.card import CARD_NAME, add_to_card
from experiments.studies import equal_kl, pictures, tables
from experiments.studies.grid import Grid, Point
from experiments.studies.groups import front_figure, groups_figure, rows_by_group, to_markdown
from experiments.studies.outcomes import Curve, Ended, best_curves, read_curves, reward_gap_sd
from experiments.studies.runner import DONE, Runner
from experiments.studies.second_look import ended, second_look
from experiments.studies.study_config import StudyConfig

log = logging.getLogger("copg_jax.figures")


def main(study: StudyConfig) -> None:
    """Draws every group of runs that differ in loss, β and seed only."""
    runtime.setup()
    grid = Grid(study)
    runner = Runner(study.output_dir, {})
    first, second = (
        [(point, ended(point, runner)) for point in points]
        for points in (grid.points, second_look(grid, runner))
    )
    done = [point for point, end in first if end == DONE]
    if len(done) < len(first):
        log.warning("%d of %d runs are not done: left out", len(first) - len(done), len(first))
    if not done:
        raise InputError(
            f"{study.output_dir}: wanted runs of the study that are done, got none of {len(first)} "
            "with the settings of this file. Fix: python -m experiments.study with the same file "
            "and settings; --list says what is left"
        )
    figures, groups = epath.Path(study.output_dir) / "figures", {}
    for group in dict.fromkeys(point.group for point in done):
        own, looked = ([pair for pair in x if pair[0].group == group] for x in (first, second))
        folder = figures / group
        folder.mkdir(parents=True, exist_ok=True)
        groups[group] = draw(study, own, looked, folder)
        log.info("wrote %s", folder)
    at_kl = equal_kl.rows_at_kl(groups)
    write_text(figures / "equal_kl.csv", tables.to_csv(at_kl))
    write_text(figures / "equal_kl.md", equal_kl.to_markdown(at_kl))
    if len(groups) > 1:
        _draw_groups(groups, figures, beta=done[0].evaluation.config.beta)


def draw(
    study: StudyConfig, first: Sequence[Ended], second: Sequence[Ended], folder: epath.Path
) -> list[Curve]:
    """Draws one group of runs; returns its curves.

    Args:
        study: says what to draw.
        first: the runs of the grid, and how each ended.
        second: those at the best β of each method; none where there are none yet.
        folder: to write into.
    """
    planned = read_curves(first)
    found = [curve for curve in planned if curve.runs]
    point = first[0][0]
    beta = point.evaluation.config.beta
    over_steps = tables.rows_over_steps(found)
    by_beta = tables.rows_by_beta(found, beta=beta, sd=reward_gap_sd(point.policy.config))
    best = {name: best_curves(found, value) for name, value in tables.measures(beta).items()}
    best_betas = {curve.method: curve.beta for curve in best["reward"]}
    # The second look is at the β that are best in reward, and fair once each of its runs is done.
    num_left = sum(end != DONE for _, end in second)
    if num_left:
        log.warning("%d of %d runs at the best beta are not done", num_left, len(second))
    elif second:
        best["reward"] = read_curves(second)
    best_over_steps = tables.rows_over_steps(best["reward"])
    differences = tables.rows_of_differences(best, beta=beta)
    drawn = {
        "curves": lambda: (pictures.curves_figure(over_steps), over_steps),
        "beta": lambda: (pictures.beta_figure(by_beta), by_beta),
        "best": lambda: (pictures.best_figure(best_over_steps), best_over_steps),
        "frontier": lambda: (pictures.frontier_figure(over_steps, by_beta, beta=beta), by_beta),
        "held_out": lambda: (pictures.held_out_figure(over_steps, best_betas), over_steps),
        "named": lambda: (pictures.named_figure(over_steps), over_steps),
        "residual": lambda: (pictures.residual_figure(over_steps), over_steps),
    }
    # One reward has its pictures in the others; a residual wants CoPG, and two samples a prompt.
    empty = {"named": not tables.names_of(found[0])}
    empty["residual"] = all(
        row["method"] != "copg" or math.isnan(row["residual_samples"]) for row in over_steps
    )
    for name in study.figures:
        if empty.get(name, False):
            continue
        if name == "best" and not best_over_steps:
            log.warning("best is not drawn: no beta has all of its seeds done")
            continue
        figure, rows = drawn[name]()
        pictures.write_picture(figure, folder / f"{name}.png")
        write_text(folder / f"{name}.csv", tables.to_csv(rows))
    write_text(folder / "differences.csv", tables.to_csv(differences))
    num_prompts = len(found[0].runs[0].final.reward)
    table = tables.to_markdown(by_beta, differences, beta=beta, num_prompts=num_prompts)
    table += f"\n{lost}\n" if (lost := tables.lost(planned)) else ""
    write_text(folder / "table.md", table)
    _add_to_cards([point for point, end in (*first, *second) if end == DONE], table)
    return found


def _draw_groups(groups: Mapping[str, Sequence[Curve]], folder: epath.Path, *, beta: float) -> None:
    """Draws all groups beside each other."""
    rows = rows_by_group(groups, beta=beta)
    pictures.write_picture(groups_figure(rows, beta=beta), folder / "groups.png")
    write_text(folder / "groups.csv", tables.to_csv(rows))
    write_text(folder / "groups.md", to_markdown(rows, beta=beta))
    ways = [
        {"group": group} | row
        for group, curves in groups.items()
        for row in tables.rows_over_steps(curves)
    ]
    pictures.write_picture(equal_kl.paths_figure(groups), folder / "paths.png")
    write_text(folder / "paths.csv", tables.to_csv(ways))
    named = [name for name in equal_kl.measures(groups) if name != "reward"]
    if len(named) > 1:
        pictures.write_picture(front_figure(rows, *named[:2]), folder / "front.png")
    log.info("wrote %s", folder / "groups.md")


def _add_to_cards(points: Sequence[Point], table: str) -> None:
    """Into all that the runs exported or share; of several groups, a section of each."""
    titles = {
        job.config.output_dir: ": ".join(filter(None, ("The study that it is of", point.group)))
        for point in points
        for job in point.jobs
    }
    for path, title in titles.items():
        for name in ("model", "best", "adapter", "best_adapter"):
            folder = epath.Path(path) / name
            if (folder / CARD_NAME).exists():
                add_to_card(folder, title, table)


if __name__ == "__main__":
    run_main(main, StudyConfig, description=__doc__)
