"""Generates on fixed prompts and measures reward, KL to the reference, length and EOS rate.

    python -m experiments.evaluate configs/smollm2_evaluate.yaml

Writes evaluation.json (the averages) and generations.jsonl (every completion with its numbers). An
interrupted evaluation goes on at the first prompt it has not done.
"""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from etils import epath

from copg_jax import distributed, runtime, sharding, stages
from copg_jax.cli import run_main
from copg_jax.config import EvaluateConfig
from copg_jax.evaluate import Generation, sample_texts, summarize
from copg_jax.files import GrowingFile
from copg_jax.metrics import MetricsLogger


def main(config: EvaluateConfig) -> dict[str, float]:
    """Evaluates one model and returns the averages that evaluation.json holds."""
    folder = epath.Path(config.output_dir)
    runtime.setup(config.distributed)
    runtime.check_run_folder(folder, config, may_differ=("output_dir", "distributed", "mesh"))
    mesh = sharding.make_mesh(config.mesh)
    model = stages.open_model(config.model, mesh)
    reference = config.reference and stages.open_model(config.reference, mesh)
    evaluator = stages.open_evaluation(
        config.evaluation,
        model,
        mesh,
        folder,
        beta=config.beta,
        reference=reference,
        logits_chunk=config.logits_chunk,
    )
    runtime.write_run_header(folder, config, evaluator.inputs | {"model": model.hash})

    sizes = config.evaluation.generation
    path = folder / "generations.jsonl"
    found = _read(path, sizes.num_samples)
    done = int(distributed.from_main(len(found) // sizes.num_samples))
    total = sizes.num_prompts * sizes.num_samples
    params = model.load_frozen() if done < sizes.num_prompts else None
    logger = MetricsLogger(
        folder, total_steps=sizes.num_prompts, log_every=1, resume_step=done or None
    )
    # Every process generates and knows the averages; process 0 writes.
    is_main = distributed.is_main_process()
    with GrowingFile(path, map(_line, found)) if is_main else nullcontext() as file, logger:
        for batch in evaluator.batches(params, step=0, first=done):
            if file is not None:
                file.write("".join(map(_line, batch)))
                file.sync()
            found += batch
            logger.log(
                len(found) // sizes.num_samples,
                summarize(found, beta=config.beta),
                text=sample_texts(found, sizes) if len(found) == total else None,
            )
    metrics = summarize(found, beta=config.beta)
    path = folder / "evaluation.json"
    with distributed.main_first(path):
        if is_main:
            path.write_text(json.dumps(_jsonable(metrics), indent=2) + "\n")
    return metrics


def _read(path: epath.Path, num_samples: int) -> list[Generation]:
    """What an interrupted evaluation has generated: whole prompts, without a line cut short."""
    found: list[Generation] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:
            break
        values: dict[str, Any] = {k: math.nan if v is None else v for k, v in row.items()}
        found.append(Generation(**values))
    return found[: len(found) // num_samples * num_samples]


def _line(generation: Generation) -> str:
    return json.dumps(_jsonable(asdict(generation)), ensure_ascii=False) + "\n"


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """NaN (no reference, no reward) becomes null, which JSON has."""
    return {name: None if value != value else value for name, value in values.items()}


if __name__ == "__main__":
    run_main(main, EvaluateConfig, description=__doc__)
