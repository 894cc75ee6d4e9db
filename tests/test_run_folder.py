"""The output folder: what is written first, and which folders are refused before any work."""

import dataclasses
import errno
import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import jax
import pytest

from copg_jax import run_folder
from copg_jax.config import stages
from copg_jax.config.load import load_config
from copg_jax.config.options import option, section
from copg_jax.config.schema import iter_fields
from copg_jax.errors import InputError
from copg_jax.run_folder import check_run_folder, claim, write_run_header
from tests.toys import names_all


@dataclass(frozen=True)
class Optim:
    learning_rate: float = 1e-6


@dataclass(frozen=True)
class Config:
    beta: float = 0.1
    log_every: int = 10
    tags: list[str] = option([])
    optim: Optim = section(Optim)


def test_the_header_holds_the_resolved_config_and_the_versions(tmp_path):
    folder = tmp_path / "runs" / "a"
    write_run_header(folder, Config(beta=0.3), {})
    assert load_config(Config, [str(folder / "config.yaml")]) == Config(beta=0.3)
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    assert versions["transformers"] == metadata.version("transformers")
    assert versions["device_count"] == 8
    assert versions["platform"] == "cpu"
    assert versions["device_kind"]
    names = ["config.yaml", "inputs.json", "versions.json"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_run_that_began_with_another_content_is_refused(tmp_path):
    write_run_header(tmp_path, Config(), {"data": "a", "model": "b"})
    write_run_header(tmp_path, Config(), {"data": "a", "model": "b"})
    with pytest.raises(InputError, match=r"another content of: model \(.*another output_dir"):
        write_run_header(tmp_path, Config(), {"data": "a", "model": "c"})


def test_the_same_config_resumes(tmp_path):
    write_run_header(tmp_path, Config(), {})
    before = (tmp_path / "config.yaml").read_text()
    check_run_folder(tmp_path, Config())
    write_run_header(tmp_path, Config(), {})
    assert (tmp_path / "config.yaml").read_text() == before


def test_the_folder_of_another_run_is_refused_with_differences_and_fixes(tmp_path):
    write_run_header(tmp_path, Config(), {})
    other = Config(beta=0.3, log_every=5, optim=Optim(2e-5))
    with pytest.raises(InputError) as caught:
        check_run_folder(tmp_path, other, may_differ=["log_every"])
    text = str(caught.value)
    assert "beta: 0.1 -> 0.3" in text
    assert "optim.learning_rate: 1e-06 -> 2e-05" in text
    assert "log_every" not in text
    assert "another output_dir, or delete" in text
    assert load_config(Config, [str(tmp_path / "config.yaml")]) == Config()


@pytest.mark.parametrize("prefix", ["optim", "optim.learning_rate"])
def test_fields_that_may_differ_do_not_make_another_run(tmp_path, prefix):
    write_run_header(tmp_path, Config(), {})
    changed = replace(Config(), optim=Optim(2e-5))
    check_run_folder(tmp_path, changed, may_differ=[prefix])
    write_run_header(tmp_path, changed, {})
    assert load_config(Config, [str(tmp_path / "config.yaml")]) == changed


def test_a_prefix_ends_at_a_dot(tmp_path):
    write_run_header(tmp_path, Config(), {})
    with pytest.raises(InputError, match=r"optim\.learning_rate"):
        check_run_folder(tmp_path, Config(optim=Optim(1.0)), may_differ=["opt"])


def test_an_unreadable_earlier_config_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="could not read it"):
        check_run_folder(tmp_path, Config())


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 10])
def test_a_config_that_was_cut_short_is_damaged_and_not_that_of_another_run(tmp_path, cut):
    write_run_header(tmp_path, Config(), {})
    path = tmp_path / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: cut and -cut]) if cut else path.read_text()[:-1])
    with pytest.raises(InputError, match=r"config.yaml: damaged: cut short.*another output_dir"):
        check_run_folder(tmp_path, Config())


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json"])
def test_work_without_what_it_began_with_is_not_gone_on_with(tmp_path, name):
    write_run_header(tmp_path, Config(), {})
    (tmp_path / name).unlink()
    check_run_folder(tmp_path, Config())  # ended before any work
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=rf"{name}: missing, though metrics.jsonl is there"):
        check_run_folder(tmp_path, Config())


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"3", b"{", b"\xff", b"{}", b'{"data": "a"}', b"[" * 10**5]
)
def test_damaged_hashes_of_inputs_are_named(tmp_path, raw):
    write_run_header(tmp_path, Config(), {"data": "a"})
    (tmp_path / "inputs.json").write_bytes(raw)
    with pytest.raises(InputError, match=r"inputs.json: .*(restore it|another output_dir)"):
        write_run_header(tmp_path, Config(), {"data": "a"})


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "run"
    path.write_text("")
    with pytest.raises(InputError, match="wanted a folder, got a file"):
        check_run_folder(path, Config())


