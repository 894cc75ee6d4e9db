"""The whole pipeline on generated posts and a tiny Llama, on CPU, in minutes.

    python -m experiments.quickstart configs/quickstart.yaml

SFT → reward model → score → CoPG, DPO and IPO on the same scored pairs → evaluation, through the
same stages, file formats and configs as the 7B runs, with configs/sizes/quickstart.yaml. Prints a
table and writes summary.json and reward_curves.png. Finished stages are not run again.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from copg_jax import runtime
from copg_jax.config.load import load_config, run_main
from copg_jax.config.stages import (
    EvaluateConfig,
    PolicyConfig,
    QuickstartConfig,
    RewardModelConfig,
    ScoreConfig,
    SFTConfig,
)
from copg_jax.data.generated import write_generated
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.hf import weights as hf_weights
from copg_jax.models.params import Architecture, init_params
from copg_jax.rewards import RewardModel
from copg_jax.rewards.functions import pairwise_accuracy
from experiments import evaluate, figures, score, train_policy, train_reward, train_sft

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = [str(CONFIGS / "tldr.yaml"), str(CONFIGS / "sizes" / "quickstart.yaml")]
METHODS = ("copg", "dpo", "ipo")
PARTS = ("train", "validation")


def main(config: QuickstartConfig) -> None:
    """Runs every stage, then summarises."""
    folder = Path(config.output_dir)
    runtime.setup()
    runtime.check_run_folder(folder, config)
    runtime.write_run_header(folder, config, inputs={})
    make_inputs(config, folder)

    here = f"shared.folder={folder}"

    def run(
        stage: Callable[[Any], Any], cls: type, name: str, *arguments: str, loss: str = ""
    ) -> Any:
        files = [*FILES, str(CONFIGS / "losses" / f"{loss}.yaml")] if loss else FILES
        # One process, even where a cluster would be detected.
        arguments = (here, *arguments, "distributed=off", *config.overrides.get(name, []))
        return stage(load_config(cls, [*files, *arguments]))

    run(train_sft.main, SFTConfig, "sft")
    run(train_reward.main, RewardModelConfig, "reward")
    run(score.main, ScoreConfig, "scored")
    for name in METHODS:
        run(train_policy.main, PolicyConfig, name, loss=name)
    results = {
        name: run(evaluate.main, EvaluateConfig, "evaluate", f"shared.run={name}")
        for name in ("sft", *METHODS)
    }
    accuracy = reward_accuracy(folder)
    figures.summarize_quickstart(folder, accuracy, results)


def reward_accuracy(folder: Path) -> dict[str, float]:
    """Share of human choices that the reward model predicts, on the posts it was trained on and on
    held-out ones.
    """
    config = load_config(RewardModelConfig, [*FILES, f"shared.folder={folder}"])
    model = RewardModel(path=str(folder / "reward" / "model"), batch_size=64)
    parts = {part: replace(config.data, part=part) for part in PARTS}
    return {
        f"{part}_accuracy": pairwise_accuracy(model, GroupReader(section))
        for part, section in parts.items()
    }


def make_inputs(config: QuickstartConfig, folder: Path) -> None:
    """Writes data, tokenizer and an untrained model, once."""
    if (folder / "base" / "config.json").exists():
        return
    write_generated(
        folder / "data",
        num_posts=config.num_posts,
        num_comparisons=config.num_comparisons,
        seed=config.seed,
        vocab_size=config.vocab_size,
    )
    tokenizer = load_tokenizer(folder / "data" / "tokenizer")
    model = Architecture(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=8 * config.hidden_size // 3,
        num_hidden_layers=config.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=config.hidden_size // 4,
        tie_word_embeddings=True,
    )
    params = init_params(model, jax.random.key(config.seed))
    hf_weights.save_pretrained(folder / "base", model, params, head="lm", tokenizer=tokenizer)


if __name__ == "__main__":
    run_main(main, QuickstartConfig, description=__doc__)
