"""Metrics: valid JSON lines, a file that resumes exactly, a console that suits its reader."""

import json
import sys

import jax
import numpy as np
import pytest

from copg_jax import tracking
from copg_jax.errors import InputError
from copg_jax.tracking import MetricsLogger


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_log_is_one_json_line_on_disk_at_once(tmp_path):
    with MetricsLogger(tmp_path, total_steps=2, quiet=True) as logger:
        logger.log(1, {"loss": np.float32(0.5)}, text={"sample/0": "ein Körper\nzwei"})
        (line,) = lines_of(tmp_path)
    assert line["step"] == 1
    assert line["loss"] == 0.5
    assert line["text"] == {"sample/0": "ein Körper\nzwei"}
    assert line["time"] > 1e9


def test_nan_and_infinity_become_null(tmp_path):
    with MetricsLogger(tmp_path, total_steps=1, quiet=True) as logger:
        logger.log(1, {"a": float("nan"), "b": float("-inf"), "c": jax.numpy.float32(1.0)})
    (line,) = lines_of(tmp_path)
    assert (line["a"], line["b"], line["c"]) == (None, None, 1.0)


def test_a_resumed_run_drops_later_and_torn_lines(tmp_path):
    with MetricsLogger(tmp_path, total_steps=4, quiet=True) as logger:
        for step in range(4):
            logger.log(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    with MetricsLogger(tmp_path, total_steps=4, quiet=True, resume_step=2) as logger:
        logger.log(3, {"loss": 30})
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 30),
    ]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    for _ in range(2):
        with MetricsLogger(tmp_path, total_steps=1, quiet=True) as logger:
            logger.log(0, {"loss": 1})
    assert len(lines_of(tmp_path)) == 1


def test_without_a_terminal_a_plain_line_comes_every_few_steps(tmp_path, capsys):
    with MetricsLogger(tmp_path, total_steps=7, log_every=3) as logger:
        for step in range(1, 8):
            logger.log(step, {"loss": 0.123456, "[odd]": 1.0})
        logger.log(7, {"eval/reward_mean": 2.0})
    output = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in output] == [
        "step 3/7",
        "step 6/7",
        "step 7/7",
        "step 7/7",
    ]
    assert "loss 0.1235  [odd] 1  " in output[0]
    assert "s/step  ETA 0:00:0" in output[0]
    assert output[-1] == "step 7/7  eval/reward_mean 2"


def test_what_is_counted_is_named(tmp_path, capsys):
    with MetricsLogger(tmp_path, total_steps=320, unit="prompt", log_every=1) as logger:
        logger.log(80, {"eval/kl": 0.5})
        logger.log(160, {"eval/kl": 0.5})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "prompt 80/320  eval/kl 0.5"  # no pace: it waited for compilation
    assert second.startswith("prompt 160/320  eval/kl 0.5  ")
    assert "s/prompt  ETA " in second


def test_evaluation_and_texts_show_at_any_step(tmp_path, capsys):
    with MetricsLogger(tmp_path, total_steps=100, log_every=50) as logger:
        logger.log(1, {"eval/kl": 0.5}, text={"sample": "[b]words"})
    assert capsys.readouterr().out.splitlines()[-1] == "  sample: [b]words"


def test_a_terminal_gets_a_progress_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with MetricsLogger(tmp_path, total_steps=2, log_every=1) as logger:
        logger.log(1, {"loss": 1.0})
        logger.log(2, {"loss": 1.0})
    output = capsys.readouterr().out
    assert "2/2" in output
    assert "step 1/2  loss 1" in output


def test_no_bar_shows_while_the_first_step_compiles(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with MetricsLogger(tmp_path, total_steps=9, log_every=1) as logger:
        logger.log(0, {"eval/loss": 1.0})
    assert "0/9 " not in capsys.readouterr().out.replace("step 0/9", "")


def test_the_pace_leaves_out_what_was_before_the_first_step(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 102.0, 104.0, 106.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(clock))
    with MetricsLogger(tmp_path, total_steps=4, log_every=1) as logger:
        for step in range(1, 4):
            logger.log(step, {})
    first, *others = capsys.readouterr().out.splitlines()
    assert "s/step" not in first
    assert [line.split("  ")[1] for line in others] == ["2 s/step"] * 2


def test_quiet_prints_nothing(tmp_path, capsys):
    with MetricsLogger(tmp_path, total_steps=1, log_every=1, quiet=True) as logger:
        logger.log(1, {"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_only_process_0_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "is_main_process", lambda: False)
    with MetricsLogger(tmp_path, total_steps=1, log_every=1) as logger:
        logger.log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricsLogger(tmp_path, total_steps=1, tensorboard=True, quiet=True) as logger:
        logger.log(1, {"loss": 1.0}, text={"sample": "words"})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()
    assert b"words" in events.read_bytes()


def test_tensorboard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"pip install 'copg_jax\[tensorboard\]'"):
        MetricsLogger(tmp_path, total_steps=1, tensorboard=True)
