"""run_gpu.sh: one process without SLURM, srun with one process a GPU in a job, known XLA flags."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.quickstart import QuickstartConfig
from tests.fake_cloud import HOSTILE
from tests.workplace import MAINS

SCRIPT = Path(__file__).parents[1] / "experiments" / "run_gpu.sh"
RUN = [
    "experiments.train_policy",
    "configs/copg.yaml",
    "rewards=[{function: my.reward, weight: 1}]",
]
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
SAME = {"SLURM_CPUS_ON_NODE": "34"} | JOB

STAGES = {main.__module__: cls for main, cls in MAINS.values()}
STAGES["experiments.quickstart"] = QuickstartConfig

FAKE = """#!/bin/bash
printf '%s\\n' "${0##*/}" "$@"
printf '%s\\0' "$@" >"$RECORD.arguments"
env | grep -E '^(XLA|JAX)_' >"$RECORD"
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script beside a python and an srun that print their arguments, one a line."""
    for name in ("python", "srun"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "XLA_", "JAX_"))}

    def run(*arguments, cwd=None, **extra):
        env = clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": f"{tmp_path}/env"}
        done = subprocess.run(
            ["bash", SCRIPT, *arguments],
            env=env | extra,
            cwd=cwd,
            capture_output=True,
            text=True,
        )
        record = tmp_path / "env"
        seen = record.read_text().splitlines() if record.exists() else []
        return done, dict(line.split("=", 1) for line in seen)

    return run


def test_it_parses():
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_node_is_one_process_with_the_arguments_as_given(run):
    done, _ = run(*RUN)
    assert done.returncode == 0
    assert done.stdout.splitlines() == ["python", "-m", *RUN]


@pytest.mark.parametrize("job", [{}, SAME, SAME | {"SLURM_STEP_NUM_TASKS": "8"}])
def test_no_shell_reads_the_arguments(run, tmp_path, job):
    wanted = ["experiments.train_policy", *(f"x={text}" for text in HOSTILE), *HOSTILE]
    done, _ = run(*wanted, **job, cwd=tmp_path)
    assert done.returncode == 0
    got = (tmp_path / "env.arguments").read_text().split("\0")
    start = got.index("experiments.train_policy")
    assert got[start : start + len(wanted)] == wanted
    assert not (tmp_path / "ran").exists()


def test_a_slurm_job_starts_one_process_a_gpu_and_insists_on_distributed(run):
    done, _ = run(*RUN, **SAME)
    launcher, *options = done.stdout.splitlines()
    at = options.index("python")
    assert launcher == "srun"
    assert set(options[:at]) == {
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--cpus-per-task=8",
        "--gpu-bind=none",  # jax takes the GPU of its local rank among all
        "--overlap",  # or it waits for ever in an interactive step, which holds the GPUs
        "--kill-on-bad-exit=1",
    }
    assert options[at:] == ["python", "-m", *RUN, "distributed=on"]


@pytest.mark.parametrize("name", STAGES)
def test_srun_starts_the_experiments_that_know_what_distributed_is(run, name):
    done, _ = run(name, **SAME)
    known = hasattr(STAGES[name], "distributed")
    assert done.stdout.startswith("srun\n" if known else "python\n")
    assert done.stdout.endswith("\ndistributed=on\n") == known


def test_a_process_that_srun_started_starts_no_srun(run):
    done, _ = run(*RUN, **SAME, SLURM_STEP_NUM_TASKS="8")
    assert done.stdout.splitlines() == ["python", "-m", *RUN, "distributed=on"]


@pytest.mark.parametrize(
    ("missing", "text"),
    [({"SLURM_GPUS_ON_NODE": ""}, "got 0 GPUs"), ({"SLURM_CPUS_ON_NODE": "2"}, "and 2 CPUs")],
)
def test_a_slurm_job_without_gpus_or_cpus_is_told_what_to_ask_for(run, missing, text):
    done, _ = run(*RUN, **(SAME | missing))
    assert done.returncode == 2
    assert text in done.stderr and "--gpus-per-node=N --exclusive" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [[], ["configs/copg.yaml"], ["python", "-m", *RUN]])
def test_anything_but_an_experiment_is_refused(run, arguments):
    done, _ = run(*arguments)
    assert done.returncode == 2 and "wanted experiments.NAME" in done.stderr


GPU_FILES = map(Path, ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"))


@pytest.mark.skipif(any(p.exists() for p in GPU_FILES), reason="NOT CHECKED: here is a GPU")
def test_a_missing_gpu_is_an_error_and_not_a_run_on_cpu(run):
    _, env = run(*RUN)
    done = subprocess.run(
        [sys.executable, "-c", "from copg_jax import runtime; runtime.setup()"],
        env={**os.environ, "JAX_PLATFORMS": env["JAX_PLATFORMS"]},
        capture_output=True,
        text=True,
    )
    assert "InputError: JAX_PLATFORMS=cuda,cpu: wanted cuda, got cpu." in done.stderr


def test_the_callers_environment_wins(run):
    mine = {"XLA_CLIENT_MEM_FRACTION": "0.5", "JAX_PLATFORMS": "rocm", "XLA_FLAGS": "--xla_mine=1"}
    _, env = run(*RUN, **mine, JAX_COMPILATION_CACHE_DIR="/cache")
    assert env["XLA_FLAGS"].split()[-1] == "--xla_mine=1"
    assert env["JAX_COMPILATION_CACHE_DIR"] == "/cache"
    assert {name: env[name] for name in ("XLA_CLIENT_MEM_FRACTION", "JAX_PLATFORMS")} == {
        "XLA_CLIENT_MEM_FRACTION": "0.5",
        "JAX_PLATFORMS": "rocm",
    }


def test_the_older_name_of_the_share_of_memory_wins_too(run):
    """jaxlib refuses to see both."""
    _, env = run(*RUN)
    assert env["XLA_CLIENT_MEM_FRACTION"] == "0.92"
    _, env = run(*RUN, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    assert "XLA_CLIENT_MEM_FRACTION" not in env


def test_the_installed_jaxlib_knows_the_xla_flags(run):
    """An unknown flag ends the process; flags for GPUs are read on CPU too."""
    _, env = run(*RUN)
    assert env["XLA_FLAGS"].startswith("--xla_gpu")

    def start(flags):
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, env=env, capture_output=True, text=True)

    done = start(env["XLA_FLAGS"])
    assert done.returncode == 0, done.stderr
    assert "Unknown flag" in start("--xla_gpu_no_such_flag=1").stderr
