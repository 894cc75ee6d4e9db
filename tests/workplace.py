"""A folder with everything that the stages need, on a tiny model, and their arguments there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from copg_jax.config import stages as config
from copg_jax.config.load import load_config
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.errors import InputError
from copg_jax.files import read_json_lines
from copg_jax.hf import weights as hf_weights
from copg_jax.models.params import Architecture, init_params
from experiments import evaluate, online, sample, score, train_policy, train_reward, train_sft
from experiments.generated import write_generated
from tests.reads import recorded_reads
from tests.toys import LLAMA

MAINS: dict[str, tuple[Any, type]] = {
    "sft": (train_sft.main, config.SFTConfig),
    "reward": (train_reward.main, config.RewardModelConfig),
    "sample": (sample.main, config.SampleConfig),
    "score": (score.main, config.ScoreConfig),
    "policy": (train_policy.main, config.PolicyConfig),
    "online": (online.main, config.OnlineConfig),
    "evaluate": (evaluate.main, config.EvaluateConfig),
}
DATA = ["data.max_rows=24", "data.max_prompt_tokens=192", "data.max_completion_tokens=96"]
TRAINING = [
    "training.batch_size=8",
    "training.max_steps=3",
    "training.eval_every=2",
    "training.remat=none",
]
MODEL = ["dtype=float32"]
GENERATION = ["num_prompts=5", "max_new_tokens=6", "batch_size=8", "num_texts=1"]


def held_out(fraction: float, *sections: str) -> list[str]:
    """Settings by which some posts are trained on, and the others are validated on."""
    part = {"data": "train", "validation": "validation", "evaluation.data": "validation"}
    return [
        f"{section}.{setting}"
        for section in sections
        for setting in (f"holdout_fraction={fraction}", f"part={part[section]}")
    ]


def tiny_model(folder: Path, tokenizer: Any, vocab_size: int, model: Architecture = LLAMA) -> None:
    """Writes a random model with a tokenizer."""
    model = replace(model, vocab_size=vocab_size, intermediate_size=16, tie_word_embeddings=True)
    params = init_params(model, jax.random.key(0))
    hf_weights.save_pretrained(
        folder, model, params, head="lm", tokenizer=tokenizer, source={"note": "of the base"}
    )


class Workplace:
    """Data, a base model, and the arguments of every stage on them.

    Attributes:
      reads: stage to the fields of its config that its runs have read.
    """

    def __init__(self, folder: Path, model: Architecture = LLAMA) -> None:
        self.folder = folder
        self.reads: dict[str, set[str]] = {}
        write_generated(
            folder / "data", num_examples=40, num_comparisons=48, seed=0, vocab_size=400
        )
        tokenizer = load_tokenizer(folder / "data" / "tokenizer")
        tiny_model(folder / "base", tokenizer, len(tokenizer), model)
        self.posts = folder / "data" / "sft.jsonl"
        self.comparisons = folder / "data" / "comparisons.jsonl"

    def arguments(self, stage: str) -> list[str]:
        """Arguments of a run of the stage into `folder`/`stage`."""
        folder = self.folder
        sft = folder / "sft" / "model"
        reward = f"copg_jax.rewards.RewardModel, arguments: {{path: {folder / 'reward' / 'model'}}}"
        watched = "copg_jax.rewards.length, name: words, weight: 0, clip: [-50, 0]"
        watched += ", overlong: {max_tokens: 60, buffer_tokens: 10, penalty: 2}"
        rewards = f"rewards=[{{function: {reward}}}, {{function: {watched}}}]"
        evaluation = [
            f"evaluation.data.path={self.posts}",
            *held_out(0.2, "evaluation.data"),
            f"evaluation.{rewards}",
            *(f"evaluation.generation.{setting}" for setting in GENERATION),
        ]
        own = {
            "sft": [
                f"model.path={folder / 'base'}",
                f"data.path={self.posts}",
                f"validation.path={self.posts}",
                "validation.max_rows=11",
                *held_out(0.2, "data", "validation"),
                *TRAINING,
            ],
            "reward": [
                f"model.path={sft}",
                f"data.path={self.comparisons}",
                f"validation.path={self.comparisons}",
                *held_out(0.2, "data", "validation"),
                *TRAINING,
            ],
            "sample": [
                f"model.path={sft}",
                f"data.path={self.posts}",
                *held_out(0.2, "data"),
                "sampling.max_new_tokens=24",
                "part_size=16",
                "batch_size=8",
            ],
            "score": [
                f"reference.path={sft}",
                f"data.path={self.comparisons}",
                *held_out(0.2, "data"),
                rewards,
                "part_size=16",
                "batch_size=8",
            ],
            "policy": [
                f"model.path={sft}",
                f"data.path={folder / 'score'}",
                f"validation.path={folder / 'score'}",
                *held_out(0.4, "data", "validation"),  # of those that were scored
                "optim.learning_rate=1e-2",
                *TRAINING,
                *evaluation,
            ],
            "online": [
                f"model.path={sft}",
                f"data.path={self.posts}",
                *held_out(0.2, "data"),
                rewards,
                "rounds=3",
                "prompts_per_round=8",
                "sampling.max_new_tokens=12",
                "part_size=6",
                "batch_size=4",
                "optim.learning_rate=1e-2",
                *(setting for setting in TRAINING if "max_steps" not in setting),
                *evaluation,
            ],
            "evaluate": [
                f"model.path={folder / 'policy' / 'model'}",
                f"reference.path={sft}",
                *(f"reference.{setting}" for setting in MODEL),
                *evaluation,
            ],
        }[stage]
        name = "reference" if stage == "score" else "model"
        common = [f"{name}.{setting}" for setting in MODEL]
        common += [] if stage == "evaluate" else DATA
        return [*common, *own, f"output_dir={folder / stage}"]

    def run(self, stage: str, *more: str) -> Any:
        """Runs a stage through its config and main."""
        main, cls = MAINS[stage]
        config = load_config(cls, [*self.arguments(stage), *more])
        with recorded_reads(config) as reads:
            result = main(config)
        self.reads.setdefault(stage, set()).update(reads)
        return result

    def refusal(self, stage: str, *more: str) -> str:
        """The text of the InputError that a stage gives."""
        with pytest.raises(InputError) as caught:
            self.run(stage, *more)
        return str(caught.value)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of the run in the folder of this name."""
        return [row for _, row in read_json_lines(self.folder / name / "metrics.jsonl")]
