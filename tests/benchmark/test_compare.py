"""Peers: everyone runs by turns, ratios are of one round, and what is missing is said before."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from copg_jax.errors import InputError
from experiments.benchmark import compare
from experiments.benchmark.commands import make_parser
from tests.toys import names_all

SCRIPT = """
import json, sys
from pathlib import Path

here, calls = Path(__file__), Path(__file__).with_name("calls")
with calls.open("a") as file:
    file.write(json.dumps([here.name, *sys.argv[1:]]) + "\\n")
number = sum(json.loads(line)[0] == here.name for line in calls.read_text().splitlines())
print("noise")
print(json.dumps({"pairs_per_s": RATE * number, "tokens_per_s": 100 * RATE}))
"""


def fake(folder: Path, name: str, rate: float, text: str = SCRIPT) -> Path:
    """A script that says `rate` in its first call, twice that in its second and so on."""
    path = folder / name
    path.write_text(text.replace("RATE", str(rate)))
    return path


@pytest.fixture
def scripts(tmp_path, monkeypatch) -> Path:
    """A folder of scripts in place of all peers', and ours."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    monkeypatch.setattr(compare, "FOLDER", folder)
    for rate, peer in enumerate(compare.PEERS.values(), start=1):
        fake(folder, peer.file, rate)
    fake(folder, "ours.py", 6)
    return folder


def run(scripts: Path, workload: Path, *arguments: str) -> dict[str, Any]:
    """The command, with a script in place of our benchmark."""
    shared = ["--workload", str(workload), "--shape", "tiny"]
    args = make_parser("experiments.benchmark", None).parse_args(["peers", *shared, *arguments])
    args.own = (sys.executable, str(scripts / "ours.py"))
    return args.run(args)


def calls(scripts: Path) -> list[list[str]]:
    return [json.loads(line) for line in (scripts / "calls").read_text().splitlines()]


ENVS = ("--env", f"torch={sys.executable}", "--env", f"tunix={sys.executable}")


def test_contestants_take_turns_and_a_ratio_is_ours_over_theirs_of_the_same_round(
    scripts, toy_model, rows, write, capsys
):
    result = run(scripts, write(rows), *ENVS, "--peers", "torch", "trl", "--rounds", "2")
    order = [name for name, *_ in calls(scripts)]
    assert order == ["ours.py", "torch_loop.py", "trl_dpo.py"] * 2
    trl = result["contestants"]["trl"]
    assert trl["pairs_per_s"] == {"median": 3.0, "least": 2.0, "most": 4.0}
    # 6 / 2 and 12 / 4; the ratio of other rounds would be 1.5 or 6.
    assert trl["ratio"] == {"median": 3.0, "least": 3.0, "most": 3.0}
    assert result["contestants"]["ours"] == {
        "pairs_per_s": {"median": 9.0, "least": 6.0, "most": 12.0}
    }
    shown = capsys.readouterr()
    names_all(shown.out, ["2 rounds", "torch", "trl", "3 (2–4)", "3× (3–3)"])
    names_all(shown.err, ["round 1 of 2: ours 6.0", "round 2 of 2: trl 4.0"])


def test_each_task_has_our_run_and_everyone_gets_the_same_rows(
    scripts, toy_model, rows, write, tmp_path
):
    sizes = ("--batch", "2", "--steps", "3", "--warmup", "1", "--prompts", "4", "--new", "5")
    workload = write(rows)
    run(scripts, workload, *ENVS, "--rounds", "1", *sizes, "--remat", "dots")
    found = {tuple(call[:2]) if call[0] == "ours.py" else call[0]: call for call in calls(scripts)}
    assert len(found) == 6
    (path,) = {call[call.index("--workload") + 1] for call in found.values()}
    assert path != str(workload)
    training = ["--batch", "2", "--steps", "3", "--warmup", "1"]
    generation = ["--batch", "4", "--new", "5"]
    for name, wanted in {
        ("ours.py", "train"): ["--shape", "tiny", *training, "--remat", "dots"],
        ("ours.py", "generate"): ["--shape", "tiny", *generation],
        "torch_loop.py": training,
        "trl_dpo.py": training,
        "tunix_dpo.py": training,
        "hf_generate.py": generation,
    }.items():
        assert found[name][-len(wanted) :] == wanted


