"""Supervised fine-tuning on the authors' summaries (paper Sec. 6): gives π_ref.

    python -m experiments.train_sft configs/sft_tldr_llama2_7b.yaml output_dir=runs/sft

Writes metrics.jsonl, checkpoints/ and model/, a Hugging Face folder.
"""

from copg_jax import step, training
from copg_jax.cli import run_main
from copg_jax.config import SFTConfig


def main(config: SFTConfig) -> None:
    """Trains with the negative log-likelihood of the completion tokens."""
    training.train(
        config,
        head="lm",
        make_loss=lambda model: step.make_nll_loss(model, chunk=config.logits_chunk),
    )


if __name__ == "__main__":
    run_main(main, SFTConfig, description=__doc__)
