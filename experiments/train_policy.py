"""CoPG, or DPO, IPO, PG, RLOO and others, on scored completions (paper Sec. 6, Figs. 2-6).

    python -m experiments.train_policy configs/tldr.yaml configs/sizes/llama2_7b.yaml \\
        configs/losses/copg.yaml

Reads the folder that `experiments.score` wrote, or several (data.sources). Training holds one
model: rewards and ln π_ref come with the data. Evaluation by generation additionally holds π_ref
and the reward functions' models. Writes metrics.jsonl, checkpoints/, model/ (the last step) and
best/ (the step of the highest generation reward).
"""

from collections.abc import Callable
from functools import partial

from etils import epath
from jax import Array

from copg_jax import reuse
from copg_jax.config.load import run_main
from copg_jax.config.policy_data import PolicyDataConfig
from copg_jax.config.sections import BY_DIFFERENCES, DataConfig
from copg_jax.config.stages import OnlineConfig, PolicyConfig, PolicyEvaluationConfig
from copg_jax.data.dataset import GroupDataset
from copg_jax.data.stream import Groups
from copg_jax.evaluate import GenerationEvaluator
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.inputs import (
    open_evaluation,
    require_same_reference,
    require_scored_folder,
)
from copg_jax.models.forward import make_seq_logp
from copg_jax.objective import (
    LossFn,
    batch_arguments,
    find_coefficients,
    find_objective,
    make_policy_loss,
)
from copg_jax.pooled import require_differences, require_mu
from copg_jax.train.run import Stage, train
from copg_jax.train.stored import open_stored


def make_loss(
    model: PretrainedModel, *, objective: Callable[..., Array], chunk: int | None
) -> LossFn:
    """The loss of a policy, with an objective of `objective.find_objective`."""
    return make_policy_loss(make_seq_logp(model.arch, model.partitioner, chunk=chunk), objective)


def _paths(data: PolicyDataConfig) -> str:
    return data.path or ", ".join(source.path for source in data.sources)


def open_own_evaluation(
    section: PolicyEvaluationConfig,
    config: PolicyConfig | OnlineConfig,
    model: PretrainedModel,
    folder: epath.Path,
) -> tuple[GenerationEvaluator, dict[str, str]]:
    """The evaluation of a policy that began at its reference."""
    return open_evaluation(
        section,
        model,
        folder,
        beta=config.loss.beta,
        reference=model,
        logits_chunk=config.logits_chunk,
    )


def main(config: PolicyConfig) -> None:
    """Trains the SFT model with the loss named in `loss.name`."""
    objective, evaluation = find_objective(config.loss), config.evaluation

    def check_data(section: DataConfig, model: PretrainedModel, dataset: GroupDataset) -> None:
        require_same_reference(section, model, dataset)
        if "mu_log_ratio" in batch_arguments(objective):
            field = "validation.path" if section is config.validation else "data.path"
            require_mu(field, section.path, dataset)

    def check_pool(groups: Groups) -> None:
        if config.loss.name in BY_DIFFERENCES:
            require_differences(_paths(config.data), groups)

    train(
        config,
        Stage(
            head="lm",
            make_loss=reuse.once(
                "loss",
                (objective, config.logits_chunk),
                lambda: partial(make_loss, objective=objective, chunk=config.logits_chunk),
            ),
            open_feed=partial(
                open_stored,
                config,
                check_section=require_scored_folder,
                check_data=check_data,
                check_pool=check_pool,
                cross=config.loss.pairs == "cross",
            ),
            coefficients=partial(find_coefficients, config.loss),
            open_evaluation=evaluation and partial(open_own_evaluation, evaluation, config),
            best_metric="eval/reward_mean" if evaluation else None,
        ),
    )


if __name__ == "__main__":
    run_main(main, PolicyConfig, description=__doc__)
