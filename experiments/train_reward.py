"""Bradley–Terry reward model on human comparisons (paper Sec. 6, ℓ_RM).

    python -m experiments.train_reward configs/tldr.yaml configs/sizes/llama2_7b.yaml

It learns the human choice where a row has one, the rows' scores where it has none.
Writes metrics.jsonl, checkpoints/ and model/, which `AutoModelForSequenceClassification` loads (one
label).
"""

from functools import partial

from copg_jax.config.load import run_main
from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import RewardModelConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.inputs import require_preferences, require_rewards
from copg_jax.models.forward import make_score
from copg_jax.objective import make_bradley_terry_loss
from copg_jax.pooled import require_differences
from copg_jax.train.run import Stage, train
from copg_jax.train.stored import open_stored


def check_data(section: DataConfig, _model: PretrainedModel, dataset: GroupDataset) -> None:
    """Raises InputError unless there are pairs, and choices among them."""
    require_rewards(dataset, at_least=2)
    require_differences(section.path, dataset)


def main(config: RewardModelConfig) -> None:
    """Trains the SFT backbone with a new scalar head on labelled pairs."""
    train(
        config,
        Stage(
            head="score",
            make_loss=lambda model: make_bradley_terry_loss(
                make_score(model.arch, model.partitioner)
            ),
            open_feed=partial(
                open_stored,
                config,
                check_section=require_preferences,
                check_data=check_data,
                by_choice=True,
            ),
        ),
    )


if __name__ == "__main__":
    run_main(main, RewardModelConfig, description=__doc__)
