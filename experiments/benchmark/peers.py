"""Runs the scripts of other libraries and ours by turns, each in a process and environment of its
own.

1. `find` checks scripts and environments before anything runs.
2. `compare` runs every contestant once a round: a machine whose load drifts slows all alike.
3. `summarize` divides our rate by theirs, round by round, and takes medians; `show` is the table.

A contestant prints a JSON line, its last, with `pairs_per_s` or `tokens_per_s`.
"""

import itertools
import json
import logging
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from copg_jax.errors import InputError

log = logging.getLogger(__name__)

RATES = {"train": "pairs_per_s", "generate": "tokens_per_s"}
OURS = {"train": "ours", "generate": "ours_generate"}


class Script(NamedTuple):
    """A file of the scripts' folder and how it is called."""

    file: str
    env: str
    task: str
    arguments: str
    cuda: str  # arguments on a GPU, in bfloat16
    shapes: tuple[str, ...]  # that it has


_TRAIN = "--batch {batch} --steps {steps} --warmup {warmup}"
_GENERATE = "--batch {prompts} --new {new}"
PEERS = {
    "torch": Script(
        "peer_torch.py", "torch", "train", _TRAIN, "--device cuda --bf16 1", ("small", "smol", "1b")
    ),
    "trl": Script(
        "peer_trl.py", "torch", "train", _TRAIN, "--cuda 1 --bf16 1", ("small", "smol", "1b")
    ),
    "tunix": Script(
        "peer_tunix.py", "tunix", "train", "--batch {batch} --steps {steps}", "", ("small", "smol")
    ),
    "hf_generate": Script(
        "peer_hf_generate.py",
        "torch",
        "generate",
        _GENERATE,
        "--device cuda --dtype bfloat16",
        ("small", "smol"),
    ),
}
_SHAPES = {"1b": "b1"}  # what the scripts call it


class Settings(NamedTuple):
    """What every contestant is asked to do."""

    workload: Path
    shape: str
    batch: int  # pairs of a training step
    steps: int
    warmup: int
    prompts: int  # of the generation
    new: int  # tokens of every completion
    remat: str  # what our training keeps, per layer
    cuda: bool  # whether peers run on a GPU; then everyone computes in bfloat16


class Contestant(NamedTuple):
    """A command that measures one rate."""

    name: str
    task: str  # key of RATES
    command: tuple[str, ...]


def find(
    names: Sequence[str],
    *,
    folder: Path,
    envs: Mapping[str, str],
    own: Sequence[str],
    settings: Settings,
) -> list[Contestant]:
    """Returns the contestants: ours for every task that a peer is named for, and the peers.

    Args:
        names: keys of `PEERS`.
        folder: where their scripts are.
        envs: name of an environment to its Python.
        own: command of our benchmark.
        settings: what they are asked to do.

    Raises:
        InputError: lists every script, environment and shape that is missing.
    """
    problems = {name: _missing(name, folder, envs, settings.shape) for name in names}
    if any(problems.values()):
        others = [name for name, found in problems.items() if not found]
        raise InputError(
            "\n".join(dict.fromkeys(itertools.chain(*problems.values())))
            + "\nGive what is missing, or name the peers to run: --peers "
            + (" ".join(others) or "NAME")
        )
    shared = ("--workload", str(settings.workload), "--shape")

    def arguments(text: str, cuda: str) -> list[str]:
        return (text + " " + cuda * settings.cuda).format(**settings._asdict()).split()

    contestants = []
    for task in dict.fromkeys(PEERS[name].task for name in names):
        text = {"train": _TRAIN + " --remat {remat}", "generate": _GENERATE}[task]
        command = (*own, task, *shared, settings.shape, *arguments(text, "--dtype bfloat16"))
        contestants.append(Contestant(OURS[task], task, command))
    for name in names:
        script = PEERS[name]
        command = (envs[script.env], str(folder / script.file), *shared)
        shape = _SHAPES.get(settings.shape, settings.shape)
        rest = arguments(script.arguments, script.cuda)
        contestants.append(Contestant(name, script.task, (*command, shape, *rest)))
    return contestants


def _missing(name: str, folder: Path, envs: Mapping[str, str], shape: str) -> list[str]:
    """What a peer lacks; arguments as in `find`."""
    script = PEERS[name]
    python = envs.get(script.env)
    problems = []
    if not (folder / script.file).is_file():
        problems.append(f"--scripts {folder}: wanted {script.file} there, for the peer {name}")
    if python is None:
        problems.append(f"--env {script.env}=PYTHON: wanted, for the peer {name}")
    elif not os.access(python, os.X_OK) or Path(python).is_dir():
        problems.append(f"--env {script.env}={python}: wanted a Python, got nothing that runs")
    if shape not in script.shapes:
        problems.append(f"--shape: wanted {' or '.join(script.shapes)} for {name}, got {shape}")
    return problems


def compare(
    contestants: Sequence[Contestant], *, rounds: int, timeout_sec: float
) -> list[dict[str, float | None]]:
    """Runs all contestants `rounds` times, by turns; returns a rate by name for each round.

    One that fails has None, so that hours of the others are not lost; its error is logged.

    Args:
        contestants: from `find`.
        rounds: how often.
        timeout_sec: of one process.
    """
    found = []
    for number in range(1, rounds + 1):
        rates = {}
        for contestant in contestants:
            rates[contestant.name] = rate = _run(contestant, timeout_sec)
            log.info("round %d of %d: %s %s", number, rounds, contestant.name, rate)
        found.append(rates)
    return found


def _run(contestant: Contestant, timeout_sec: float) -> float | None:
    try:
        done = subprocess.run(
            contestant.command, capture_output=True, text=True, timeout=timeout_sec, check=True
        )
        line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return float(line[RATES[contestant.task]])
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip()[-2000:]
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError, KeyError) as error:
        reason = repr(error)
    log.error("%s failed: %s\n%s", contestant.name, " ".join(contestant.command), reason)
    return None


def summarize(
    contestants: Sequence[Contestant], found: Sequence[Mapping[str, float | None]]
) -> dict[str, dict[str, Any]]:
    """By contestant: its rate and, for a peer, our rate over its, each as median, least and most.

    Args:
        contestants: from `find`.
        found: from `compare`.
    """
    summary = {}
    for c in contestants:
        rates = [r for row in found if (r := row[c.name]) is not None]
        pairs = [(row[OURS[c.task]], row[c.name]) for row in found]
        ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
        summary[c.name] = {RATES[c.task]: _spread(rates)}
        if c.name in PEERS:
            summary[c.name]["ratio"] = _spread(ratios)
    return summary


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def show(summary: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Prints the table."""
    table = Table(title=title, title_justify="left")
    for column in ("", "unit", "rate", "ours / theirs"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    for name, found in summary.items():
        unit = next(unit for unit in RATES.values() if unit in found)
        ratio = _text(found["ratio"], "×") if "ratio" in found else ""
        table.add_row(name, unit, _text(found[unit], ""), ratio)
    Console(soft_wrap=True).print(table)


def _text(spread: Mapping[str, float] | None, unit: str) -> str:
    if spread is None:
        return "failed"
    median, least, most = (spread[key] for key in ("median", "least", "most"))
    return f"{median:.3g}{unit} ({least:.3g}–{most:.3g})"
