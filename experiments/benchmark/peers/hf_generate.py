"""Hugging Face `generate`, greedy and to a fixed number of tokens: prints tokens_per_s.

Its environment needs torch and transformers. The settings are fair:

- the first prompts of the workload in one batch, padded on the left to the longest, as ours;
- no token ends a completion, so that everyone makes as many, and nothing is sampled;
- weights in the compute dtype (bfloat16 on a GPU); the key-value cache is the default one;
- one call to warm up, then the median of three, as ours.
"""
# pyright: reportMissingImports=false

import os
import statistics
import time
from typing import Any

import shared


def main() -> None:
    """Generates."""
    args = shared.parse(__doc__, training=False)
    shared.need(torch="torch", transformers="transformers")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    place = ("cuda", torch.bfloat16) if args.cuda else ("cpu", torch.float32)
    args.arch |= {"bos_token_id": None, "eos_token_id": None}
    model: Any = LlamaForCausalLM(LlamaConfig(**args.arch))
    model.to(*place).eval()
    prompts = [row["prompt_ids"] for row in args.rows]
    longest = max(map(len, prompts))
    pads = [[0] * (longest - len(ids)) for ids in prompts]
    ids = torch.tensor([pad + own for pad, own in zip(pads, prompts, strict=True)])
    mask = torch.tensor([pad + [1] * len(own) for pad, own in zip(pads, prompts, strict=True)])
    inputs = {"input_ids": ids.to(place[0]), "attention_mask": mask.to(place[0])}

    def seconds() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                **inputs, do_sample=False, max_new_tokens=args.new, pad_token_id=0
            ).cpu()
        assert made.shape == (args.batch, longest + args.new), made.shape
        return time.perf_counter() - start

    seconds()
    taken = statistics.median(seconds() for _ in range(3))
    shared.show(
        peer="hf_generate",
        tokens_per_s=args.batch * args.new / taken,
        seconds=taken,
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
