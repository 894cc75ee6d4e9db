"""Bad settings, models and data are refused before anything long begins, with what to change."""

import json
import shutil

import pytest

from copg_jax.data.tokenizer import load_tokenizer
from tests.toys import names_all
from tests.workplace import Workplace, tiny_model


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    """Data and a base model, which stands in for the models that SFT and the policy stage leave."""
    place = Workplace(tmp_path_factory.mktemp("refusals"))
    for stage in ("sft", "policy"):
        shutil.copytree(place.folder / "base", place.folder / stage / "model")
    return place


@pytest.fixture
def elsewhere(tmp_path) -> str:
    """Argument for an output folder that is not used yet."""
    return f"output_dir={tmp_path / 'run'}"


def test_unknown_and_mistyped_keys_are_named_with_the_one_that_was_meant(workplace, elsewhere):
    names_all(
        workplace.refusal("policy", elsewhere, "loss.bta=0.1", "training.max_steps=many"),
        ["'loss.bta'", "did you mean 'loss.beta'?", "training.max_steps", "wanted int", "'many'"],
    )


@pytest.mark.parametrize(
    ("stage", "setting", "parts"),
    [
        ("policy", "loss.beta=0", ["loss.beta must be > 0", "got 0"]),
        ("evaluate", "beta=-1", ["beta must be > 0", "got -1"]),
        ("policy", "loss.name=ppo", ["loss.name must be one of copg, dpo", "'ppo'"]),
        ("policy", "loss.baseline=1", ["loss.baseline", "loss"]),
        (
            "policy",
            "loss.arguments={baseline: 1}",
            ["loss.arguments", "copg", "'baseline'", "it takes beta."],
        ),
        ("policy", "loss.name=tests.no_such.loss", ["loss.name", "'tests.no_such.loss'"]),
        ("sft", "model.dtype=float16", ["model.dtype must be one of", "'float16'"]),
        ("sft", "training.remat=some", ["training.remat must be one of", "'some'"]),
        ("sft", "logits_chunk=0", ["logits_chunk must be >= 1", "got 0"]),
        ("score", "part_size=0", ["part_size"]),
        ("sft", "training.num_microbatches=3", ["training.batch_size", "multiple", "8 and 3"]),
        ("sft", "training.num_microbatches=2", ["training.batch_size", "2 x 8", "nearest is 16"]),
        ("sft", "mesh.tensor=3", ["mesh", "tensor=3", "8 device"]),
        ("sft", "training.batch_size=64", ["24 groups", "64", "batch size"]),
        ("sft", "model.path=nowhere/at/all", ["nowhere/at/all", "model folder"]),
        ("sft", "data.path=nowhere.jsonl", ["nowhere.jsonl"]),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_bad_settings_are_named_with_what_was_wanted(workplace, elsewhere, stage, setting, parts):
    names_all(workplace.refusal(stage, elsewhere, setting), parts)


def test_a_mesh_that_does_not_divide_the_model_lists_what_it_does_not_divide(workplace, elsewhere):
    text = workplace.refusal("sft", elsewhere, "mesh.tensor=4", "mesh.fsdp=2")
    names_all(text, ["k_proj", "kv_heads", "size 2", "mesh.tensor=4"])


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(workplace, elsewhere, tmp_path):
    tiny_model(tmp_path / "small", load_tokenizer(workplace.folder / "base"), 300)
    text = workplace.refusal("sft", elsewhere, f"model.path={tmp_path / 'small'}")
    names_all(text, [str(tmp_path / "small"), "400 ids", "300", "vocab_size in config.json", "Fix"])


@pytest.mark.parametrize(
    ("stage", "window", "parts"),
    [
        ("sft", 100, ["sft.jsonl", "data.max_prompt_tokens"]),
        ("score", 100, ["comparisons.jsonl", "data.max_prompt_tokens"]),
        (
            "evaluate",
            400,
            ["evaluation.generation", "completions of up to 395", "max_new_tokens"],
        ),
    ],
)
def test_a_window_that_is_shorter_than_the_data_is_refused_with_both_numbers(
    workplace, elsewhere, tmp_path, stage, window, parts
):
    model = tmp_path / "mistral"
    shutil.copytree(workplace.folder / "base", model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mistral", "sliding_window": window}
    (model / "config.json").write_text(json.dumps(config))
    paths = [f"{name}.path={model}" for name in ("model", "reference")]
    paths = {"sft": paths[:1], "score": paths[1:]}.get(stage, paths)
    longer = ["evaluation.generation.max_new_tokens=395"] if stage == "evaluate" else []
    text = workplace.refusal(stage, elsewhere, *paths, *longer)
    names_all(text, [*parts, str(model), f"sliding_window={window}", "Fix"])


def test_fewer_prompts_than_asked_for_are_refused(workplace, elsewhere):
    text = workplace.refusal("evaluate", elsewhere, "evaluation.generation.num_prompts=1000")
    names_all(text, ["evaluation.data", "wanted 1000", "got 9", str(workplace.posts)])
    assert "num_prompts=9" in text


def test_data_without_choices_trains_no_reward_model(workplace, elsewhere):
    text = workplace.refusal("reward", elsewhere, f"data.path={workplace.posts}")
    names_all(text, ["wanted 2 or more completions", "got at most 1", "missing", "comparisons"])


def test_data_that_was_not_scored_trains_no_policy(workplace, elsewhere):
    text = workplace.refusal("policy", elsewhere, f"data.path={workplace.comparisons}")
    names_all(text, [str(workplace.comparisons), "no ref_logp", "experiments.score"])


def test_a_refused_run_leaves_no_config_behind(workplace, elsewhere, tmp_path):
    workplace.refusal("reward", elsewhere, f"data.path={workplace.posts}")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_validation_on_rows_that_are_trained_on_is_said(workplace, elsewhere, capsys):
    settings = [
        f"{part}.{to}" for part in ("data", "validation") for to in ("part=all", "max_rows=9")
    ]
    workplace.run("sft", elsewhere, *settings, "training.max_steps=1")
    assert "validation: 9 of its 9 groups are trained on as well" in capsys.readouterr().err
