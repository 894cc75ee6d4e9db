"""Two processes are as good as one: the same numbers, interrupted or not; failures are loud."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from copg_jax import distributed
from copg_jax.data.tokenizer import load_tokenizer
from copg_jax.errors import InputError
from experiments.generated import write_generated
from tests import worker
from tests.runs import (
    assert_same_evaluation,
    assert_same_rounds,
    assert_same_scores,
    assert_same_training,
)
from tests.toys import names_all
from tests.workplace import DATA, tiny_model

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
STEPS = 6
MESH = ["mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(port: int, index: int, devices: int = 4) -> dict[str, str]:
    """Of process `index` of two."""
    values = (f"127.0.0.1:{port}", "2", str(index))
    return {
        **os.environ,
        **dict(zip(NAMES, values, strict=True)),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def start_pair(*jobs: dict[str, Any], devices: int = 4) -> list[subprocess.Popen]:
    """Starts a process with so many devices for each of two jobs."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.worker", json.dumps(job)],
            env=environment(port, index, devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, job in enumerate(jobs)
    ]


def finish(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Status and texts of processes that have to end by themselves."""
    try:
        texts = [process.communicate(timeout=1.2 * worker.LIMIT_SEC) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *both) for process, both in zip(processes, texts, strict=True)]


class Place:
    """A model, comparisons, and the arguments of stages on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_generated(folder / "data", num_examples=8, num_comparisons=24, seed=0, vocab_size=400)
        tokenizer = load_tokenizer(folder / "data" / "tokenizer")
        tiny_model(folder / "base", tokenizer, len(tokenizer))

    def arguments(self, stage: str, output: Path) -> list[str]:
        """Arguments of a run of the stage into `output`."""
        base, comparisons = self.folder / "base", self.folder / "data" / "comparisons.jsonl"
        rewards = "rewards=[{function: copg_jax.rewards.length}]"
        evaluation = [
            f"evaluation.data.path={self.folder / 'data' / 'sft.jsonl'}",
            f"evaluation.{rewards}",
            "evaluation.generation.num_prompts=5",
            "evaluation.generation.num_samples=2",
            "evaluation.generation.max_new_tokens=6",
        ]
        own = {
            "score": [
                f"reference.path={base}",
                "reference.dtype=float32",
                f"data.path={comparisons}",
                *DATA,
                rewards,
                "part_size=16",
                "batch_size=8",
            ],
            "policy": [
                f"model.path={base}",
                "model.dtype=float32",
                f"data.path={self.folder / 'scored'}",
                *DATA,
                "optim.learning_rate=1e-4",
                "training.batch_size=8",
                f"training.max_steps={STEPS}",
                "training.eval_every=4",
                "training.save_every=3",
                *evaluation,
            ],
            "online": [
                f"model.path={base}",
                "model.dtype=float32",
                f"data.path={self.folder / 'data' / 'sft.jsonl'}",
                *(setting for setting in DATA if "max_rows" not in setting),
                rewards,
                "rounds=3",
                "steps_per_round=2",
                "prompts_per_round=8",
                "sampling.max_new_tokens=6",
                "part_size=4",
                "batch_size=4",
                "optim.learning_rate=1e-4",
                "training.batch_size=8",
                "training.save_every=2",
            ],
            "evaluate": [f"model.path={base}", "model.dtype=float32", *evaluation],
        }[stage]
        return [*own, *MESH, f"output_dir={output}"]

    def run(self, stage: str, output: Path) -> None:
        """Runs a stage in this process, on its eight devices."""
        worker.main({"stages": [[stage, self.arguments(stage, output)]]})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """What one process makes of score, policy and evaluate."""
    found = Place(tmp_path_factory.mktemp("distributed"))
    found.run("score", found.folder / "scored")
    for stage in ("policy", "evaluate"):
        found.run(stage, found.folder / stage)
    return found


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_through_termination_and_a_crash(place, tmp_path):
    scored, evaluated, policy = tmp_path / "scored", tmp_path / "evaluated", tmp_path / "policy"
    train = ["policy", place.arguments("policy", policy)]
    stages = [
        ["score", place.arguments("score", scored)],
        ["evaluate", place.arguments("evaluate", evaluated)],
        train,
    ]
    # One process is told to leave: the other leaves with it.
    (code, text, errors), (other, _, noise) = finish(
        *start_pair({"stages": stages}, {"stages": stages, "signal": ["SIGTERM", 2]})
    )
    assert (code, other) == (143, 143), errors + noise
    assert f"SIGTERM: saved step 2 of {STEPS}" in text
    assert "INFO" in errors and "INFO" not in noise  # process 0 alone logs
    assert_same_scores(scored, place.folder / "scored")
    assert_same_evaluation(evaluated, place.folder / "evaluate")

    # One process goes on with what two have saved, on another mesh.
    alone = tmp_path / "alone"
    shutil.copytree(policy, alone)
    worker.main(
        {"stages": [["policy", [*place.arguments("policy", alone), "mesh.data=2", "mesh.fsdp=2"]]]}
    )
    assert_same_training(alone, place.folder / "policy")

    # Two go on with one device each, as SLURM starts a process a GPU, and one dies without a word;
    # whoever started them ends the other, and starts both again.
    cut = [["policy", [*train[1], "mesh.fsdp=1", "mesh.tensor=2"]]]
    survivor, killed = start_pair(
        {"stages": cut}, {"stages": cut, "signal": ["SIGKILL", 5]}, devices=1
    )
    killed.communicate(timeout=1.2 * worker.LIMIT_SEC)
    assert killed.returncode == -9
    survivor.kill()
    finish(survivor, killed)
    assert not (policy / "model").exists()
    (code, _, errors), (other, _, noise) = finish(*start_pair(*[{"stages": [train]}] * 2))
    assert (code, other) == (0, 0), errors + noise
    assert_same_training(policy, place.folder / "policy")


@pytest.mark.slow
def test_two_processes_make_the_rounds_of_one_through_a_termination_and_on_another_mesh(
    place, tmp_path
):
    whole, rounds = place.folder / "online", tmp_path / "online"
    place.run("online", whole)
    stages = [["online", place.arguments("online", rounds)]]
    # One process is told to leave while the second round is scored: the other leaves with it.
    (code, text, errors), (other, _, noise) = finish(
        *start_pair(
            {"stages": stages}, {"stages": stages, "signal": ["SIGTERM", "judged a part 3"]}
        )
    )
    assert (code, other) == (143, 143), errors + noise
    assert "SIGTERM: saved step 2 of 6" in text
    # One process goes on with it on another mesh, and two on theirs.
    alone = tmp_path / "alone"
    shutil.copytree(rounds, alone)
    mesh = ["mesh.data=2", "mesh.fsdp=2"]
    worker.main({"stages": [["online", [*place.arguments("online", alone), *mesh]]]})
    assert_same_rounds(alone, whole)
    (code, _, errors), (other, _, noise) = finish(*start_pair(*[{"stages": stages}] * 2))
    assert (code, other) == (0, 0), errors + noise
    assert_same_rounds(rounds, whole)


@pytest.fixture
def alone(monkeypatch) -> pytest.MonkeyPatch:
    """No variable of JAX names other processes."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def refusal(mode: str) -> str:
    with pytest.raises(InputError) as caught:
        distributed.start(mode)
    return str(caught.value)


def test_a_coordinator_that_does_not_answer_is_named_with_the_time_waited_and_so_are_absent_ones():
    port = free_port()
    script = "from copg_jax import distributed; distributed.start('on', timeout_sec=2)"
    command = [sys.executable, "-c", script]
    # Process 1 without its coordinator, and, elsewhere, process 0 without the other.
    ports = {0: free_port(), 1: port}
    running = [
        subprocess.Popen(
            command, env=environment(ports[index], index), stderr=subprocess.PIPE, text=True
        )
        for index in ports
    ]
    for index, (code, _, errors) in enumerate(finish(*running)):
        assert code == 2
        names_all(
            errors,
            [f"process {index} waited 2 s", "all 2 processes", f"127.0.0.1:{ports[index]}", "Fix"],
        )


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "all_proxy"])
@pytest.mark.parametrize(
    ("no_proxy", "is_named"),
    [(None, True), ("localhost,.other", True), ("x, node.cluster", False), (".cluster", False)],
)
def test_a_proxy_between_the_processes_is_named_where_they_do_not_meet(
    alone, name, no_proxy, is_named
):
    for variable in list(os.environ):
        if variable.lower().endswith("_proxy"):
            alone.delenv(variable)
    alone.setenv(name, "http://user:secret@proxy:3128")
    if no_proxy:
        alone.setenv("no_proxy", no_proxy)
    for variable, value in zip(NAMES, ("node.cluster:1234", "2", "1"), strict=True):
        alone.setenv(variable, value)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("deadline exceeded")

    alone.setattr(jax.distributed, "initialize", refuse)
    text = refusal("on")
    names_all(text, ["node.cluster:1234", "deadline exceeded"])
    assert (f"{name} is set here, and no_proxy does not name node.cluster" in text) == is_named
    assert ("export no_proxy=node.cluster" in text) == is_named
    assert "secret" not in text


def test_without_a_cluster_auto_runs_alone_and_on_refuses(alone):
    assert distributed.start("auto") == 0
    names_all(refusal("on"), ["distributed=on", "SLURM", *NAMES, "distributed=off"])


def test_off_looks_at_nothing(alone):
    alone.setenv(NAMES[1], "many")
    assert distributed.start("off") == 0


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (("host:1234", None, None), [f"got no {NAMES[1]}, {NAMES[2]}"]),
        ((None, "2", "0"), [f"got no {NAMES[0]}"]),
        (("host:1234", "two", "0"), [NAMES[1], "wanted a number", "'two'"]),
        (("host", "2", "0"), ["HOST:PORT", "'host'"]),
        (("host:1234", "2", "2"), [f"0 <= {NAMES[2]} < {NAMES[1]}", "2 and 2"]),
    ],
)
def test_a_cluster_described_in_part_is_refused(alone, values, parts):
    for name, value in zip(NAMES, values, strict=True):
        if value is not None:
            alone.setenv(name, value)
    for mode in ("auto", "on"):
        names_all(refusal(mode), parts)


def test_joining_after_devices_were_used_is_refused(alone):
    jax.devices()
    for name, value in zip(NAMES, ("127.0.0.1:1", "2", "0"), strict=True):
        alone.setenv(name, value)
    names_all(refusal("auto"), ["process 0 of 2", "127.0.0.1:1", "before"])


def test_a_slurm_job_is_joined_at_its_first_node(alone):
    job = {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "gpu[003-004]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }
    joined = []
    alone.setattr(distributed, "_join", lambda member, timeout: joined.append(member))
    for name, value in job.items():
        alone.setenv(name, value)
    assert distributed.start("auto") == 9
    (member,) = joined
    assert (member.address.split(":")[0], member.count, member.index) == ("gpu003", 16, 9)
    alone.setenv("SLURM_NTASKS", "1")
    alone.setenv("SLURM_PROCID", "0")
    assert distributed.start("auto") == 0
    assert len(joined) == 1  # one process needs no coordinator


def test_others_do_not_go_on_where_process_0_failed_or_its_file_is_not_to_be_seen(
    monkeypatch, tmp_path
):
    told = ["False", "True", "True"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed, "_hear", lambda turn, index: told.pop(0))
    monkeypatch.setattr(distributed, "_VISIBLE_SEC", 0.0)
    path = tmp_path / "config.yaml"
    for parts in (
        ["process 0 could not make it"],
        ["one output_dir for all", "process 1", "gs://"],
    ):
        with pytest.raises(InputError) as caught, distributed.main_first(path):
            raise AssertionError("not reached")
        names_all(str(caught.value), [str(path), *parts])
    path.write_text("")
    with distributed.main_first(path):
        told.append("on")
    assert told == ["on"]


def test_process_0_tells_the_others_that_it_failed(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_say", lambda turn, text: told.append(text))
    with pytest.raises(InputError, match="bad"), distributed.main_first(tmp_path):
        raise InputError("bad")
    with distributed.main_first(tmp_path):
        pass
    assert told == ["False", "True"]