def test_rows_that_nobody_reaches_are_left_out(scripts, toy_model, rows, write):
    count = "print(json.dumps({'pairs_per_s': len(open(sys.argv[2]).readlines())}))"
    for name in ("ours.py", "torch_loop.py"):
        path = "[sys.argv.index('--workload') + 1]"
        fake(scripts, name, 1, "import json, sys\n" + count.replace("[2]", path))
    sizes = ("--batch", "2", "--steps", "3", "--warmup", "1", "--prompts", "1")
    result = run(scripts, write(rows), *ENVS, "--peers", "torch", "--rounds", "1", *sizes)[
        "contestants"
    ]
    assert result["ours"]["pairs_per_s"]["median"] == result["torch"]["pairs_per_s"]["median"] == 8


def test_on_a_gpu_everyone_computes_in_bfloat16(scripts, toy_model, rows, write):
    run(scripts, write(rows), *ENVS, "--rounds", "1", "--cuda", "--peers", "torch", "hf_generate")
    found = calls(scripts)
    assert [call[0] for call in found if call[-2:] == ["--dtype", "bfloat16"]] == [
        "ours.py",
        "ours.py",
    ]
    assert [call[0] for call in found if call[-1] == "--cuda"] == [
        "torch_loop.py",
        "hf_generate.py",
    ]


def test_a_peer_that_fails_is_logged_and_leaves_the_others_their_numbers(
    scripts, toy_model, rows, write, capsys
):
    fake(scripts, "trl_dpo.py", 1, "raise SystemExit('no memory left')")
    fake(scripts, "tunix_dpo.py", 1, "print('no JSON')")
    arguments = ("--peers", "torch", "trl", "tunix", "--rounds", "1")
    result = run(scripts, write(rows), *ENVS, *arguments)["contestants"]
    assert result["torch"]["ratio"]["median"] == 6.0
    assert result["trl"] == result["tunix"] == {"pairs_per_s": None, "ratio": None}
    shown = capsys.readouterr()
    names_all(shown.err, ["trl failed", "no memory left", "tunix failed", "JSONDecodeError"])
    assert "failed" in shown.out


def test_a_command_that_does_not_start_leaves_the_others_their_numbers(tmp_path):
    script = fake(tmp_path, "peer.py", 1)  # not executable
    commands = {"torch": (str(script),), "ours": (sys.executable, str(script))}
    named = [compare.Contestant(name, "train", command) for name, command in commands.items()]
    assert compare.run(named, rounds=1, timeout_sec=60) == [{"torch": None, "ours": 1.0}]


def test_a_peer_that_hangs_is_ended(scripts, toy_model, rows, write, capsys):
    fake(scripts, "torch_loop.py", 1, "import time; time.sleep(60)")
    arguments = ("--peers", "torch", "--rounds", "1", "--timeout", "2")
    result = run(scripts, write(rows), *ENVS, *arguments)["contestants"]
    assert result["torch"]["pairs_per_s"] is None
    assert "TimeoutExpired" in capsys.readouterr().err


def test_peers_are_told_the_sizes_of_the_model_that_ours_has(scripts, toy_model, rows, write):
    count = "json.load(open(sys.argv[sys.argv.index('--config') + 1]))['intermediate_size']"
    fake(
        scripts, "torch_loop.py", 1, f"import json, sys; print('{{\"pairs_per_s\":', {count}, '}}')"
    )
    result = run(scripts, write(rows), *ENVS, "--peers", "torch", "--rounds", "1")
    assert result["contestants"]["torch"]["pairs_per_s"]["median"] == toy_model.intermediate_size


def test_missing_environments_are_listed_before_anything_runs(scripts, toy_model, rows, write):
    with pytest.raises(InputError) as caught:
        run(scripts, write(rows), "--env", f"torch={scripts / 'ours.py'}")  # not executable
    names_all(
        str(caught.value),
        ["ours.py: wanted a Python", "--env tunix=PYTHON", "tunix_dpo.py says", "--peers"],
    )
    assert not (scripts / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--env", "torch"), "NAME=PYTHON"),
        (("--cuda",), "--cuda: tunix does not.*--peers torch trl hf_generate"),
        (("--rounds", "0"), "--rounds must be >= 1, got 0"),
        (("--batch", "0"), "--batch must be >= 1"),
        (("--steps", "0"), "--steps must be >= 1"),
        (("--warmup", "0"), "--warmup must be >= 1"),
        (("--prompts", "0"), "--prompts must be >= 1"),
        (("--new", "1"), "--new must be >= 2, got 1"),
        (("--timeout", "nan"), "--timeout must be >= 1, got nan"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(scripts, toy_model, rows, write, arguments, wanted):
    with pytest.raises(InputError, match=f"(?s){wanted}"):
        run(scripts, write(rows), *ENVS, *arguments)
    assert not (scripts / "calls").exists()
