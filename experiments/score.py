"""Computes rewards and ln π_ref of a data set once, so that training needs neither model.

    python -m experiments.score configs/score_tldr_llama2_7b.yaml output_dir=runs/scored

Writes part-*.parquet and scored.json with the hashes of model, tokenizer and rewards. An
interrupted run goes on at the first part that is not finished.
"""

from functools import partial

from etils import epath

from copg_jax import policy, runtime, scoring, sharding, stages
from copg_jax.cli import run_main
from copg_jax.config import MAY_DIFFER, ScoreConfig
from copg_jax.forward import GroupForward
from copg_jax.rewards import WeightedRewards


def main(config: ScoreConfig) -> None:
    """Scores every group of the data set."""
    folder = epath.Path(config.output_dir)
    runtime.setup(config.distributed)
    runtime.check_run_folder(folder, config, may_differ=MAY_DIFFER)
    mesh = sharding.make_mesh(config.mesh)
    reference = stages.open_model(config.reference, mesh)
    dataset = stages.open_data(config.data, reference, folder, "groups")
    rewards = WeightedRewards(config.rewards)
    inputs = {"reference": reference.hash, "data": dataset.fingerprint}
    runtime.write_run_header(folder, config, inputs | {"rewards": rewards.fingerprint})
    seq_logp = GroupForward(
        partial(policy.seq_logp, reference.config, chunk=config.logits_chunk),
        reference.load_frozen(),
        param_shardings=reference.shardings,
        mesh=mesh,
        batch_size=config.batch_size,
        name="reference",
    )
    scoring.score_dataset(
        dataset,
        folder=folder,
        part_size=config.part_size,
        rewards=rewards,
        seq_logp=seq_logp,
        side_car=stages.side_car(config, reference, rewards),
    )


if __name__ == "__main__":
    run_main(main, ScoreConfig, description=__doc__)
