"""Draws K completions of each prompt from a model, as groups to score and train on.

    python -m experiments.sample configs/tldr.yaml configs/sizes/quickstart.yaml

Writes part-*.parquet, with token ids, texts, ln µ and how each completion ended, and sampled.json.
`experiments.score` reads the folder. An interrupted run goes on at the first part that is not
finished; mesh and batch size may be others. With engine_prompts=true it draws nothing, and writes
prompts.jsonl for an engine, see experiments/generate_vllm.py.
"""

import json
import logging
from dataclasses import asdict

from etils import epath

from copg_jax import disk, distributed, generation, run_folder, runtime, sharding
from copg_jax.config.load import run_main
from copg_jax.config.stages import MAY_DIFFER, SampleConfig
from copg_jax.data import sampled
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.formats.choice import text_format_hash
from copg_jax.data.groups import warn_of_lists
from copg_jax.data.tokenizer import Encoder
from copg_jax.files import write_text
from copg_jax.hf.pretrained import PretrainedModel, open_model
from copg_jax.inputs import open_data, prepared_bytes
from copg_jax.part_loop import is_complete

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
        _write_prompts(folder / "prompts.jsonl", prompts)
        return
    is_whole = lambda: sampled.is_sampled_to_its_end(folder)
    if is_complete(folder, len(prompts), config.part_size, is_whole):
        return
    num_tokens = len(prompts) * numbers.num_samples * numbers.max_new_tokens
    disk.warn_of_space(folder, prepared_bytes(config.data) + _BYTES_A_TOKEN * num_tokens)
    if numbers.top_k or numbers.top_p:
        log.warning(
            "sampling.top_k and top_p cut completions off µ that π_ref can write. Theorem 1 wants "
            "equal supports: what is never drawn keeps its log-ratio, and CoPG no longer ends at π*"
        )
    run_folder.write_run_header(folder, config, hashes)
    generation.sample_dataset(
        list(prompts),
        folder=folder,
        part_size=config.part_size,
        completer=generation.make_completer(numbers, model, batch_size=config.batch_size),
        params=model.load_frozen(),
        seed=numbers.seed,
        origin=config.origin,
        side_car=_side_car(config, model, prompts),
    )


def _side_car(
    config: SampleConfig, model: PretrainedModel, prompts: GroupDataset
) -> sampled.Sampled:
    """What a folder of samples is made of, before its first part is written."""
    encoder, text_format = Encoder(model.tokenizer), prompts.stats["text_format"]
    return sampled.Sampled(
        tokenizer_hash=encoder.hash,
        text_format=text_format,
        text_format_hash=text_format_hash(text_format, encoder),
        model_hash=model.hash,
        model_dtype=model.arch.dtype,
        sampling=asdict(config.sampling),
        limits=config.data.limits._asdict(),
        complete=False,
        counts=prompts.stats,
    )


def _write_prompts(path: epath.Path, prompts: GroupDataset) -> None:
    """Prompts as a model reads them, for an engine."""
    rows = (
        {"id": row.id, "prompt": row.prompt, "prompt_token_ids": row.prompt_tokens.tolist()}
        | row.columns
        for row in prompts
    )
    with distributed.main_first(path):
        if distributed.is_main_process():
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    log.info("wrote %d prompts to %s", len(prompts), path)


if __name__ == "__main__":
    run_main(main, SampleConfig, description=__doc__)
