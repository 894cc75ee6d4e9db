"""Draws K completions of each prompt from a model, as groups to score and train on.

    python -m experiments.sample configs/tldr.yaml configs/sizes/quickstart.yaml

Writes part-*.parquet, with token ids, texts, ln µ and how each completion ended, and sampled.json.
`experiments.score` reads the folder. An interrupted run goes on at the first part that is not
finished; mesh and batch size may be others. With engine_prompts=true it draws nothing, and writes
prompts.jsonl for an engine, see experiments/generate_vllm.py.
"""

import logging

from etils import epath

from copg_jax import disk, distributed, generation, run_folder, runtime, sharding
from copg_jax.config.load import run_main
from copg_jax.config.stages import MAY_DIFFER, SampleConfig
from copg_jax.data import sampled
from copg_jax.data.groups import warn_of_lists
from copg_jax.hf.pretrained import open_model
from copg_jax.inputs import open_data, prepared_bytes
from copg_jax.outside import write_prompts
from copg_jax.part_loop import is_complete
from copg_jax.sampling import row_keys

log = logging.getLogger("copg_jax.sample")  # a script's own name is __main__

_BYTES_A_TOKEN = 10  # of a sample, at most: its id and its text


def main(config: SampleConfig) -> None:
    """Samples completions of every prompt of the data set."""
    runtime.setup(config.distributed)
    with run_folder.claim(config.output_dir, config, may_differ=MAY_DIFFER):
        _sample(config)


def _sample(config: SampleConfig) -> None:
    folder, numbers = epath.Path(config.output_dir), config.sampling
    mesh = sharding.make_mesh(config.mesh)
    model = open_model(config.model, mesh)
    prompts = open_data(config.data, model, folder, "prompts", prompts_only=True)
    warn_of_lists(prompts)
    longest, *_ = prompts.shape(multiple=1)
    fix = "lower data.max_prompt_tokens or sampling.max_new_tokens"
    model.require_context(config.data.path, longest, numbers.max_new_tokens, fix=fix)
    hashes = {"model": model.hash, "data": prompts.fingerprint}
    run_folder.check_inputs(folder, hashes)
    if config.engine_prompts:
        run_folder.write_run_header(folder, config, hashes)
        path = folder / "prompts.jsonl"
        with distributed.main_first(path):
            if distributed.is_main_process():
                write_prompts(path, prompts)
        log.info("wrote %d prompts to %s", len(prompts), path)
        return
    is_whole = lambda: sampled.is_sampled_to_its_end(folder)
    if is_complete(folder, len(prompts), config.part_size, is_whole):
        return
    num_tokens = len(prompts) * numbers.num_samples * numbers.max_new_tokens
    disk.warn_of_space(folder, prepared_bytes(config.data) + _BYTES_A_TOKEN * num_tokens)
    generation.warn_of_cuts(numbers)
    run_folder.write_run_header(folder, config, hashes)
    generation.sample_dataset(
        list(prompts),
        folder=folder,
        part_size=config.part_size,
        completer=generation.make_completer(numbers, model, batch_size=config.batch_size),
        params=model.load_frozen(),
        keys=row_keys(numbers.seed, 0, len(prompts)),
        origin=config.origin,
        side_car=generation.describe_samples(
            numbers,
            model,
            text_format=prompts.stats["text_format"],
            limits=config.data.limits,
            counts=prompts.stats,
        ),
    )


if __name__ == "__main__":
    run_main(main, SampleConfig, description=__doc__)
