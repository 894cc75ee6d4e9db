"""The whole pipeline on generated posts and a tiny Llama, on CPU, in minutes.

    python -m experiments.quickstart configs/quickstart.yaml

SFT → reward model → score → CoPG, DPO and IPO on the same scored pairs → evaluation, through the same stages, file
formats and kinds of config (configs/quickstart/*.yaml) as the 7B runs. Prints a table and writes summary.json and
reward_curves.png. Finished stages are not run again.
"""

import json
from pathlib import Path

import jax

from copg_jax import runtime
from copg_jax.cli import load_config, run_main
from copg_jax.config import (
    EvaluateConfig,
    PolicyConfig,
    QuickstartConfig,
    RewardModelConfig,
    ScoreConfig,
    SFTConfig,
)
from copg_jax.data.generated import write_generated
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.models import functional, hf_weights
from copg_jax.models.llama import LlamaConfig
from experiments import evaluate, figures, score, train_policy, train_reward, train_sft

CONFIGS = Path(__file__).parents[1] / "configs" / "quickstart"
METHODS = ("copg", "dpo", "ipo")


def main(config: QuickstartConfig) -> None:
    """Runs every stage, then summarises."""
    folder = Path(config.output_dir)
    runtime.setup()
    runtime.write_run_header(folder, config)
    make_inputs(config, folder)

    def run(stage, cls, name: str, *, read: str | None = None, **paths: str):
        arguments = [f"{key.replace('__', '.')}={folder / path}" for key, path in paths.items()]
        arguments.append(f"output_dir={folder / name}")
        return stage(load_config(cls, [str(CONFIGS / f"{read or name}.yaml"), *arguments]))

    posts, comparisons = "data/sft.jsonl", "data/comparisons.jsonl"
    validation = {"data__path": posts, "validation__path": posts}
    run(train_sft.main, SFTConfig, "sft", model__path="base", **validation)
    validation = {"data__path": comparisons, "validation__path": comparisons}
    run(train_reward.main, RewardModelConfig, "reward", model__path="sft/model", **validation)
    run(score.main, ScoreConfig, "scored", reference__path="sft/model", data__path=comparisons)
    for name in METHODS:
        run(train_policy.main, PolicyConfig, name, model__path="sft/model", data__path="scored")
    results = {}
    for name in ("sft", *METHODS):
        results[name] = run(
            evaluate.main,
            EvaluateConfig,
            f"evaluate_{name}",
            read="evaluate",
            model__path=f"{name}/{'model' if name == 'sft' else 'best'}",
            reference__path="sft/model",
        )
    figures.summarize_quickstart(folder, results)


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
    model = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=8 * config.hidden_size // 3,
        num_hidden_layers=config.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=config.hidden_size // 4,
        tie_word_embeddings=True,
    )
    params = functional.init(model, jax.random.key(config.seed))
    hf_weights.save_pretrained(folder / "base", model, params, head="lm", tokenizer=tokenizer)


if __name__ == "__main__":
    run_main(main, QuickstartConfig, description=__doc__)
