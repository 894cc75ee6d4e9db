"""Values of configs: texts as they are written, numbers that mean something, YAML that is sane."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copg_jax.config.load import load_config, to_yaml
from copg_jax.config.options import option
from copg_jax.config.schema import iter_fields
from copg_jax.config.stages import (
    STAGES,
    EvaluateConfig,
    PolicyConfig,
    SFTConfig,
)
from copg_jax.errors import InputError
from experiments.quickstart import QuickstartConfig

NEEDED = ["output_dir=a", "model.path=m", "data.path=d"]
NAMES = ["20241001", "2024_10_01", "0x14e5", "1e3", "007", "on", "No", "1:30", "0b1", "True", ".5"]


@dataclass(frozen=True)
class Texts:
    one: str = "x"
    maybe: str | None = None
    some: list[str] = option([])
    named: dict[str, str] = option({})
    lists: dict[str, list[str]] = option({})
    free: Any = None


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(cls: type, *argv: str) -> str:
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_config(cls, argv)
    assert time.monotonic() - start < 60  # not for ever; a second on an idle machine
    return str(caught.value)


# --- texts ---


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_taken_as_it_is_written(tmp_path, name):
    expected = Texts(name, name, [name], {"a": name}, {"b": [name]})
    path = write(
        tmp_path,
        f"one: {name}\nmaybe: {name}\nsome: [{name}]\nnamed: {{a: {name}}}\n"
        f"lists:\n  b:\n  - {name}\n",
    )
    assert load_config(Texts, [path]) == expected
    arguments = [f"one={name}", f"maybe={name}", f"some=[{name}]", f"named.a={name}"]
    assert load_config(Texts, [*arguments, f"lists={{b: [{name}]}}"]) == expected
    # Through shared values too, alone and inside of other texts.
    path = write(
        tmp_path,
        "one: ${shared.n}\nmaybe: ${shared.n}\nsome: ${shared.s}\nnamed: {a: '${shared.n}'}\n"
        f"lists: {{b: ['${{shared.n}}']}}\nshared: {{n: {name}, s: [{name}]}}\n",
    )
    assert load_config(Texts, [path]) == expected
    assert load_config(Texts, ["one=a/${shared.n}-b", f"shared.n={name}"]).one == f"a/{name}-b"
    # What was written is what is loaded back.
    assert load_config(Texts, [write(tmp_path, to_yaml(expected))]) == expected


def test_a_field_of_any_type_keeps_the_typing_of_yaml(tmp_path):
    path = write(tmp_path, "free: [0x10, 1e3, on, '007', 2024-10-01, null]\n")
    assert load_config(Texts, [path]).free == [16, 1000.0, True, "007", "2024-10-01", None]
    assert load_config(Texts, ["free=1e3"]).free == 1000.0
    assert load_config(Texts, ["free=${shared.n}", "shared.n=0x10"]).free == 16


@pytest.mark.parametrize(
    "text", ["*.jsonl", "{a,b}.jsonl", "[ab]*.jsonl", "a: b", "a #1", "&x", "!x", "%x", "@x", "- a"]
)
def test_a_text_on_the_command_line_is_no_yaml(text):
    config = load_config(SFTConfig, [*NEEDED, f"data.path={text}", f"data.revision={text}"])
    assert (config.data.path, config.data.revision) == (text, text)
    assert load_config(SFTConfig, [*NEEDED, f"sft.data.path={text}"]).data.path == text


def test_a_glob_may_be_shared():
    for glob in ("*.jsonl", "{a,b}.jsonl"):
        config = load_config(SFTConfig, [*NEEDED, "data.path=${shared.p}", f"shared.p={glob}"])
        assert config.data.path == glob


def test_quotes_and_null_mean_on_the_command_line_what_they_mean_in_a_file():
    assert load_config(Texts, ["one='1e-6'", 'maybe="a b"']) == Texts("1e-6", "a b")
    assert load_config(Texts, ["maybe=null"]).maybe is None
    assert "one: wanted str, got nothing" in error_of(Texts, "one=null")


def test_the_last_text_wins_and_leaves_nothing_behind(tmp_path):
    path = write(tmp_path, "one: 007\nsome: [007, 008]\nnamed: {a: 0x1}\n")
    config = load_config(Texts, [path, "one=1", "some=[2, 3_0]", "named.b=1e1", "named.a=c"])
    assert config == Texts("1", some=["2", "3_0"], named={"a": "c", "b": "1e1"})


def test_merged_keys_are_texts_too(tmp_path):
    path = write(tmp_path, "free: &a {x: 1}\nnamed: {<<: [{a: 0x1, b: 1e3}, {a: 3}], b: 007}\n")
    assert load_config(Texts, [path]).named == {"a": "0x1", "b": "007"}


@pytest.mark.parametrize("mode", ["on", "off", "auto"])
def test_joining_other_processes_needs_no_quotes(tmp_path, mode):
    path = write(tmp_path, f"distributed: {mode}\n")
    assert load_config(SFTConfig, [path, *NEEDED]).distributed == mode
    assert load_config(SFTConfig, [*NEEDED, f"distributed={mode}"]).distributed == mode


def test_the_home_folder_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    reward = "{function: copg_jax.rewards.RewardModel, arguments: {path: ~/r, other: ~/x}}"
    config = load_config(
        PolicyConfig,
        [
            "output_dir=${shared.f}/a",
            "shared.f=~/runs",
            "model.path=~/m",
            "data.path=~/*.jsonl",
            "evaluation.data.path=~/e",
            f"evaluation.rewards=[{reward}]",
            "data.revision=~/x",
        ],
    )
    assert config.output_dir == "/home/me/runs/a"
    assert (config.model.path, config.data.path) == ("/home/me/m", "/home/me/*.jsonl")
    assert config.evaluation is not None
    assert config.evaluation.data.path == "/home/me/e"
    assert config.evaluation.rewards[0].arguments == {"path": "/home/me/r", "other": "~/x"}
    assert config.data.revision == "~/x"
    path = write(tmp_path, "output_dir: ~/q\n")
    assert load_config(QuickstartConfig, [path]).output_dir == "/home/me/q"


def test_a_path_that_looks_like_a_number_is_a_text_in_arguments_of_rewards():
    reward = "{function: f.f, arguments: {path: 2024_10_01, n: 1_0}}"
    config = load_config(EvaluateConfig, ["output_dir=a", "model.path=m", "evaluation.data.path=d",
                                          f"evaluation.rewards=[{reward}]"])  # fmt: skip
    assert config.evaluation.rewards[0].arguments == {"path": "2024_10_01", "n": 10}


# --- numbers ---

EVALUATION = ["evaluation.data.path=d"]
FLOATS = [
    "evaluation.generation.sampling_temperature",
    "evaluation.generation.missing_eos_reward",
    "loss.beta",
    "optim.learning_rate",
    "optim.weight_decay",
    "optim.eps",
    "optim.clip_norm",
    "data.holdout_fraction",
]


@pytest.mark.parametrize("value", ["nan", ".nan", "inf", "-.inf", "1e39", "1e-46", "1e-39"])
@pytest.mark.parametrize("field", FLOATS)
def test_a_number_must_be_one_in_float32(tmp_path, field, value):
    text = error_of(PolicyConfig, *NEEDED, *EVALUATION, f"{field}={value}")
    assert text.startswith(f"command line: {field}: wanted float")
    assert "finite" in text
    assert "got " in text
    *sections, name = field.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(sections)]
    path = write(tmp_path, "\n".join([*lines, f"{'  ' * len(sections)}{name}: {value}\n"]))
    text = error_of(PolicyConfig, path, *NEEDED, *EVALUATION)
    assert text.startswith(f"{path}:{len(sections) + 1}: {field}: wanted float")


@pytest.mark.parametrize("value", ["nan", "-.inf", "1e39"])
def test_numbers_inside_lists_and_dictionaries_are_checked_too(value):
    text = error_of(PolicyConfig, *NEEDED, f"loss.arguments={{baseline: {value}}}")
    assert text.startswith("command line: loss.arguments: wanted dict[str, float] that is finite")
    rewards = f"evaluation.rewards=[{{function: f.f, weight: {value}}}]"
    text = error_of(PolicyConfig, *NEEDED, *EVALUATION, rewards)
    assert text.startswith("command line: evaluation.rewards[0].weight: wanted float that is")
    assert "beta_factors: wanted list[float] that is" in error_of(
        QuickstartConfig, f"beta_factors=[1, {value}]"
    )
    shared = ["loss.beta=${shared.beta}", f"shared.beta={value}"]
    assert "loss.beta: wanted float that is" in error_of(PolicyConfig, *NEEDED, *shared)


@pytest.mark.parametrize(
    ("cls", "argument"),
    [
        (PolicyConfig, "loss.arguments.a.b=2"),
        (PolicyConfig, "loss.arguments={a: [1]}"),
        (QuickstartConfig, "beta_factors=[[1]]"),
        (QuickstartConfig, "beta_factors=[null]"),
        (QuickstartConfig, "overrides={sft: {a: b}}"),
        (QuickstartConfig, "overrides={sft: [[a]]}"),
    ],
)
def test_what_stands_in_lists_and_dictionaries_has_their_type(cls, argument):
    needed = NEEDED if cls is PolicyConfig else []
    field = argument.partition("=")[0].removesuffix(".a.b")
    assert error_of(cls, *needed, argument).startswith(f"command line: {field}: wanted ")


def test_zero_and_the_ends_of_float32_are_numbers():
    for value in ("0", "1e38", "-3.4e38", "1.2e-38"):
        config = load_config(PolicyConfig, [*NEEDED, f"loss.arguments={{baseline: {value}}}"])
        assert config.loss.arguments == {"baseline": float(value)}


@pytest.mark.parametrize("beta", ["b1", "b2"])
def test_a_decay_that_is_one_in_float32_is_refused(beta):
    assert f"optim.{beta} must be in [0, 1)" in error_of(
        SFTConfig, *NEEDED, f"optim.{beta}=0.99999999"
    )


@pytest.mark.parametrize("value", ["-1", "4294967296", "1" + "0" * 30])
@pytest.mark.parametrize("field", ["seed", "evaluation.generation.seed"])
def test_a_seed_has_32_bits(field, value):
    arguments = [*NEEDED, *EVALUATION]
    assert error_of(PolicyConfig, *arguments, f"{field}={value}") == (
        f"command line: {field} must be in [0, 2**32), got {value}"
    )
    load_config(PolicyConfig, [*arguments, f"{field}=0"])
    load_config(PolicyConfig, [*arguments, f"{field}=4294967295"])


def test_a_run_may_be_as_long_as_one_likes():
    config = load_config(SFTConfig, [*NEEDED, f"training.max_steps={10**25}"])
    assert config.training.max_steps == 10**25


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training.max_steps", "0"),
        ("training.log_every", "-2"),
        ("mesh.data", "0"),
        ("mesh.tensor", "-2"),
        ("optim.b2", "2.0"),
        ("optim.clip_norm", "-1.0"),
        ("evaluation.generation.num_texts", "-1"),
        ("evaluation.generation.sampling_temperature", "-1.0"),
    ],
)
def test_a_number_out_of_range_is_named_alone_with_its_value(field, value):
    text = error_of(PolicyConfig, *NEEDED, *EVALUATION, f"{field}={value}")
    assert text.startswith(f"command line: {field} must be ")
    assert text.endswith(f"got {value}")
    assert len(text) < 100


# --- blame ---


@pytest.mark.parametrize("item", ["evaluation.rewards[0].weight", "evaluation.rewards[0]"])
def test_an_item_of_a_list_on_the_command_line_is_blamed_there(tmp_path, item):
    path = write(tmp_path, "evaluation:\n  data: {path: d}\n  rewards:\n  - function: f.f\n")
    text = error_of(PolicyConfig, path, *NEEDED, f"{item}=2")
    assert text.startswith(f"command line: {item}: ")
    assert str(path) not in text
    assert "evaluation.rewards='[...]'" in text


def test_a_required_value_inside_a_list_is_not_asked_for_on_the_command_line():
    text = error_of(PolicyConfig, *NEEDED, *EVALUATION, "evaluation.rewards=[{weight: 2}]")
    assert text.startswith("evaluation.rewards[0].function: wanted")
    assert "command line" not in text


def test_a_value_longer_than_a_file_name_is_a_value():
    assert load_config(Texts, [f"one={'x' * 5000}"]).one == "x" * 5000


def test_of_two_fields_that_do_not_fit_the_one_that_is_set_is_placed(tmp_path):
    text = error_of(SFTConfig, *NEEDED, "training.num_microbatches=3")
    assert text.startswith("command line: training.batch_size must be a multiple")
    path = write(tmp_path, "\ntraining:\n  num_microbatches: 3\n")
    assert error_of(SFTConfig, path, *NEEDED).startswith(f"{path}:3: training.batch_size must be")


# --- YAML ---

LAUGHS = "\n".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
MERGES = "\n".join(f"  a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one: a\n? [a, b]\n: c\n", 2),
        ("one: a\nfree: {{a: b}: c}\n", 2),
        ("one: a\nfree: &x [1, *x]\n", 2),
        ("one: a\nfree: &x\n  a: *x\n", 2),
        ("one: a\nfree: &x {<<: *x}\n", 2),
        (f"one: a\nfree: {'[' * 5000}{']' * 5000}\n", 2),
        (f"one: a\nfree: {'[' * 100}{']' * 100}\n", 2),
        (f"one: a\nfree: {'{a: ' * 100}1{'}' * 100}\n", 2),
        (f"one: a\nfree: {'9' * 5000}\n", 2),
        (f"one: a\nfree: 0x{'f' * 5000}\n", 2),
        (f"one: a\nfree:\n  a0: &a0 [lol]\n{LAUGHS}\n", None),
        (f"one: a\nfree:\n  a0: &a0 {{}}\n{MERGES}\n", None),
        ("one: a\nfree: !!python/object/apply:os.getcwd []\n", 2),
        ("one: a\nfree: !!python/name:os.getcwd x\n", 2),
        ("one: a\nfree: !!int x\n", 2),
        ("one: a\nfree: !!bool x\n", 2),
        ("one: a\nfree: !!timestamp x\n", 2),
        ("one: a\nfree: !!binary aa\n", 2),
        ("one: a\nfree: !!binary aaaa\n", 2),
        ("one: a\nfree: !!set {a}\n", 2),
        ("one: a\nfree: {<<: 3}\n", 2),
        ('one: a\nfree: "\\0"\n', 2),
        ('one: a\nfree: "\\ud800"\n', 2),
        ("one: a\nfree: \x07\n", 2),
        ("one: a\nfree: *gone\n", 2),
        ("one: a\nfree: ${\n", 2),
        ("one: a\n--- b\n", 2),
        ("one: a\non: 3\n", 2),
        ("one: a\n~: 3\n", 2),
        ("one: a\n\tfree: 3\n", 2),
        ("one: a\nfree: b\x00\n", 2),
        ("one: a\nfree: [\n  1\n", 4),
        (f"one: a\nfree: {'x' * 200_000}\n", 2),
        (f"one: a\nfree: {'${one}' * 20_000}\n", 2),
        (f"one: a\nfree: '{'${' * 3000}one{'}' * 3000}'\n", 2),
    ],
)
def test_strange_yaml_is_refused_with_its_line(tmp_path, text, line):
    path = write(tmp_path, text)
    found = error_of(Texts, path)
    assert found.startswith(f"{path}:{'' if line is None else f'{line}: '}")
    assert len(found) < 1000


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000, "&x [*x]", "{[a]: b}", "!!int x", "${"])
def test_strange_yaml_on_the_command_line_is_refused_too(value):
    found = error_of(Texts, f"free={value}")
    assert found.startswith("command line")
    assert "free" in found


TWICE = "${{shared.a{0}}}${{shared.a{0}}}"
LISTS = "['${{shared.a{0}}}', '${{shared.a{0}}}', '${{shared.a{0}}}']"


@pytest.mark.parametrize("doubling", [TWICE, LISTS])
def test_values_that_read_each_other_until_no_machine_can_hold_them_are_refused(tmp_path, doubling):
    lines = [f"  a{n}: {doubling.format(n - 1)}\n" for n in range(1, 40)]
    path = write(tmp_path, "free: ${shared.a39}\nshared:\n  a0: lol\n" + "".join(lines))
    text = error_of(Texts, path)
    assert text.startswith(f"{path}:1: free: wanted at most 1000 values read as ${{...}}")
    # A chain as long as a person would write resolves.
    few = "".join(lines[:4])
    path = write(tmp_path, f"free: ${{shared.a4}}\nshared:\n  a0: lol\n{few}")
    assert str(load_config(Texts, [path]).free).count("lol") in (16, 81)


def test_values_that_read_each_other_in_a_circle_are_refused():
    circle = ["shared.a=${shared.b}", "shared.b=${shared.a}"]
    assert "ecursi" in error_of(Texts, "free=${shared.a}", *circle)
    chain = [f"shared.a{n}=${{shared.a{n + 1}}}" for n in range(600)]
    assert "ecursi" in error_of(Texts, "free=${shared.a0}", *chain, "shared.a600=1")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("one: \xe9\n".encode("latin-1"), "wanted a readable YAML config, got: 'utf-8'"),
        ("one: a\n".encode("utf-16"), "wanted a readable YAML config, got: 'utf-8'"),
        (b"#" + b"x" * 2_000_000, "wanted a config of at most 1000000 characters, got 2000001"),
    ],
)
def test_a_file_that_no_person_wrote_is_refused(tmp_path, content, wanted):
    (tmp_path / "run.yaml").write_bytes(content)
    assert error_of(Texts, str(tmp_path / "run.yaml")).startswith(f"{tmp_path}/run.yaml: {wanted}")


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_config(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbfone: a b\r\nsome:\r\n- c\r\n")
    assert load_config(Texts, [str(tmp_path / "run.yaml")]) == Texts("a b", some=["c"])


@pytest.mark.parametrize("field", ["loss.arguments", "evaluation.rewards"])
def test_arguments_are_no_list_and_rewards_are_sections(tmp_path, field):
    top, name = field.split(".")
    value = "[1]" if top == "loss" else "[{function: f.f, arguments: [1]}]"
    path = write(tmp_path, f"{top}:\n  {name}: {value}\n")
    found = error_of(PolicyConfig, path, *NEEDED)
    assert found.startswith(f"{path}:2: {field}")
    assert "got [1] (list)" in found


@pytest.mark.parametrize(
    "argv", [["shared.a=[1]", "shared.a.b=1"], ["shared.a={b: 1}", "shared.a=[1]"]]
)
def test_shared_values_of_two_kinds_are_refused(argv):
    assert error_of(Texts, "free=${shared.a.b}", *argv)


# --- anything ---

STRANGE = [*NAMES, "", "~", "null", "true", "[]", "{}", "[1]", "{a: 1}", "[{}]", "[{function: f}]"]
STRANGE += ["nan", "-.inf", "1e400", "-1", "0", "2", "1e-50", "9" * 400, "9" * 5000, "-0.0", "١"]
STRANGE += ["${", "${x}", "${seed}", "${oc.env:NONE}", "${output_dir}", "???", "*", "&a", "!!int a"]
STRANGE += ["'", "a: b: c", "\ud800", "\x00", "!!binary aa", "[[[]]]", "{1: 2}", "{[]: 1}", "${a:}"]
FIELDS = [(cls, field.name) for cls in (*STAGES.values(), QuickstartConfig) for field in
          iter_fields(cls)]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(STRANGE),
    st.text(max_size=12),
    st.text("[]{}:,'\"#&*!|>%@`${}.-_ \n0eatfx~?<=", max_size=12),
    st.integers().map(str),
    st.floats().map(repr),
)


@dataclass(frozen=True)
class Every(Texts):
    count: int = 1
    number: float = 1.0
    flag: bool = False
    maybe_number: float | None = None
    numbers: list[float] = option([])
    coefficients: dict[str, float] = option({})
    anything: dict[str, Any] = option({})
    choice: Literal["none", "all"] = "none"


@pytest.mark.parametrize("value", STRANGE)
def test_a_strange_value_of_every_type_loads_or_is_an_input_error(tmp_path, value):
    for name in Every.__dataclass_fields__:
        for source in (f"{name}={value}", f"{name}=[{value}]", f"{name}={{a: {value}}}"):
            with contextlib.suppress(InputError):
                assert isinstance(load_config(Every, [source]), Every)
        text = value.encode("utf-8", "replace").decode()
        with contextlib.suppress(InputError):
            assert isinstance(load_config(Every, [write(tmp_path, f"{name}: {text}\n")]), Every)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_of_any_field_loads_or_is_an_input_error(tmp_path_factory, field, value):
    cls, name = field
    names = {info.name for info in iter_fields(cls)}
    needed = [argument for argument in NEEDED if argument.partition("=")[0] in names]
    try:
        load_config(cls, [*needed, f"{name}={value}"])
    except InputError as error:
        assert str(error)
    # The same in a file, in its own section.
    text = value.encode("utf-8", "replace").decode().replace("\n", " ")
    parts = name.replace("[i]", "").split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)]
    path = write(tmp_path_factory.getbasetemp(), "\n".join(lines) + f" {text}\n")
    try:
        load_config(cls, [path, *needed])
    except InputError as error:
        assert str(error)
