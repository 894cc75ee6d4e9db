"""Bradley–Terry reward model on human comparisons (paper Sec. 6, ℓ_RM).

    python -m experiments.train_reward configs/reward_tldr_llama2_7b.yaml output_dir=runs/reward

Writes metrics.jsonl, checkpoints/ and model/, which `LlamaForSequenceClassification` (num_labels=1)
loads.
"""

from copg_jax import stages, step, training
from copg_jax.cli import run_main
from copg_jax.config import RewardModelConfig


def main(config: RewardModelConfig) -> None:
    """Trains the SFT backbone with a new scalar head on labelled pairs."""
    training.train(
        config,
        head="score",
        make_loss=step.make_bradley_terry_loss,
        check_data=lambda _section, _model, dataset: stages.require_rewards(dataset, at_least=2),
    )


if __name__ == "__main__":
    run_main(main, RewardModelConfig, description=__doc__)
