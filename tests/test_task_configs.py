"""The configs of tasks with public data load for every stage, and read rows with its fields."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from copg_jax.config.load import load_config
from copg_jax.config.sections import DataConfig
from copg_jax.config.stages import (
    EvaluateConfig,
    OnlineConfig,
    PolicyConfig,
    RewardModelConfig,
    SampleConfig,
    ScoreConfig,
    SFTConfig,
)
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.reader import GroupReader
from copg_jax.rewards.functions import load_reward
from tests.pages import ROOT

# Rows with the fields of the public sets.
ROWS = {
    "gsm8k": {"question": "Tom has 2 pens and buys 3. How many?", "answer": "2+3=5\n#### 5"},
    "mbpp": {
        "task_id": 601,
        "text": "Write a function to add two numbers.",
        "code": "def add(a, b):\r\n    return a + b",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
    "ultrafeedback": {
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}],
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
}
SPLITS = ("train", "validation", "test")


def config_of(task: str, cls: type) -> Any:
    names = ["tldr", "sizes/llama2_7b", f"tasks/{task}"]
    names += ["losses/copg"] * (cls in (PolicyConfig, OnlineConfig, EvaluateConfig))
    return load_config(cls, [str(ROOT / "configs" / f"{name}.yaml") for name in names])


def read(section: DataConfig, folder: Path, **options: Any) -> list[TextGroup]:
    """The rows of a section, from local files in place of the hub."""
    own = {"path": str(folder), "subset": None, "part": "all", "holdout_fraction": 0.0}
    groups = list(GroupReader(replace(section, **own), **options))
    assert all(isinstance(group, TextGroup) for group in groups)
    return groups  # pyright: ignore[reportReturnType]


@pytest.fixture(params=list(ROWS))
def task(request, tmp_path) -> tuple[str, Path]:
    for split in SPLITS:
        row = ROWS[request.param] | {"id": split}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return request.param, tmp_path


def test_sft_learns_the_answer_of_the_row(task):
    name, folder = task
    config = config_of(name, SFTConfig)
    held_out = config.validation
    assert held_out is not None and held_out != config.data  # never the same rows
    for section in (config.data, held_out):
        (group,) = read(section, folder, chosen_only=True)
        (answer,) = group.completions
        row = ROWS[name]
        wanted = row.get("answer") or row.get("code") or row["chosen"][1:]
        assert (list(answer) if isinstance(answer, tuple | list) else answer) == wanted


@pytest.mark.parametrize("cls", [PolicyConfig, EvaluateConfig, OnlineConfig, SampleConfig])
def test_prompts_come_with_what_the_reward_needs(task, cls):
    name, folder = task
    config = config_of(name, cls)
    section = config.data if cls is SampleConfig else config.evaluation.data
    if cls is not SampleConfig:
        assert section.split == "test"
        # Rows of the test split: GSM8K 1,319, MBPP 500, UltraFeedback 1,000.
        most = {"gsm8k": 1319, "mbpp": 500, "ultrafeedback": 1000}[name]
        assert config.evaluation.generation.num_prompts <= most
    if cls is OnlineConfig:
        (group,) = read(config.data, folder, prompts_only=True)
        assert name == "ultrafeedback" or config.data.columns == {
            "prompt": section.columns["prompt"]
        }
    (group,) = read(section, folder, prompts_only=True)  # as `sample` and evaluations do
    for spec in [] if name == "ultrafeedback" else config_of(name, ScoreConfig).rewards:
        assert spec.arguments["column"] in group.columns


def test_unit_tests_of_the_rows_judge_their_programs(tmp_path):
    (spec,) = config_of("mbpp", ScoreConfig).rewards
    row = ROWS["mbpp"]
    columns = {"test_list": [row["test_list"]] * 2}
    texts = [row["code"], "def add(a, b):\n    return a - b"]
    assert load_reward(spec)(["p"] * 2, texts, **columns) == [1.0, 0.5]


@pytest.mark.oracle("math_verify")
def test_the_answers_of_gsm8k_are_read_as_numbers():
    (spec,) = config_of("gsm8k", ScoreConfig).rewards
    texts = [ROWS["gsm8k"]["answer"], "#### 5.0", "it is 6\n#### 6"]
    assert load_reward(spec)(["p"] * 3, texts, answer=["2+3=5\n#### 5"] * 3) == [1.0, 1.0, 0.0]


def test_comparisons_give_both_answers_to_score_and_train_a_reward_on(task):
    name, folder = task
    score = config_of(name, ScoreConfig)
    if name != "ultrafeedback":
        assert score.data.path == config_of(name, SampleConfig).output_dir
        return
    for cls in (RewardModelConfig, ScoreConfig):
        (group,) = read(config_of(name, cls).data, folder, by_choice=cls is RewardModelConfig)
        assert len(group.completions) == 2
