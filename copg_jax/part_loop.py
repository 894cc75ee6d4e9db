"""A folder of parts, made part by part: an interrupted run goes on with those that are missing."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from copg_jax import distributed
from copg_jax.data.parts import part_name
from copg_jax.errors import Damaged
from copg_jax.tracking import MetricsLogger, warn_of_lost_lines

log = logging.getLogger(__name__)


class PartFiles(NamedTuple):
    """How the parts of one kind of folder are found and written; side-cars have `parts`."""

    record: epath.Path  # the side-car's
    whole: Callable[[], dict[str, str]]  # finished ones: name → checksum
    write: Callable[..., dict[str, str]]  # (index, groups, metrics) → the same of it
    save: Callable[[Any], None]  # the side-car


def is_complete(
    folder: epath.Path, num_groups: int, part_size: int, is_whole: Callable[[], bool]
) -> bool:
    """Whether a folder is made to its end, and its parts are as they were written.

    Args:
        folder: the folder.
        num_groups: in all parts.
        part_size: groups a part.
        is_whole: asked in process 0; may raise Damaged, and then it is not.

    Raises:
        InputError: a part that is not of it, or that cannot be read.
    """
    answer = False
    with distributed.main_first(folder, lambda: True):  # nothing is made here
        if distributed.is_main_process():
            with suppress(Damaged):  # who makes the parts names it
                answer = is_whole()
    answer = bool(distributed.from_main(answer))
    if answer:
        warn_of_lost_lines(folder, _ends(num_groups, part_size).tolist())
        log.info("%s: already complete (%d groups)", folder, num_groups)
    return answer


def make_parts(
    make: Callable[[range], tuple[Sequence[Any], dict[str, float]]],
    num_groups: int,
    *,
    folder: epath.Path,
    part_size: int,
    files: PartFiles,
    side_car: Any,
    quiet: bool = False,
) -> Any:
    """Makes the parts that are not there; returns the side-car that names all of them.

    Every process makes a part, and process 0 writes it.

    Args:
        make: indices of groups → what `files.write` writes, and metrics.
        num_groups: in all parts.
        folder: of the run, with its metrics.jsonl.
        part_size: groups a part.
        files: finds and writes parts.
        side_car: written first, as it is, and after each part with what is finished.
        quiet: nothing on the console.
    """
    first_rows, ends = range(0, num_groups, part_size), _ends(num_groups, part_size)
    with distributed.main_first(files.record):
        if distributed.is_main_process():
            side_car = replace(side_car, parts=files.whole())
            files.save(side_car)
    names = [part_name(part) for part in range(len(first_rows))]
    finished = distributed.from_main(np.isin(names, list(side_car.parts)))
    done = int((ends - first_rows)[finished].sum())
    with MetricsLogger(
        folder,
        total_steps=num_groups,
        unit="group",
        log_every=1,
        quiet=quiet,
        resume_step=done or None,
        is_done=set(ends[finished].tolist()).__contains__,
        logged=ends[finished].tolist(),
    ) as logger:
        if not quiet:
            log.info("%d groups to do", num_groups - done)
        for part, (first, end) in enumerate(zip(first_rows, ends.tolist(), strict=True)):
            if finished[part]:
                continue
            groups, metrics = make(range(first, end))
            # Before the part: what is finished has its line.
            done += end - first
            logger.log(end, metrics, done=done)
            logger.sync()
            if distributed.is_main_process():
                side_car = replace(
                    side_car, parts=side_car.parts | files.write(part, groups, metrics)
                )
                files.save(side_car)
    return side_car


def _ends(num_groups: int, part_size: int) -> np.ndarray:
    """How many groups are in each part and those before it: the step of its line in the log."""
    return np.minimum(np.arange(0, num_groups, part_size) + part_size, num_groups)
