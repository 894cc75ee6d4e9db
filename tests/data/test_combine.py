"""One reward of several: the formulas, the rule for absent ones, and data that is combined anew."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from copg_jax import pooled
from copg_jax.config.sections import DataConfig
from copg_jax.data import scored
from copg_jax.data.combine import Moments, combine
from copg_jax.data.dataset import GroupDataset, data_key, prepare
from copg_jax.data.formats.choice import FORMATS
from copg_jax.data.groups import TokenGroup
from copg_jax.data.reader import GroupReader
from copg_jax.data.scored import ScoredGroup, SideCar
from copg_jax.data.tokenizer import Encoder, tokenizer_hash
from copg_jax.errors import InputError
from tests.toys import names_all

WEIGHTS = {"a": 2.0, "b": -0.5, "watched": 0.0}
MOMENTS = {"a": Moments(1.0, 2.0), "b": Moments(-1.0, 0.5)}
FORMULAS = {
    "sum": lambda a, b: 2 * a - 0.5 * b,
    "min": lambda a, b: min(2 * a, -0.5 * b),
    "standardized_sum": lambda a, b: 2 * (a - 1) / 2 - 0.5 * (b + 1) / 0.5,
}


def combined(by_name: dict[str, list[float]], how: str, weights: Any = WEIGHTS) -> np.ndarray:
    """With these weights and moments."""
    return combine({name: np.array(x) for name, x in by_name.items()}, weights, how, MOMENTS)


@pytest.mark.parametrize("how", FORMULAS)
def test_a_combination_is_its_formula_and_no_other(how, rng):
    a, b, watched = np.float32(rng.normal(size=(3, 50)))
    got = combined({"a": a, "b": b, "watched": watched}, how)
    for name, formula in FORMULAS.items():
        wanted = [formula(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        assert np.allclose(got, wanted, rtol=1e-12) == (name == how)


@pytest.mark.parametrize("how", FORMULAS)
def test_an_absent_reward_makes_all_absent_unless_its_weight_is_zero(how):
    rows = {"a": [1, math.nan, 1, 1], "b": [1, 1, math.nan, 1], "watched": [1, 1, 1, math.nan]}
    assert np.isnan(combined(rows, how)).tolist() == [False, True, True, False]


@pytest.mark.parametrize("how", FORMULAS)
def test_the_order_of_the_weights_does_not_change_a_bit(how, rng):
    rows = dict(zip("abw", 1e3 * rng.normal(size=(3, 99)), strict=True))
    weights = {"w": 0.1, "b": 0.7, "a": 1 / 3}
    given = {name: Moments(0.1, 0.3) for name in weights}
    turned = dict(reversed(weights.items()))
    got, other = (combine(rows, each, how, given) for each in (weights, turned))
    assert got.tobytes() == other.tobytes()


# --- scored data ---

PROMPT = "SUBREDDIT: r/x\n\nTITLE: t{}\n\nPOST: p\n\nTL;DR:"


def row(i: int, a: list[float], b: list[float]) -> ScoredGroup:
    """A pair that was scored as a + 0.3·b, by rewards a, b and one that is the same for all."""
    by_name = {"a": np.float32(a), "b": np.float32(b), "same": np.ones(2)}
    group = TokenGroup(
        id=str(i),
        where="",
        prompt=PROMPT.format(i),
        prompt_tokens=np.array([5, 6 + i], np.int32),
        completions=(" x", " y"),
        completion_tokens=(np.array([7, 8]), np.array([9, 3, 4])),
        rewards=combine(by_name, {"a": 1.0, "b": 0.3}),
        ref_logps=np.float32([-1.0, -2.0]),
    )
    return ScoredGroup(group, by_name)


def write(folder: Path, tokenizer: Any, rows: list[ScoredGroup]) -> Path:
    """A scored folder of two parts."""
    parts = {}
    for part, some in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        parts |= scored.write_part(epath.Path(folder), part, some, "key")
    side_car = SideCar(
        tokenizer_hash=tokenizer_hash(tokenizer),
        text_format="tldr",
        text_format_hash=FORMATS["tldr"].hash,
        reference_hash="r",
        reference_dtype="float32",
        rewards=[],
        limits={},
        complete=True,
        parts=parts,
    )
    scored.write_side_car(epath.Path(folder), side_car)
    return folder


@pytest.fixture(scope="module")
def folder(plain, tmp_path_factory) -> Path:
    """Twenty pairs; a and b lack a value each in the second and the third."""
    values = np.random.default_rng(3).normal(size=(20, 2, 2)) * [[[1.0], [7.0]]] + 2
    values[1, 0, 0] = values[2, 1, 1] = math.nan
    rows = [row(i, *pair.tolist()) for i, pair in enumerate(values)]
    return write(tmp_path_factory.mktemp("scored"), plain, rows)


def opened(folder: Path, tokenizer: Any, arrow: Path, **settings: Any) -> GroupDataset:
    """The data set of a scored folder."""
    config = DataConfig(path=str(folder), **settings)
    reader = GroupReader(config)
    return prepare(reader, tokenizer, path=arrow, limits=config.limits, vocab_size=500)


def test_the_weights_of_scoring_give_the_rewards_of_scoring_bit_for_bit(folder, plain, tmp_path):
    stored = opened(folder, plain, tmp_path / "stored.arrow")
    again = opened(folder, plain, tmp_path / "again.arrow", rewards={"b": 0.3, "a": 1.0})
    assert len(stored) == len(again) == 18
    for one, other in zip(stored, again, strict=True):
        assert one.rewards.tobytes() == other.rewards.tobytes()
        assert one.completion_tokens[1].tolist() == other.completion_tokens[1].tolist()


def test_data_is_combined_anew_and_what_lacks_a_reward_is_dropped_and_counted_by_its_name(
    folder, plain, tmp_path
):
    got = opened(folder, plain, tmp_path / "a.arrow", rewards={"a": -1.0, "b": 0.0})
    assert len(got) == 19
    assert got.stats["changed"] == {
        "completion without a reward": 1,
        "completion without the reward 'a'": 1,
    }
    least = opened(folder, plain, tmp_path / "m.arrow", rewards={"a": 1, "b": 2}, combine="min")
    assert len(least) == 18
    for group in least:
        stored = next(g for g in rows_of(folder) if g["id"] == group.id)
        by_name = dict(stored["rewards"])
        wanted = [min(x, 2 * y) for x, y in zip(by_name["a"], by_name["b"], strict=True)]
        assert group.rewards.tolist() == np.float32(wanted).tolist()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of a scored folder, as they are stored."""
    paths = sorted(folder.glob("part-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_a_reward_is_standardised_over_the_whole_folder_whatever_part_of_it_is_read(
    folder, plain, tmp_path, caplog
):
    caplog.set_level("INFO", "copg_jax")
    weights = {"rewards": {"a": 1.0, "b": 0.5}, "combine": "standardized_sum"}
    stored = {name: [] for name in "ab"}
    for kept in rows_of(folder):
        for name in stored:
            stored[name] += [x for x in dict(kept["rewards"])[name] if x is not None]
    (m_a, s_a), (m_b, s_b) = ((np.mean(x), np.std(x)) for x in stored.values())
    wanted = {
        r["id"]: [
            (x - m_a) / s_a + 0.5 * (y - m_b) / s_b
            for x, y in zip(*(dict(r["rewards"])[n] for n in "ab"), strict=True)
        ]
        for r in rows_of(folder)
        if None not in dict(r["rewards"])["a"] + dict(r["rewards"])["b"]
    }
    held_out = {"holdout_fraction": 0.4}
    for i, part in enumerate(
        ({}, {"max_rows": 4}, *({**held_out, "part": p} for p in ("train", "validation")))
    ):
        got = list(opened(folder, plain, tmp_path / f"{i}.arrow", **weights, **part))
        assert got
        for group in got:
            np.testing.assert_allclose(group.rewards, wanted[group.id], rtol=1e-5, atol=1e-6)
    text = f"'b' has mean {m_b:.4g} and standard deviation {s_b:.4g}"
    assert f"{text}, so that its weight in the sum is {0.5 / s_b:.4g}" in caplog.text


def test_another_combination_is_other_data_and_another_order_of_it_is_not(folder, plain):
    def key(rewards: dict[str, float], how: str = "sum") -> str:
        config = DataConfig(path=str(folder), rewards=rewards, combine=how)
        return data_key(GroupReader(config), Encoder(plain), config.limits, 500)

    both = {"a": 1.0, "b": 2.0}
    assert key(both) == key({"b": 2.0, "a": 1.0})
    others = [key({}), key(both), key(both, "min"), key(both, "standardized_sum"), key({"a": 1.0})]
    assert len(set(others)) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rewards": {"a": 1.0, "lenght": 1.0}}, ["data.rewards", "'lenght'", "a, b, same", "Fix"]),
        (
            {"rewards": {"a": 1.0, "same": 1.0}, "combine": "standardized_sum"},
            ["data.combine", "'same'", "standard deviation", "Fix"],
        ),
        ({"rewards": {"a": 3e38}}, ["part-00000.parquet:", "combined reward", "smaller weights"]),
    ],
)
def test_a_combination_that_cannot_be_is_refused(folder, plain, tmp_path, settings, words):
    with pytest.raises(InputError) as caught:
        opened(folder, plain, tmp_path / "x.arrow", **settings)
    names_all(str(caught.value), words)


def test_weights_for_data_that_was_not_scored_are_refused_before_a_row_is_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text("no row")
    reader = GroupReader(DataConfig(path=str(tmp_path / "rows.jsonl"), rewards={"a": 1.0}))
    for use in (lambda: reader.check_ids(""), lambda: next(iter(reader))):
        with pytest.raises(InputError, match=r"data\.rewards: .*experiments\.score wrote.*rows"):
            use()


def test_ties_are_those_of_the_combined_reward(folder, plain, tmp_path):
    tied = opened(folder, plain, tmp_path / "tied.arrow", rewards={"same": 1.0})
    with pytest.raises(InputError, match="all completions are equally good"):
        pooled.require_differences("d", tied)
    both = opened(folder, plain, tmp_path / "both.arrow", rewards={"same": 1.0, "a": 1e-3})
    pooled.require_differences("d", both)
    assert len(both) == 19
