"""Bradley–Terry reward model on human comparisons (paper Sec. 6, ℓ_RM).

    python -m experiments.train_reward configs/tldr.yaml configs/sizes/llama2_7b.yaml

Writes metrics.jsonl, checkpoints/ and model/, which `AutoModelForSequenceClassification` loads (one
label).
"""

from copg_jax.config.load import run_main
from copg_jax.config.stages import RewardModelConfig
from copg_jax.inputs import require_rewards
from copg_jax.models.forward import make_score
from copg_jax.objective import make_bradley_terry_loss
from copg_jax.train.run import Stage, train


def main(config: RewardModelConfig) -> None:
    """Trains the SFT backbone with a new scalar head on labelled pairs."""
    train(
        config,
        Stage(
            head="score",
            make_loss=lambda model: make_bradley_terry_loss(
                make_score(model.arch, model.partitioner)
            ),
            check_data=lambda _section, _model, dataset: require_rewards(dataset, at_least=2),
        ),
    )


if __name__ == "__main__":
    run_main(main, RewardModelConfig, description=__doc__)
