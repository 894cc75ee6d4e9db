"""The whole pipeline on generated posts and a tiny Llama, on CPU, in minutes.

    python -m experiments.quickstart configs/quickstart.yaml

SFT → reward model → score → CoPG, DPO and IPO on the same scored pairs → evaluation, through the
same stages, file formats and kinds of config (configs/quickstart/*.yaml) as the 7B runs. Prints a
table and writes summary.json and reward_curves.png. Finished stages are not run again.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from copg_jax import runtime
from copg_jax.config.stages import (
    EvaluateConfig,
    PolicyConfig,
    QuickstartConfig,
    RewardModelConfig,
    ScoreConfig,
    SFTConfig,
)
from copg_jax.config.load import load_config, run_main
from copg_jax.data.generated import write_generated
from copg_jax.data.reader import GroupReader
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.hf import weights as hf_weights
from copg_jax.models.params import Architecture, init_params
from copg_jax.rewards import RewardModel
from copg_jax.rewards.functions import pairwise_accuracy
from experiments import evaluate, figures, score, train_policy, train_reward, train_sft

CONFIGS = Path(__file__).parents[1] / "configs" / "quickstart"
METHODS = ("copg", "dpo", "ipo")
PARTS = ("train", "validation")
REWARD = "copg_jax.rewards.RewardModel"


def main(config: QuickstartConfig) -> None:
    """Runs every stage, then summarises."""
    folder = Path(config.output_dir)
    runtime.setup()
    runtime.check_run_folder(folder, config)
    runtime.write_run_header(folder, config, inputs={})
    make_inputs(config, folder)

    def run(
        stage: Callable[[Any], Any], cls: type, name: str, *arguments: str, read: str = ""
    ) -> Any:
        file = CONFIGS / f"{read or name}.yaml"
        # One process, even where a cluster would be detected.
        arguments = (*arguments, "distributed=off", *config.overrides.get(read or name, []))
        return stage(load_config(cls, [str(file), *arguments, f"output_dir={folder / name}"]))

    posts, comparisons = folder / "data/sft.jsonl", folder / "data/comparisons.jsonl"
    sft, reward_model = folder / "sft/model", folder / "reward/model"
    rewards = f"rewards=[{{function: {REWARD}, arguments: {{path: {reward_model}}}}}]"
    prompts = [f"evaluation.data.path={posts}", f"evaluation.{rewards}"]

    data = [f"data.path={posts}", f"validation.path={posts}"]
    run(train_sft.main, SFTConfig, "sft", f"model.path={folder / 'base'}", *data)
    data = [f"data.path={comparisons}", f"validation.path={comparisons}"]
    run(train_reward.main, RewardModelConfig, "reward", f"model.path={sft}", *data)
    data = [f"data.path={comparisons}", rewards]
    run(score.main, ScoreConfig, "scored", f"reference.path={sft}", *data)
    for name in METHODS:
        data = [f"data.path={folder / 'scored'}", *prompts]
        run(train_policy.main, PolicyConfig, name, f"model.path={sft}", *data)
    results = {}
    for name in ("sft", *METHODS):
        models = [f"model.path={folder / name / 'model'}", f"reference.path={sft}"]
        output = f"evaluate_{name}"
        results[name] = run(
            evaluate.main, EvaluateConfig, output, *models, *prompts, read="evaluate"
        )
    accuracy = reward_accuracy(comparisons, reward_model)
    figures.summarize_quickstart(folder, accuracy, results)


def reward_accuracy(comparisons: Path, reward_model: Path) -> dict[str, float]:
    """Share of human choices that the reward model predicts, on the posts it was trained on and on
    held-out ones.
    """
    model = RewardModel(path=str(reward_model), batch_size=64)
    data = load_config(RewardModelConfig, [str(CONFIGS / "reward.yaml")]).data
    parts = {part: replace(data, path=str(comparisons), part=part) for part in PARTS}
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
