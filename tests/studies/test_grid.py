"""The grid of a study: every combination once, readable names, and shared work shared."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from copg_jax.config.load import load_config
from copg_jax.errors import InputError
from experiments.studies.axes import expand, named
from experiments.studies.grid import Grid, jobs_of
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
LITTLE = StudyConfig(  # of two stages, which load fast
    output_dir="runs/it",
    stages=["policy", "evaluate"],
    settings=[
        "policy.output_dir=runs/it/copg",
        "policy.model.path=m",
        "policy.data.path=d",
        "policy.evaluation.data.path=p",
        "evaluate.output_dir=runs/it/e",
        "evaluate.model.path=runs/it/copg/model",
        "evaluate.reference.path=m",
        "evaluate.evaluation.data.path=p",
    ],
    grid={"loss.beta": [0.1]},
)
ADAPTERS = [
    "policy.lora.rank=4",
    "policy.model.adapter=a",
    "evaluate.reference.adapter=a",
    "evaluate.model.path=m",
    "evaluate.model.adapter=runs/it/copg/adapter",
]


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


def test_a_study_may_train_online_and_its_short_names_are_then_those_of_online():
    study = replace(
        PLAIN,
        stages=["sft", "reward", "online", "evaluate"],
        settings=[
            *PLAIN.settings,
            "evaluate.model.path=${shared.folder}/online_${shared.run}/model",
        ],
        grid={"steps_per_round": [1, 10], "online.seed": [0, 1]},
    )
    found = Grid(study)
    assert [point.name for point in found.points] == [
        f"steps_per_round_{n}-seed_{s}" for n in (1, 10) for s in (0, 1)
    ]
    last = found.points[-1]
    assert (last.policy.stage, last.policy.config.steps_per_round) == ("online", 10)
    assert last.evaluation.config.model.path == f"runs/it/{last.name}/model"
    assert last.group == "steps_per_round_10" and found.seeds == (0, 1)
    assert {job.stage for job in jobs_of(found.points)} == set(study.stages)
    with pytest.raises(InputError, match=re.escape(r"online_\${shared.run}/model, for")):
        Grid(replace(study, settings=PLAIN.settings))


@pytest.mark.parametrize("stages", [["evaluate"], ["policy", "online", "evaluate"], ["online"]])
def test_a_study_has_one_stage_that_trains_and_an_evaluation(stages):
    with pytest.raises(InputError, match="wanted evaluate and one of policy and online"):
        replace(LITTLE, stages=stages)


def test_an_axis_that_nothing_reads_is_refused_and_one_that_an_axis_reads_is_not():
    with pytest.raises(InputError, match=r"grid: shared.arn: .* got one that nothing reads"):
        Grid(replace(PLAIN, grid={"shared.arn": ["a", "b"]}))
    read = {"shared.path": ["a", "b"], "evaluate.evaluation.data.path": [r"${shared.path}.jsonl"]}
    found = Grid(replace(LITTLE, grid=read)).points
    assert [p.evaluation.config.evaluation.data.path for p in found] == ["a.jsonl", "b.jsonl"]


def test_the_second_look_has_settings_and_seeds_of_its_own():
    best = BestConfig(settings=["policy.training.eval_every=100"], seeds=[3, 4])
    few = {"loss.beta": {"copg": [0.1], "dpo": [0.05]}}
    found = Grid(replace(STUDY, best=best, grid=STUDY.grid | few))
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
        ({"stages": ["sft"]}, "stages: wanted evaluate and one of policy and online"),
        ({"figures": ["curve"]}, "figures: wanted some of curves,"),
        ({"best": {"seeds": [1, 2, 1]}}, "seeds: wanted different ones"),
        ({"grid": {}}, "grid: wanted at least one setting"),
        ({"output_dir": ""}, "output_dir must be a path"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_by_its_field(changed, text):
    with pytest.raises(InputError, match=text):
        replace(STUDY, **{k: BestConfig(**v) if k == "best" else v for k, v in changed.items()})


def test_the_baseline_of_adapters_is_pi_ref_and_neither_its_base_nor_the_policy():
    """The zero of every reward: the base with the adapter that policies start from."""
    (point,) = Grid(replace(LITTLE, settings=[*LITTLE.settings, *ADAPTERS])).points
    model = point.baseline.config.model
    assert model == point.baseline.config.reference
    assert (model.path, model.adapter) == ("m", "a")
    assert point.evaluation.config.model.adapter == f"runs/it/{point.name}/adapter"


def test_settings_of_policy_with_or_without_its_name_are_the_same_axes():
    grid = {"policy.loss.beta": [0.1, 0.3], "policy.seed": [0, 1]}
    points = Grid(replace(LITTLE, grid=grid)).points
    assert {point.group for point in points} == {""}
    assert points[0].values == {"loss.beta": 0.1, "seed": 0}
    assert points[0].name == "beta_0.1-seed_0"
    with pytest.raises(InputError, match=r"a setting once, got seed and policy\.seed"):
        named(grid | {"seed": [3]}, "policy")


@pytest.mark.parametrize("axes", [{"loss.beta": [0.1, 0.3]}, {"loss.beta": [0.1], "seed": [0]}])
def test_the_second_look_has_its_seeds_also_where_the_grid_varies_none(axes):
    found = Grid(replace(LITTLE, grid=axes, best=BestConfig(seeds=[0, 1, 2])))
    points = found.best_points([{"loss.beta": 0.1}])
    assert [point.policy.config.seed for point in points] == [0, 1, 2]
    names = [point.name for point in points]
    assert len(set(names)) == 3 and all(name.endswith(f"-seed_{i}") for i, name in enumerate(names))
    assert len({point.evaluation.name for point in points}) == 3
    assert found.seeds == (0, 1, 2)  # batches of one shape for all


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({"shared.beta": [0.1, 0.3]}, r"shared\.beta: .* leaves loss\.beta as it is"),
        ({"shared.number": [0, 1]}, "leaves seed as it is, got seed = 0 and 1"),
        ({"loss": [{"name": "copg", "beta": 1.0}, {"name": "ipo", "beta": 1.0}]}, "loss: wanted"),
    ],
)
def test_loss_beta_and_seed_are_changed_by_their_own_settings_alone(axes, text):
    shared = ["shared={number: 0, beta: 0.2}", "policy.seed=${shared.number}"]
    shared.append("policy.loss.beta=${shared.beta}")
    with pytest.raises(InputError, match=text):
        Grid(replace(LITTLE, settings=[*LITTLE.settings, *shared], grid=axes))


@pytest.mark.parametrize("setting", ["policy.seed=5", "policy.loss.beta=9.0"])
def test_a_second_look_at_another_run_is_refused_before_the_first(setting):
    with pytest.raises(InputError, match=r"best\.settings: wanted the loss, β and seed"):
        Grid(replace(LITTLE, best=BestConfig(settings=[setting])))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["evaluate.model.path=elsewhere"], "evaluate.model: wanted .*runs/it/copg/model"),
        (["evaluate.model.path=runs/it/copg/best"], "got runs/it/copg/best.* best/ is chosen by"),
        ([*ADAPTERS[:-1], "evaluate.model.adapter=runs/it/copg/best_adapter"], "best_adapter"),
        (["policy.evaluation=null"], "policy.evaluation: wanted evaluations by generation"),
        (["evaluate.reference=null"], "evaluate.reference: wanted .*got null"),
        (["evaluate.reference.path=another"], "evaluate.reference: wanted .*path=another"),
        (["evaluate.reference.adapter=a"], "evaluate.reference: wanted .*adapter=a"),
    ],
)
def test_stages_that_do_not_read_each_other_as_a_study_needs_are_refused(settings, text):
    with pytest.raises(InputError, match=text):
        Grid(replace(LITTLE, settings=[*LITTLE.settings, *settings]))


@pytest.mark.parametrize("name", ["quickstart", "smollm2", "tldr_llama2_7b"])
def test_every_study_that_ships_evaluates_what_training_ends_as(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_config(StudyConfig, [f"configs/studies/{name}.yaml"])
    grid = {axis: _first(given) for axis, given in study.grid.items()}
    (point,) = Grid(replace(study, grid=grid)).points
    assert point.evaluation.config.model.path == f"{point.policy.config.output_dir}/model"


def _first(given):
    """The first value of an axis, also of one whose values depend on another's."""
    return {k: v[:1] for k, v in given.items()} if isinstance(given, dict) else given[:1]


def test_a_setting_that_no_stage_has_is_refused_before_anything_runs():
    with pytest.raises(InputError, match=r"unknown field .*loss\.betta"):
        Grid(replace(STUDY, grid={"loss.betta": [1.0]}))
    with pytest.raises(InputError, match="two runs would be called"):
        Grid(replace(PLAIN, grid={"data.split": ["a/b", "a//b"]}))
