"""Scoring a data set once: rewards and ln π_ref of every completion, in resumable parts.

Both are constants of training, so computing them here leaves training with one model and no reward
function.

1. Groups are taken part by part; parts that are on disk already, as they were written, are skipped.
   Of a folder that `is_complete` nothing is written.
2. The reward function sees the texts, the reference model the tokens: a completion that is there
   several times in one part is computed once, one that is in several parts once in each.
3. Each part is written whole or not at all; the side-car that makes the folder usable comes last.

Every process calls the reward functions (a model that is spread over all devices needs them all)
and process 0 writes what it was told.
"""

import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import compress
from typing import Any

import numpy as np
from etils import epath

from copg_jax import distributed
from copg_jax.config.sections import RewardSpec
from copg_jax.config.stages import ScoreConfig
from copg_jax.data import scored
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.formats.choice import text_format_hash
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.groups import TokenGroup, columns_by_completion
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import Encoder
from copg_jax.errors import Damaged, InputError
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.infer import GroupForward
from copg_jax.rewards.functions import DROPPED, WeightedRewards
from copg_jax.rewards.protocol import OWN
from copg_jax.runtime import Progress
from copg_jax.tracking import MetricsLogger, warn_of_lost_lines

log = logging.getLogger(__name__)


def check_folder(folder: epath.Path) -> None:
    """Raises InputError where a folder has parts of another format, so that none are added."""
    if scored.is_scored(str(folder)):
        scored.read_side_car(folder)


def open_rewards(config: ScoreConfig, dataset: GroupDataset) -> WeightedRewards:
    """The functions of the config; without any, the rewards that the rows bring along.

    Raises:
        InputError: no function and rows without rewards, or with human choices alone; a function
            that needs the rewards of rows that have none.
    """
    bare = None
    if not dataset.has_rewards:
        where = next(row.where for row in dataset if row.rewards is None)
        bare = f"the row at {where} has no rewards of its own"
    if config.rewards:
        return WeightedRewards(config.rewards, no_own=bare)
    wanted = "rewards: wanted at least one reward function, got none"
    name = "name a function, e.g. rewards='[{function: copg_jax.rewards.rouge_l}]'"
    if bare is not None:
        raise InputError(
            f"{wanted}, and {bare}. Fix: {name}; or give every row `rewards`, one for each "
            "completion."
        )
    first = next(iter(GroupReader(config.data)), None)
    if isinstance(first, TextGroup) and first.is_choice:
        raise InputError(
            f"{wanted}, and the rows, such as that at {first.where}, have a human choice and no "
            f"scores of their own. Fix: {name}; or, to train on the choice as rewards 1 and 0, set "
            "rewards='[{function: copg_jax.rewards.given}]'."
        )
    log.info("no reward function is named: the rewards that the rows bring along are kept")
    return WeightedRewards([RewardSpec("copg_jax.rewards.given")], no_own=None)


def make_side_car(
    config: ScoreConfig,
    reference: PretrainedModel,
    rewards: WeightedRewards,
    dataset: GroupDataset,
) -> scored.SideCar:
    """What a scored folder is made of, before its first part is written."""
    encoder, text_format = Encoder(reference.tokenizer), dataset.stats["text_format"]
    return scored.SideCar(
        tokenizer_hash=encoder.hash,
        text_format=text_format,
        text_format_hash=text_format_hash(text_format, encoder),
        reference_hash=reference.hash,
        reference_dtype=reference.arch.dtype,
        rewards=rewards.provenance,
        limits=config.data.limits._asdict(),
        complete=False,
    )


def is_complete(folder: epath.Path, num_groups: int, part_size: int) -> bool:
    """Whether a folder is scored to its end, and its parts are as they were written.

    Raises:
        InputError: a part that is not of it, or that cannot be read.
    """
    is_whole = False
    with distributed.main_first(folder):
        if distributed.is_main_process() and scored.is_scored(str(folder)):
            side_car = scored.read_side_car(folder)
            try:
                scored.check_parts(folder, side_car)
                is_whole = side_car.complete
            except Damaged:
                pass  # scoring names it
    is_whole = bool(distributed.from_main(is_whole))
    if is_whole:
        warn_of_lost_lines(folder, _ends(num_groups, part_size).tolist())
        log.info("%s: already complete (%d groups)", folder, num_groups)
    return is_whole


def _ends(num_groups: int, part_size: int) -> np.ndarray:
    """How many groups are in each part and those before it: the step of its line in the log."""
    return np.minimum(np.arange(0, num_groups, part_size) + part_size, num_groups)


def score_dataset(
    dataset: GroupDataset,
    *,
    folder: epath.Path,
    part_size: int,
    rewards: WeightedRewards,
    reference: GroupForward,
    side_car: scored.SideCar,
) -> None:
    """Scores every group and writes the scored folder.

    Args:
        dataset: tokenised groups.
        folder: where part-*.parquet and scored.json go.
        part_size: groups a part.
        rewards: total and parts of the reward.
        reference: ln π_ref of groups.
        side_car: what makes the numbers; written as incomplete first and as complete at the end.

    Raises:
        InputError: a reward function that misbehaves; finished parts stay.
    """
    first_rows = range(0, len(dataset), part_size)
    decides = json.dumps([asdict(side_car), dataset.fingerprint, part_size])
    key = hashlib.sha256(decides.encode()).hexdigest()
    with distributed.main_first(folder / scored.SIDE_CAR):
        if distributed.is_main_process():
            side_car = replace(side_car, parts=scored.whole_parts(folder, key))
            scored.write_side_car(folder, side_car)
    names = [scored.part_name(part) for part in range(len(first_rows))]
    finished = distributed.from_main(np.isin(names, list(side_car.parts)))
    ends = _ends(len(dataset), part_size)
    done = int((ends - first_rows)[finished].sum())
    with MetricsLogger(
        folder,
        total_steps=len(dataset),
        unit="group",
        log_every=1,
        resume_step=done or None,
        is_done=set(ends[finished].tolist()).__contains__,
        logged=ends[finished].tolist(),
    ) as logger:
        log.info("scoring %d groups", len(dataset) - done)
        spread = _per_completion(dataset) - rewards.row_columns
        for part, (first, end) in enumerate(zip(first_rows, ends.tolist(), strict=True)):
            if finished[part]:
                continue
            rows = [dataset[i] for i in range(first, end)]
            groups, metrics = _score_rows(rows, spread, rewards, reference)
            # Before the part: what is finished has its line.
            done += len(rows)
            logger.log(end, metrics, done=done)
            logger.sync()
            if distributed.is_main_process():
                dropped = {name: n for name, n in metrics.items() if DROPPED in name}
                written = scored.write_part(folder, part, groups, key, dropped)
                side_car = replace(side_car, parts=side_car.parts | written)
                scored.write_side_car(folder, side_car)
    with distributed.main_first(folder):
        if distributed.is_main_process():
            _finish(dataset, folder, side_car)


