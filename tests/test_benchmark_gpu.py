"""benchmark_gpu.sh: one line a variant whatever happens to it, and no more time than allowed."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import plan
from experiments.benchmark.commands import make_parser
from tests.toys import names_all

SCRIPT = Path(__file__).parents[1] / "experiments" / "benchmark_gpu.sh"

FAKE = """#!/bin/bash
printf '%s\\n' "$*" >>"$RECORD"
case "$*" in
  *"remat full"*) echo RESOURCE_EXHAUSTED >&2; exit 1 ;;
  *"remat dots"*) exec sleep 30 ;;
  *pip*) for last; do :; done; [[ -f $last ]] ;;
  -c*) [[ $GPU ]] || { echo "no devices" >&2; exit 1; } ;;
  *) echo '{"pairs_per_s": 2.5, "mfu": null}' ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script beside a python that records its arguments."""
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "XLA_", "JAX_"))}

    def run(*arguments, **extra):
        env = clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": f"{tmp_path}/calls"}
        command = ["bash", SCRIPT, *map(str, arguments)]
        env |= {"GPU": "yes"} | extra
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        calls = tmp_path / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done, [line for line in lines if not line.startswith("-c ")]

    return run


def test_what_fails_or_takes_too_long_leaves_the_others(run, tmp_path):
    out = tmp_path / "out"
    done, _ = run(out, SHAPES="tiny", MOST="1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    found = {line.pop("variant"): line for line in lines}
    good = {"pairs_per_s": 2.5, "mfu": None}
    assert found == {
        "train tiny auto none": good,
        "generate tiny x1": good,
        "train tiny auto dots": {"failed": 124},
        "train tiny auto full": {"failed": 1},
        "train tiny auto mlp": good,
    }
    names_all(
        (out / "log.txt").read_text(), ["== train tiny auto full: train --shape tiny", "EXHAUSTED"]
    )
    names_all(done.stdout, ['"variant": "train tiny auto full", "failed": 1', "results.jsonl"])


def test_what_there_is_no_time_for_is_left_out(run, tmp_path):
    done, calls = run(tmp_path / "out", LIMIT="10")  # 7b-lora and 1b
    assert done.returncode == 0
    assert done.stdout.count('"left_out": "no time"') == 12
    assert len(calls) == 1 and " workload " in calls[0]


def test_wheels_are_installed_before_anything_is_imported(run, tmp_path):
    (tmp_path / "some.whl").touch()
    done, calls = run(tmp_path / "out", SHAPES="tiny", LIMIT="10", WHEELS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert calls[0].startswith("-m pip install") and calls[0].endswith("some.whl")


def test_the_benchmark_knows_every_argument(run, tmp_path):
    _, calls = run(tmp_path / "out", SHAPES="7b 1b tiny tiny-lora", MOST="1")
    assert len(calls) == 1 + 5 + 7 + 5 + 5
    assert sum("--shape tiny --lora-rank 16" in call for call in calls) == 4
    for call in calls:
        module, *arguments = call.split()[1:]
        assert make_parser(module, None).parse_args(arguments)  # exits where it does not


def test_both_planners_are_asked_for_every_step_without_a_gpu(run, tmp_path, monkeypatch):
    done, calls = run(tmp_path / "out", GPU="", PLAN="h100")
    assert done.returncode == 0, done.stderr
    *planned, last = (call.split()[2:] for call in calls)
    assert last == ["--table", str(tmp_path / "out" / "plans.txt")]
    assert len(planned) == 2 * (4 + 5)
    monkeypatch.setattr(plan, "open_topology", lambda name: name)
    monkeypatch.setattr(plan, "print_table", lambda found: None)
    seen = []

    def found(config, topology):
        seen.append((topology, config.lora and config.lora.rank, config.training.batch_size))
        return SimpleNamespace(), []

    monkeypatch.setattr(plan, "make_plan", found)
    monkeypatch.setattr(plan.dataclasses, "asdict", vars)
    for arguments in planned:
        plan.main(arguments)
    assert seen[:4] == [
        *[(f"{kind}:1xh100", 16, 64) for kind in ("gpu", "cpu")],
        *[(f"{kind}:1xh100", None, 64) for kind in ("gpu", "cpu")],
    ]


@pytest.mark.parametrize("platforms", ["", "cuda,cpu"])
def test_without_a_gpu_nothing_is_tried_and_earlier_results_stay(run, tmp_path, platforms):
    (tmp_path / "results.jsonl").write_text("earlier")
    done, calls = run(tmp_path, GPU="", JAX_PLATFORMS=platforms)
    assert done.returncode == 2 and calls == []
    assert "wanted an NVIDIA GPU that JAX sees, got none: no devices" in done.stderr
    assert (tmp_path / "results.jsonl").read_text() == "earlier"


def test_it_can_be_tried_on_a_cpu(run, tmp_path):
    done, _ = run(tmp_path, GPU="", JAX_PLATFORMS="cpu", SHAPES="tiny", MOST="1")
    assert done.returncode == 0 and '"variant": "train tiny auto none"' in done.stdout


def test_one_folder_is_wanted(run):
    done, _ = run()
    assert done.returncode == 2 and "wanted one folder" in done.stderr
