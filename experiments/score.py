"""Computes rewards and ln π_ref of a data set once, so that training needs neither model.

    python -m experiments.score configs/tldr.yaml configs/sizes/llama2_7b.yaml

Writes part-*.parquet and scored.json with the hashes of model, tokenizer and rewards. An
interrupted run goes on at the first part that is not finished. Rows that bring rewards of their own
along need no reward function: those are kept.
"""

import logging
from functools import partial

from etils import epath

from copg_jax import disk, run_folder, runtime, scoring, sharding
from copg_jax.config.load import run_main
from copg_jax.config.stages import MAY_DIFFER, ScoreConfig
from copg_jax.hf.pretrained import open_model
from copg_jax.infer import GroupForward
from copg_jax.inputs import open_data, prepared_bytes, require_answers
from copg_jax.models.forward import make_seq_logp
from copg_jax.part_loop import is_complete

log = logging.getLogger("copg_jax.score")  # a script's own name is __main__


def main(config: ScoreConfig) -> None:
    """Scores every group of the data set."""
    runtime.setup(config.distributed)
    with run_folder.claim(config.output_dir, config, may_differ=MAY_DIFFER):
        _score(config)


def _score(config: ScoreConfig) -> None:
    folder = epath.Path(config.output_dir)
    scoring.check_folder(folder)
    mesh = sharding.make_mesh(config.mesh)
    model = open_model(config.reference, mesh)
    # The tokens, and as much again as parts.
    disk.warn_of_space(folder, 2 * prepared_bytes(config.data))
    dataset = open_data(config.data, model, folder, "groups")
    require_answers(config.prompts, config.data, dataset)
    rewards = scoring.open_rewards(config, dataset)
    hashes = {"reference": model.hash, "data": dataset.fingerprint}
    hashes |= {"rewards": rewards.fingerprint}
    run_folder.check_inputs(folder, hashes)
    is_whole = partial(scoring.is_scored_to_its_end, folder)
    if is_complete(folder, len(dataset), config.part_size, is_whole):
        return
    run_folder.write_run_header(folder, config, hashes)
    reference = scoring.sampled_logps
    if scoring.drawn_from(config.data.path, model):
        log.info("the reference drew these samples: their ln µ is ln π_ref")
    else:
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
        side_car=scoring.make_side_car(config.data.limits, model, rewards, dataset),
    )


if __name__ == "__main__":
    run_main(main, ScoreConfig, description=__doc__)
