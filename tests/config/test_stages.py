"""Configs: every YAML is used and loads, no field is dead, every script lists its fields."""

import ast
import dataclasses
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from copg_jax.bandit.train import BanditConfig
from copg_jax.config import stages as config
from copg_jax.config.load import load_config, to_yaml
from copg_jax.config.schema import iter_fields
from copg_jax.config.stages import STAGES
from experiments import bandit
from experiments.quickstart import QuickstartConfig
from experiments.studies.study_config import StudyConfig
from tests.reads import dead_fields, recorded_reads

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, type] = {
    "train_sft": config.SFTConfig,
    "train_reward": config.RewardModelConfig,
    "sample": config.SampleConfig,
    "score": config.ScoreConfig,
    "train_policy": config.PolicyConfig,
    "online": config.OnlineConfig,
    "evaluate": config.EvaluateConfig,
    "quickstart": QuickstartConfig,
    "study": StudyConfig,
    "figures": StudyConfig,
    "bandit": BanditConfig,
}
SIZES = ("llama2_7b", "smollm2", "quickstart")
LOSSES = ("copg", "dpo", "ipo")
PUBLIC_TASKS = {"gsm8k", "mbpp", "ultrafeedback"}
STUDIES = (
    "quickstart",
    "smollm2",
    "smollm2_cpu",
    "order",
    "tldr_llama2_7b",
    "arithmetic",
    "fresh",
    "fresh_arithmetic",
    "fresh_losses",
    "reward_models",
    "low_beta",
    "conflict",
    "ensemble",
    "graded",
)
ARMS = ("fresh", "gold", "judges", "low_beta", "conflict", "ensemble")
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@functools.cache
def load(stage: str, size: str, *more: str, loss: str | None = None) -> Any:
    """The config of a stage at a size; a loss where the stage needs one."""
    names = ["tldr", f"sizes/{size}", *([f"losses/{loss}"] if loss else [])]
    return load_config(STAGES[stage], [*(f"configs/{name}.yaml" for name in names), *more])