def _finish(dataset: GroupDataset, folder: epath.Path, side_car: scored.SideCar) -> None:
    """Makes the folder usable: the side-car with the counts of all parts."""
    dropped = scored.count_dropped(folder)
    counts = dataset.stats | scored.count_rewards(folder) | {"rewards missing": dropped}
    if counts["without a reward"] == counts["completions scored"]:
        names = " or ".join(spec["function"] for spec in side_car.rewards)
        raise InputError(
            f"{folder}: not one of {counts['completions scored']} completions has a reward: each "
            f"got None of {names} ({dropped}). Correct that, and score into another output_dir."
        )
    scored.write_side_car(folder, replace(side_car, complete=True, counts=counts))
    log.info(
        "%s: %d completions scored, %d of them without a reward (they will be left out)%s",
        folder,
        counts["completions scored"],
        counts["without a reward"],
        "".join(f"\n  {name}: {number}" for name, number in dropped.items()),
    )


def _per_completion(dataset: GroupDataset) -> set[str]:
    """Columns that hold, in every row, a list with one entry for each completion, or null."""
    spread, mixed = columns_by_completion(dataset)
    for name, where in mixed.items():
        log.warning(
            "column %r: at %s not one entry for each completion, as in other rows: functions "
            "receive what each row has, whole",
            name,
            where,
        )
    if spread:
        log.info("columns with one entry for each completion: %s", ", ".join(sorted(spread)))
    return spread


def _spread(row: TokenGroup, names: set[str]) -> TokenGroup:
    """A group whose columns of one entry a completion are those of the completions it kept."""
    kept = [True] * len(row.completions) if row.kept is None else row.kept
    lists = {name: row.columns.get(name) for name in names}
    own = {name: list(compress(values, kept)) for name, values in lists.items() if values}
    return replace(row, columns=row.columns | own, kept=None)


def _score_rows(
    rows: Sequence[TokenGroup],
    spread: set[str],
    rewards: WeightedRewards,
    reference: GroupForward,
) -> tuple[list[scored.ScoredGroup], dict[str, float]]:
    """Scores the groups of a part; with metrics."""
    begin = time.perf_counter()
    rows = [_spread(row, spread) for row in rows]
    counts: Counter[str] = Counter()
    totals, parts = _reward_groups(rewards, rows, spread, counts)
    reward_sec = time.perf_counter() - begin
    ref_logps = reference(rows)
    groups = [
        scored.ScoredGroup(replace(row, rewards=total, ref_logps=ref_logp), of_row)
        for row, total, ref_logp, of_row in zip(rows, totals, ref_logps, parts, strict=True)
    ]
    seconds = time.perf_counter() - begin
    values = np.concatenate(totals)
    kept = values[~np.isnan(values)]
    return groups, {
        "reward/mean": float(kept.mean()) if len(kept) else math.nan,
        "reward/std": float(kept.std()) if len(kept) else math.nan,
        "reward/dropped": len(values) - len(kept),
        **counts,
        "ref_logp/mean": float(np.concatenate(ref_logps).mean()),
        "perf/groups_per_sec": len(rows) / seconds,
        "perf/reward_share": reward_sec / seconds,
    }


def _reward_groups(
    rewards: WeightedRewards, rows: Sequence[TokenGroup], spread: set[str], counts: Counter[str]
) -> tuple[list[np.ndarray], list[dict[str, np.ndarray]]]:
    """Total reward and its parts of each group; NaN where a reward is absent, counted by reason."""
    cells = [(row, k) for row in rows for k in range(len(row.completions))]

    def entry(row: TokenGroup, k: int, name: str) -> Any:
        value = row.columns.get(name)
        return value[k] if name in spread and value is not None else value

    names = sorted({name for row in rows for name in row.columns})
    columns = {name: [entry(row, k, name) for row, k in cells] for name in names}
    if any(row.rewards is not None for row in rows):
        columns[OWN] = [None if row.rewards is None else float(row.rewards[k]) for row, k in cells]
    number = len(cells) * len(rewards)
    with Progress(f"rewards of {len(cells)} completions", number, "rewards") as progress:
        total, parts = rewards(
            [row.prompt for row, _ in cells],
            [row.completions[k] for row, k in cells],
            columns,
            [row.where for row, _ in cells],
            counts=counts,
            update=progress.update,
        )
    cuts = np.cumsum([len(row.completions) for row in rows])[:-1]
    split = {name: np.split(values, cuts) for name, values in parts.items()}
    of_row = [{name: values[i] for name, values in split.items()} for i in range(len(rows))]
    return np.split(total, cuts), of_row
