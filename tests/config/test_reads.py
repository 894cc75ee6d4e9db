"""The record of what a run reads of its config, by which a dead field is found."""

from dataclasses import asdict, dataclass, fields, replace
from types import SimpleNamespace

import pytest

from copg_jax.config.load import config_differences, load_config, read_settings, to_yaml
from copg_jax.config.options import option, section
from copg_jax.config.stages import PolicyConfig, SFTConfig
from copg_jax.config.variants import is_related, load_with, shared_reads
from tests.reads import dead_fields, recorded_reads


@dataclass(frozen=True)
class Data:
    path: str = option("x")
    split: str = option("train")

    def __post_init__(self) -> None:
        assert self.split

    @property
    def place(self) -> str:
        return self.path


@dataclass(frozen=True)
class Reward:
    path: str = option("r")
    weight: float = option(1.0)


@dataclass(frozen=True)
class Config:
    path: str = option("o")
    data: Data = section(Data)
    validation: Data | None = option(None)
    rewards: list[Reward] = option([])


ARGUMENTS = ["validation.path=v", "rewards=[{path: a}, {path: b}]"]


def dead_after(run) -> list[str]:
    config = load_config(Config, ARGUMENTS)
    with recorded_reads(config) as reads:
        run(config)
    return dead_fields(Config, reads)


ALL = [
    "path", "data.path", "data.split", "validation", "validation.path", "validation.split",
    "rewards", "rewards[i].path", "rewards[i].weight",
]  # fmt: skip


def without(*names: str) -> list[str]:
    return [name for name in ALL if name not in names]


@pytest.mark.parametrize(
    ("run", "read"),
    [
        (lambda config: None, []),
        (lambda config: config.path, ["path"]),
        (lambda config: config.data.path, ["data.path"]),
        (lambda config: config.data.place, ["data.path"]),
        (lambda config: config.validation, ["validation"]),
        (lambda config: config.validation.path, ["validation", "validation.path"]),
        (lambda config: config.rewards[1].path, ["rewards", "rewards[i].path"]),
        (lambda config: getattr(config.data, "split"), ["data.split"]),  # noqa: B009
        (lambda config: SimpleNamespace(path=1, split=2, weight=3).path, []),
        (lambda config: Data().path, []),  # not of this config
    ],
)
def test_a_field_is_read_by_who_reads_it_and_by_no_name_elsewhere(run, read):
    assert dead_after(run) == without(*read)


@pytest.mark.parametrize(
    "run",
    [
        asdict,
        to_yaml,
        repr,
        lambda config: replace(config),
        lambda config: config == load_config(Config, ARGUMENTS),
        lambda config: config_differences(config, Config()),
        lambda config: config.data.__post_init__(),
        lambda config: [field.name for field in fields(config)],
    ],
)
def test_what_takes_all_fields_alike_reads_none(run):
    assert dead_after(run) == ALL


def test_a_copy_of_a_section_reads_none_of_its_fields():
    assert dead_after(lambda config: replace(config.data, path="y")) == ALL


def test_classes_are_left_as_they_were():
    dead_after(lambda config: config.path)
    assert all("__getattribute__" not in vars(cls) for cls in (Config, Data, Reward))


READS = """
shared: {a: 1.0, b: "${shared.a}", which: x, table: {x: "${shared.c}", y: 2}, c: 3, unread: 4}
policy:
  loss: {beta: "${shared.b}"}
  seed: ${shared.table.${shared.which}}
"""


def test_names_of_shared_that_a_stage_may_read_are_found_also_through_each_other(tmp_path):
    (tmp_path / "it.yaml").write_text(READS)
    settings = read_settings(PolicyConfig, [str(tmp_path / "it.yaml")])
    found = shared_reads(settings)
    assert found == {"shared.a", "shared.b", "shared.table.", "shared.which", "shared.c"}
    assert not any(is_related("shared.unread", read) for read in found)
    assert any(is_related("shared.table.y", read) for read in found)
    sft = read_settings(SFTConfig, [str(tmp_path / "it.yaml")])
    assert shared_reads(sft) == set()
    assert shared_reads(sft, [["${shared.unread}", 1]]) == {"shared.unread"}


def test_settings_make_many_configs_and_stay_as_they_are(tmp_path):
    text = READS.replace(", unread: 4", "")
    text += "  output_dir: o\n  model: {path: m}\n  data: {path: d}\n"
    (tmp_path / "it.yaml").write_text(text)
    settings = read_settings(PolicyConfig, [str(tmp_path / "it.yaml")])
    for value in ("0.5", "0.25"):
        found = load_with(settings, [f"shared.a={value}", "seed=7"])
        assert found == load_config(
            PolicyConfig, [str(tmp_path / "it.yaml"), f"shared.a={value}", "seed=7"]
        )
        assert (found.loss.beta, found.seed) == (float(value), 7)
    assert (load_with(settings, []).loss.beta, load_with(settings, []).seed) == (1.0, 3)
