"""Compiles the step of a config for chips that are not here: does it fit, what bounds it?

    python -m experiments.plan configs/tldr.yaml configs/sizes/llama2_7b.yaml \\
        configs/losses/copg.yaml model.path=configs/models/llama2_7b --topology v5e:4x4 \\
        [--topology gpu:1xh200 ...] [--stage sft|reward|policy|evaluate] [key=value ...]
    python -m experiments.plan --table FILE

A topology is a TPU slice (v5e:4x4, v5p:2x2x1; needs the tpu extra, no TPU), GPUs of one node
(gpu:8xh200; needs the plan-gpu extra, no GPU), the same by the compiler of this CPU (cpu:8xh200, an
estimate) or virtual CPU devices (cpu:8). The stage follows from the names of the
configs where they tell it: that of a loss is policy. Prints a table, and one JSON line a topology;
--table prints the plans in a file of such lines as Markdown.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from copg_jax.config.load import load_config
from copg_jax.config.sections import POLICY_LOSSES
from copg_jax.errors import InputError
from experiments.planning.plan import Plan, make_plan
from experiments.planning.program import STAGES
from experiments.planning.table import read_plans, to_markdown
from experiments.planning.topology import open_topology

STAGE_OF_WORD = {stage: stage for stage in STAGES} | dict.fromkeys(POLICY_LOSSES, "policy")


def main(arguments: list[str]) -> None:
    """Plans one config for every topology asked for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--topology", action="append", default=[])
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--table", type=Path)
    options, rest = parser.parse_known_args(arguments)
    if options.table is not None:
        if options.topology or rest:
            raise InputError("--table FILE: wanted nothing beside it: its plans are made already")
        print(to_markdown(read_plans(options.table)))
        return
    asks_help = {"-h", "--help"} & set(rest)
    stage = options.stage or ("policy" if asks_help else stage_of(rest))
    config = load_config(STAGES[stage], rest, description=__doc__)
    if not options.topology:
        raise InputError("--topology: wanted at least one, such as v5e:4x4, got none")
    found = []
    for topology in [open_topology(name) for name in options.topology]:
        found.append(make_plan(config, topology))
        print(json.dumps(dataclasses.asdict(found[-1][0])), flush=True)
    print_table(found)


def stage_of(arguments: list[str]) -> str:
    """The stage that the names of the configs tell, e.g. losses/copg.yaml or my_sft.yaml."""
    files = [Path(argument) for argument in arguments if argument.endswith((".yaml", ".yml"))]
    words = [word for file in files for word in re.split(r"[_.-]", file.stem)]
    stages = {STAGE_OF_WORD[word] for word in words if word in STAGE_OF_WORD}
    if len(stages) != 1:
        raise InputError(
            f"--stage: wanted one of {', '.join(STAGES)}, since the names of the configs do not "
            "tell (a script does: experiments.train_policy is --stage policy)"
        )
    return stages.pop()


def print_table(found: list[tuple[Plan, list[str]]]) -> None:
    """What one chip holds, computes and receives in one step, and how long that takes at least."""
    plans = [plan for plan, _ in found]
    table = Table(title="One chip in one step", title_justify="left")
    table.add_column("")
    for plan in plans:
        table.add_column(plan.topology, justify="right")

    def add(name: str, value: Callable[[Plan], Any]) -> None:
        table.add_row(name, *("-" if value(plan) is None else str(value(plan)) for plan in plans))

    add("chips", lambda plan: plan.num_chips)
    add("mesh data x fsdp x tensor", lambda plan: " x ".join(map(str, plan.mesh.values())))
    add("arguments (state, batch), GiB", lambda plan: plan.arguments_gib)
    add("all else at its peak, GiB", lambda plan: plan.temp_gib)
    add("reference and reward models, GiB", lambda plan: plan.frozen_gib)
    add("memory, GiB", lambda plan: plan.hbm_gib_per_chip)
    add("fits", lambda plan: {True: "yes", False: "no", None: None}[plan.fits])
    add("useful TFLOP", lambda plan: plan.useful_tflops_per_chip)
    for term in ("compute", "hbm", "interconnect"):
        add(f"at least, s: {term}", lambda plan, t=term: (plan.roofline_step_s or {}).get(t))
    add("bound by", lambda plan: plan.bound_by)
    names = sorted({name for plan in plans for name in plan.collectives or {}})
    for name in names:
        add(f"received by {name}", lambda plan, name=name: _received(plan, name))
    add("compiled in, s", lambda plan: plan.compile_s)
    console = Console()
    console.print(table)
    for plan, remarks in found:
        for remark in remarks:
            console.print(f"{plan.topology}: {remark}", soft_wrap=True)


def _received(plan: Plan, name: str) -> str | None:
    one = (plan.collectives or {}).get(name)
    return f"{one['count']} x, {one['bytes'] / 1e9:.2f} GB" if one else None


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)  # the most that a topology of one node asks for
    # What is compiled for a GPU cannot be read from a cache without one.
    jax.config.update("jax_enable_compilation_cache", False)
    # Instructions are scheduled with less care: a fifth of the time, the same collectives.
    jax.config.update("jax_optimization_level", "O1")
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
