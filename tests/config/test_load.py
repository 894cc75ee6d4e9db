"""Typed configs: values arrive typed, every mistake is named with its place and its fix."""

import signal
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from copg_jax.config.load import config_differences, load_config, run_main, to_yaml
from copg_jax.config.options import option, section
from copg_jax.config.stages import STAGES, PolicyConfig, ScoreConfig, SFTConfig
from copg_jax.errors import InputError
from copg_jax.train.metrics import NonFiniteLoss


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
    rewards: list[Reward] = option([], "Summed rewards.")
    judge: Reward | None = None


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def error_of(*argv: str, cls: type = Config) -> str:
    with pytest.raises(InputError) as caught:
        load_config(cls, argv)
    return str(caught.value)


def printed(capsys: pytest.CaptureFixture, *argv: str, cls: type = Config) -> str:
    with pytest.raises(SystemExit) as caught:
        load_config(cls, [*argv, "--print-config"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_defaults_then_file_then_command_line_win_in_this_order(yaml_file):
    path = yaml_file("output_dir: a\nnum_epochs: 3\noptim:\n  learning_rate: 1e-3\n")
    config = load_config(Config, [path, "num_epochs=4"])
    assert config.output_dir == "a"
    assert config.num_epochs == 4
    assert config.optim == Optim(learning_rate=1e-3, warmup_fraction=0.1)


def test_later_files_win_sections_merge_and_lists_and_values_are_replaced(yaml_file):
    first = yaml_file(
        "output_dir: a\nnum_epochs: 3\noptim: {learning_rate: 1, warmup_fraction: 0.2}\n"
        "betas: [1, 2, 3]\nextra: {a: {b: 1}, c: 2}\nrewards: [{function: f, weight: 2}]\n"
        "judge: {function: g}\n",
        "first.yaml",
    )
    second = yaml_file(
        "output_dir: b\noptim: {learning_rate: 2}\nbetas: [4]\nextra: {a: {d: 3}}\n"
        "rewards: [{function: h}]\njudge: null\n",
        "second.yaml",
    )
    config = load_config(Config, [first, second, "extra.c=5"])
    assert config == Config(
        "b",
        num_epochs=3,
        optim=Optim(learning_rate=2, warmup_fraction=0.2),
        betas=[4],
        extra={"a": {"b": 1, "d": 3}, "c": 5},
        rewards=[Reward("h")],
    )
    config = load_config(Config, [second, first, "judge={function: k, weight: 3}"])
    assert (config.output_dir, config.optim.learning_rate) == ("a", 1)
    assert (config.betas, config.rewards) == ([1, 2, 3], [Reward("f", 2)])
    assert config.judge == Reward("k", 3)


def test_mistakes_in_several_files_are_placed_in_their_own(yaml_file):
    first = yaml_file("output_dir: a\nnum_epoch: 1\n", "first.yaml")
    second = yaml_file("\noptim:\n  learning_rate: fast\n", "second.yaml")
    assert error_of(first, second).splitlines() == [
        f"{first}:2: unknown field 'num_epoch'; did you mean 'num_epochs'?",
        f"{second}:3: optim.learning_rate: wanted float, got 'fast' (str); "
        "set for example optim.learning_rate=1e-06",
    ]
    first = yaml_file("output_dir: a\noptim: {learning_rate: -1}\n", "first.yaml")
    second = yaml_file("optim:\n  learning_rate: -2\n", "second.yaml")
    assert error_of(first, second) == f"{second}:2: optim.learning_rate must be > 0, got -2.0"


def test_a_file_after_an_override_is_refused(yaml_file):
    path = yaml_file("output_dir: a\n")
    text = error_of("num_epochs=1", path)
    assert f"got '{path}'; config files come first" in text


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
    argv = [
        "output_dir='1e-6'",
        "rewards=[{function: f}]",
        "optim.learning_rate=3e-7",
        "extra={a: [], b: {}, c: null, d: '# no comment', e: '', f: 'x: y', g: [[1], {h: 2}]}",
        "extra.lines='one\ntwo'",
        f"extra.long='{'word ' * 40}'",
        "extra.quoted='it is \"1\"'",
    ]
    text = printed(capsys, *argv)
    assert load_config(Config, [yaml_file(text)]) == load_config(Config, argv)
    # Each value has a place.
    values = [line for line in text.splitlines() if not line.endswith((":", "-"))]
    assert sum("  # " in line for line in values) >= len(Config.__dataclass_fields__)


def test_the_printed_config_says_where_each_value_comes_from(capsys, yaml_file):
    first = yaml_file(
        "output_dir: a\nnum_epochs: 3\nbetas: [1,\n  2]\noptim:\n  learning_rate: 1\n"
        "  warmup_fraction: 0.2\nrewards:\n- function: f\n  weight: 2\njudge: {function: g}\n",
        "first.yaml",
    )
    second = yaml_file("# comment\nnum_epochs: 4\nrewards:\n- function: h\n", "second.yaml")
    found = printed(capsys, first, second, "optim.learning_rate=3", "extra={a: {b: [1]}}")
    assert [line.strip() for line in found.splitlines() if "#" in line] == [
        f"output_dir: a  # {first}:1",
        f"num_epochs: 4  # {second}:2",
        "quiet: false  # default",
        "decay: none  # default",
        "max_rows: null  # default",
        f"- 1.0  # {first}:3",
        f"- 2.0  # {first}:4",
        "- 1  # command line",
        "learning_rate: 3.0  # command line",
        f"warmup_fraction: 0.2  # {first}:7",
        f"- function: h  # {second}:4",
        "weight: 1.0  # default",
        f"function: g  # {first}:11",
        "weight: 1.0  # default",
    ]


def test_the_printed_config_follows_what_a_value_reads(capsys, yaml_file):
    first = yaml_file(
        "shared:\n  size: big\n  name: run-${shared.size}\n  rewards:\n  - function: f\n"
        "  weights: {big: 2, small: 3}\noutput_dir: x/${shared.name}\n"
        "rewards: ${shared.rewards}\nnum_epochs: ${shared.weights.${shared.size}}\n",
        "first.yaml",
    )
    second = yaml_file("shared:\n  size: small\n", "second.yaml")
    lines = dict(
        line.strip().split("  # ")
        for line in printed(capsys, first, second).splitlines()
        if "#" in line
    )
    assert lines["output_dir: x/run-small"] == (
        f"{first}:7, shared.name from {first}:3, shared.size from {second}:2"
    )
    assert lines["- function: f"] == f"{first}:8, shared.rewards[0].function from {first}:5"
    assert lines["weight: 1.0"] == "default"
    assert lines["num_epochs: 3"] == (
        f"{first}:9, shared.size from {second}:2, shared.weights.small from {first}:6"
    )


def test_shared_values_are_read_by_fields_wherever_they_are_set(yaml_file):
    base = yaml_file("output_dir: ${shared.folder}/x\nnum_epochs: ${shared.n}\n", "base.yaml")
    values = yaml_file("shared:\n  folder: runs\n  n: 7\n", "values.yaml")
    for files in ([base, values], [values, base]):
        config = load_config(Config, [*files, "shared.n=8"])
        assert (config.output_dir, config.num_epochs) == ("runs/x", 8)
    assert load_config(Config, [base, "shared={folder: a, n: 1}"]).output_dir == "a/x"


def test_a_shared_value_that_nothing_reads_is_a_typo(yaml_file):
    base = yaml_file("shared:\n  folder: runs\noutput_dir: ${shared.folder}\n", "base.yaml")
    assert error_of(base, "shared.foldr=x") == (
        "command line: no field reads ${shared.foldr}; did you mean 'shared.folder'?"
    )
    other = yaml_file("shared:\n  folder: x\n  betas: {zzz: 1}\n", "other.yaml")
    assert error_of(base, other).startswith(f"{other}:3: no field reads ${{shared.betas.zzz}}")
    assert error_of(base, "shared=3").startswith("command line: unknown field 'shared'; wanted a")


def test_a_shared_value_that_is_nowhere_set_is_named_with_its_reader(yaml_file):
    path = yaml_file("output_dir: a\noptim:\n  learning_rate: ${shared.rate}\n")
    text = error_of(path)
    assert text.startswith(f"{path}:3: optim.learning_rate: Interpolation key 'shared.rate' not")
    assert "set it in one of the files or on the command line" in text


def test_a_value_that_is_read_is_checked_like_one_that_is_written(yaml_file):
    path = yaml_file("output_dir: a\nnum_epochs: ${shared.n}\nrewards: ${shared.r}\n")
    text = error_of(path, "shared.n=two", "shared.r=[{function: f, wieght: 1}]")
    assert f"{path}:2: num_epochs: wanted int, got 'two' (str)" in text
    assert f"{path}:3: unknown field 'rewards[0].wieght'; did you mean 'rewards[0].weight'?" in text
    text = error_of(path, "shared.n=2", "shared.r=[{weight: 1}]")
    assert "rewards[0].function: wanted a value, got nothing" in text


def test_a_section_named_after_stages_holds_for_them_alone(yaml_file):
    path = yaml_file(
        "output_dir: a\nsft, policy:\n  model: {path: m}\n  data: {path: d}\n"
        "policy:\n  seed: 3\nscore:\n  reference: {path: r}\n  data: {path: s}\n"
    )
    sft = load_config(SFTConfig, [path])
    assert (sft.model.path, sft.data.path, sft.seed) == ("m", "d", 0)
    policy = load_config(PolicyConfig, [path, "policy.data.path=e"])
    assert (policy.model.path, policy.data.path, policy.seed) == ("m", "e", 3)
    score = load_config(ScoreConfig, [path, "policy.data.path=e"])
    assert (score.reference.path, score.data.path) == ("r", "s")


def test_what_stands_lower_in_a_file_wins(yaml_file):
    path = yaml_file("sft:\n  seed: 1\nsft, policy:\n  seed: 2\n", "a.yaml")
    needed = ["output_dir=x", "model.path=x", "data.path=x"]
    assert load_config(SFTConfig, [path, *needed]).seed == 2
    last = yaml_file("seed: 3\n", "b.yaml")
    assert load_config(SFTConfig, [path, last, *needed]).seed == 3


@pytest.mark.parametrize("cls", [SFTConfig, ScoreConfig, Config])
def test_a_section_is_checked_by_every_script(yaml_file, cls):
    path = yaml_file(
        "sft, reward:\n  optim:\n    learning_rat: 1\n  training: {batch_size: many}\n"
    )
    text = error_of(path, cls=cls)
    assert (
        f"{path}:3: unknown field 'optim.learning_rat'; did you mean 'optim.learning_rate'" in text
    )
    assert f"{path}:4: training.batch_size: wanted int, got 'many' (str)" in text
    assert len(text.splitlines()) == 2  # one line a mistake, not one a stage


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("polcy", "policy"), ("sft, rewrd", "sft, reward"), ("sharde", "shared")],
)
def test_a_misspelt_section_gets_a_did_you_mean(yaml_file, name, suggestion):
    path = yaml_file(f"output_dir: a\n{name}:\n  seed: 1\n")
    text = error_of(path, cls=SFTConfig)
    assert text == f"{path}:2: unknown field '{name}'; did you mean '{suggestion}'?"


