"""CoPG, DPO, IPO, PG or RLOO on scored completions (paper Sec. 6, Figs. 2-6).

    python -m experiments.train_policy configs/copg_tldr_llama2_7b.yaml output_dir=runs/copg

Reads the folder that `experiments.score` wrote. Training holds one model: rewards and ln π_ref come
with the data. Evaluation by generation additionally holds π_ref and the reward functions' models.
Writes metrics.jsonl, checkpoints/, model/ (the last step) and best/ (the step of the highest
generation reward).
"""

from copg_jax import stages, step, training
from copg_jax.cli import run_main
from copg_jax.config import PolicyConfig


def main(config: PolicyConfig) -> None:
    """Trains the SFT model with the loss named in `loss.name`."""
    loss, evaluation = config.loss, config.evaluation
    training.train(
        config,
        head="lm",
        make_loss=lambda model: step.make_policy_loss(
            model,
            loss.name,
            beta=loss.beta,
            baseline=loss.baseline,
            chunk=config.logits_chunk,
        ),
        check_data=stages.require_scored,
        make_evaluation=evaluation
        and (
            lambda model, mesh, folder: stages.open_evaluation(
                evaluation,
                model,
                mesh,
                folder,
                beta=loss.beta,
                reference=model,
                logits_chunk=config.logits_chunk,
            )
        ),
        best_metric="eval/reward_mean" if evaluation else None,
    )


if __name__ == "__main__":
    run_main(main, PolicyConfig, description=__doc__)
