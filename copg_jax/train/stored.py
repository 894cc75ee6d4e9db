"""Stored data as what a run trains on: a data set or a pool of several, in epochs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from copg_jax import disk, inputs, pooled
from copg_jax.config.policy_data import PolicyDataConfig
from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import TrainConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.stream import Groups, num_steps
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.tracking import MetricsLogger
from copg_jax.train.checkpoint import Checkpoints
from copg_jax.train.order import open_stream
from copg_jax.train.run import Fed, Run


@dataclass(frozen=True)
class StoredFeed:
    """Groups to train on, and held-out ones; a `run.Feed`."""

    config: TrainConfig
    groups: Groups
    held_out: GroupDataset | None

    @property
    def num_steps(self) -> int:
        """See `run.Feed`."""
        training = self.config.training
        total = num_steps(len(self.groups), training.batch_size, training.num_epochs)
        return total if training.max_steps is None else min(total, training.max_steps)

    @property
    def hashes(self) -> Mapping[str, str]:
        """See `run.Feed`."""
        found = {"data": self.groups.fingerprint}
        return found | ({"validation": self.held_out.fingerprint} if self.held_out else {})

    @property
    def card(self) -> Mapping[str, str]:
        """See `run.Feed`."""
        config = self.config
        read = {
            "train": (config.data, self.groups),
            "validation": (config.validation, self.held_out),
        }
        return {
            name: f"{_paths(section)}, {len(groups)} groups, fingerprint {groups.fingerprint[:12]}"
            for name, (section, groups) in read.items()
            if section is not None and groups is not None
        }

    def begin(
        self,
        run: Run,
        start: int,
        logger: MetricsLogger,
        checkpoints: Checkpoints,
        frozen: Mapping[str, Any] | None,
    ) -> Fed:
        """See `run.Feed`."""
        del logger, checkpoints, frozen
        config = self.config
        return Fed(iter(open_stream(self.groups, config.training, config.seed, run.mesh, start)))


def _paths(section: DataConfig) -> str:
    """Where data is: its path, or those of its sources with their shares."""
    if not isinstance(section, PolicyDataConfig) or not section.sources:
        return f"`{section.path}`"
    return " and ".join(
        f"`{source.path}`" + ("" if source.share is None else f" (share {source.share:g})")
        for source in section.sources
    )


def open_stored(
    config: TrainConfig,
    model: PretrainedModel,
    to_write: int,
    *,
    check_section: Callable[[DataConfig], None] | None = None,
    check_data: Callable[[DataConfig, PretrainedModel, GroupDataset], None] | None = None,
    check_pool: Callable[[Groups], None] | None = None,
    cross: bool = False,
    chosen_only: bool = False,
    by_choice: bool = False,
) -> StoredFeed:
    """Opens the data of a config and checks that it fits the model and the stage.

    Args:
        config: of the run.
        model: what is trained.
        to_write: bytes that the run writes beside its tokens; 0 where it is complete.
        check_section: raises InputError for data that the stage cannot mean, before it is read.
        check_data: raises InputError where a data set does not fit the stage.
        check_pool: raises InputError where all groups of training together do not fit the stage.
        cross: whether pairs are those of different origins.
        chosen_only: of preferences, train on the chosen completion alone.
        by_choice: learn the human choice where a row has one, not its scores.
    """
    folder = epath.Path(config.output_dir)
    sections = [*pooled.scored_sections(config.data), config.validation]
    if to_write:
        disk.warn_of_space(folder, to_write + inputs.prepared_bytes(*sections))
    for section in sections:
        if section is not None and check_section is not None:
            check_section(section)

    def open_one(section: DataConfig, name: str) -> GroupDataset:
        options = {"chosen_only": chosen_only, "by_choice": by_choice}
        dataset = inputs.open_data(section, model, folder, name, **options)
        if check_data is not None:
            check_data(section, model, dataset)
        return dataset

    groups = pooled.open_pooled(
        config.data, lambda section, end: open_one(section, f"train{end}"), cross=cross
    )
    held_out = None
    if config.validation is not None:
        held_out = open_one(config.validation, "validation")
        inputs.warn_of_overlap(groups, held_out)
    if check_pool is not None:
        check_pool(groups)
    return StoredFeed(config, groups, held_out)
