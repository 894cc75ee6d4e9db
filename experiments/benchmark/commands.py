"""The command line of the benchmark: its arguments, checked, and what each command does.

1. `make_parser` declares the commands; each parses into the function that runs it.
2. `write`, `time_training`, `time_generation` and `compare_with_peers` return what is printed as
   one JSON line.
"""

import argparse
import dataclasses
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from copg_jax import runtime, sharding
from copg_jax.config.sections import ATTENTION_CHOICES, DTYPES, REMATS, MeshConfig
from copg_jax.errors import InputError
from copg_jax.models import kernels
from copg_jax.models.params import Architecture
from experiments.benchmark import compare, generate, train
from experiments.benchmark.workload import MODELS, read_workload, write_workload

_OF_ONE = "pairs rounds batch steps warmup prompts samples microbatches logits_chunk lora_rank"
_LEAST = {"seed": 0, "new": 2, "timeout": 1, "peak_tflops": 1e-3} | dict.fromkeys(
    _OF_ONE.split(), 1
)


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser; `run` of what it returns is the command's function, of the same.

    Args:
        module: what `python -m` runs.
        description: for `--help`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(required=True)

    def command(name: str, run: Any) -> Any:
        added = subparsers.add_parser(
            name, help=run.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        added.set_defaults(run=lambda args: (_check_numbers(args), run(args))[1])
        return added.add_argument

    add = command("workload", write)
    add("--out", type=Path, required=True, help="file to write")
    add("--pairs", type=int, default=256, help="rows")
    add("--seed", type=int, default=0, help="decides lengths and ids")

    add = command("train", time_training)
    _add_shared(add)
    _add_model(add)
    _add_steps(add)
    add("--remat", choices=REMATS, default="full", help="what is kept, per layer")
    add("--lora-rank", type=int, help="train adapters of this rank (default: all weights)")
    add("--microbatches", type=int, default=1, help="pieces of a batch")
    add("--logits-chunk", type=int, help="completion tokens whose logits exist at a time")
    add("--peak-tflops", type=float, help="of one device, for the MFU (known by its kind)")
    add("--profile", type=Path, help="folder for a profiler trace")

    add = command("generate", time_generation)
    _add_shared(add)
    _add_model(add)
    add("--batch", type=int, default=32, help="prompts")
    add("--new", type=int, default=48, help="tokens of each completion")
    add("--samples", type=int, default=1, help="completions of each prompt")

    add = command("peers", compare_with_peers)
    _add_shared(add)
    add("--env", action="append", default=[], metavar="NAME=PYTHON", help="torch= and tunix=")
    names = list(compare.PEERS)
    add("--peers", nargs="+", choices=names, default=names, help="whom to run")
    add("--rounds", type=int, default=3, help="turns")
    _add_steps(add)
    add("--prompts", type=int, default=32, help="prompts of the generation")
    add("--new", type=int, default=48, help="tokens of each completion")
    add("--remat", choices=REMATS, default="full", help="of ours (peers keep everything)")
    add("--cuda", action="store_true", help="peers on the GPU, everyone in bfloat16")
    add("--timeout", type=float, default=1800, help="seconds of one process")
    subparsers.choices["peers"].set_defaults(own=(sys.executable, "-m", module))
    return parser


def _add_shared(add: Any) -> None:
    add("--workload", type=Path, required=True, help="JSON lines of token ids")
    add("--shape", choices=MODELS, default="small", help="architecture")


def _add_steps(add: Any) -> None:
    add("--batch", type=int, default=8, help="pairs of a step, over all devices")
    add("--steps", type=int, default=6, help="steps to time")
    add("--warmup", type=int, default=2, help="steps before those")


def _add_model(add: Any) -> None:
    add("--dtype", choices=DTYPES, default="float32", help="compute dtype")
    add("--attention", choices=ATTENTION_CHOICES, default="auto", help="what computes prompts")
    add("--mesh", type=_mesh, default=MeshConfig(), help="data=N,fsdp=N,tensor=N")


def _mesh(text: str) -> MeshConfig:
    try:
        sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
        return MeshConfig(**sizes)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"wanted sizes of axes such as data=1,fsdp=4,tensor=2, got {text!r} ({error})"
        ) from error


