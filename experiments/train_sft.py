"""Supervised fine-tuning on the authors' summaries (paper Sec. 6): gives π_ref.

    python -m experiments.train_sft configs/tldr.yaml configs/sizes/llama2_7b.yaml

Writes metrics.jsonl, checkpoints/ and model/, a Hugging Face folder. Of preferences it learns the
chosen completions.
"""

from functools import partial

from copg_jax.config.load import run_main
from copg_jax.config.stages import SFTConfig
from copg_jax.models.forward import make_seq_logp
from copg_jax.objective import make_nll_loss
from copg_jax.train.run import Stage, train
from copg_jax.train.stored import open_stored


def main(config: SFTConfig) -> None:
    """Trains with the negative log-likelihood of the completion tokens."""
    train(
        config,
        Stage(
            head="lm",
            make_loss=lambda model: make_nll_loss(
                make_seq_logp(model.arch, model.partitioner, chunk=config.logits_chunk)
            ),
            open_feed=partial(open_stored, config, chosen_only=True),
        ),
    )


if __name__ == "__main__":
    run_main(main, SFTConfig, description=__doc__)
