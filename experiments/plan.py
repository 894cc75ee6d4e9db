"""Compiles the step of a config for chips that are not here: does it fit, what bounds it?

    python -m experiments.plan configs/copg_tldr_llama2_7b.yaml --topology v5e:4x4 \\
        [--topology gpu:1xh200 ...] [--stage sft|reward|policy|evaluate] [key=value ...]

A topology is a TPU slice (v5e:4x4, v5p:2x2x1; needs the tpu extra, no TPU), GPUs of one node
(gpu:8xh200, an estimate) or virtual CPU devices (cpu:8). The stage follows from the config's name.
Prints a table, and one JSON line a topology.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from copg_jax.cli import load_config
from copg_jax.errors import InputError
from copg_jax.planning.plan import Plan, make_plan
from copg_jax.planning.program import STAGES
from copg_jax.planning.topology import open_topology
from copg_jax.step import POLICY_LOSSES

STAGE_OF_WORD = {"sft": "sft", "reward": "reward", "evaluate": "evaluate"} | dict.fromkeys(
    POLICY_LOSSES, "policy"
)


def main(arguments: list[str]) -> None:
    """Plans one config for every topology asked for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--topology", action="append", default=[])
    parser.add_argument("--stage", choices=STAGES)
    options, rest = parser.parse_known_args(arguments)
    stage = options.stage or stage_of(rest)
    config = load_config(STAGES[stage], rest, description=__doc__)
    if not options.topology:
        raise InputError("--topology: wanted at least one, such as v5e:4x4, got none")
    jax.config.update("jax_platforms", "cpu")
    sizes = [re.match(r"[cg]pu:(\d+)", name) for name in options.topology]
    jax.config.update("jax_num_cpu_devices", max([1, *(int(size[1]) for size in sizes if size)]))
    found = []
    for topology in [open_topology(name) for name in options.topology]:
        found.append(make_plan(config, topology))
        print(json.dumps(dataclasses.asdict(found[-1][0])), flush=True)
    print_table(found)


def stage_of(arguments: list[str]) -> str:
    """The stage that a config's name tells, e.g. copg_tldr_llama2_7b.yaml."""
    words = re.split(r"[_.-]", Path(arguments[0]).stem if arguments else "")
    stages = {STAGE_OF_WORD[word] for word in words if word in STAGE_OF_WORD}
    if len(stages) != 1:
        raise InputError(
            f"--stage: wanted one of {', '.join(STAGES)}, since the name of the config does not "
            "tell (its script does: experiments.train_policy is --stage policy)"
        )
    return stages.pop()


def print_table(found: list[tuple[Plan, list[str]]]) -> None:
    """What one chip holds, computes and receives in one step, and how long that takes at least."""
    table = Table(title="One chip in one step", title_justify="left")
    for column in ("topology", "mesh", "GiB: arguments + temporary", "of", "fits", "useful TFLOP"):
        table.add_column(column)
    for column in ("s: compute", "HBM", "interconnect", "bound by", "compiled in"):
        table.add_column(column)
    for plan, _ in found:
        seconds = plan.roofline_step_s or {}
        table.add_row(
            f"{plan.topology} ({plan.num_chips})",
            " ".join(f"{name}={size}" for name, size in plan.mesh.items()),
            f"{plan.arguments_gib} + {plan.temp_gib}",
            _text(plan.hbm_gib_per_chip),
            {True: "yes", False: "no", None: "-"}[plan.fits],
            f"{plan.useful_tflops_per_chip}",
            *(_text(seconds.get(term)) for term in ("compute", "hbm", "interconnect")),
            _text(plan.bound_by),
            f"{plan.compile_s} s",
        )
    console = Console()
    console.print(table)
    for plan, remarks in found:
        received = (
            f"{one['count']} x {name} {one['bytes'] / 1e9:.2f} GB"
            for name, one in (plan.collectives or {}).items()
        )
        for line in (", ".join(received), *remarks):
            console.print(f"{plan.topology}: {line}" if line else "", soft_wrap=True)


def _text(value: float | str | None) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