def _check_numbers(args: argparse.Namespace) -> None:
    """Raises InputError for a number that is too small, before anything is read or run."""
    for name, least in _LEAST.items():
        number = getattr(args, name, None)
        if number is not None and not number >= least:  # nor NaN
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} must be >= {least}, got {number}")


def write(args: argparse.Namespace) -> dict[str, Any]:
    """write a workload: rows of random ids with the lengths of TL;DR"""
    write_workload(args.out, num_pairs=args.pairs, seed=args.seed)
    return {"wrote": str(args.out), "pairs": args.pairs}


def time_training(args: argparse.Namespace) -> dict[str, Any]:
    """time full optimiser steps of policy training"""
    runtime.check_platform()
    mesh = sharding.make_mesh(args.mesh)
    arch = dataclasses.replace(_architecture(args, mesh), remat=args.remat)
    measured = train.measure(
        arch,
        read_workload(args.workload, vocab_size=arch.vocab_size),
        batch_size=args.batch,
        num_steps=args.steps,
        num_warmup=args.warmup,
        mesh=mesh,
        lora_rank=args.lora_rank,
        num_microbatches=args.microbatches,
        logits_chunk=args.logits_chunk,
        peak_tflops=args.peak_tflops,
        profile=args.profile,
    )
    own = ("lora_rank", "remat", "steps", "warmup", "microbatches", "logits_chunk")
    return _setting(args, arch, mesh) | {name: getattr(args, name) for name in own} | measured


def time_generation(args: argparse.Namespace) -> dict[str, Any]:
    """time greedy generation of a fixed number of tokens"""
    runtime.check_platform()
    mesh = sharding.make_mesh(args.mesh)
    arch = _architecture(args, mesh)
    measured = generate.measure(
        arch,
        read_workload(args.workload, vocab_size=arch.vocab_size),
        batch_size=args.batch,
        num_new=args.new,
        num_samples=args.samples,
        mesh=mesh,
    )
    setting = _setting(args, arch, mesh) | {"new": args.new, "samples": args.samples}
    return setting | measured


def _architecture(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Architecture:
    """The model of that shape as it computes on these devices."""
    arch = dataclasses.replace(MODELS[args.shape], dtype=args.dtype)
    return kernels.choose(args.attention, arch, mesh)


def _setting(
    args: argparse.Namespace, arch: Architecture, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """What the numbers of a line belong to."""
    return {
        "shape": args.shape,
        "batch": args.batch,
        "dtype": arch.dtype,
        "attention": arch.attention,
        "mesh": dict(mesh.shape),
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
    }


def compare_with_peers(args: argparse.Namespace) -> dict[str, Any]:
    """run scripts of other libraries (experiments/benchmark/peers) and ours by turns"""
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("experiments").setLevel(logging.INFO)
    read_workload(args.workload, vocab_size=MODELS[args.shape].vocab_size)
    envs = dict(text.split("=", 1) for text in args.env if "=" in text)
    if len(envs) < len(args.env):
        raise InputError(f"--env: wanted NAME=PYTHON, each name once, got {args.env}")
    with tempfile.TemporaryDirectory() as folder:
        # What nobody reaches is left out: some peers compute their reference on every row first.
        with args.workload.open(encoding="utf-8") as file:
            rows = list(file)
        used = Path(folder) / "workload.jsonl"
        most = max(args.batch * (args.steps + args.warmup), args.prompts)
        used.write_text("".join(rows[:most]), encoding="utf-8")
        config = Path(folder) / "config.json"
        compare.write_config(MODELS[args.shape], config)
        settings = compare.Settings(
            workload=used,
            config=config,
            shape=args.shape,
            batch=args.batch,
            steps=args.steps,
            warmup=args.warmup,
            prompts=args.prompts,
            new=args.new,
            remat=args.remat,
            cuda=args.cuda,
        )
        contestants = compare.find(args.peers, envs=envs, own=args.own, settings=settings)
        found = compare.run(contestants, rounds=args.rounds, timeout_sec=args.timeout)
    summary = compare.summarize(contestants, found)
    compare.show(summary, f"{args.shape}, median of {args.rounds} rounds (least–most)")
    files = ("workload", "config")
    setting = {key: value for key, value in settings._asdict().items() if key not in files}
    return setting | {"rounds": args.rounds, "contestants": summary}
