"""What the environment gives reaches those who need it, and no file, message or hash."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from copg_jax import errors
from copg_jax.config.load import config_differences, load_config, run_main, to_yaml
from copg_jax.config.stages import PolicyConfig, ScoreConfig
from copg_jax.errors import InputError
from copg_jax.rewards.functions import WeightedRewards, load_reward
from copg_jax.run_folder import check_run_folder, write_run_header

SECRET = "sk-4711"
ARGUMENTS = (
    "{api_key: '${oc.env:JUDGE_KEY}', headers: [{auth: 'Bearer ${shared.key}'}], "
    "path: '${shared.disk}/rm', n: 3}"
)
SHARED = ["shared.key=${oc.env:JUDGE_KEY}", "shared.disk=${oc.env:DISK}"]
received: dict[str, Any] = {}


def judge(**arguments: Any) -> Callable[..., list[float]]:
    """A reward factory that keeps what it is given."""
    received.clear()
    received.update(arguments)
    return constant


def constant(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def refusing(api_key: str, **arguments: Any) -> None:
    raise ValueError("no such account")


def telling(api_key: str, **arguments: Any) -> None:
    raise ValueError(f"invalid key {api_key}")


def returning(api_key: str, **arguments: Any) -> dict[str, str]:
    return {"key": api_key}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_names", {})  # those of other tests
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    monkeypatch.setenv("DISK", "/disk/here")


def scoring(*more: str, factory: str = f"{__name__}.judge") -> ScoreConfig:
    rewards = f"rewards=[{{function: {factory}, arguments: {ARGUMENTS}}}]"
    needed = ["output_dir=a", "reference.path=m", "data.path=${shared.disk}/d"]
    return load_config(ScoreConfig, [*needed, rewards, *SHARED, *more])


def test_the_values_reach_the_factory_as_plain_texts_and_the_paths_their_fields():
    config = scoring()
    load_reward(config.rewards[0])
    assert received == {
        "api_key": SECRET,
        "headers": [{"auth": f"Bearer {SECRET}"}],
        "path": "/disk/here/rm",
        "n": 3,
    }
    assert type(received["api_key"]) is str
    assert config.data.path == "/disk/here/d"


def test_a_run_stores_names_and_no_values(tmp_path):
    config = scoring()
    rewards = WeightedRewards(config.rewards)
    write_run_header(tmp_path, config, {"rewards": rewards.fingerprint})
    stored = (tmp_path / "config.yaml").read_text()
    side_car = json.dumps(rewards.provenance)
    for text in (stored, side_car, repr(config), to_yaml(config)):
        assert SECRET not in text
        assert "${oc.env:JUDGE_KEY}" in text
        assert "Bearer ${oc.env:JUDGE_KEY}" in text
    assert "path: ${oc.env:DISK}/d" in stored


def test_another_key_and_another_disk_go_on_with_the_run(tmp_path, monkeypatch):
    first = scoring()
    hashes = {"rewards": WeightedRewards(first.rewards).fingerprint}
    write_run_header(tmp_path, first, hashes)
    monkeypatch.setenv("JUDGE_KEY", "sk-rotated")
    monkeypatch.setenv("DISK", "/there")
    second = scoring()
    assert {"rewards": WeightedRewards(second.rewards).fingerprint} == hashes
    check_run_folder(tmp_path, second)
    load_reward(second.rewards[0])
    assert received["api_key"] == "sk-rotated"
    # The stored config is one to run again.
    again = load_config(ScoreConfig, [str(tmp_path / "config.yaml")])
    assert (again, again.data.path) == (second, "/there/d")


@pytest.mark.parametrize(
    ("field", "before", "after"),
    [
        ("optim.learning_rate", "1e-3", "2e-3"),
        ("seed", "1", "2"),
    ],
)
def test_a_number_of_the_environment_is_stored_and_compared_by_value(
    monkeypatch, field, before, after
):
    configs = []
    for value in (before, after):
        monkeypatch.setenv("SETTING", value)
        arguments = ["output_dir=a", "model.path=m", "data.path=d", f"{field}=${{oc.env:SETTING}}"]
        configs.append(load_config(PolicyConfig, arguments))
    assert "oc.env" not in to_yaml(configs[0])
    [difference] = config_differences(*configs)
    assert difference.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("field", "before", "after"),
    [
        ("data.split", "train", SECRET),
        ("data.revision", "main", SECRET),
        ("model.revision", "main", SECRET),
        ("loss.name", "copg", "dpo"),
        ("evaluation.rewards", "a.b", "a.c"),
    ],
)
def test_a_text_of_the_environment_is_stored_by_name_and_a_run_does_not_go_on_with_another(
    tmp_path, monkeypatch, field, before, after
):
    written = "[{function: '${oc.env:SETTING}'}]" if "rewards" in field else "${oc.env:SETTING}"
    arguments = ["output_dir=a", "model.path=m", "data.path=d", f"{field}={written}"]
    arguments.append("evaluation.data.path=d")
    monkeypatch.setenv("SETTING", before)
    write_run_header(tmp_path, load_config(PolicyConfig, arguments), {})
    write_run_header(tmp_path, load_config(PolicyConfig, arguments), {})
    monkeypatch.setenv("SETTING", after)
    config = load_config(PolicyConfig, arguments)
    assert "${oc.env:SETTING}" in to_yaml(config)
    assert after not in to_yaml(config)
    with pytest.raises(InputError, match=f"another content of: {field}"):
        write_run_header(tmp_path, config, {})


def test_the_printed_config_shows_names(capsys):
    with pytest.raises(SystemExit):
        scoring("--print-config")
    text = capsys.readouterr().out
    assert SECRET not in text
    assert "api_key: ${oc.env:JUDGE_KEY}  # command line" in text


@pytest.mark.parametrize("read", ["${oc.env:JUDGE_KEY}", "x ${shared.key}"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", "{}"),
        ("data.part", "{}"),
        ("data.holdout_fraction", "{}"),
        ("distributed", "{}"),
        ("mesh", "{}"),
        ("rewards", "{}"),
        ("rewards", "[{{function: f.f, weight: '{}'}}]"),
        ("rewards", "[{{function: f.f, arguments: '{}'}}]"),
        ("data.max_rows", "{}"),
    ],
)
def test_a_key_in_the_wrong_field_is_not_shown(field, value, read):
    with pytest.raises(InputError) as caught:
        scoring(f"{field}={value.format(read)}")
    assert field in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "${oc.env:JUDGE_KEY}" in str(caught.value)


def test_a_long_key_is_not_shown_in_part(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k" * 1000)
    with pytest.raises(InputError) as caught:
        scoring("batch_size=${oc.env:JUDGE_KEY}")
    assert "kkk" not in str(caught.value)


@pytest.mark.parametrize("key", [SECRET, "k" * 200, "a\nkey'\\"], ids=["short", "long", "odd"])
@pytest.mark.parametrize("factory", ["refusing", "constant", "telling", "returning"])
def test_a_factory_that_fails_is_named_without_its_arguments(factory, key, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(InputError) as caught:
        load_reward(scoring(factory=f"{__name__}.{factory}").rewards[0])
    assert f"{__name__}.{factory}" in str(caught.value)
    assert not any(part in str(caught.value) for part in (key, repr(key)[1:-1], "kkk"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("${${oc.env:JUDGE_KEY}}", "key '${oc.env:JUDGE_KEY}' not found"),
        ("${shared.${shared.key}}", "key 'shared.${oc.env:JUDGE_KEY}' not found"),
        ("${oc.env:${oc.env:JUDGE_KEY}}", "of a plain name"),
        ("${oc.env:${shared.key}}", "of a plain name"),
        ("${oc.env: JUDGE_KEY}", "of a plain name"),
        (r"x\\${oc.env:JUDGE_KEY}", "no two backslashes"),
        (r"x\\${shared.key}", "no two backslashes"),
    ],
)
def test_what_reads_a_variable_in_another_way_is_refused_without_its_value(text, words):
    with pytest.raises(InputError) as caught:
        scoring(f"data.path={text}")
    assert words in str(caught.value)
    assert SECRET not in str(caught.value)


def test_an_error_of_the_run_is_printed_without_what_the_environment_gave(monkeypatch, capsys):
    def main(config: ScoreConfig) -> None:
        raise InputError(f"{config.data.path}: the key {SECRET} is refused")

    monkeypatch.setattr("copg_jax.config.load.load_config", lambda *_, **__: scoring())
    with pytest.raises(SystemExit):
        run_main(main, ScoreConfig, description=None)
    wanted = "error: ${oc.env:DISK}/d: the key ${oc.env:JUDGE_KEY} is refused\n"
    assert capsys.readouterr().err == wanted


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(InputError) as caught:
        scoring("data.path=${oc.env:NO_SUCH_DISK}/x")
    assert "'NO_SUCH_DISK' not found" in str(caught.value)
    assert "export it" in str(caught.value)
    assert scoring("data.path=${oc.env:NO_SUCH_DISK,/y}/x").data.path == "/y/x"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("${oc.decode:'[1]'}", "oc.decode"),
        ("${oc.create:{a: 1}}", "oc.create"),
        ("${oc.select:output_dir}", "oc.select"),
        ("${oc.deprecated:output_dir}", "oc.deprecated"),
        ("${oc.dict.keys:data}", "oc.dict.keys"),
        ("${my.own:1}", "my.own"),
        ("${ oc.decode : 1}", " oc.decode "),
        ("${ oc.env:JUDGE_KEY}", " oc.env"),
        ("${oc.env :JUDGE_KEY}", "oc.env "),
        ("a${oc.env:JUDGE_KEY}b${oc.decode:1}", "oc.decode"),
        ("${oc.env:NONE,${oc.decode:1}}", "oc.decode"),
        ("${oc.${shared.part}:1}", "oc."),
        ("${shared.${oc.decode:a}}", "oc.decode"),
    ],
)
def test_a_resolver_other_than_that_of_the_environment_is_refused(tmp_path: Path, text, name):
    path = tmp_path / "run.yaml"
    path.write_text(f'\ndata:\n  path: "{text}"\n')
    for source, place in (
        ([str(path)], f"{path}:3: data.path"),
        ([f"data.path={text}"], "command line: data.path"),
        ([f'rewards=[{{function: f.f, arguments: {{a: "{text}"}}}}]'], "command line: rewards[0]"),
    ):
        with pytest.raises(InputError) as caught:
            load_config(ScoreConfig, source)
        assert str(caught.value).startswith(place)
        assert f"the resolver '{name}" in str(caught.value)