def test_only_process_0_writes_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "is_main_process", lambda: False)
    write_run_header(tmp_path / "run", Config(), {})
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Reading:
    """A section that reads something."""

    path: str = "data.jsonl"


@dataclass(frozen=True)
class ReadingConfig:
    data: Reading = section(Reading)
    output_dir: str = "run"


def refusal(output_dir: object, config: object = None) -> str:
    """Why a folder is not claimed."""
    with pytest.raises(InputError) as caught, claim(str(output_dir), config or Config()):
        raise AssertionError("not reached")
    return str(caught.value)


def test_a_claimed_folder_is_made_and_one_that_nothing_was_written_to_is_removed(tmp_path):
    with claim(str(tmp_path / "a" / "b"), Config()):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()
    with claim(str(tmp_path / "kept"), Config()):
        (tmp_path / "kept" / "metrics.jsonl").write_text("")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "name", ["file/run", "file", "n" * 300, "a\0b", "loop", "dangling/run"], ids=lambda n: n[:8]
)
def test_a_folder_that_cannot_be_made_is_named_before_any_work(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "loop")
    names_all(refusal(tmp_path / name), ["output_dir", str(tmp_path / name), "wanted a folder"])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="NOT CHECKED: /proc is of Linux")
@pytest.mark.parametrize("folder", ["/proc/run", "/proc/self/run"])
def test_a_folder_that_root_cannot_write_either_is_named(folder):
    names_all(refusal(folder), [f"output_dir {folder}", "can be written", "Fix"])


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "RO")])
def test_the_first_file_tells_that_a_folder_cannot_be_written(tmp_path, monkeypatch, error):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("copg_jax.lock.write_text", refuse)
    names_all(refusal(tmp_path), [f"output_dir {tmp_path}", "can be written", error.strerror])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model", "a symbolic link"),
        ("best", "a symbolic link"),
        ("model", "a file"),
        ("checkpoints", "a file"),
        ("tokens", "a file"),
        ("metrics.jsonl", "a folder"),
        ("scored.json", "a folder"),
    ],
)
def test_a_name_in_use_that_a_run_cannot_replace_is_refused_before_any_work(tmp_path, name, kind):
    path = tmp_path / "run" / name
    path.parent.mkdir()
    if kind == "a symbolic link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "a file":
        path.write_text("")
    else:
        path.mkdir()
    names_all(refusal(path.parent), [f"output_dir {path.parent}", f"at {path}, got {kind}", "Fix"])


def test_checkpoints_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large")
    with claim(str(tmp_path / "run"), Config()):
        assert (tmp_path / "run" / "checkpoints").is_symlink()


