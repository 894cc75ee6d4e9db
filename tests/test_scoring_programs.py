"""`score` and `evaluate` with rewards that run programs: what is missing is counted by reason."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from etils import epath

from copg_jax.data import scored
from copg_jax.errors import InputError
from copg_jax.files import read_json_lines
from tests.toys import names_all
from tests.workplace import Workplace

GOOD, BAD = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a - b\n"
WAITS = "import time\ntime.sleep(99)\n"
# As many tests as completions in every row: they are the row's all the same.
TESTS = ["assert add(1, 2) == 3", "assert add(4, 0) == 4"]
PAIRS = [(GOOD, BAD), (BAD, WAITS), (WAITS, GOOD), (BAD, "def add(a, b): exit(0)")]
SHARES = [[1.0, 0.5], [0.5, None], [None, 1.0], [0.5, 0.0]]
ARGUMENTS = "{column: tests, wall_sec: 5}"
UNIT_TESTS = f"function: copg_jax.rewards.unit_tests, arguments: {ARGUMENTS}"
PART = ["part_size=2", "data.format=text", "data.max_rows=null"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """A base model."""
    place = Workplace(tmp_path_factory.mktemp("programs"))
    (place.folder / "sft").mkdir()
    (place.folder / "sft" / "model").symlink_to(place.folder / "base")
    return place


def arguments(place: Workplace, folder: Path, rows: list[dict], spec: str) -> list[str]:
    """Settings of a run of `score` on these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"data.path={path}", f"rewards=[{{{spec}}}]", f"output_dir={folder / 'scored'}"]
    return [*own, *PART, "data.holdout_fraction=0", "data.part=all"]


def rows(*tests: object) -> list[dict]:
    """A row for each pair; the tests of the first ones may be others."""
    given = [*tests, *[TESTS] * (len(PAIRS) - len(tests))]
    return [
        {"prompt": f"Add {i}.", "completions": list(pair), "tests": own}
        for i, (pair, own) in enumerate(zip(PAIRS, given, strict=True))
    ]


@pytest.mark.slow
def test_shares_are_stored_and_what_is_missing_is_counted_by_reason_over_an_interruption(
    place, tmp_path, monkeypatch, capfd
):
    workers = f"{UNIT_TESTS}, num_workers: 2, timeout_sec: 60"
    given = arguments(place, tmp_path, rows(), workers)
    write = scored.write_part

    def fails_at_the_second(folder: Path, index: int, *rest: object) -> dict[str, str]:
        if index:
            raise InputError("stopped")
        return write(folder, index, *rest)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="stopped"):
        patch.setattr(scored, "write_part", fails_at_the_second)
        place.run("score", *given)
    # Fewer workers, another batch size: the same run.
    place.run("score", *given[:1], f"rewards=[{{{workers}, batch_size: 2}}]", *given[2:])
    got = read(tmp_path / "scored")
    assert [row["reward"] for row in got] == SHARES
    side_car = scored.read_side_car(epath.Path(tmp_path / "scored"))
    name = "rewards/unit_tests/dropped/timeout"
    assert side_car.counts["rewards missing"] == {name: 2}
    assert side_car.counts["without a reward"] == 2
    lines = [line for _, line in read_json_lines(epath.Path(tmp_path / "scored/metrics.jsonl"))]
    assert [line.get(name) for line in lines if "reward/mean" in line] == [1, 1]
    assert f"{name}: 2" in capfd.readouterr().err


def read(folder: Path) -> list[dict]:
    """Rows of a scored folder."""

    return [
        row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_tests_that_are_no_python_are_refused_with_their_row_before_anything_is_scored(
    place, tmp_path, num_workers
):
    spec = f"{UNIT_TESTS}, num_workers: {num_workers}"
    given = arguments(place, tmp_path, rows(TESTS, TESTS, TESTS, ["assert add("]), spec)
    words = ["rows.jsonl:4", "unit_tests", "column 'tests'", "is no Python", "assert add("]
    names_all(place.refusal("score", *given), words)
    assert list((tmp_path / "scored").glob("part-*")) == []


def test_a_run_without_one_reward_says_why(place, tmp_path):
    given = arguments(place, tmp_path, rows(None, None, None, None), UNIT_TESTS)
    words = ["not one of 8", "unit_tests", "rewards/unit_tests/dropped/no_tests': 8"]
    names_all(place.refusal("score", *given), words)
