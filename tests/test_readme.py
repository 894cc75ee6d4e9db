"""What the README tells a reader to type exists and is accepted."""

import re
import shlex
from pathlib import Path

import pytest

from copg_jax import rewards
from copg_jax.config import (
    EvaluateConfig,
    PolicyConfig,
    QuickstartConfig,
    RewardModelConfig,
    ScoreConfig,
    SFTConfig,
)
from copg_jax.config.load import load_config
from experiments.benchmark.commands import make_parser

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES = {
    "train_sft": SFTConfig,
    "train_reward": RewardModelConfig,
    "score": ScoreConfig,
    "train_policy": PolicyConfig,
    "evaluate": EvaluateConfig,
    "quickstart": QuickstartConfig,
}


def shell_commands() -> list[list[str]]:
    """Arguments of each command in the README's bash blocks, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def stage_command(command: list[str]) -> list[str]:
    """`experiments.STAGE` and its arguments, without what launches it; empty for other commands."""
    names = [word.removeprefix("experiments.") for word in command]
    return next((command[i:] for i, name in enumerate(names) if name in STAGES), [])


SLICE_COMMANDS = [
    stage_command(command)
    for command in shell_commands()
    if command[0] == "./launch_tpu.sh" and stage_command(command)
]
STAGE_COMMANDS = list(filter(None, map(stage_command, shell_commands())))


def test_the_readme_shows_every_stage_but_the_quickstart():
    shown = {command[0].removeprefix("experiments.") for command in STAGE_COMMANDS}
    assert shown == set(STAGES) - {"quickstart"}


@pytest.mark.parametrize("command", STAGE_COMMANDS, ids=" ".join)
def test_a_stage_command_of_the_readme_is_a_valid_config(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(STAGES[command[0].removeprefix("experiments.")], command[1:])
    assert config.output_dir.startswith(("runs/", "gs://"))


@pytest.mark.parametrize("command", SLICE_COMMANDS, ids=" ".join)
def test_a_stage_command_for_a_slice_names_no_folder_of_this_machine(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(STAGES[command[0].removeprefix("experiments.")], command[1:])
    assert re.findall(r"'(?:runs|data|/)[^']*'", repr(config)) == []


BENCHMARKS = [
    command[command.index("experiments.benchmark") + 1 :]
    for command in shell_commands()
    if "experiments.benchmark" in command
]


def test_the_readme_shows_each_benchmark_that_needs_no_other_library():
    assert {command[0] for command in BENCHMARKS} == {"workload", "train", "generate"}


@pytest.mark.parametrize("command", BENCHMARKS, ids=" ".join)
def test_a_benchmark_of_the_readme_is_accepted(command):
    args = make_parser("experiments.benchmark", None).parse_args(command)
    assert callable(args.run)


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {command[1] for command in shell_commands() if command[0] == "make"}
    assert named and named <= set(targets)


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_shipped_rewards_named_in_the_readme_exist():
    named = re.findall(r"copg_jax\.rewards\.(\w+)", TEXT)
    assert named
    assert [name for name in named if not hasattr(rewards, name)] == []