@pytest.mark.parametrize(
    ("read", "written"),
    [
        ("data", "data"),
        ("data", "data/run"),
        ("data", "data/../data/a/b"),
        ("data", "link/run"),
        ("link", "data/run"),
        ("data/rows.jsonl", "data"),
        ("data/rows.jsonl", "."),
        ("run/model", "run"),
        ("run/model", "run/model/x"),
        ("data/*.jsonl", "data"),
        ("data/*/*.jsonl", "data/run"),
        ("data/**/*.jsonl", "data/a/b"),
        ("~/data", "data/run"),
        ("gs://b/data", "gs://b/data/run"),
        ("gs://b/run/model", "gs://b/run"),
    ],
)
def test_an_output_folder_that_overlaps_with_an_input_is_refused(
    tmp_path, monkeypatch, read, written
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("data", "run/model"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "rows.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    config = load_config(ReadingConfig, [f"data.path={read}", f"output_dir={written}"])
    names_all(refusal(config.output_dir, config), ["output_dir", "overlaps with data.path", "Fix"])


@pytest.mark.parametrize(
    ("read", "written"),
    [
        ("data/rows.jsonl", "data/run"),
        ("data/*.jsonl", "data/run"),
        ("data", "data2"),
        ("owner/name", "owner"),  # a name on a hub
        ("run/model", "run2"),
        ("runs/sft/model", "runs/evaluated"),
    ],
)
def test_folders_beside_each_other_do_not_overlap(tmp_path, monkeypatch, read, written):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("")
    (tmp_path / "run" / "model").mkdir(parents=True)
    with claim(written, ReadingConfig(Reading(read), written)):
        assert (tmp_path / written).is_dir()


DEFINES = {
    *(f"model.{name}" for name in ("path", "revision", "dtype", "adapter")),
    *("reference", *(f"reference.{name}" for name in ("path", "revision", "dtype", "adapter"))),
    *(
        "lora",
        "sampling",
        "origin",
        "engine_prompts",
        "prompts",
        "rewards",
        "seed",
        "part_size",
        "beta",
    ),
    *("data", "validation", "optim", "loss", "evaluation", "evaluation.data", "evaluation.rewards"),
    *("training.batch_size", "training.num_epochs", "training.max_steps"),
    *(f"evaluation.generation.{name}" for name in ("num_prompts", "num_samples", "seed")),
    *(f"evaluation.generation.{name}" for name in ("max_new_tokens", "sampling_temperature")),
    "evaluation.generation.missing_eos_reward",
    *("rounds", "steps_per_round", "prompts_per_round", "replay_rounds", "reference_every"),
    *("offline", "generator", "generator.command"),
}
"""Fields and sections that decide the numbers of a run."""
SECTIONS = (
    "rewards",
    "data",
    "validation",
    "optim",
    "lora",
    "sampling",
    "loss",
    "offline",
    "evaluation.data",
    "evaluation.rewards",
)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_every_field_either_defines_a_run_or_may_differ_when_it_is_resumed(stage):
    for field in iter_fields(stages.STAGES[stage]):
        name = field.name
        may_differ = any(run_folder._is_under(name, prefix) for prefix in stages.MAY_DIFFER)
        of_section = any(name.startswith((f"{part}.", f"{part}[")) for part in SECTIONS)
        says_how = name.endswith(("].num_workers", "].batch_size"))  # of a reward
        defines = name in DEFINES or (of_section and not says_how)
        assert may_differ != defines, name


@pytest.mark.parametrize(
    "setting",
    [
        "evaluation.generation.batch_size=2",
        "evaluation.generation.num_texts=0",
        "training.save_every=7",
        "training.eval_every=9",
        "logits_chunk=3",
    ],
)
def test_what_says_only_how_often_and_how_much_at_a_time_may_differ(tmp_path, caplog, setting):
    evaluation = ["evaluation.data.path=c", "evaluation.generation.batch_size=4"]
    arguments = ["model.path=a", "data.path=b", f"output_dir={tmp_path}", *evaluation]
    first, second = (
        load_config(stages.PolicyConfig, [*arguments, *more]) for more in ([], [setting])
    )
    write_run_header(tmp_path, first, {})
    caplog.set_level("INFO", "copg_jax")
    check_run_folder(tmp_path, second, may_differ=stages.MAY_DIFFER)
    assert f"goes on with another {setting.split('=')[0]}: " in caplog.text


@pytest.mark.parametrize(
    ("before", "now"),
    [("data/a", "./data/a"), ("./data/a/", "data/a"), ("~/a", "{home}/a"), ("a", "{home}/a")],
)
def test_one_path_written_in_two_ways_is_one_path(tmp_path, monkeypatch, before, now):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run_header("run", ReadingConfig(Reading(before)), {})
    config = ReadingConfig(Reading(now.format(home=tmp_path)))
    check_run_folder("run", config)
    with pytest.raises(InputError, match=r"data\.path: "):
        check_run_folder("run", dataclasses.replace(config, data=Reading("other")))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_run_in_order_and_leaves_its_folder_free(tmp_path, name, code):
    before = signal.getsignal(signal.Signals[name])
    with pytest.raises(SystemExit) as caught, claim(str(tmp_path), Config()):
        os.kill(os.getpid(), signal.Signals[name])
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.Signals[name]) is before


def test_what_the_disk_says_in_a_run_is_one_sentence(tmp_path):
    with pytest.raises(InputError) as caught, claim(str(tmp_path), Config()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    names_all(str(caught.value), [str(tmp_path), "No space left on device", "Fix"])


def test_of_several_processes_only_process_0_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "is_main_process", lambda: False)
    with claim(str(tmp_path), Config()):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [SystemExit(143), KeyboardInterrupt(), InputError("no")])
def test_a_folder_is_free_again_however_the_run_ends(tmp_path, ending):
    with suppress(type(ending)), claim(str(tmp_path), Config()):
        assert list(Path(tmp_path).iterdir())
        raise ending
    assert list(Path(tmp_path).iterdir()) == []
