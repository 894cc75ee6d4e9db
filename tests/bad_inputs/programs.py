"""Arguments of the programs beside the stages: benchmark, plan, demo, figures, conversion."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from copg_jax.bandit.train import BanditConfig
from copg_jax.config.load import load_config
from copg_jax.hf import gguf
from experiments import bandit, plan, quickstart
from experiments.benchmark import commands
from experiments.benchmark.workload import write_workload
from experiments.planning.plan import Plan
from tests.bad_inputs.ground import Case, Ground, write

FIELDS = [field.name for field in dataclasses.fields(Plan)]
BELOW_ZERO = {"prompt_ids": [-1], "completion_ids": [[3], [4]], "rewards": [1, 0]}


def benchmark(name: str, *arguments: str, word: str, rows: bytes | None = None) -> Case:
    """A command of the benchmark on HERE/rows.jsonl."""

    def act(ground: Ground, here: Path) -> object:
        workload = here / "rows.jsonl"
        write_workload(workload, num_pairs=9, seed=0)
        if rows is not None:
            write(workload, rows)
        command = [
            *arguments,
            *(["--workload", str(workload)] if arguments[0] != "workload" else []),
        ]
        args = commands.make_parser("x", None).parse_args(
            [argument.replace("HERE", str(here)) for argument in command]
        )
        return args.run(args)

    return Case(name, act, (word,))


def configured(name: str, main: Callable, cls: type, *arguments: str, word: str) -> Case:
    """A program with a config."""

    def act(ground: Ground, here: Path) -> object:
        own = [f"output_dir={here / 'run'}", *arguments]
        return main(load_config(cls, [x.replace("HERE", str(here)) for x in own]))

    return Case(name, act, (word,))


def planned(name: str, content: bytes, *words: str) -> Case:
    """A file of plans to print."""

    def act(ground: Ground, here: Path) -> object:
        write(here / "plans.txt", b" One chip in one step\n" + content)
        return plan.main(["--table", str(here / "plans.txt")])

    return Case(name, act, ("--table", *words))


def converted(name: str, content: bytes | None) -> Case:
    """A file of llama.cpp to convert."""

    def act(ground: Ground, here: Path) -> object:
        if content is not None:
            write(here / "m.gguf", content)
        return gguf.convert(here / "m.gguf", here / "out")

    return Case(name, act, ("m.gguf",))


SMALL = ["--steps", "1", "--warmup", "1", "--batch", "8"]
PLAN = ["model.path=configs/models/llama2_7b", "data.path=d", "output_dir=a", "--stage", "sft"]
CASES = [
    benchmark("a step of no pair", "train", "--batch", "0", word="--batch"),
    benchmark("a step of less than no pair", "train", "--batch", "-8", word="--batch"),
    benchmark("no step to time", "train", "--steps", "0", word="--steps"),
    benchmark("no warm-up", "train", "--warmup", "0", word="--warmup"),
    benchmark("a batch in no piece", "train", *SMALL, "--microbatches", "0", word="--microbatches"),
    benchmark("a batch in uneven pieces", "train", *SMALL, "--microbatches", "3", word="3"),
    benchmark("no logits", "train", *SMALL, "--logits-chunk", "0", word="--logits-chunk"),
    benchmark("more pairs than there are", "train", "--batch", "1000", word="batch"),
    benchmark("a generation of no token", "generate", "--new", "0", word="--new"),
    benchmark("a generation of no prompt", "generate", "--batch", "0", word="--batch"),
    benchmark("less than no sample", "generate", "--samples", "-1", word="--samples"),
    benchmark("no turn", "peers", "--rounds", "0", word="--rounds"),
    benchmark("a workload of less than no pair", "workload", "--out", "HERE/w", "--pairs", "-1",
              word="--pairs"),
    benchmark("a workload in a folder that is a file", "workload", "--out", "HERE/rows.jsonl/w",
              word="rows.jsonl"),
    benchmark("a workload in place of a folder", "workload", "--out", "HERE", word="HERE"),
    benchmark("a trace below a file", "train", *SMALL, "--profile", "HERE/rows.jsonl/trace",
              word="rows.jsonl"),
    benchmark("a workload nested deep", "train", word="rows.jsonl:1", rows=b"[" * 10_000),
    benchmark("a workload that is no JSON", "train", word="rows.jsonl:1", rows=b"{\n"),
    benchmark("a workload of bytes", "train", word="rows.jsonl", rows=bytes(range(128, 256))),
    benchmark("a workload of texts", "train", word="rows.jsonl:1", rows=b'{"prompt": "a"}\n'),
    benchmark("a workload with an id below zero", "train", word="rows.jsonl:1",
              rows=json.dumps(BELOW_ZERO).encode()),
    configured("a bandit of no seed", bandit.main, BanditConfig, "num_seeds=0", word="num_seeds"),
    configured("a bandit with rewards of no number", bandit.main, BanditConfig,
               "reward=[1, .nan, 2]", word="reward"),
    configured("a bandit below a file", bandit.main, BanditConfig, "output_dir=/dev/null/x",
               word="/dev/null"),
    configured("a demo with settings of no stage", quickstart.main, quickstart.QuickstartConfig,
               "overrides={ppo: [seed=1]}", word="overrides"),
    configured("a demo below a file", quickstart.main, quickstart.QuickstartConfig,
               "output_dir=/dev/null/x", word="/dev/null"),
    *(
        Case(f"a plan for {topology!r}",
             lambda ground, here, topology=topology: plan.main([*PLAN, "--topology", topology]),
             ("--topology",))
        for topology in ("", "v5e", "gpu:0xh200", "gpu:8xabacus", "cpu:x", "cpu:-8")
    ),
    planned("a plan cut short", b'{"topology": "v5e:4x4", "mod', "plans.txt:2", "cut short"),
    planned("a plan of an older version", b'{"topology": "v5e:4x4", "stage": "sft"}\n',
            "plans.txt:2", "without model"),
    planned("a plan of another program", b'{"a": 1}\n', "plans.txt:2", "without topology"),
    planned("a plan of texts", json.dumps(dict.fromkeys(FIELDS, "x")).encode(), "plans.txt:2"),
    planned("plans of bytes", bytes(range(128, 256)), "plans.txt"),
    converted("a GGUF that is nowhere", None),
    converted("an empty GGUF", b""),
    converted("a GGUF of text", b"a model, honestly\n" * 99),
    converted("a GGUF of zeros", bytes(4096)),
    converted("a GGUF of bytes", bytes(range(256)) * 99),
    converted("a GGUF that ends behind its name", b"GGUF\3\0\0\0"),
    converted("a GGUF of a newer version", b"GGUF\x63\0\0\0" + bytes(4096)),
    converted("a GGUF with more tensors than bytes", b"GGUF\3\0\0\0" + b"\xff" * 16 + bytes(999)),
]  # fmt: skip
