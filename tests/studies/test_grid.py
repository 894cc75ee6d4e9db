"""The grid of a study: every combination once, readable names, and shared work shared."""

from dataclasses import replace
from pathlib import Path

import pytest

from copg_jax.errors import InputError
from experiments.studies.grid import Grid, expand, jobs_of
from experiments.studies.study_config import BestConfig, StudyConfig

ROOT = Path(__file__).parents[2]
BETAS = {"copg": [0.1, 1.0], "dpo": [0.05]}
STUDY = StudyConfig(
    output_dir="runs/it",
    configs=[str(ROOT / "configs" / name) for name in ("tldr.yaml", "sizes/quickstart.yaml")],
    settings=["shared.folder=runs/it"],
    grid={"shared.loss": ["copg", "dpo"], "loss.beta": BETAS, "seed": [0, 7]},
)
PLAIN = replace(STUDY, settings=[*STUDY.settings, "shared.loss=copg"])  # of one loss


@pytest.fixture(scope="module")
def grid() -> Grid:
    return Grid(STUDY)


def test_every_combination_comes_once_the_last_axis_fastest():
    assert expand({"a": [1, 2], "b": ["x", "y"]}) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


def test_values_may_depend_on_those_of_an_earlier_setting():
    found = expand({"loss.name": ["copg", "dpo"], "loss.beta": BETAS})
    assert [tuple(v.values()) for v in found] == [("copg", 0.1), ("copg", 1.0), ("dpo", 0.05)]


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({"seed": []}, "seed: wanted different values, got none"),
        ({"seed": [1, 1]}, "seed: wanted different values, got 1, 1"),
        ({"loss.name": ["ipo"], "loss.beta": BETAS}, "got some for copg, dpo where .*=ipo"),
        ({"loss.beta": BETAS}, "the earlier settings are none"),
        ({"a": list(range(101)), "b": list(range(101))}, "at most 10000 points"),
    ],
)
def test_a_grid_that_means_nothing_is_refused_by_its_setting(axes, text):
    with pytest.raises(InputError, match=text):
        expand(axes)


def test_points_have_readable_names_and_folders_of_their_own(grid):
    assert [point.name for point in grid.points][:3] == [
        "copg-beta_0.1-seed_0",
        "copg-beta_0.1-seed_7",
        "copg-beta_1-seed_0",
    ]
    for point in grid.points:
        assert point.policy.config.output_dir == f"runs/it/{point.name}"
        assert point.evaluation.config.model.path == f"runs/it/{point.name}/model"
        assert point.policy.config.data.path == "runs/it/score"
    assert grid.seeds == (0, 7)


def test_what_points_share_is_one_job_in_an_order_in_which_all_is_there(grid):
    jobs = list(jobs_of(grid.points))
    counts = {stage: sum(job.stage == stage for job in jobs) for stage in STUDY.stages}
    # One evaluation more than policies: that of π_ref.
    assert counts == {"sft": 1, "reward": 1, "score": 1, "policy": 6, "evaluate": 7}
    names = [job.name for job in jobs]
    for job in jobs:
        assert all(names.index(need) < names.index(job.name) for need in job.needs)
    baseline = grid.points[0].baseline
    assert baseline.name == "evaluate-reference"
    assert baseline.config.model.path == baseline.config.reference.path == "runs/it/sft/model"


def test_the_settings_reach_the_run(grid):
    point = next(point for point in grid.points if point.name == "dpo-beta_0.05-seed_7")
    config = point.policy.config
    assert (config.loss.name, config.loss.beta, config.seed) == ("dpo", 0.05, 7)
    assert point.jobs[0].name == "sft" and point.jobs[0].config.seed == 0


def test_a_setting_of_an_earlier_stage_makes_all_anew_that_reads_it_and_no_more():
    found = Grid(replace(PLAIN, grid={"reward.data.max_rows": [50, 90], "seed": [0, 1]}))
    names = {job.name for job in jobs_of(found.points)}
    assert names == {
        "sft",
        *(f"reward-max_rows_{n}" for n in (50, 90)),
        *(f"score-reward.max_rows_{n}" for n in (50, 90)),
        *(f"evaluate-reference-reward.max_rows_{n}" for n in (50, 90)),
        *(f"reward.max_rows_{n}-seed_{s}" for n in (50, 90) for s in (0, 1)),
        *(f"evaluate-reward.max_rows_{n}-seed_{s}" for n in (50, 90) for s in (0, 1)),
    }
    point = found.points[-1]
    rewards = point.policy.config.evaluation.rewards
    assert rewards[0].arguments["path"] == "runs/it/reward-max_rows_90/model"
    assert point.policy.config.data.path == "runs/it/score-reward.max_rows_90"
    assert point.group == "reward.max_rows_90"


def test_the_second_look_has_settings_and_seeds_of_its_own():
    best = BestConfig(settings=["policy.training.eval_every=100"], seeds=[3, 4])
    found = Grid(replace(STUDY, best=best))
    chosen = [{"shared.loss": "dpo", "loss.beta": 0.05}]
    first, second = found.best_points(chosen)
    assert (first.name, second.name) == ("best-dpo-beta_0.05-seed_3", "best-dpo-beta_0.05-seed_4")
    assert first.policy.config.training.eval_every == 100
    assert first.policy.config.output_dir == "runs/it/best-dpo-beta_0.05-seed_3"
    assert first.baseline.name == "evaluate-best-reference"
    assert {job.name for job in first.jobs} >= {"sft", "reward", "score"}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"stages": ["policy", "sft"]}, "stages: wanted some of sft, .* in this order"),
        ({"stages": ["sft"]}, "stages: wanted policy and evaluate"),
        ({"figures": ["curve"]}, "figures: wanted some of curves,"),
        ({"grid": {}}, "grid: wanted at least one setting"),
        ({"output_dir": ""}, "output_dir must be a path"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_by_its_field(changed, text):
    with pytest.raises(InputError, match=text):
        replace(STUDY, **changed)


def test_a_setting_that_no_stage_has_is_refused_before_anything_runs():
    with pytest.raises(InputError, match=r"unknown field .*loss\.betta"):
        Grid(replace(STUDY, grid={"loss.betta": [1.0]}))
    with pytest.raises(InputError, match="two runs would be called"):
        Grid(replace(PLAIN, grid={"data.split": ["a/b", "a//b"]}))
