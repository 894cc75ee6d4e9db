"""Runs at the best β: which they are, who does them, and what is drawn of them; with stages that
write what real ones measure.
"""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from copg_jax.errors import InputError
from copg_jax.train.metrics import NonFiniteLoss
from experiments import figures, study
from experiments.studies.grid import Grid
from experiments.studies.study_config import BestConfig, StudyConfig

# β → reward, and ln π − ln π_ref: the small β is better in reward, the large in J = E[R] − 0.3·KL.
ENDS = {0.1: (2.0, 9.0), 0.3: (1.0, 0.0)}
EXPORTS = ("model", "best", "adapter", "best_adapter")
ROWS = '{"prompt": "a", "completions": ["x", "y"], "rewards": [3.0, 0.0]}\n'


def train(config) -> None:
    """Writes the metrics and the end of a policy."""
    reward, log_ratio = ENDS[config.loss.beta]
    folder = Path(config.output_dir)
    for name in EXPORTS:
        (folder / name).mkdir(parents=True)
        (folder / name / "README.md").write_text("# Model card\n")
    lines = [{"step": at, "eval/reward_mean": reward * at, "eval/kl": 0.1} for at in (0, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (folder / "model" / "end.json").write_text(json.dumps([reward, log_ratio]))


def evaluate(config) -> None:
    """Writes generations of a policy, or of π_ref."""
    end = Path(config.model.path) / "end.json"
    reward, log_ratio = json.loads(end.read_text()) if end.exists() else (0.0, 0.0)
    rest = {"logp": log_ratio, "ref_logp": 0.0, "length": 3, "has_eos": True, "completion": "a"}
    lines = [
        {"index": i, "reward": reward + 0.1 * i, **rest}
        for i in range(config.evaluation.generation.num_prompts)
    ]
    Path(config.output_dir).mkdir(parents=True)
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (Path(config.output_dir) / "generations.jsonl").write_text(text)


@pytest.fixture
def config(tmp_path, monkeypatch) -> StudyConfig:
    """A study of two methods and two β, whose second look has more prompts."""
    monkeypatch.setattr(study, "MAINS", {"policy": train, "evaluate": evaluate})
    grids: dict[str, Grid] = {}  # loading its configs lasts longer than all else here

    def grid_of(one: StudyConfig) -> Grid:
        if repr(one) not in grids:
            grids[repr(one)] = Grid(one)
        return grids[repr(one)]

    monkeypatch.setattr(study, "Grid", grid_of)
    monkeypatch.setattr(figures, "Grid", grid_of)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROWS)
    return StudyConfig(
        output_dir=str(tmp_path / "it"),
        stages=["policy", "evaluate"],
        settings=[
            "policy.output_dir=out",
            f"policy.data.path={rows}",
            "policy.model.path=m",
            "policy.evaluation.data.path=p",
            "evaluate.output_dir=e",
            "evaluate.model.path=out/model",
            "evaluate.reference.path=m",
            "evaluate.evaluation.data.path=p",
            "evaluate.evaluation.generation.num_prompts=4",
            "evaluate.beta=0.3",
        ],
        grid={"loss.name": ["copg", "ipo"], "loss.beta": [0.1, 0.3]},
        best=BestConfig(["evaluate.evaluation.generation.num_prompts=8"], [5, 6]),
        figures=[],
    )


def differences(config: StudyConfig) -> dict[str, tuple[str, ...]]:
    """For reward and J: β of both methods, prompts and seeds."""
    text = (Path(config.output_dir) / "figures" / "differences.csv").read_text()
    names = ("first_beta", "second_beta", "num_prompts", "num_seeds")
    return {row["of"]: tuple(row[n] for n in names) for row in csv.DictReader(text.splitlines())}


def test_the_part_that_ends_last_does_all_of_the_second_look(config):
    config = replace(config, grid={"loss.beta": [0.1, 0.3]})
    for shard in ("0/2", "1/2"):
        assert study.main(config, shard=shard) == 0
    names = {path.name for path in Path(config.output_dir).glob("best-*")}
    assert names == {"best-beta_0.1-seed_5", "best-beta_0.1-seed_6"}


def test_j_is_compared_where_it_is_best_half_a_second_look_replaces_nothing_and_cards_say_it(
    config,
):
    assert study.main(config) == 0
    figures.main(config)
    assert differences(config) == {
        "reward": ("0.1", "0.1", "8", "2"),
        "objective": ("0.3", "0.3", "4", "1"),
    }
    table = (Path(config.output_dir) / "figures" / "table.md").read_text()
    for run in ("copg-beta_0.3", "best-ipo-beta_0.1-seed_6"):  # one that is best, one that is not
        for name in EXPORTS:
            card = (Path(config.output_dir) / run / name / "README.md").read_text()
            assert card.startswith("# Model card\n") and card.count(table.strip()) == 1
    (Path(config.output_dir) / "records" / "best-ipo-beta_0.1-seed_6.json").unlink()
    figures.main(config)
    assert differences(config)["reward"] == ("0.1", "0.1", "4", "1")


def test_a_beta_that_lost_a_seed_has_no_second_look_and_the_table_says_why(config, monkeypatch):
    def diverge(one) -> None:
        if one.loss.beta == 0.1 and one.seed == 1:
            raise NonFiniteLoss("step 3: not finite")
        train(one)

    monkeypatch.setitem(study.MAINS, "policy", diverge)
    config = replace(config, grid={"loss.beta": [0.1, 0.3], "seed": [0, 1]})
    study.main(config)
    names = {path.name for path in Path(config.output_dir).glob("best-*")}
    assert names == {"best-beta_0.3-seed_5", "best-beta_0.3-seed_6"}
    figures.main(config)
    table = (Path(config.output_dir) / "figures" / "table.md").read_text()
    assert "| 1 of 2, 1 diverged | 0 |" in table


def test_a_policy_of_several_sources_is_drawn(config, tmp_path):
    sources = f"policy.data.sources=[{{path: {tmp_path / 'rows.jsonl'}}}]"
    settings = [*config.settings, "policy.data.path=null", sources]
    config = replace(config, settings=settings, best=None, figures=["beta"])
    assert study.main(config) == 0
    figures.main(config)
    (Path(config.output_dir) / "copg-beta_0.1" / "metrics.jsonl").rename(tmp_path / "gone")
    with pytest.raises(
        InputError, match=r"metrics\.jsonl: wanted the metrics of a run, got no file"
    ):
        figures.main(config)
    text = (Path(config.output_dir) / "figures" / "beta.csv").read_text()
    (row, *_) = csv.DictReader(text.splitlines())
    assert float(row["beta_in_sd"]) == pytest.approx(0.1 / 3)


def test_runs_of_other_settings_are_not_drawn(config):
    config = replace(config, best=None, figures=["beta"])
    assert study.main(config) == 0
    other = replace(config, settings=[*config.settings, "policy.training.max_steps=1"])
    with pytest.raises(InputError, match=r"got none of \d+ with the settings of this file. Fix:"):
        figures.main(other)
    figures.main(config)
