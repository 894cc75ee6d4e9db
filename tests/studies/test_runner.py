"""The runner of studies: nothing done twice, one point's failure is its own, one worker a job."""

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from copg_jax.checksums import write_record
from copg_jax.config.options import option
from copg_jax.errors import InputError
from copg_jax.lock import hold
from copg_jax.train.metrics import NonFiniteLoss
from experiments.studies.grid import Job, Point
from experiments.studies.progress import count_jobs, estimate_left
from experiments.studies.runner import DIVERGED, DONE, FAILED, Runner
from experiments.study import parse_shard, part_of


@dataclass(frozen=True)
class Config:
    output_dir: str = option("")
    number: int = option(0)


class Stages:
    """Stages that note what they were asked for, and end as they are told."""

    def __init__(self):
        self.ran: list[str] = []
        self.errors: dict[str, BaseException] = {}
        self.mains = dict.fromkeys(("sft", "policy", "evaluate"), self.main)

    def main(self, config: Config) -> None:
        name = Path(config.output_dir).name
        self.ran.append(name)
        if name in self.errors:
            raise self.errors[name]
        Path(config.output_dir).mkdir(parents=True)


def job(folder: Path, stage: str, name: str, *needs: str, number: int = 0) -> Job:
    return Job(name, stage, Config(str(folder / name), number), needs)


def points(folder: Path, count: int = 3) -> list[Point]:
    """Points that share their SFT."""
    sft = job(folder, "sft", "sft")
    found = []
    for i in range(count):
        policy = job(folder, "policy", f"p{i}", "sft")
        jobs = (sft, policy, job(folder, "evaluate", f"e{i}", "sft", f"p{i}"))
        found.append(Point(f"p{i}", {}, jobs))
    return found


@pytest.fixture
def stages():
    return Stages()


def test_shared_work_is_done_once_and_what_is_done_is_left_alone(tmp_path, stages):
    grid = points(tmp_path)
    assert Runner(tmp_path, stages.mains).run_points(grid) == []
    assert stages.ran == ["sft", "p0", "e0", "p1", "e1", "p2", "e2"]
    Runner(tmp_path, stages.mains).run_points(grid)
    assert len(stages.ran) == 7