def runs() -> list[tuple[str, str, str | None]]:
    """Every stage at every size, with every loss where it needs one."""
    return [
        (stage, size, loss)
        for size in SIZES
        for stage in STAGES
        for loss in (LOSSES if stage in ("policy", "online", "evaluate") else [None])
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_yaml_tells_a_command_that_reads_it_and_loads(file: Path):
    name = str(file.relative_to(ROOT))
    lines = re.findall(r"^# +python -m experiments\.(.*)$", file.read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        script, *arguments = line.replace(" \\", "").split()
        assert name in arguments
        loaded = load_config(SCRIPTS[script], arguments)
        assert isinstance(loaded, SCRIPTS[script])


def test_every_file_is_a_size_a_loss_a_task_a_study_or_a_script_s_own():
    named = {f"sizes/{size}" for size in SIZES} | {f"losses/{loss}" for loss in LOSSES}
    named |= {f"studies/{study}" for study in STUDIES} | {f"studies/arms/{arm}" for arm in ARMS}
    named |= {"tldr", "quickstart", "bandit", "lora", "online"}
    names = {file.relative_to(ROOT / "configs").with_suffix("") for file in FILES}
    tasks = {name for name in names if name.parts[0] in ("tasks", "quickstart")} - {
        Path("quickstart")
    }
    assert {str(name) for name in names - tasks} == named
    # What the quickstart runs of a task is a file, which reads that of the task.
    of = {name.parts[0]: {n.stem for n in tasks if n.parts[0] == name.parts[0]} for name in tasks}
    assert of["tasks"] == of["quickstart"] | PUBLIC_TASKS


def test_with_adapters_each_stage_reads_those_of_the_stage_before_it():
    more, sft = "configs/lora.yaml", "runs/smollm2_lora/sft/adapter"
    with_loss = ("policy", "online", "evaluate")
    lora = {
        stage: load(stage, "smollm2", more, loss="copg" if stage in with_loss else None)
        for stage in ("sft", "reward", "score", *with_loss)
    }
    base = lora["sft"].model.path
    for stage in ("sft", "reward", "policy", "online"):
        assert lora[stage].lora.rank == 16 and lora[stage].model.path == base
    assert lora["sft"].model.adapter is None
    starts = [lora["reward"].model, lora["score"].reference, lora["policy"].model]
    starts += [lora["online"].model]
    for model in (*starts, lora["evaluate"].reference):
        assert (model.path, model.adapter) == (base, sft)
    assert lora["evaluate"].model.adapter == f"{lora['policy'].output_dir}/best_adapter"
    for stage in with_loss:
        (spec,) = lora[stage].evaluation.rewards
        assert spec.arguments["path"] == base
        assert spec.arguments["adapter"] == f"{lora['reward'].output_dir}/adapter"


@pytest.mark.parametrize(("stage", "size", "loss"), runs())
def test_every_stage_has_a_config_at_every_size_with_every_loss(stage, size, loss):
    loaded = load(stage, size, loss=loss)
    assert loaded.output_dir.startswith(f"runs/{size}/")
    if stage in ("policy", "online"):
        assert loaded.loss.name == loss
    if stage == "evaluate":
        assert loaded.model.path.startswith(f"runs/{size}/{loss}/")


def test_no_two_runs_share_a_folder():
    folders = [load(stage, size, loss=loss).output_dir for stage, size, loss in runs()]
    assert len(set(folders)) == len(folders)


def test_one_number_holds_for_all_sections_of_all_stages():
    found = set()
    for stage, size, loss in runs():
        more = ["shared.max_prompt_tokens=77", "shared.dtype=float32", "shared.folder=elsewhere"]
        text = to_yaml(load(stage, size, *more, loss=loss))
        found |= set(re.findall(r"max_prompt_tokens: (.*)|dtype: (.*)", text))
        assert f"runs/{size}" not in text
    assert found == {("77", ""), ("", "float32")}


def test_the_stages_read_what_the_stages_before_them_write():
    for size in SIZES:
        sft, reward, scored = (load(stage, size) for stage in ("sft", "reward", "score"))
        policy = load("policy", size, loss="ipo")
        evaluate = load("evaluate", size, loss="ipo")
        first = f"{sft.output_dir}/model"
        assert {reward.model.path, scored.reference.path, policy.model.path} == {first}
        assert evaluate.reference.path == first
        assert policy.data.path == scored.output_dir
        assert evaluate.model.path.startswith(policy.output_dir)
        judges = [scored.rewards, policy.evaluation.rewards, evaluate.evaluation.rewards]
        assert all(judge == judges[0] for judge in judges)
        assert judges[0][0].arguments["path"] == f"{reward.output_dir}/model"
        # A reference in another dtype than the policy would read as KL.
        dtypes = {sft.model.dtype, scored.reference.dtype, policy.model.dtype, evaluate.model.dtype}
        assert len(dtypes | {evaluate.reference.dtype}) == 1


def test_an_experiment_is_a_file_of_five_lines(tmp_path):
    path = tmp_path / "half_beta.yaml"
    path.write_text(
        "shared:\n  run: copg_half_beta\npolicy:\n  loss:\n    beta: 0.03\n", encoding="utf-8"
    )
    files = ["configs/tldr.yaml", "configs/sizes/llama2_7b.yaml", "configs/losses/copg.yaml"]
    policy = load_config(config.PolicyConfig, [*files, str(path)])
    assert policy == dataclasses.replace(
        load("policy", "llama2_7b", loss="copg"),
        output_dir="runs/llama2_7b/copg_half_beta",
        loss=config.LossConfig("copg", beta=0.03),
    )
    evaluate = load_config(config.EvaluateConfig, [*files, str(path)])
    assert evaluate.model.path == "runs/llama2_7b/copg_half_beta/best"
    assert evaluate.output_dir == "runs/llama2_7b/evaluate_copg_half_beta"


def test_the_bandit_reads_all_its_fields(tmp_path):
    tiny = ["num_pairs=200", "batch_size=50", "num_epochs=3", "num_seeds=2"]
    tiny += ["long_num_epochs=5", "long_num_seeds=1", f"output_dir={tmp_path}"]
    loaded = load_config(BanditConfig, tiny)
    with recorded_reads(loaded) as reads:
        bandit.main(loaded)
    assert dead_fields(BanditConfig, reads) == []


def test_the_quickstart_reads_all_its_fields():
    # Its stages take minutes; it is the only one to read its config, so its text tells.
    tree = ast.parse((ROOT / "experiments" / "quickstart.py").read_text(encoding="utf-8"))
    reads: set[str] = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            owners = {
                argument.arg
                for argument in function.args.args
                if isinstance(argument.annotation, ast.Name)
                and argument.annotation.id == QuickstartConfig.__name__
            }
            reads |= {
                node.attr
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in owners
            }
    assert dead_fields(QuickstartConfig, reads) == []
    assert dead_fields(QuickstartConfig, reads - {"seed"}) == ["seed"]


def test_what_may_differ_on_resuming_are_fields_of_stages():
    names = {field.name for cls in SCRIPTS.values() for field in iter_fields(cls)}
    for prefix in config.MAY_DIFFER:
        assert any(name == prefix or name.startswith(prefix + ".") for name in names), prefix


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_the_script_does_and_lists_every_field_with_a_meaning(script, capsys):
    module = importlib.import_module(f"experiments.{script}")
    with pytest.raises(SystemExit) as caught:
        load_config(SCRIPTS[script], ["--help"], description=module.__doc__)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert module.__doc__.strip().splitlines()[0] in text
    for field in iter_fields(SCRIPTS[script]):
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
