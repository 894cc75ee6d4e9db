"""Statistics of stored rewards are those of all pairs, one by one."""

import itertools
import math

import numpy as np
import pytest

from copg_jax.data.reward_stats import StoredRewards, describe_rewards, format_rewards

TOTAL = "total reward"


def by_hand(values: np.ndarray, group: np.ndarray, length: np.ndarray) -> dict[str, float]:
    """The same numbers by a loop over all pairs."""
    known = [i for i in range(len(values)) if not math.isnan(values[i])]
    pairs = [(i, j) for i, j in itertools.permutations(known, 2) if group[i] == group[j]]
    gaps = np.array([values[i] - values[j] for i, j in pairs])
    longer = np.array([length[i] - length[j] for i, j in pairs])
    return {
        "mean": np.mean(values[known]),
        "std": np.std(values[known]),
        "gap_std": np.std(gaps),
        "ties": np.mean(gaps == 0),
        "length_corr": np.corrcoef(values[known], length[known])[0, 1],
        "gap_length_corr": np.corrcoef(gaps, longer)[0, 1],
        "missing": len(values) - len(known),
    }


def stored(values: np.ndarray, group: np.ndarray, length: np.ndarray) -> StoredRewards:
    """One reward, which is the total too."""
    return StoredRewards(group, length, {"judge": values}, values)


def test_statistics_are_those_of_all_pairs_one_by_one(rng):
    group = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    length = rng.integers(1, 9, len(group))
    values = np.round(rng.normal(size=len(group)) + group % 3 + 0.2 * length)  # many ties
    values[rng.random(len(group)) < 0.1] = math.nan
    found = describe_rewards(stored(values, group, length))
    assert found["judge"] == found[TOTAL] == pytest.approx(by_hand(values, group, length))
    # What the groups differ in says nothing of the pairs.
    shifted = describe_rewards(stored(values + 100 * group, group, length))["judge"]
    for name in ("gap_std", "ties", "gap_length_corr"):
        assert shifted[name] == pytest.approx(found["judge"][name])
    assert shifted["std"] > 100 * found["judge"]["std"]


@pytest.mark.parametrize(
    ("values", "group", "known"),
    [
        ([0.1, 0.1, 0.1], [0, 0, 0], {"mean": 0.1, "gap_std": 0.0, "ties": 1.0}),
        ([1.0, 2.0, 3.0], [0, 1, 2], {"mean": 2.0}),
        ([math.nan] * 3, [0, 0, 1], {"missing": 3}),
        ([], [], {"missing": 0}),
    ],
    ids=["all the same", "no pair", "none at all", "no rows"],
)
def test_what_says_nothing_is_none_and_no_number(values, group, known):
    length = np.arange(len(values))
    (found, _) = describe_rewards(stored(np.array(values), np.array(group, int), length)).values()
    assert {name: found[name] for name in known} == pytest.approx(known, abs=1e-12)
    assert found["gap_length_corr"] is None
    assert not any(isinstance(value, float) and math.isnan(value) for value in found.values())


def test_the_table_has_a_line_for_each_reward_with_its_numbers():
    found = describe_rewards(stored(np.array([1.0, 2.5]), np.array([0, 0]), np.array([3, 4])))
    head, *lines = format_rewards(found).splitlines()
    assert head.split() == list(found[TOTAL])
    assert [line.split()[-7:] for line in lines] == [
        ["1.75", "0.75", "1.5", "0", "1", "1", "0"]
    ] * 2
    assert [line[: len(TOTAL)].strip() for line in lines] == ["judge", TOTAL]