def test_a_killed_study_does_again_only_what_had_not_ended(tmp_path, stages):
    grid = points(tmp_path)
    stages.errors["p1"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        Runner(tmp_path, stages.mains).run_points(grid)
    del stages.errors["p1"]
    before = len(stages.ran)
    Runner(tmp_path, stages.mains).run_points(grid)
    assert stages.ran[before:] == ["p1", "e1", "p2", "e2"]


def test_a_run_whose_folder_was_deleted_is_not_done_once_it_has_begun_again(tmp_path, stages):
    grid = points(tmp_path, 1)
    Runner(tmp_path, stages.mains).run_points(grid)
    (tmp_path / "p0").rmdir()

    def killed(config):
        Path(config.output_dir).mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Runner(tmp_path, {**stages.mains, "policy": killed}).run_points(grid)
    stages.ran.clear()
    goes_on = {**stages.mains, "policy": lambda config: stages.ran.append("p0")}
    Runner(tmp_path, goes_on).run_points(grid)
    assert stages.ran == ["p0"]


@pytest.mark.parametrize(
    ("error", "status", "tried_again"),
    [
        (NonFiniteLoss("step 3: not finite"), DIVERGED, False),
        (InputError("no such file"), FAILED, True),
        (RuntimeError("out of memory"), FAILED, True),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_point_that_fails_or_diverges_is_recorded_and_stops_no_other(
    tmp_path, stages, error, status, tried_again
):
    grid = points(tmp_path)
    stages.errors["p1"] = error
    runner = Runner(tmp_path, stages.mains)
    runner.run_points(grid)
    assert stages.ran == ["sft", "p0", "e0", "p1", "p2", "e2"]
    record = Runner(tmp_path, stages.mains).record(grid[1].policy)
    assert record.status == status and str(error) in record.reason
    stages.errors.clear()
    stages.ran.clear()
    Runner(tmp_path, stages.mains).run_points(grid)
    assert stages.ran == (["p1", "e1"] if tried_again else [])


def test_shared_work_that_fails_is_not_tried_again_for_every_point(tmp_path, stages):
    stages.errors["sft"] = InputError("no posts")
    Runner(tmp_path, stages.mains).run_points(points(tmp_path))
    assert stages.ran == ["sft"]


def test_a_run_of_another_config_or_whose_folder_is_gone_is_not_done(tmp_path, stages):
    one = job(tmp_path, "policy", "p")
    runner = Runner(tmp_path, stages.mains)
    runner.run_job(one, wait=False)
    assert runner.record(one).status == DONE
    assert runner.record(job(tmp_path, "policy", "p", number=1)) is None
    (tmp_path / "p").rmdir()
    assert runner.record(one) is None


def test_a_point_that_another_worker_has_is_left_to_it_and_shared_work_is_waited_for(
    tmp_path, stages
):
    grid = points(tmp_path, 2)
    claims = [tmp_path / "claims" / name for name in ("p0", "sft")]
    for claim in claims:
        claim.mkdir(parents=True)
    with hold(claims[0]), hold(claims[1]) as let_go:
        threading.Timer(0.3, let_go).start()
        busy = Runner(tmp_path, stages.mains, poll_sec=0.05).run_points(grid)
    assert [point.name for point in busy] == ["p0"]
    assert stages.ran == ["sft", "p1", "e1"]


def test_two_workers_at_once_do_each_job_once(tmp_path, stages):
    grid = points(tmp_path, 4)
    workers = [
        threading.Thread(
            target=Runner(tmp_path, stages.mains, poll_sec=0.02).run_points, args=[own]
        )
        for own in (grid, grid[::-1])
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(stages.ran) == sorted(["sft", *(f"{x}{i}" for x in "pe" for i in range(4))])


@pytest.mark.parametrize("count", [1, 3, 7])
def test_shards_are_disjoint_and_together_all(count):
    items = list(range(17))
    parts = [part_of(items, (index, count)) for index in range(count)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_task_of_a_slurm_array_has_its_part_without_an_option():
    task = {"ID": "7", "MIN": "3", "STEP": "2", "COUNT": "4"}
    environment = {f"SLURM_ARRAY_TASK_{name}": value for name, value in task.items()}
    assert parse_shard(None, environment) == (2, 4)
    assert parse_shard("0/2", environment) == (0, 2)
    assert parse_shard(None, {}) == (0, 1)


@pytest.mark.parametrize("text", ["2/2", "-1/2", "a/b", "1", "1/0", "/"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="--shard: wanted I/N"):
        parse_shard(text, {})


def test_what_is_left_is_counted_by_stage_with_an_estimate(tmp_path, stages):
    grid = points(tmp_path)
    stages.errors["p1"] = InputError("no")
    runner = Runner(tmp_path, stages.mains)
    assert estimate_left(count_jobs(grid, runner.record)) is None
    runner.run_points(grid)
    for path, seconds in (("sft", 5.0), ("p0", 10.0), ("p2", 30.0), ("e0", 2.0), ("e2", 2.0)):
        write_seconds(tmp_path / "records" / f"{path}.json", seconds)
    rows = count_jobs(grid, runner.record)
    assert [row[:5] for row in rows] == [
        ("sft", 1, 0, 0, 0),
        ("policy", 2, 1, 0, 1),
        ("evaluate", 2, 0, 0, 1),
    ]
    assert estimate_left(rows) == pytest.approx(20.0 + 2.0)


def write_seconds(path: Path, seconds: float) -> None:
    values = json.loads(path.read_text()) | {"seconds": seconds}
    del values["checksum"]
    write_record(path, values)
