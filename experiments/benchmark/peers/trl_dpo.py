"""TRL's DPOTrainer on pairs of token ids: prints pairs_per_s.

Its environment needs torch, trl and accelerate. The settings are fair:

- `precompute_ref_log_probs`: ln π_ref is computed before the clock starts, as in ours;
- `loss_type=ipo`, the relative of CoPG that TRL has; its cost is that of CoPG;
- nothing is recomputed in the backward pass, nothing is saved, logged or drawn;
- padding, sampler and optimiser (AdamW without weight decay) are those of the trainer.

On a GPU weights are float32 and products bfloat16 (`bf16`), as in ours.
"""
# pyright: reportMissingImports=false

import os
import tempfile
import time
from typing import Any

import shared


def make_rows(rows: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """The rows under the names of the trainer."""
    names = "prompt_ids", "chosen_ids", "rejected_ids"
    return [
        dict(zip(names, (row["prompt_ids"], *shared.chosen_first(row)), strict=True))
        for row in rows
    ]


def make_tokenizer() -> Any:
    """One that the trainer asks for the ids of padding and end only."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )


def make_config(args: Any, folder: str) -> Any:
    """The settings above."""
    import trl

    return trl.DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=args.batch,
        max_steps=args.warmup + args.steps,
        loss_type=["ipo"],
        learning_rate=1e-6,
        weight_decay=0.0,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        max_length=None,
        use_cpu=not args.cuda,
        bf16=args.cuda,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Trains; the clock runs from the end of the warm-up to the end of the last step."""
    args = shared.parse(__doc__, training=True)
    shared.need(torch="torch", trl="trl", accelerate="accelerate")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    import trl
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    class Trainer(trl.DPOTrainer):
        """The trainer on rows that are token ids already."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    class Clock(TrainerCallback):
        """Time at the end of each step."""

        ends: list[float]

        def __init__(self) -> None:
            self.ends = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if args.cuda:
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=LlamaForCausalLM(LlamaConfig(**args.arch)),
            args=make_config(args, folder),
            train_dataset=Dataset.from_list(make_rows(args.rows)),
            processing_class=make_tokenizer(),
            callbacks=[clock],
        ).train()
    seconds = clock.ends[-1] - clock.ends[args.warmup - 1]
    shared.show(
        peer="trl",
        pairs_per_s=args.steps * args.batch / seconds,
        step_s=seconds / args.steps,
        torch=torch.__version__,
        trl=trl.__version__,
    )


if __name__ == "__main__":
    main()
