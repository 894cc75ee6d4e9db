"""Generates on fixed prompts and measures reward, KL to the reference, length and EOS rate.

    python -m experiments.evaluate configs/evaluate_smollm2.yaml model.path=runs/copg/best
    output_dir=runs/copg_eval

Writes evaluation.json (the averages) and generations.jsonl (every completion with its numbers).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich import print as show

from copg_jax import runtime, sharding, stages
from copg_jax.cli import run_main
from copg_jax.config import EvaluateConfig
from copg_jax.evaluate import summarize


def main(config: EvaluateConfig) -> dict[str, float]:
    """Evaluates one model and returns the averages that evaluation.json holds."""
    folder = Path(config.output_dir)
    runtime.setup()
    mesh = sharding.make_mesh(config.mesh)
    model = stages.open_model(config.model, mesh)
    reference = config.reference and stages.open_model(config.reference, mesh)
    runtime.write_run_header(folder, config, may_differ=("mesh",))
    evaluator = stages.open_evaluation(
        config.evaluation, model, mesh, folder, beta=config.beta, reference=reference
    )
    generations = evaluator.generate(model.load_frozen(), step=0)
    metrics = summarize(generations, beta=config.beta)
    if runtime.is_main_process():
        with (folder / "generations.jsonl").open("w", encoding="utf-8") as file:
            for generation in generations:
                file.write(json.dumps(_jsonable(dataclasses.asdict(generation))) + "\n")
        (folder / "evaluation.json").write_text(json.dumps(_jsonable(metrics), indent=2) + "\n")
        show({name: round(value, 4) for name, value in metrics.items()})
    return metrics


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """NaN (no reference, no reward) becomes null, which JSON has."""
    return {name: None if value != value else value for name, value in values.items()}


if __name__ == "__main__":
    run_main(lambda config: main(config) and None, EvaluateConfig, description=__doc__)
