"""Reward functions in worker processes: one bad completion costs itself, and nothing else."""

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copg_jax.config.reward_spec import RewardSpec
from copg_jax.errors import InputError
from copg_jax.rewards.functions import WeightedRewards
from tests.rewards import hostile
from tests.toys import names_all

JUDGE = f"{hostile.__name__}.judge"


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    """Whether processes end, within a minute."""
    for _ in range(600):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def pool() -> WeightedRewards:
    """Two workers, kept for the tests of this file."""
    return WeightedRewards([RewardSpec(JUDGE, num_workers=2, timeout_sec=2.0)])


def workers(rewards: WeightedRewards) -> list[Any]:
    """Its workers."""
    return [worker for found in rewards._pools if found for worker in found._workers]


def pids(rewards: WeightedRewards) -> list[int]:
    """The processes of its workers."""
    return [worker.process.pid for worker in workers(rewards)]


@pytest.fixture
def soon() -> Iterator[None]:
    """Ends a test that waits for ever, after a minute."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def ask(rewards: WeightedRewards, texts: list[str]) -> tuple[list[float], dict[str, int]]:
    """Rewards of texts, and why some are missing."""
    counts: Counter[str] = Counter()
    where = [f"f:{i}" for i in range(1, len(texts) + 1)]
    sizes = [9] * len(texts)
    total, _ = rewards(["p"] * len(texts), texts, {}, where, num_tokens=sizes, counts=counts)
    return total.tolist(), {name.rpartition("/")[2]: number for name, number in counts.items()}


def test_rewards_of_workers_come_in_the_order_of_the_completions_from_processes_that_stay(pool):
    texts = ["x" * (i % 7) for i in range(50)]
    assert ask(pool, texts) == ([float(i % 7) for i in range(50)], {})
    before = pids(pool)
    assert len(set(before)) == 2
    assert ask(pool, ["a"]) == ([1.0], {})
    assert pids(pool) == before
    assert ask(pool, []) == ([], {})


HOSTILE = {
    "hang": "timeout",
    "hold": "timeout",
    "exit": "error",
    "exit at once": "crash",
    "kill": "crash",
    "raise": "error",
    "memory": "error",
    "none": "none",
}


def test_a_hostile_completion_has_no_reward_and_is_counted_by_reason_and_the_others_have_theirs(
    pool, caplog
):
    texts = [text for hostile in HOSTILE for text in ("before", hostile, "after it")]
    with caplog.at_level(logging.WARNING):
        values, counts = ask(pool, texts)
    wanted = [np.nan if text in HOSTILE else float(len(text)) for text in texts]
    np.testing.assert_array_equal(values, wanted)
    assert counts == Counter(HOSTILE.values())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3  # of a time-out, a crash and an error; not of each
    for text in (
        r"f:[25]: it took longer than 2.0 s",
        r"f:\d+: its process ended \(",
        r"failed: \w+",
    ):
        assert any(re.search(f"{JUDGE} gave no reward: .*{text}", line) for line in said), text
    assert ask(pool, ["abc"]) == ([3.0], {})


def test_a_process_that_a_reward_forks_ends_with_the_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "pids"))
    rewards = WeightedRewards([RewardSpec(JUDGE, num_workers=1)])
    assert ask(rewards, ["fork"]) == ([4.0], {})
    started = {int(pid) for pid in (tmp_path / "pids").read_text().split()}
    assert len(started - set(pids(rewards))) == 1
    assert all(map(alive, started))
    del rewards
    gc.collect()
    assert gone(list(started))


def test_a_process_that_a_reward_forks_ends_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE_MARK", str(tmp_path / "pids"))
    rewards = WeightedRewards([RewardSpec(JUDGE, num_workers=1)])
    ask(rewards, ["fork"])
    (worker,) = workers(rewards)
    worker.process.stdin.close()  # as the end of this process does
    assert gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


@pytest.mark.parametrize("then", ["return", "raise"])
def test_a_process_that_a_reward_forks_and_lets_go_on_answers_nothing(then):
    texts = [text for n in range(1, 5) for text in (n * "x", f"fork and {then}")]
    rewards = WeightedRewards([RewardSpec(JUDGE, num_workers=1)])
    assert ask(rewards, texts) == ([float(len(text)) for text in texts], {})


def test_a_process_that_a_factory_or_a_reward_forks_does_not_go_on_with_the_run():
    program = f"""
