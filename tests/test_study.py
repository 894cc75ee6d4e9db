"""A whole study on the tiny model: it compiles each loss once, does nothing twice, and its figures,
tables and model cards come from what it measured.
"""

import csv
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from copg_jax import checksums, inputs
from copg_jax.config.load import load_config
from copg_jax.hf import pretrained
from copg_jax.rewards import RewardModel
from experiments import figures, study
from experiments.studies.grid import Grid
from experiments.studies.study_config import StudyConfig
from tests.workplace import Workplace

pytestmark = pytest.mark.slow  # a dozen runs
BETAS = {"copg": [0.1, 1.0], "dpo": [0.5]}
SEEDS = {"copg": [0, 1], "dpo": [0]}


class Requests(logging.Handler):
    """Counts the compilations that were asked for, by the name of the function, whether the
    persistent cache had them or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        if match := re.search(
            r"cache (?:hit|miss) for '(\w+)'", record.getMessage(), re.IGNORECASE
        ):
            self.found[match[1].removeprefix("jit_")] += 1


@contextmanager
def compilations() -> Iterator[Counter[str]]:
    """What is compiled, while it is open."""
    logger, handler = logging.getLogger("jax._src.compiler"), Requests()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> StudyConfig:
    """A study of two losses on the stages of a workplace."""
    place = Workplace(tmp_path_factory.mktemp("study"))
    stages = ("sft", "reward", "score", "policy", "evaluate")
    settings = [f"{stage}.{text}" for stage in stages for text in place.arguments(stage)]
    folder = place.folder / "it"
    text = {
        "output_dir": str(folder),
        "settings": settings,
        "grid": {"loss.name": ["copg", "dpo"], "loss.beta": BETAS, "seed": SEEDS},
        "best": {"settings": ["policy.training.log_every=2"], "seeds": [0]},
    }
    path = place.folder / "study.yaml"
    path.write_text(yaml.safe_dump(text, sort_keys=False))
    return load_config(StudyConfig, [str(path)])


class Count:
    """Counts calls of a function."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.fixture(scope="module")
def ran(config):
    """The study once; what was compiled, and how often models and data were read."""
    folder, loads = "", Counter()
    load, assemble = pretrained.PretrainedModel._load_base, pretrained.assemble

    def loaded(model):
        nonlocal folder
        folder = str(model.folder)
        return load(model)

    def assembled(source, tensors, *args, **kwargs):
        loads[folder] += bool(tensors)  # none: all are in memory
        return assemble(source, tensors, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained.PretrainedModel, "_load_base", loaded)
        patch.setattr(pretrained, "assemble", assembled)
        opened, prepared = Count(RewardModel.__init__), Count(inputs.prepare)
        patch.setattr(RewardModel, "__init__", lambda *a, **k: opened(*a, **k))
        patch.setattr(inputs, "prepare", prepared)
        with compilations() as found:
            assert study.main(config) == 0
    return found, opened.calls, prepared.calls, loads


def test_all_betas_and_seeds_of_a_loss_share_one_compilation(ran):
    found, *_ = ran
    # SFT, reward model, CoPG, DPO; of their held-out losses the same; one sampler and one π_ref.
    assert found["train_step"] == 4 and found["loss_step"] == 4
    assert found["sample"] == 1


def test_the_reward_model_and_each_data_set_are_read_once(ran):
    _, opened, prepared, _ = ran
    assert opened == 2  # by score, and by all evaluations
    # Posts and comparisons with what is held out, what is scored, its two parts, prompts.
    assert prepared == 2 + 2 + 1 + 2 + 1


def test_the_reference_is_loaded_once(ran, config):
    *_, loads = ran
    folder = Path(config.output_dir)
    # By score, and by all trainings and evaluations; a policy by its evaluation.
    assert loads[str(folder / "sft" / "model")] == 2
    assert loads[str(folder / "dpo-beta_0.5-seed_0" / "model")] == 1


def test_a_second_call_does_nothing_and_says_so(ran, config, monkeypatch, capsys):
    monkeypatch.setattr(study, "MAINS", {})
    assert study.main(config) == 0
    assert re.search(r"policy +│ +7 │ +0 │ +0 │ +0", capsys.readouterr().out)
    assert study.main(config, shard="1/3", only_list=True) == 0


def test_every_point_is_an_ordinary_run_folder_and_the_best_have_a_second_look(ran, config):
    names = {path.name for path in Path(config.output_dir).iterdir() if path.is_dir()}
    wanted = {point.name for point in Grid(config).points}
    assert len(wanted) == 5 and wanted <= names
    assert any(name.startswith("best-copg-beta_") for name in names)
    assert "best-dpo-beta_0.5-seed_0" in names
    for name in wanted:
        folder = Path(config.output_dir) / name
        assert (folder / "metrics.jsonl").exists() and (folder / "config.yaml").exists()


def test_figures_tables_and_cards_come_from_what_was_measured(ran, config):
    figures.main(config)
    folder = Path(config.output_dir) / "figures"
    assert not (folder / "residual.png").exists()  # it wants two samples a prompt
    for name in set(config.figures) - {"residual"}:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.csv").exists()
    rows = list(csv.DictReader((folder / "beta.csv").read_text().splitlines()))
    assert [(row["method"], row["beta"]) for row in rows] == [
        ("copg", "0.1"),
        ("copg", "1.0"),
        ("dpo", "0.5"),
    ]
    assert [row["num_seeds"] for row in rows] == ["2", "2", "1"]
    table = (folder / "table.md").read_text()
    figures.main(config)  # again, in place of the first
    for point in Grid(config).points:
        model = Path(point.policy.config.output_dir) / "model"
        card = (model / "README.md").read_text()
        assert card.count(table.strip()) == 1
        assert f"beta: {point.policy.config.loss.beta}" in card
        assert "| eval/reward_mean |" in card and "groups, fingerprint" in card
        checksums.check(model, fix="")
        for job in point.jobs:  # what the runs share has it too
            exported = Path(job.config.output_dir) / "model" / "README.md"
            if job.stage in ("sft", "reward"):
                assert exported.read_text().count(table.strip()) == 1


def test_a_card_may_be_corrected_by_hand(ran, config):
    model = Path(config.output_dir) / "sft" / "model"
    assert "README.md" not in checksums.sealed_sums(model, fix="")
