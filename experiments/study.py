"""Runs a study: every point of a grid of settings, through the stages of the pipeline.

    python -m experiments.study configs/studies/quickstart.yaml [--list] [--shard I/N]

A point is an ordinary run folder. What points share is run once, what is done is left alone, and a
point that fails or diverges is recorded and stops no other; the same command goes on. --list says
what is left. --shard 0/4 does the first of four parts; in a SLURM array that is the default. The
runs at the best β are the work of the part that ends last.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from copg_jax import distributed, reuse, runtime
from copg_jax.config.load import run_main
from copg_jax.dotted import find
from copg_jax.errors import InputError
from experiments import evaluate, online, sample, score, train_policy, train_reward, train_sft
from experiments.studies.grid import Grid, Point, jobs_of
from experiments.studies.progress import count_jobs, estimate_left, progress_table
from experiments.studies.runner import DIVERGED, FAILED, Runner
from experiments.studies.second_look import second_look
from experiments.studies.study_config import StudyConfig

log = logging.getLogger("copg_jax.study")

T = TypeVar("T")
MAINS = {
    "sft": train_sft.main,
    "reward": train_reward.main,
    "sample": sample.main,
    "score": score.main,
    "online": online.main,
    "policy": train_policy.main,
    "evaluate": evaluate.main,
}


def main(study: StudyConfig, *, shard: str | None = None, only_list: bool = False) -> int:
    """Runs what is left of a study, or lists it.

    Args:
        study: its config.
        shard: "I/N" for one part of it; None for the part of a SLURM array's task, or all.
        only_list: run nothing.

    Returns:
        1 where something has failed, else 0.
    """
    part = parse_shard(shard, os.environ)
    grid = Grid(study)
    runner = Runner(study.output_dir, {**MAINS, "inputs": make_inputs})
    if not only_list:
        runtime.setup(grid.points[0].policy.config.distributed)
        with reuse.shared_by_runs(grid.seeds):
            _run_all(runner, part_of(grid.points, part))
            # All of it in each part: the one that ends last finds it; claims part it among several.
            _run_all(runner, second_look(grid, runner))
    best = second_look(grid, runner)
    points = [*part_of(grid.points, part), *best]
    if distributed.is_main_process():
        _report(points, runner, only_list=only_list)
        if study.best is not None and not best:
            log.info(
                "the runs at the best beta of each method follow once all others have ended, where "
                "a beta has all of its seeds"
            )
    return int(any(row.failed for row in count_jobs(points, runner.record)))


def make_inputs(config: Any) -> None:
    """Calls the function of the study's `inputs`."""
    function = find(config.function, "inputs.function", "experiments.quickstart.make_inputs")
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    function(Path(config.output_dir), **config.arguments)


def _run_all(runner: Runner, points: Sequence[Point]) -> None:
    # What others had claimed is looked at once more at the end: they may be gone.
    busy = runner.run_points(points)
    runner.run_points(busy)


def _report(points: Sequence[Point], runner: Runner, *, only_list: bool) -> None:
    """Prints how far these points are, what has failed, and on request what is left."""
    console = Console(highlight=False, soft_wrap=True)
    rows = count_jobs(points, runner.record)
    console.print(progress_table(rows))
    for job in jobs_of(points):
        record = runner.record(job)
        if record is not None and record.status in (FAILED, DIVERGED):
            console.print(f"{job.name}: {record.status}: {record.reason}", markup=False)
        elif record is None and only_list:
            console.print(f"left: {job.name}", markup=False)
    seconds = estimate_left(rows)
    if seconds is None:
        console.print("How long the rest takes is known once every stage has run.")
    elif seconds:
        console.print(f"About {seconds / 60:.0f} minutes are left, for one worker.")


def part_of(items: Sequence[T], shard: tuple[int, int]) -> list[T]:
    """A contiguous part, so that a worker compiles few losses."""
    index, count = shard
    return list(items[index * len(items) // count : (index + 1) * len(items) // count])


def parse_shard(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Which part of how many: of `--shard I/N`, else of a SLURM array, else all.

    Raises:
        InputError: no such part.
    """
    if text is None and "SLURM_ARRAY_TASK_ID" in environment:
        names = ("ID", "MIN", "STEP", "COUNT")
        task, least, step, count = (environment.get(f"SLURM_ARRAY_TASK_{n}", "") for n in names)
        if not count:
            raise InputError("SLURM_ARRAY_TASK_COUNT: wanted a number, got none: give --shard I/N")
        index = (int(task) - int(least or 0)) // int(step or 1)
        text = f"{index}/{count}"
    left, slash, right = (text or "0/1").partition("/")
    if not (slash and left.isdigit() and right.isdigit() and int(left) < int(right)):
        raise InputError(f"--shard: wanted I/N with 0 <= I < N, such as 0/4, got {text!r}")
    return int(left), int(right)


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and the arguments of the config."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--shard")
    return parser.parse_known_args(list(arguments))


if __name__ == "__main__":
    options, sys.argv[1:] = parse_options(sys.argv[1:])
    run_main(
        partial(main, shard=options.shard, only_list=options.list),
        StudyConfig,
        description=__doc__,
    )