from copg_jax.config.reward_spec import RewardSpec
from copg_jax.rewards.functions import load_reward
from copg_jax.rewards.protocol import ask
function = load_reward(RewardSpec({f"{hostile.__name__}.forks"!r}, {{"then": "return"}}))
texts = ["fork and return", "fork and raise"]
print(*ask(function, texts, texts, {{}}, name="forks").values, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("15.0 14.0\n", 0), done.stderr


@pytest.mark.parametrize(("first", "last"), [("fork", "exit at once"), ("four", "close")])
def test_the_end_of_a_worker_is_seen_though_a_process_of_its_own_lives_or_it_does_itself(
    soon, first, last
):
    rewards = WeightedRewards([RewardSpec(JUDGE, num_workers=1)])
    values, counts = ask(rewards, [first, last, "abc"])
    np.testing.assert_array_equal(values, [4, np.nan, 3])
    assert counts == {"crash": 1}


@pytest.mark.parametrize("first", ["ab", "fork"])
def test_a_worker_that_ended_between_calls_is_replaced_and_costs_no_completion(soon, first):
    rewards = WeightedRewards([RewardSpec(JUDGE, num_workers=1)])
    ask(rewards, [first])
    (worker,) = workers(rewards)
    worker.process.kill()
    worker.process.wait()
    assert ask(rewards, ["abc"]) == ([3.0], {})
    assert pids(rewards) != [worker.process.pid]


def test_workers_that_end_before_they_are_ready_are_replaced(tmp_path):
    arguments = {"folder": str(tmp_path), "last": 3}
    spec = RewardSpec(f"{hostile.__name__}.unfinished", arguments, num_workers=1)
    assert ask(WeightedRewards([spec]), ["abc"]) == ([3.0], {})


def test_in_a_batch_only_the_completion_at_fault_is_dropped():
    spec = RewardSpec(JUDGE, num_workers=1, timeout_sec=1.0, batch_size=4)
    values, counts = ask(
        WeightedRewards([spec]), ["a", "raise", "bb", "kill", "ccc", "dd", "e", "f"]
    )
    np.testing.assert_array_equal(values, [1, np.nan, 2, np.nan, 3, 2, 1, 1])
    assert counts == {"error": 1, "crash": 1}


def test_a_function_that_fails_for_all_of_the_first_completions_ends_the_run():
    rewards = WeightedRewards([RewardSpec(JUDGE, num_workers=2)])
    with pytest.raises(InputError) as caught:
        ask(rewards, ["raise"] * 100)
    names_all(
        str(caught.value), [JUDGE, "the first 32 completions all failed", "KeyError: 'raise'"]
    )
    assert pids(rewards) == []


@pytest.mark.parametrize("batch_size", [None, 2])
def test_what_is_no_reward_is_refused_with_its_row_as_without_workers(batch_size):
    texts = ["a", "b", "nan", "c"]
    refusals = []
    for num_workers in (0, 1):
        spec = RewardSpec(JUDGE, num_workers=num_workers, batch_size=batch_size)
        with pytest.raises(InputError) as caught:
            ask(WeightedRewards([spec]), texts)
        refusals.append(str(caught.value))
    assert refusals[0] == refusals[1]
    names_all(refusals[0], ["f:3", JUDGE, "finite number", "'nan'"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_reward_prints_and_changes_is_said_once(num_workers, caplog, capfd):
    names = [JUDGE, f"{hostile.__name__}.changes"]
    rewards = WeightedRewards([RewardSpec(name, num_workers=num_workers) for name in names])
    columns = {"topic": ["x"] * 2}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            total, _ = rewards(["p"] * 2, ["print", "print"], columns, num_tokens=[9] * 2)
    assert total.tolist() == [5.0, 5.0]
    assert columns == {"topic": ["x"] * 2}
    (prints, changes) = (record.getMessage() for record in caplog.records)
    names_all(prints, [JUDGE, "prints, such as 'so much to say"])
    assert len(prints) < 200
    names_all(changes, [names[1], "changes what it is given (topic)"])
    assert ("so much to say" in capfd.readouterr().out) == (num_workers == 0)


def test_a_worker_starts_without_jax_and_never_takes_the_accelerator(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    spec = RewardSpec(f"{hostile.__name__}.reads_jax", num_workers=1, batch_size=3)
    values, _ = ask(WeightedRewards([spec]), ["a", "b", "c"])
    assert values[:2] == [0.0, 1.0]
    assert values[2] != os.getpid()


def test_a_secret_is_hidden_in_what_a_worker_reports(monkeypatch):
    from copg_jax import errors

    monkeypatch.setattr(errors, "_names", {})
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    errors.hide("JUDGE_KEY")
    spec = RewardSpec(
        f"{hostile.__name__}.asks_for_a_secret", {"key": "sk-very-secret"}, num_workers=1
    )
    with pytest.raises(InputError) as caught:
        ask(WeightedRewards([spec]), ["a"] * 32)
    assert "sk-very-secret" not in str(caught.value)
    assert "cannot log in with ${oc.env:JUDGE_KEY}" in str(caught.value)


def test_a_worker_that_cannot_start_ends_the_run(tmp_path):
    spec = RewardSpec(f"{hostile.__name__}.unfinished", {"folder": str(tmp_path)}, num_workers=1)
    with pytest.raises(InputError, match=r"no worker can be started: .*exit status 3"):
        ask(WeightedRewards([spec]), ["a"])


def test_two_workers_work_at_the_same_time():
    spec = RewardSpec(f"{hostile.__name__}.slow", num_workers=2)
    values, _ = ask(WeightedRewards([spec]), ["a"] * 10)
    assert len(set(values)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("end", ["return", "raise", "SIGTERM", "SIGKILL"])
def test_workers_end_with_the_run_however_that_ends(end, tmp_path):
    mark = tmp_path / "pids"
    text = {"SIGTERM": "hang", "SIGKILL": "hang"}.get(end, "a")
    program = f"""
from copg_jax.config.reward_spec import RewardSpec
from copg_jax.rewards.functions import WeightedRewards
from copg_jax.runtime import signals_as_exits
with signals_as_exits():
    rewards = WeightedRewards([RewardSpec({JUDGE!r}, num_workers=2)])
    rewards(["p"] * 4, [{text!r}] * 4, {{}}, num_tokens=[9] * 4)
    {"raise KeyError('x')" if end == "raise" else ""}
"""
    environment = os.environ | {"HOSTILE_MARK": str(mark)}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL
    ) as run:
        for _ in range(600):
            if end.startswith("SIG") and mark.exists() and len(set(mark.read_text().split())) == 2:
                run.send_signal(signal.Signals[end])
                break
            if run.poll() is not None:
                break
            time.sleep(0.1)
    assert run.returncode == {"return": 0, "raise": 1, "SIGTERM": 143, "SIGKILL": -9}[end]
    assert gone([int(pid) for pid in mark.read_text().split()])


def test_a_reward_model_refuses_workers_by_name_before_it_is_read():
    spec = RewardSpec("copg_jax.rewards.RewardModel", {"path": "no/such/folder"}, num_workers=2)
    with pytest.raises(InputError, match=r"RewardModel.*num_workers must be 0, got 2.*accelerator"):
        WeightedRewards([spec])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"timeout_sec": 5.0}, ["timeout_sec is 5", "num_workers is 0", "Set num_workers"]),
        ({"timeout_sec": 0.0, "num_workers": 1}, ["timeout_sec must be > 0"]),
        ({"num_workers": -1}, ["num_workers must be in [0, 1024]"]),
        ({"batch_size": 0}, ["batch_size must be in"]),
    ],
)
def test_fields_that_cannot_hold_are_refused(fields, words):
    with pytest.raises(InputError) as caught:
        RewardSpec(JUDGE, **fields)
    names_all(str(caught.value), words)


def test_how_rewards_are_computed_is_no_part_of_what_they_are():
    one = WeightedRewards([RewardSpec(JUDGE, num_workers=1, timeout_sec=1.0)])
    two = WeightedRewards([RewardSpec(JUDGE, num_workers=2, timeout_sec=1.0, batch_size=3)])
    other = WeightedRewards([RewardSpec(JUDGE, num_workers=1, timeout_sec=2.0)])
    here = WeightedRewards([RewardSpec(JUDGE)])
    assert one.fingerprint == two.fingerprint
    assert len({one.fingerprint, other.fingerprint, here.fingerprint}) == 3


def test_batches_in_the_run_s_own_process_give_the_same_and_say_how_far_they_are():
    texts, told = ["a", "bb", "", "ccc", "d"], []
    whole = ask(WeightedRewards([RewardSpec(JUDGE)]), texts)
    spec = RewardSpec(JUDGE, batch_size=2)
    assert ask(WeightedRewards([spec]), texts) == whole
    both: Any = WeightedRewards([spec, replace(spec, name="second")])
    both(["p"] * 5, texts, {}, num_tokens=[9] * 5, update=told.append)
    assert told == [2, 4, 5, 7, 9, 10]
