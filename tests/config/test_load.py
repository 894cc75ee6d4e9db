"""Typed configs: values arrive typed, every mistake is named with its place and its fix."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from copg_jax.config.load import config_differences, load_config, run_main, to_yaml
from copg_jax.config.options import option, section
from copg_jax.errors import InputError


@dataclass(frozen=True)
class Optim:
    learning_rate: float = option(1e-6, "Peak learning rate.")
    warmup_fraction: float = option(0.1, "Share of the steps that warm up.")

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise InputError(f"learning_rate must be > 0, got {self.learning_rate}")


@dataclass(frozen=True)
class Reward:
    function: str = option(help="Dotted path of the reward function.")
    weight: float = option(1.0, "Factor.")

    def __post_init__(self) -> None:
        if self.weight == 0:
            raise InputError("weight must not be 0")


@dataclass(frozen=True)
class Config:
    output_dir: str = option(help="Folder of the run.")
    num_epochs: int = option(2, "Passes over the data.")
    quiet: bool = False
    decay: Literal["none", "cosine"] = "none"
    max_rows: int | None = None
    betas: list[float] = option([0.9, 0.95], "Adam's moments.")
    extra: dict[str, Any] = option({}, "Free keys.")
    optim: Optim = section(Optim)
    rewards: list[Reward] = option(default_factory=list, help="Summed rewards.")
    judge: Reward | None = None


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def error_of(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(Config, argv)
    return str(caught.value)


def test_defaults_then_file_then_command_line_win_in_this_order(yaml_file):
    path = yaml_file("output_dir: a\nnum_epochs: 3\noptim:\n  learning_rate: 1e-3\n")
    config = load_config(Config, [path, "num_epochs=4"])
    assert config.output_dir == "a"
    assert config.num_epochs == 4
    assert config.optim == Optim(learning_rate=1e-3, warmup_fraction=0.1)


def test_configs_are_typed_frozen_dataclasses(yaml_file):
    path = yaml_file("output_dir: 7\njudge: {function: f}\nextra: {a: {b: 1}}\nbetas: [1, 2]\n")
    config = load_config(Config, [path, "max_rows=null", "optim.learning_rate=2", "quiet=true"])
    assert config.output_dir == "7"
    assert config.quiet is True
    assert config.max_rows is None
    assert config.extra == {"a": {"b": 1}}
    assert config.judge == Reward("f")
    assert isinstance(config.optim.learning_rate, float)
    assert all(isinstance(value, float) for value in config.betas)
    with pytest.raises(FrozenInstanceError):
        config.optim.learning_rate = 1.0


def test_lists_of_sections_become_dataclasses():
    config = load_config(Config, ["output_dir=a", "rewards=[{function: f, weight: 2}]"])
    assert config.rewards == [Reward("f", 2.0)]


def test_defaults_of_lists_are_not_shared():
    assert Config("a").betas is not Config("b").betas


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [
        ("num_epoch=1", "num_epochs"),
        ("optim.learning_rat=1", "optim.learning_rate"),
        ("optm.learning_rate=1", "optim"),
        ("learning_rate=1", "optim.learning_rate"),
        ("rewards=[{function: f, wieght: 1}]", "rewards[0].weight"),
    ],
)
def test_an_unknown_field_gets_a_did_you_mean(argument, suggestion):
    text = error_of("output_dir=a", argument)
    assert text.startswith("command line: unknown field '")
    assert f"did you mean '{suggestion}'?" in text


def test_an_unknown_field_without_a_near_name_lists_the_fields():
    text = error_of("output_dir=a", "optim.zzz=1")
    assert "wanted one of: optim.learning_rate, optim.warmup_fraction" in text


def test_an_unknown_field_in_the_file_is_named_with_its_line(yaml_file):
    path = yaml_file("output_dir: a\n\noptim:\n  warmup_fraction: 0\n  learning_rte: 1\n")
    assert f"{path}:5: unknown field 'optim.learning_rte'" in error_of(path)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("num_epochs", "two", "int"),
        ("num_epochs", "1.5", "int"),
        ("num_epochs", "true", "int"),
        ("num_epochs", "null", "int"),
        ("max_rows", "many", "int | null"),
        ("quiet", "maybe", "bool"),
        ("decay", "linear", "one of none, cosine"),
        ("betas", "0.9", "list[float]"),
        ("betas", "[a]", "list[float]"),
        ("extra", "3", "dict[str, Any]"),
        ("optim.learning_rate", "fast", "float"),
        ("optim", "3", "a section with the fields learning_rate, warmup_fraction"),
        ("judge", "3", "a section with the fields function, weight"),
        ("rewards", "3", "a list of sections"),
        ("rewards", "{a: 1}", "a list of sections"),
    ],
)
def test_a_wrong_type_names_field_wanted_and_got(field, value, wanted):
    text = error_of("output_dir=a", f"{field}={value}")
    assert text.startswith(f"command line: {field}: wanted {wanted}")
    assert "got " in text


def test_a_wrong_type_inside_a_list_of_sections_has_its_path_and_line(yaml_file):
    path = yaml_file("output_dir: a\nrewards:\n- function: f\n- function: g\n  weight: heavy\n")
    assert f"{path}:5: rewards[1].weight: wanted float, got 'heavy' (str)" in error_of(path)


def test_an_empty_section_in_the_file_is_explained(yaml_file):
    path = yaml_file("output_dir: a\noptim:\n")
    assert f"{path}:2: optim: wanted a section" in error_of(path)


def test_all_mistakes_are_reported_together(yaml_file):
    path = yaml_file("output_dirr: a\nnum_epochs: x\n")
    text = error_of(path, "betas=1")
    assert [line.split(": ")[0] for line in text.splitlines()] == [
        f"{path}:1",
        f"{path}:2",
        "command line",
    ]


def test_a_mistake_in_the_file_is_placed_there_even_when_overridden(yaml_file):
    path = yaml_file("output_dir: a\nnum_epochs: x\n")
    assert error_of(path, "num_epochs=2").startswith(f"{path}:2: num_epochs: wanted int")


def test_missing_required_values_are_listed_with_how_to_set_them():
    text = error_of("judge.weight=2")
    assert "output_dir: wanted str (Folder of the run.), got nothing" in text
    assert "add judge.function=VALUE to the command line" in text


def test_a_range_error_gets_the_path_of_its_section_and_its_place(yaml_file):
    assert error_of("output_dir=a", "optim.learning_rate=-1") == (
        "command line: optim.learning_rate must be > 0, got -1.0"
    )
    path = yaml_file("output_dir: a\nrewards:\n- function: f\n  weight: 0\n")
    assert error_of(path) == f"{path}:4: rewards[0].weight must not be 0"


def test_a_key_given_twice_is_refused_with_both_lines(yaml_file):
    path = yaml_file("output_dir: a\noptim:\n  learning_rate: 1\n  learning_rate: 2\n")
    text = error_of(path)
    assert f"{path}:4: key 'optim.learning_rate' wanted once, got twice (first on line 3)" in text


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_is_refused(yaml_file, text):
    assert "got an empty file" in error_of(yaml_file(text))


def test_a_file_that_is_no_mapping_is_refused(yaml_file):
    path = yaml_file("- a\n- b\n")
    assert f"{path}:1: wanted a YAML mapping" in error_of(path)


def test_malformed_yaml_names_the_line(yaml_file):
    path = yaml_file("output_dir: a\nbetas: [1\noptim: 2\n")
    assert f"{path}:3: wanted valid YAML" in error_of(path)


def test_a_missing_file_is_named():
    assert "nowhere.yaml: wanted a readable YAML config, got: No such file" in error_of(
        "nowhere.yaml"
    )


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert f"{path}: wanted a readable YAML config" in error_of(str(path))


@pytest.mark.parametrize("argument", ["num_epochs", "--num_epochs=3", "=3", "other.yaml"])
def test_an_argument_that_is_not_key_value_is_refused(argument):
    assert f"got '{argument}'" in error_of("output_dir=a", argument)


def test_an_unclosed_value_is_refused():
    assert "command line: betas: wanted a value, got 'betas=[1'" in error_of("betas=[1")


def test_a_config_path_may_hold_an_equals_sign(tmp_path):
    folder = tmp_path / "beta=0.1"
    folder.mkdir()
    (folder / "config.yaml").write_text("output_dir: b\n")
    assert load_config(Config, [str(folder / "config.yaml")]).output_dir == "b"


def test_interpolation_reads_other_fields_and_names_absent_ones():
    assert load_config(Config, ["output_dir=runs/${num_epochs}"]).output_dir == "runs/2"
    assert "'absent' not found" in error_of("output_dir=${absent}")


def test_help_lists_every_field_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(Config, ["--help"], description="Trains.")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Trains." in text
    assert "  output_dir: str (required)\n      Folder of the run.\n" in text
    assert "  optim.learning_rate: float = 1e-06\n      Peak learning rate.\n" in text
    assert "  rewards[i].function: str (required)\n" in text
    assert "  max_rows: int | null = null\n" in text
    assert "  decay: one of none, cosine = none\n" in text


def test_the_printed_config_loads_back_to_the_same_config(capsys, yaml_file):
    argv = ["output_dir='1e-6'", "rewards=[{function: f}]", "optim.learning_rate=3e-7"]
    with pytest.raises(SystemExit) as caught:
        load_config(Config, [*argv, "--print-config"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert load_config(Config, [yaml_file(printed)]) == load_config(Config, argv)


def test_yaml_keeps_the_order_of_the_fields():
    text = to_yaml(Config("a"))
    names = [line.split(":")[0] for line in text.splitlines() if line[0] not in " -"]
    assert names == list(Config.__dataclass_fields__)


def test_differences_name_the_dotted_field():
    a = Config("a", rewards=[Reward("f")])
    b = Config("a", optim=Optim(learning_rate=2e-5))
    assert config_differences(a, b) == [
        "optim.learning_rate: 1e-06 -> 2e-05",
        "rewards[0].function: f -> (absent)",
        "rewards[0].weight: 1.0 -> (absent)",
        "rewards: (absent) -> []",
    ]
    assert config_differences(a, a) == []


@pytest.mark.parametrize(("result", "status"), [(None, 0), ({"a": 1}, 0), (143, 143)])
def test_a_script_exits_with_the_status_that_main_returns(monkeypatch, result, status):
    monkeypatch.setattr(sys, "argv", ["script", "output_dir=a"])
    with pytest.raises(SystemExit) as caught:
        run_main(lambda config: result, Config, description="")
    assert caught.value.code == status


def test_a_script_prints_bad_input_without_a_traceback():
    script = (
        "from copg_jax.config.load import run_main\n"
        "from copg_jax.errors import InputError\n"
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class C:\n"
        "    n: int = 1\n"
        "run_main(print, C, description='')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "m=1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: command line: unknown field 'm'; wanted one of: n\n"


def test_ctrl_c_exits_with_130(monkeypatch):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["script", "output_dir=a"])
    with pytest.raises(SystemExit) as caught:
        run_main(main, Config, description="")
    assert caught.value.code == 130
