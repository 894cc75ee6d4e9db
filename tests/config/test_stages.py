"""Configs: every YAML loads, every field is read somewhere, every script lists its fields."""

import ast
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from copg_jax.bandit.train import BanditConfig
from copg_jax.config import stages as config
from copg_jax.config.load import load_config
from copg_jax.config.schema import field_types, iter_fields, section_class

ROOT = Path(__file__).parents[1]
STAGES: dict[str, type] = {
    "train_sft": config.SFTConfig,
    "train_reward": config.RewardModelConfig,
    "score": config.ScoreConfig,
    "train_policy": config.PolicyConfig,
    "evaluate": config.EvaluateConfig,
    "quickstart": config.QuickstartConfig,
    "bandit": BanditConfig,
}
# The stage of a YAML, by a word of its name.
WORDS = {
    "sft": "train_sft",
    "reward": "train_reward",
    "score": "score",
    "scored": "score",
    "copg": "train_policy",
    "dpo": "train_policy",
    "ipo": "train_policy",
    "evaluate": "evaluate",
    "quickstart": "quickstart",
    "bandit": "bandit",
}
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


def stage_of(file: Path) -> str:
    """The stage that a YAML belongs to."""
    (stage,) = {WORDS[word] for word in file.stem.split("_") if word in WORDS}
    return stage


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_yaml_loads_and_tells_the_command_that_runs_it(file):
    stage = stage_of(file)
    loaded = load_config(STAGES[stage], [str(file)])
    assert isinstance(loaded, STAGES[stage])
    comment = "".join(line for line in file.read_text().splitlines(True) if line[0] == "#")
    assert f"experiments.{stage} {file.relative_to(ROOT)}" in comment.replace("\n", " ")


def test_the_paper_has_a_config_for_each_stage_and_method():
    names = {file.stem for file in FILES}
    wanted = {f"{name}_tldr_llama2_7b" for name in ("sft", "reward", "score", "copg", "dpo", "ipo")}
    assert wanted <= names
    assert {f"smollm2_{name}" for name in ("sft", "reward", "score", "copg", "evaluate")} <= names


def sections(cls: type) -> Iterator[type]:
    """A config dataclass and those of its sections."""
    yield cls
    for hint in field_types(cls).values():
        nested = section_class(hint)
        if nested is not None:
            yield from sections(nested)


def attributes_read() -> set[str]:
    """Names x of all `something.x` that the product reads, but for `self.x` in `__post_init__`."""
    found: set[str] = set()
    for folder in ("copg_jax", "experiments"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            checks = [
                node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
            ]
            inside = {id(node) for check in checks for node in ast.walk(check)}
            found |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load)
                and id(node) not in inside
            }
    return found


def test_no_config_field_is_dead():
    read = attributes_read()
    classes = {cls for stage in STAGES.values() for cls in sections(stage)}
    assert len(classes) > 10
    dead = [
        f"{cls.__name__}.{field.name}"
        for cls in sorted(classes, key=lambda cls: cls.__name__)
        for field in dataclasses.fields(cls)
        if field.name not in read
    ]
    assert dead == []


def test_what_may_differ_on_resuming_are_fields_of_stages():
    names = {field.name for cls in STAGES.values() for field in iter_fields(cls)}
    for prefix in config.MAY_DIFFER:
        assert any(name == prefix or name.startswith(prefix + ".") for name in names), prefix


@pytest.mark.parametrize("stage", STAGES)
def test_help_says_what_the_script_does_and_lists_every_field_with_a_meaning(stage, capsys):
    module = importlib.import_module(f"experiments.{stage}")
    with pytest.raises(SystemExit) as caught:
        load_config(STAGES[stage], ["--help"], description=module.__doc__)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert module.__doc__.strip().splitlines()[0] in text
    for field in iter_fields(STAGES[stage]):
        assert f"  {field.name}: {field.type}" in text
        assert field.help and field.help in text, field.name


def test_defaults_are_the_paper_s():
    policy = load_config(
        config.PolicyConfig,
        ["output_dir=x", "model.path=x", "data.path=x", "evaluation.data.path=x"],
    )
    assert (policy.optim.learning_rate, policy.optim.warmup_fraction) == (1e-6, 0.1)
    assert (policy.training.batch_size, policy.training.num_epochs) == (128, 2)
    assert (policy.loss.name, policy.loss.beta, policy.optim.decay) == ("copg", 0.06, "constant")
    assert policy.evaluation.generation.sampling_temperature == 1.0
    sft = load_config(config.SFTConfig, ["output_dir=x", "model.path=x", "data.path=x"])
    assert (sft.optim.learning_rate, sft.optim.decay) == (2e-5, "cosine")
