"""Generates on fixed prompts and measures reward, KL to the reference, length and EOS rate.

    python -m experiments.evaluate configs/tldr.yaml configs/sizes/llama2_7b.yaml \\
        configs/losses/copg.yaml

Writes evaluation.json (the averages) and generations.jsonl (every completion with its numbers). An
interrupted evaluation goes on with the prompts it has not done; generations.jsonl is in batch order
while it grows and in the order of the prompts at the end. Each of its lines carries a checksum, so
that damage is found, and all done again.
"""

import json
import logging
import math
import zlib
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
from etils import epath

from copg_jax import disk, distributed, run_folder, runtime, sharding
from copg_jax.config.load import run_main
from copg_jax.config.schema import map_leaves
from copg_jax.config.stages import MAY_DIFFER, EvaluateConfig
from copg_jax.errors import InputError
from copg_jax.files import GrowingFile, read_json_lines, write_text
from copg_jax.hf.pretrained import open_model
from copg_jax.inputs import open_evaluation, prepared_bytes
from copg_jax.rewards.functions import DROPPED
from copg_jax.summary import Generation, in_prompt_order, sample_texts, summarize
from copg_jax.tracking import MetricsLogger

log = logging.getLogger("copg_jax.evaluate")  # a script's own name is __main__

_CHECKSUM = "crc32"  # of a line of generations.jsonl
_BYTES_A_TOKEN = 10  # of a generation, at most: its text as JSON


def main(config: EvaluateConfig) -> dict[str, float]:
    """Evaluates one model and returns the averages that evaluation.json holds."""
    runtime.setup(config.distributed)
    with run_folder.claim(config.output_dir, config, may_differ=MAY_DIFFER):
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> dict[str, float]:
    folder = epath.Path(config.output_dir)
    mesh = sharding.make_mesh(config.mesh)
    model = open_model(config.model, mesh)
    disk.warn_of_space(folder, _bytes_to_write(config))
    reference = config.reference and open_model(config.reference, mesh)
    evaluator, hashes = open_evaluation(
        config.evaluation,
        model,
        folder,
        beta=config.beta,
        reference=reference,
        logits_chunk=config.logits_chunk,
    )
    hashes = hashes | {"model": model.hash}
    run_folder.check_inputs(folder, hashes)
    sizes = config.evaluation.generation
    path = folder / "generations.jsonl"
    found = in_prompt_order(_read(path, sizes.num_samples))
    of_main = np.isin(np.arange(sizes.num_prompts), [g.index for g in found])
    finished = set(np.flatnonzero(distributed.from_main(of_main)).tolist())
    total = sizes.num_prompts * sizes.num_samples
    params = None
    if len(finished) < sizes.num_prompts:
        run_folder.write_run_header(folder, config, hashes)
        params = model.load_frozen()
    logger = MetricsLogger(
        folder,
        total_steps=sizes.num_prompts,
        unit="prompt",
        log_every=1,
        resume_step=len(finished) or None,
        logged=[len(finished)] if finished else [],
    )
    # Every process generates and knows the averages; process 0 writes.
    is_main = distributed.is_main_process()
    with GrowingFile(path, map(_line, found)) if is_main else nullcontext() as file, logger:
        for batch in evaluator.batches(params, step=0, finished=finished):
            found = in_prompt_order([*found, *batch])
            # Before the generations: what is finished has its line.
            logger.log(
                len(found) // sizes.num_samples,
                summarize(found, beta=config.beta),
                text=sample_texts(found, sizes) if len(found) == total else None,
            )
            logger.sync()
            if file is not None:
                file.write("".join(map(_line, batch)))
                file.sync()
    # Of what is stored alone: the counts of an interrupted evaluation's first part are not known.
    metrics = summarize(found, beta=config.beta)
    averages = folder / "evaluation.json"
    with distributed.main_first(averages):
        if is_main:
            write_text(path, "".join(map(_line, found)))
            write_text(averages, json.dumps(_jsonable(metrics), indent=2) + "\n")
    log.info("wrote %s and %s", averages, path)
    _report_rewards(metrics["eval/dropped_rewards"], total, path, evaluator.counts())
    return metrics


def _bytes_to_write(config: EvaluateConfig) -> int:
    """The tokens of the prompts and, twice while they are written anew, the generations."""
    sizes = config.evaluation.generation
    num_tokens = sizes.num_prompts * sizes.num_samples * sizes.max_new_tokens
    return prepared_bytes(config.evaluation.data) + 2 * _BYTES_A_TOKEN * num_tokens


def _report_rewards(
    num_dropped: float, total: int, path: epath.Path, counts: dict[str, float]
) -> None:
    """Says how many generations have no reward; none with one is an error."""
    why = ", ".join(f"{name}: {number:.0f}" for name, number in counts.items() if DROPPED in name)
    why = why and f" ({why})"  # of what an earlier process generated it is not known
    if num_dropped == total:
        raise InputError(
            f"{path}: not one of {total} generations has a reward: each got None{why}. Correct "
            "the reward function and evaluate into another output_dir."
        )
    if num_dropped:
        log.warning("%d of %d generations have no reward: left out%s", num_dropped, total, why)


def _read(path: epath.Path, num_samples: int) -> list[Generation]:
    """What an interrupted evaluation has generated: whole prompts, without a line cut short.

    Nothing where a line is damaged: a prompt done again in another batch is the same to rounding
    only.
    """
    rows = [row for _, row in read_json_lines(path)] if path.exists() else []
    rows = rows[:-1] if rows and rows[-1] is None else rows  # cut short
    found: list[Generation] = []
    for number, row in enumerate(rows, start=1):
        try:
            checksum = row.pop(_CHECKSUM)
            generation = Generation(**_with_nan(row))
        except (KeyError, TypeError, AttributeError):
            checksum = generation = None
        if generation is None or checksum != _checksum(generation):
            log.warning("%s:%d: damaged, or not of this version: all is done again", path, number)
            return []
        found.append(generation)
    return found[: len(found) // num_samples * num_samples]


def _line(generation: Generation) -> str:
    row = _jsonable(asdict(generation)) | {_CHECKSUM: _checksum(generation)}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _checksum(generation: Generation) -> str:
    """CRC-32 of the values as JSON."""
    return f"{zlib.crc32(json.dumps(_jsonable(asdict(generation))).encode()):08x}"


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """NaN (no reference, no reward) becomes null, which JSON has."""
    return map_leaves(lambda value: None if value != value else value, values)


def _with_nan(values: dict[str, Any]) -> dict[str, Any]:
    """What `_jsonable` made null is NaN again."""
    return map_leaves(lambda value: math.nan if value is None else value, values)


if __name__ == "__main__":
    run_main(main, EvaluateConfig, description=__doc__)
