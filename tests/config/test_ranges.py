"""Every number of every field of every stage: in its range it loads, outside it is named."""

import dataclasses
from typing import Any

import pytest

from copg_jax.bandit.train import BanditConfig
from copg_jax.config.load import load_config
from copg_jax.config.schema import iter_fields
from copg_jax.config.stages import STAGES
from copg_jax.errors import InputError
from experiments.quickstart import QuickstartConfig

CONFIGS: dict[str, type] = STAGES | {"quickstart": QuickstartConfig, "bandit": BanditConfig}
NEEDED = ["output_dir=a", "model.path=m", "data.path=d", "evaluation.data.path=d"]
NEEDED += ["reference.path=m", "validation.path=d", "offline.path=d", "offline.share=0.5"]
NEEDED += ["generator.command=[c]"]
# What a field of a reward needs beside it.
BESIDE = {"buffer_tokens": {"max_tokens": 9}, "penalty": {"max_tokens": 9}}
# Once each, though most sections are those of several stages.
NUMBERS = {
    ".".join(field.name.split(".")[-2:]): (stage, field.name, field.type.removesuffix(" | null"))
    for stage, cls in reversed(CONFIGS.items())
    for field in iter_fields(cls)
    if field.type.removesuffix(" | null") in ("int", "float")
}.values()
# Fields that any finite number suits.
ANY_SIGN = ("weight", "missing_eos_reward")


def listed(of: str, field: str, value: str) -> str:
    """A list of one reward or source that has this field, such as `overlong.max_tokens`."""
    *sections, name = field.split(".")
    text = ", ".join([f"{k}: {v}" for k, v in BESIDE.get(name, {}).items()] + [f"{name}: {value}"])
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    needed = "path: d" if of == "data.sources" else "function: f.f"
    return f"[{{{needed}, {text}}}]"


def load(stage: str, name: str, value: str) -> Any:
    cls = CONFIGS[stage]
    names = [field.name for field in iter_fields(cls)]
    needed = [setting for setting in NEEDED if setting.partition("=")[0] in names]
    name, _, inside = name.partition("[i].")
    return load_config(cls, [*needed, f"{name}={listed(name, inside, value) if inside else value}"])


def refusal(stage: str, name: str, value: str) -> str:
    with pytest.raises(InputError) as caught:
        load(stage, name, value)
    return str(caught.value)


def test_the_table_has_every_stage():
    assert {stage for stage, _, _ in NUMBERS} >= {"sft", "score", "policy", "quickstart", "bandit"}
    assert len(NUMBERS) > 50


@pytest.mark.parametrize(("stage", "name", "kind"), NUMBERS)
def test_what_is_out_of_range_is_named_with_its_place_and_value(stage, name, kind):
    shown = name.replace("[i]", "[0]")
    for value in [".nan", "-.inf", "1e39"] if kind == "float" else ["1.5"]:
        text = refusal(stage, name, value)
        assert text.startswith(f"command line: {shown}: wanted {kind}")
        assert ", got " in text
    if name.endswith(ANY_SIGN):
        return
    text = refusal(stage, name, "-2")
    assert text.startswith(f"command line: {shown}")
    assert "got -2" in text
    assert len(text) < 200


@pytest.mark.parametrize("stage", CONFIGS)
def test_all_defaults_are_in_range(stage):
    assert dataclasses.is_dataclass(load(stage, "output_dir", "b"))


SIZES = [
    (stage, name)
    for stage, name, _ in NUMBERS
    if stage in STAGES and name.endswith(("batch_size", "num_microbatches", "num_samples"))
]


@pytest.mark.parametrize("value", ["0", "1048577", "1" + "0" * 30])
@pytest.mark.parametrize(("stage", "name"), SIZES)
def test_what_is_computed_at_once_has_a_size_that_a_machine_can_hold(stage, name, value):
    shown = name.replace("[i]", "[0]")
    wanted = f"command line: {shown} must be in [1, 2**20], got {value}"
    assert refusal(stage, name, value) == wanted


# --- paths ---

PATHS = ["output_dir", "model.path", "data.path", "evaluation.data.path"]


@pytest.mark.parametrize("value", ["''", "' '"])
@pytest.mark.parametrize("name", PATHS)
def test_an_empty_path_is_not_the_working_directory(name, value):
    assert refusal("policy", name, value) == (
        f"command line: {name} must be a path, got an empty text"
    )


SECRET = "s3cr3t"
URLS = [
    f"https://me:{SECRET}@host/x",
    f"s3://key:{SECRET}@bucket/x/*.jsonl",
    f"https://host/x?token={SECRET}",
    f"https://host/x?a=1&X-Amz-Signature={SECRET}",
    f"gs://bucket/x?access_key={SECRET}",
    f"https://{SECRET}@host/x",
    f"https://host/x#token={SECRET}",
    f"https://host/x?access={SECRET}",
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("name", [*PATHS, "rewards"])
def test_a_password_or_token_in_a_url_is_refused_and_not_shown(name, url):
    if name == "rewards":
        rewards = f"[{{function: f.f, arguments: {{path: '{url}'}}}}]"
        text = refusal("score", "rewards", rewards)
        assert text.startswith("command line: rewards[0].arguments: path must be a URL without")
    else:
        text = refusal("policy", name, url)
        assert text.startswith(f"command line: {name} must be a URL without password or token")
    assert SECRET not in text


@pytest.mark.parametrize(
    "url",
    ["gs://bucket/x?.jsonl", "https://host/x.parquet", "hf://datasets/a/b@main/x", "a:b@c/d"],
)
def test_a_url_without_secrets_is_a_path(url):
    assert load("policy", "data.path", url).data.path == url
