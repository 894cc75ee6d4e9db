"""Runs the scripts of other libraries and ours by turns, each in a process and environment of its
own.

1. `find` checks the environments before anything runs; the scripts are in `peers/`.
2. `run` runs every contestant once a round: a machine whose load drifts slows all alike.
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
from copg_jax.models.params import Architecture

log = logging.getLogger(__name__)

RATES = {"train": "pairs_per_s", "generate": "tokens_per_s"}
_STEADY = "steady_pairs_per_s"  # of ours: all steps in a row, as the others are timed
OURS = {"train": "ours", "generate": "ours_generate"}
FOLDER = Path(__file__).with_name("peers")


class Peer(NamedTuple):
    """A script of another library."""

    file: str  # in `FOLDER`
    env: str  # name of the environment that it needs
    task: str  # key of RATES
    on_gpu: bool = True  # whether it computes in bfloat16 on a GPU


PEERS = {
    "torch": Peer("torch_loop.py", "torch", "train"),
    "trl": Peer("trl_dpo.py", "torch", "train"),
    "tunix": Peer("tunix_dpo.py", "tunix", "train", on_gpu=False),
    "hf_generate": Peer("hf_generate.py", "torch", "generate"),
}
_ARGUMENTS = {
    "train": "--batch {batch} --steps {steps} --warmup {warmup}",
    "generate": "--batch {prompts} --new {new}",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "tie_word_embeddings",
)


class Settings(NamedTuple):
    """What every contestant is asked to do."""

    workload: Path
    config: Path  # from `write_config`
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


def write_config(arch: Architecture, path: Path) -> None:
    """Writes the sizes of a model as a config.json with Hugging Face names, for the peers."""
    path.write_text(json.dumps({name: getattr(arch, name) for name in _SIZES}), encoding="utf-8")


def find(
    names: Sequence[str], *, envs: Mapping[str, str], own: Sequence[str], settings: Settings
) -> list[Contestant]:
    """Returns the contestants: ours for every task that a peer is named for, and the peers.

    Args:
        names: keys of `PEERS`.
        envs: name of an environment to its Python.
        own: command of our benchmark.
        settings: what they are asked to do.

    Raises:
        InputError: lists every environment that is missing, and who cannot run on a GPU.
    """
    problems = {name: _missing(name, envs, settings.cuda) for name in names}
    if any(problems.values()):
        others = [name for name, found in problems.items() if not found]
        raise InputError(
            "\n".join(dict.fromkeys(itertools.chain(*problems.values())))
            + "\nGive what is missing, or name the peers to run: --peers "
            + (" ".join(others) or "NAME")
        )
    workload = ("--workload", str(settings.workload))
    arguments = {
        task: text.format(**settings._asdict()).split() for task, text in _ARGUMENTS.items()
    }
    contestants = []
    for task in dict.fromkeys(PEERS[name].task for name in names):
        ours = (*own, task, *workload, "--shape", settings.shape, *arguments[task])
        remat = ("--remat", settings.remat) if task == "train" else ()
        dtype = ("--dtype", "bfloat16") if settings.cuda else ()
        contestants.append(Contestant(OURS[task], task, (*ours, *remat, *dtype)))
    for name in names:
        peer = PEERS[name]
        script = (envs[peer.env], str(FOLDER / peer.file))
        config = ("--config", str(settings.config))
        cuda = ("--cuda",) if settings.cuda else ()
        command = (*script, *workload, *config, *arguments[peer.task], *cuda)
        contestants.append(Contestant(name, peer.task, command))
    return contestants


def _missing(name: str, envs: Mapping[str, str], cuda: bool) -> list[str]:
    """What a peer lacks; arguments as in `find`."""
    peer = PEERS[name]
    python = envs.get(peer.env)
    problems = []
    if python is None:
        problems.append(
            f"--env {peer.env}=PYTHON: wanted, for the peer {name}. {FOLDER / peer.file} says "
            "which packages that Python needs."
        )
    elif not os.access(python, os.X_OK) or Path(python).is_dir():
        problems.append(f"--env {peer.env}={python}: wanted a Python, got nothing that runs")
    if cuda and not peer.on_gpu:
        problems.append(f"--cuda: {name} does not compute in bfloat16 on a GPU here")
    return problems


def run(
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
            rates[contestant.name] = rate = _run_once(contestant, timeout_sec)
            log.info("round %d of %d: %s %s", number, rounds, contestant.name, rate)
        found.append(rates)
    return found


def _run_once(contestant: Contestant, timeout_sec: float) -> float | None:
    try:
        done = subprocess.run(
            contestant.command, capture_output=True, text=True, timeout=timeout_sec, check=True
        )
        line: dict[str, Any] = json.loads(done.stdout.rstrip("\n").split("\n")[-1])
        return float(line.get(_STEADY, line[RATES[contestant.task]]))
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
        found: from `run`.
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
