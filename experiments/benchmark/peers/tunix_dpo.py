"""tunix's DPOTrainer on pairs of token ids: prints pairs_per_s.

Its environment needs google-tunix, which pins a jax of its own. The settings are fair:

- the model is tunix's Llama, with nothing recomputed in the backward pass;
- prompts and completions are padded to the longest of all rows, since one shape is compiled once;
- the reference is a second model, run at every step: the trainer takes no ln π_ref that is known;
- the loss is DPO, the only one of pairs that it has; its cost is that of CoPG; Adam, no decay.

It computes in float32 on the CPU.
"""
# pyright: reportMissingImports=false

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import shared


def padded(rows: Sequence[list[int]], width: int, *, left: bool) -> tuple[Any, Any]:
    """Ids [n, width] padded with 0 on one side, and the mask of those that are none."""
    import numpy as np

    ids, mask = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    for index, row in enumerate(rows):
        own = slice(width - len(row), width) if left else slice(len(row))
        ids[index, own], mask[index, own] = row, 1
    return ids, mask


def make_batches(rows: Sequence[shared.Row], batch_size: int) -> Iterator[Any]:
    """Batches in the order of the rows, all of one shape."""
    from tunix.sft.dpo.dpo_trainer import TrainingInput

    pairs = [shared.chosen_first(row) for row in rows]
    widest = max(len(row["prompt_ids"]) for row in rows)
    longest = max(len(ids) for pair in pairs for ids in pair)
    for first in range(0, len(rows), batch_size):
        own = slice(first, first + batch_size)
        prompts = padded([row["prompt_ids"] for row in rows[own]], widest, left=True)
        chosen, rejected = (
            padded([pair[k] for pair in pairs[own]], longest, left=False) for k in range(2)
        )
        yield TrainingInput(*prompts, *chosen, *rejected)


def main() -> None:
    """Trains; the clock runs from the end of the warm-up to the end of the last step."""
    args = shared.parse(__doc__, training=True)
    shared.need(tunix="google-tunix")
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import optax
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig
    from tunix.sft.hooks import TrainingHooks

    ends: list[float] = []

    class Clock(TrainingHooks):
        """Time when each step's loss is there; the hook comes while the next step runs."""

        def on_train_step_end(self, train_ctx: Any, train_step: int, train_loss: Any) -> None:
            jax.block_until_ready(train_loss)
            ends.append(time.perf_counter())

        def _nothing(self, *args: Any, **kwargs: Any) -> None:
            pass

        on_train_start = on_train_end = on_train_step_start = _nothing
        on_eval_step_start = on_eval_step_end = _nothing

    arch = args.arch
    sizes = ModelConfig(
        num_layers=arch["num_hidden_layers"],
        vocab_size=arch["vocab_size"],
        embed_dim=arch["hidden_size"],
        hidden_dim=arch["intermediate_size"],
        num_heads=arch["num_attention_heads"],
        head_dim=arch["head_dim"],
        num_kv_heads=arch["num_key_value_heads"],
        rope_theta=arch["rope_theta"],
        norm_eps=arch["rms_norm_eps"],
        weight_tying=arch["tie_word_embeddings"],
    )
    policy, reference = (Llama3(sizes, rngs=nnx.Rngs(0)) for _ in range(2))
    num_steps = args.warmup + args.steps
    config = DPOTrainingConfig(eval_every_n_steps=num_steps + 1, max_steps=num_steps)
    trainer = DPOTrainer(policy, reference, optax.adam(1e-6), config)
    trainer.with_training_hooks(Clock())
    trainer.train(list(make_batches(args.rows, args.batch)))
    seconds = ends[-1] - ends[args.warmup - 1]
    shared.show(
        peer="tunix",
        pairs_per_s=args.steps * args.batch / seconds,
        step_s=seconds / args.steps,
        jax=jax.__version__,
    )


if __name__ == "__main__":
    main()