def test_an_empty_section_of_a_stage_is_explained(yaml_file):
    path = yaml_file("output_dir: a\nsft:\n")
    assert f"{path}:2: unknown field 'sft'; wanted a mapping" in error_of(path, cls=SFTConfig)


def test_no_field_has_the_name_of_a_section():
    names = {name for cls in STAGES.values() for name in cls.__dataclass_fields__}
    assert not names & {*STAGES, "shared"}


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


@pytest.mark.parametrize("error", [InputError("bad"), NonFiniteLoss("step 3: not finite")])
def test_what_a_user_can_mend_is_one_line_and_status_2(monkeypatch, capsys, error):
    def main(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["script", "output_dir=a"])
    with pytest.raises(SystemExit) as caught:
        run_main(main, Config, description="")
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("call", [lambda: sys.exit(0), sys.exit, lambda: exit(0)])
def test_a_function_of_the_user_cannot_end_a_run_as_if_it_were_complete(monkeypatch, capsys, call):
    monkeypatch.setattr(sys, "argv", ["script", "output_dir=a"])
    with pytest.raises(SystemExit) as caught:
        run_main(lambda config: call(), Config, description="")
    assert caught.value.code == 2
    assert "sys.exit(0), so that the run is not complete" in capsys.readouterr().err


def test_signals_keep_their_status(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "output_dir=a"])
    with pytest.raises(SystemExit) as caught:
        run_main(lambda config: sys.exit(143), Config, description="")
    assert caught.value.code == 143


_IMPORTING = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which one in the background has not
sys.argv[:] = ["-m"]  # as `python -m` sets it while it looks for the script
import experiments
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Slow())
import experiments.train_sft
print("not reached")
"""


def test_ctrl_c_during_the_imports_of_a_script_is_no_traceback():
    done = subprocess.run([sys.executable, "-c", _IMPORTING], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT  # which a shell calls 130
    assert (done.stdout, done.stderr) == ("", "")


def test_ctrl_c_is_python_s_again_once_main_begins_and_imports_leave_a_program_of_ones_own_alone():
    script = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import experiments\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "from copg_jax.config.load import run_main\n"
        "from copg_jax.bandit.train import BanditConfig\n"
        "run_main(lambda c: print(signal.getsignal(signal.SIGINT) is signal.default_int_handler),"
        " BanditConfig, description='')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "True\nTrue\n"


def test_ctrl_c_exits_with_130(monkeypatch):
    def main(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["script", "output_dir=a"])
    with pytest.raises(SystemExit) as caught:
        run_main(main, Config, description="")
    assert caught.value.code == 130
