"""The data of a policy: a scored folder, or a pool of several, opened and checked.

1. `scored_sections` names every folder that a config reads.
2. `open_pooled` opens them, as a pool where there are several.
3. `require_differences` and `require_mu` refuse data from which a loss cannot learn.
"""

import logging
from collections.abc import Callable
from dataclasses import fields
from glob import glob, has_magic
from typing import Any

import numpy as np

from copg_jax import losses
from copg_jax.config.policy_data import PolicyDataConfig
from copg_jax.config.sections import DataConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.pool import JoinedPool, Pool, Source, origins_of
from copg_jax.data.stream import Groups
from copg_jax.errors import InputError

log = logging.getLogger(__name__)


def scored_sections(section: DataConfig) -> list[DataConfig]:
    """One section for each folder that a section reads.

    Raises:
        InputError: a glob that matches nothing.
    """
    if not isinstance(section, PolicyDataConfig):
        return [section]
    if not section.sources:
        return [_at(section, str(section.path))]
    return [one for source in section.sources for one in _of_source(section, source.path)]


def open_pooled(
    section: DataConfig, open_one: Callable[[DataConfig, str], GroupDataset], *, cross: bool
) -> Groups:
    """The groups of a section, from all of its folders.

    Args:
        section: the data of a policy.
        open_one: (section of one folder, suffix of its name) → its data set.
        cross: whether pairs are those of different origins, for which the groups of a prompt are
            joined.

    Raises:
        InputError: pairs across origins of data that have one; origins that are too many.
    """
    if not isinstance(section, PolicyDataConfig) or not section.sources:
        (only,) = scored_sections(section)
        dataset = open_one(only, "")
        if not cross:
            return dataset
        pool = Pool([Source([dataset])])
    else:
        sources = []
        for number, source in enumerate(section.sources):
            folders = _of_source(section, source.path)
            opened = [open_one(one, f"-{number}-{at}") for at, one in enumerate(folders)]
            sources.append(Source(opened, source.share, source.origin))
        pool = Pool(sources)
    if not cross:
        return pool
    for group in pool:
        if origins_of(group).max(initial=0) >= losses.NUM_ORIGINS or origins_of(group).min() < 0:
            raise InputError(
                f"{group.where}: wanted origins from 0 to {losses.NUM_ORIGINS - 1} with "
                f"loss.pairs=cross, got {origins_of(group).tolist()}. Fix: give each of "
                "data.sources its origin."
            )
    joined = JoinedPool(pool)
    log.info("%d prompts with completions of several origins are joined", len(joined))
    if joined.num_left_out:
        log.warning("%d prompts have completions of one origin only: left out", joined.num_left_out)
    return joined


def require_differences(where: str, dataset: Groups) -> None:
    """Raises InputError where no group has two different rewards, from which a loss would learn.

    Args:
        where: the path of the data, or those of its sources.
        dataset: all groups.
    """
    for group in dataset:
        given = group.rewards[~np.isnan(group.rewards)] if group.rewards is not None else []
        if len(given) and min(given) < max(given):
            return
    raise InputError(
        f"{where}: wanted groups with different rewards, got {len(dataset)} in each of which "
        "all completions are equally good: there is nothing to learn. Fix: other "
        "data, or score with another reward function."
    )


def require_mu(field: str, path: str, dataset: Groups) -> None:
    """Raises InputError where a loss needs ln µ and a group has none.

    Args:
        field: that names the data, e.g. `data.path`.
        path: its value.
        dataset: all groups.
    """
    for group in dataset:
        if group.mu_logps is None:
            raise InputError(
                f"{field} {path}: {group.where}: wanted `logp_mu`, the log-probability of each "
                "completion under the policy that wrote it, which loss.name asks for, got none. "
                "Fix: data that experiments.sample wrote and experiments.score scored; or a loss "
                "without it, such as copg."
            )


def _of_source(section: DataConfig, path: str) -> list[DataConfig]:
    folders = sorted(glob(path)) if has_magic(path) else [path]
    if not folders:
        raise InputError(
            f"data.sources: {path}: wanted folders that experiments.score wrote, and this glob "
            "matches nothing. Correct it (relative paths start at the working directory)."
        )
    return [_at(section, folder) for folder in folders]


def _at(section: DataConfig, path: str) -> DataConfig:
    values: dict[str, Any] = {item.name: getattr(section, item.name) for item in fields(DataConfig)}
    values["path"] = path
    return DataConfig(**values)
