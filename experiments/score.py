"""Computes rewards and ln π_ref of a data set once, so that training needs neither model.

    python -m experiments.score configs/tldr.yaml configs/sizes/llama2_7b.yaml

Writes part-*.parquet and scored.json with the hashes of model, tokenizer and rewards. An
interrupted run goes on at the first part that is not finished. Rows that bring rewards of their own
along need no reward function: those are kept.
"""

import logging

from etils import epath

from copg_jax import runtime, scoring, sharding
from copg_jax.config.load import run_main
from copg_jax.config.sections import DataConfig, RewardSpec
from copg_jax.config.stages import MAY_DIFFER, ScoreConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.formats.columns import TextGroup
from copg_jax.data.reader import GroupReader
from copg_jax.errors import InputError
from copg_jax.hf.pretrained import open_model
from copg_jax.infer import GroupForward
from copg_jax.inputs import open_data
from copg_jax.models.forward import make_seq_logp
from copg_jax.rewards.functions import WeightedRewards

log = logging.getLogger("copg_jax.score")  # a script's own name is __main__


def own_rewards(data: DataConfig, dataset: GroupDataset) -> list[RewardSpec]:
    """What scores where no function is named: the rows' own rewards.

    Raises:
        InputError: rows without rewards, or with human choices alone.
    """
    kept = "rewards='[{function: copg_jax.rewards.given}]'"
    wanted = "rewards: wanted at least one reward function, got none"
    name = "name a function, e.g. rewards='[{function: copg_jax.rewards.rouge_l}]'"
    bare = next((row.where for row in dataset if row.rewards is None), None)
    if bare is not None:
        raise InputError(
            f"{wanted}, and the row at {bare} brings no rewards of its own along. Fix: {name}; or "
            "give every row `rewards`, one for each completion."
        )
    first = next(iter(GroupReader(data)), None)
    if isinstance(first, TextGroup) and first.is_choice:
        raise InputError(
            f"{wanted}, and the rows, such as that at {first.where}, have a human choice and no "
            f"scores of their own. Fix: {name}; or, to train on the choice as rewards 1 and 0, set "
            f"{kept}."
        )
    log.info("no reward function is named: the rewards that the rows bring along are kept")
    return [RewardSpec("copg_jax.rewards.given")]


def main(config: ScoreConfig) -> None:
    """Scores every group of the data set."""
    folder = epath.Path(config.output_dir)
    runtime.setup(config.distributed)
    runtime.check_run_folder(folder, config, may_differ=MAY_DIFFER)
    scoring.check_folder(folder)
    mesh = sharding.make_mesh(config.mesh)
    model = open_model(config.reference, mesh)
    dataset = open_data(config.data, model, folder, "groups")
    specs = config.rewards or own_rewards(config.data, dataset)
    rewards = WeightedRewards(specs, own=dataset.has_rewards)
    hashes = {"reference": model.hash, "data": dataset.fingerprint}
    runtime.write_run_header(folder, config, hashes | {"rewards": rewards.fingerprint})
    reference = GroupForward(
        make_seq_logp(model.arch, model.partitioner, chunk=config.logits_chunk),
        model.load_frozen(),
        mesh=mesh,
        batch_size=config.batch_size,
        name=f"reference {model.folder}",
    )
    scoring.score_dataset(
        dataset,
        folder=folder,
        part_size=config.part_size,
        rewards=rewards,
        reference=reference,
        side_car=scoring.make_side_car(config, model, rewards),
    )


if __name__ == "__main__":
    run_main(main, ScoreConfig, description=__doc__)
