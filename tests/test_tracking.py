"""Metrics: valid JSON lines, a file that resumes exactly, a console that suits its reader."""

import jax
import numpy as np
import pytest

from copg_jax import tracking
from copg_jax.files import read_json_lines
from copg_jax.tracking import MetricsLogger


def lines_of(folder):
    return [row for _, row in read_json_lines(folder / "metrics.jsonl")]


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


def test_parts_that_are_done_again_have_a_rate_and_the_time_left(tmp_path, capsys):
    # Of four parts of ten, the second and the third were damaged.
    with MetricsLogger(
        tmp_path, total_steps=40, log_every=1, resume_step=20, is_done={10, 40}.__contains__
    ) as logger:
        logger.log(20, {"a": 1.0}, done=30)
        logger.log(30, {"a": 1.0}, done=40)
    _, last = capsys.readouterr().out.splitlines()
    assert last.startswith("step 40/40  a 1  ")
    assert last.endswith("s/step  ETA 0:00:00")
    assert [row["step"] for row in lines_of(tmp_path)] == [20, 30]


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


FOREIGN = [
    b"a note of somebody\n",
    b'"step"\n',
    b'{"note": 1}\n',
    b'{"step": "1"}\n',
    b'{"step": null}\n',
    b"[" * 10_000 + b"\n",
    b"\n",
    b"\xff\xfe\n",
]


@pytest.mark.parametrize("cut", ['{"step": 3, "te', '{"step": 3, "text": {"a": "ein Körper'])
def test_a_resume_keeps_every_line_of_steps_that_are_not_done_again(tmp_path, caplog, cut):
    texts = ["two\u2028lines", "ein Körper\x85 und\u2029", "a\x1cb\x0bc\rd\n"]
    with MetricsLogger(tmp_path, total_steps=4, quiet=True) as logger:
        for step, text in enumerate(texts):
            logger.log(step, {"loss": step}, text={"sample": text})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    torn = cut.encode()
    torn = torn[: torn.find("ö".encode()) + 1] if "ö" in cut else torn  # inside of the character
    path.write_bytes(b"".join(FOREIGN) + whole + torn)
    with MetricsLogger(tmp_path, total_steps=4, quiet=True, resume_step=2):
        pass
    assert path.read_bytes() == whole
    assert f"{path}: damaged: {len(FOREIGN)} lines are cut short or foreign" in caplog.text
    assert [row["text"]["sample"] for _, row in read_json_lines(path)] == texts


def test_lines_that_are_no_json_are_told_from_those_that_are(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"a": "x\xe2\x80\xa8y"}\n\nnote\n{"b": 2}\r\n{"c": "\xc3')
    assert [row for _, row in read_json_lines(path)] == [{"a": "x\u2028y"}, None, {"b": 2}, None]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m red", "\\x9b31m red"),
        ("over\rwritten\b", "over\\rwritten\\x08"),
        ("a :smile: [b]ü😀 TL;DR", "a :smile: [b]ü😀 TL;DR"),
    ],
)
def test_a_text_cannot_command_the_terminal_and_is_shown_as_it_is(tmp_path, capsys, text, shown):
    with MetricsLogger(tmp_path, total_steps=9) as logger:
        logger.log(1, {}, text={"sample": text})
    assert capsys.readouterr().out == f"  sample: {shown}\n"
    assert [row["text"] for row in lines_of(tmp_path)] == [{"sample": text}]


def test_a_log_of_steps_out_of_order_keeps_those_that_are_done(tmp_path):
    with MetricsLogger(tmp_path, total_steps=30, quiet=True) as logger:
        for step in (10, 20, 30):
            logger.log(step, {})
    done = {10, 30}
    with MetricsLogger(
        tmp_path, total_steps=30, quiet=True, resume_step=20, is_done=done.__contains__
    ) as logger:
        logger.log(20, {})
    assert [line["step"] for line in lines_of(tmp_path)] == [10, 30, 20]


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (None, "the lines of 3 steps from 1 to 3 are lost"),
        ([], "the lines of 3 steps from 1 to 3 are lost"),
        ([0, 1], "the lines of 2 steps from 2 to 3 are lost"),
        ([0, 1, 3], "the lines of 1 steps from 2 to 2 are lost"),
        ([1, 2, 3, 4], ""),
    ],
)
def test_a_resumed_run_names_the_lines_that_are_lost(tmp_path, caplog, left, text):
    path = tmp_path / "metrics.jsonl"
    if left is not None:
        path.write_text("".join(f'{{"step": {step}}}\n' for step in left))
    with MetricsLogger(tmp_path, total_steps=5, quiet=True, resume_step=3, logged=range(1, 4)):
        pass
    assert text in caplog.text and bool(text) == bool(caplog.text)
    assert not text or str(path) in caplog.text


def test_a_run_that_begins_anew_says_which_lines_it_leaves_out(tmp_path, caplog):
    for text in ("", "metrics.jsonl: its 1 lines are left out"):
        caplog.clear()
        with MetricsLogger(tmp_path, total_steps=5, quiet=True) as logger:
            logger.log(1, {"loss": 1.0})
        assert text in caplog.text and bool(text) == bool(caplog.text)
