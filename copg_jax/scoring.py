"""Scoring a data set once: rewards and ln π_ref of every completion, in resumable parts.

Both are constants of training, so computing them here leaves training with one model and no reward
function.

1. Groups are taken part by part; parts that are on disk already, as they were written, are skipped.
   Of a folder that `is_scored_to_its_end` nothing is written.
2. The reward function sees the texts, the reference model the tokens: a completion that is there
   several times in one part is computed once, one that is in several parts once in each.
3. Each part is written whole or not at all; the side-car that makes the folder usable comes last.

Every process calls the reward functions (a model that is spread over all devices needs them all)
and process 0 writes what it was told.
"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import compress
from typing import Any

import numpy as np
from etils import epath

from copg_jax import distributed
from copg_jax.config.reward_spec import RewardSpec
from copg_jax.config.sections import Limits
from copg_jax.config.stages import ScoreConfig
from copg_jax.data import sampled, scored
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.formats.choice import text_format_hash
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.group_list import GroupList
from copg_jax.data.groups import TokenGroup, columns_by_completion
from copg_jax.data.reader import GroupReader
from copg_jax.data.reward_stats import (
    TOTAL,
    describe_rewards,
    format_rewards,
    moments,
    read_rewards,
)
from copg_jax.data.tokenizer import Encoder
from copg_jax.errors import InputError
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.part_loop import PartFiles, make_parts
from copg_jax.rewards.functions import DROPPED, WeightedRewards
from copg_jax.rewards.protocol import OWN
from copg_jax.runtime import Progress

log = logging.getLogger(__name__)

Reference = Callable[[Sequence[TokenGroup]], list[np.ndarray]]
"""Groups → ln π_ref of their completions, nats: a `GroupForward`, or `sampled_logps`."""


def sampled_logps(rows: Sequence[TokenGroup]) -> list[np.ndarray]:
    """ln µ of samples, which is ln π_ref where π_ref drew them; see `drawn_from`."""
    return [row.mu_logps for row in rows if row.mu_logps is not None]


def drawn_from(path: str, reference: PretrainedModel) -> bool:
    """Whether data are samples of this reference in its dtype, with nothing cut off or scaled."""
    if not sampled.is_sampled(path):
        return False
    made = sampled.read_sampled(epath.Path(path))
    is_same = (made.model_hash, made.model_dtype) == (reference.hash, reference.arch.dtype)
    return is_same and made.is_whole_model


def check_folder(folder: epath.Path) -> None:
    """Raises InputError where a folder has parts of another format, so that none are added."""
    if scored.is_scored(str(folder)):
        scored.read_side_car(folder)


def open_rewards(config: ScoreConfig, dataset: GroupDataset) -> WeightedRewards:
    """The functions of the config; without any, the rewards that the rows bring along.

    Raises:
        InputError: no function and rows without rewards, or with human choices alone; a function
            that needs the rewards of rows that have none, or that cannot use a row.
    """
    bare = None
    if not dataset.has_rewards:
        where = next(row.where for row in dataset if row.rewards is None)
        bare = f"the row at {where} has no rewards of its own"
    if config.rewards:
        rewards = WeightedRewards(config.rewards, no_own=bare)
        rewards.check_rows(dataset)
        return rewards
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
    limits: Limits,
    reference: PretrainedModel,
    rewards: WeightedRewards,
    dataset: GroupDataset | GroupList,
    *,
    reference_hash: str | None = None,
) -> scored.SideCar:
    """What a scored folder is made of, before its first part is written.

    Args:
        limits: that the data were read with.
        reference: π_ref.
        rewards: total and parts of the reward.
        dataset: what is scored.
        reference_hash: of its weights; None: as they are in its folder.
    """
    encoder, text_format = Encoder(reference.tokenizer), dataset.stats["text_format"]
    return scored.SideCar(
        tokenizer_hash=encoder.hash,
        text_format=text_format,
        text_format_hash=text_format_hash(text_format, encoder),
        reference_hash=reference_hash or reference.hash,
        reference_dtype=reference.arch.dtype,
        rewards=rewards.provenance,
        limits=limits._asdict(),
        complete=False,
    )


def is_scored_to_its_end(folder: epath.Path, *, fix: str = "") -> bool:
    """Whether a folder is complete, and its parts are as they were written.

    Args:
        folder: the scored folder.
        fix: the way out of damage; without one, the command that wrote it.

    Raises:
        InputError: a part that is not of it, that is damaged, or that cannot be read.
    """
    if not scored.is_scored(str(folder)):
        return False
    side_car = scored.read_side_car(folder, fix=fix)
    if side_car.complete:  # else a part may have been written that the side-car does not name yet
        scored.check_parts(folder, side_car, fix=fix)
    return side_car.complete


def score_dataset(
    dataset: GroupDataset | GroupList,
    *,
    folder: epath.Path,
    part_size: int,
    rewards: WeightedRewards,
    reference: Reference,
    side_car: scored.SideCar,
    quiet: bool = False,
) -> None:
    """Scores every group and writes the scored folder.

    Args:
        dataset: tokenised groups.
        folder: where part-*.parquet and scored.json go.
        part_size: groups a part.
        rewards: total and parts of the reward.
        reference: see `Reference`.
        side_car: what makes the numbers; written as incomplete first and as complete at the end.
        quiet: nothing on the console.

    Raises:
        InputError: a reward function that misbehaves; finished parts stay.
    """
    decides = json.dumps([asdict(side_car), dataset.fingerprint, part_size])
    key = hashlib.sha256(decides.encode()).hexdigest()
    spread = _per_completion(dataset) - rewards.row_columns

    def make(indices: range) -> tuple[list[scored.ScoredGroup], dict[str, float]]:
        return score_groups([dataset[i] for i in indices], spread, rewards, reference)

    def write(
        index: int, groups: Sequence[scored.ScoredGroup], metrics: Mapping[str, float]
    ) -> dict[str, str]:
        dropped = {name: number for name, number in metrics.items() if DROPPED in name}
        return scored.write_part(folder, index, groups, key, dropped)

    side_car = make_parts(
        make,
        len(dataset),
        folder=folder,
        part_size=part_size,
        files=PartFiles(
            folder / scored.SIDE_CAR,
            whole=lambda: scored.whole_parts(folder, key),
            write=write,
            save=lambda side_car: scored.write_side_car(folder, side_car),
        ),
        side_car=side_car,
        quiet=quiet,
    )
    with distributed.main_first(folder):
        if distributed.is_main_process():
            _finish(dataset, folder, side_car, quiet)


def _finish(
    dataset: GroupDataset | GroupList, folder: epath.Path, side_car: scored.SideCar, quiet: bool
) -> None:
    """Makes the folder usable: the side-car with the counts of all parts."""
    stored, dropped = read_rewards(folder), scored.count_dropped(folder)
    stats = describe_rewards(stored)
    total, missing = len(stored.total), stats[TOTAL]["missing"]
    if missing == total:
        names = " or ".join(spec["name"] for spec in side_car.rewards if spec["weight"])
        raise InputError(
            f"{folder}: not one of {total} completions has a reward: each got None of {names} "
            f"({dropped}). Correct that, and score into another output_dir."
        )
    counts = {"completions scored": total, "without a reward": missing, "rewards": stats}
    counts = dataset.stats | counts | {"rewards missing": dropped}
    scored.write_side_car(folder, replace(side_car, complete=True, counts=counts))
    if quiet:
        return
    log.info(
        "%s: %d completions scored, %d of them without a reward (they will be left out)%s\n%s",
        folder,
        total,
        missing,
        "".join(f"\n  {name}: {number}" for name, number in dropped.items()),
        format_rewards(stats),
    )


def _per_completion(dataset: GroupDataset | GroupList) -> set[str]:
    """Columns that hold, in every row, a list with one entry for each completion, or null. Those of
    rows whose completions were drawn belong to the prompt, however long they are.
    """
    is_drawn = lambda row: row.has_eos is not None and row.rewards is None
    spread, mixed = columns_by_completion(row for row in dataset if not is_drawn(row))
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


def score_groups(
    rows: Sequence[TokenGroup],
    spread: set[str],
    rewards: WeightedRewards,
    reference: Reference,
) -> tuple[list[scored.ScoredGroup], dict[str, float]]:
    """Scores groups, with metrics; writes nothing.

    Args:
        rows: tokenised groups.
        spread: columns with one entry for each completion.
        rewards: total and parts of the reward.
        reference: see `Reference`.
    """
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
    measured = {"reward": totals}
    measured |= {f"rewards/{name}": [of_row[name] for of_row in parts] for name in rewards.names}
    return groups, {
        **{
            f"{name}/{what}": value
            for name, values in measured.items()
            for what, value in _moments_and_dropped(np.concatenate(values)).items()
        },
        **counts,
        "ref_logp/mean": float(np.concatenate(ref_logps).mean()),
        "perf/groups_per_sec": len(rows) / seconds,
        "perf/reward_share": reward_sec / seconds,
    }


def _moments_and_dropped(values: np.ndarray) -> dict[str, float]:
    mean, std = moments(values)
    return {"mean": mean, "std": std, "dropped": int(np.isnan(values).sum())}


def _reward_groups(
    rewards: WeightedRewards, rows: Sequence[TokenGroup], spread: set[str], counts: Counter[str]
) -> tuple[list[np.ndarray], list[dict[str, np.ndarray]]]:
    """Total reward of each group and each reward by name; NaN where one is absent. Counts what is
    missing by reason, and what was clipped or too long.
    """
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
            num_tokens=[len(row.completion_tokens[k]) for row, k in cells],
            counts=counts,
            update=progress.update,
        )
    cuts = np.cumsum([len(row.completions) for row in rows])[:-1]
    split = {name: np.split(values, cuts) for name, values in parts.items()}
    of_row = [{name: values[i] for name, values in split.items()} for i in range(len(rows))]
    return np.split(total, cuts), of_row
