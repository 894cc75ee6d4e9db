"""Groups of runs beside each other: paired changes at the same method and β."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.studies import tables
from experiments.studies.groups import (
    front_figure,
    groups_figure,
    rows_by_group,
    to_markdown,
)
from experiments.studies.outcomes import Curve
from tests.studies.test_tables import BASE, COPG, DPO, MILD, with_gold


def shifted(curve: Curve, gain: np.ndarray) -> Curve:
    """The same curve with other rewards of its last step."""
    final = [replace(one.final, reward=one.final.reward + gain) for one in curve.runs]
    runs = tuple(replace(r, final=f) for r, f in zip(curve.runs, final, strict=True))
    return replace(curve, runs=runs)


def test_a_change_is_paired_with_the_first_group_at_the_same_method_and_beta():
    gain = np.array([0.0, 0.5, 1.0])
    rows = rows_by_group({"a": [COPG, MILD], "b": [shifted(COPG, gain), DPO]}, beta=0.5)
    assert [(row["group"], row["method"], row["beta"]) for row in rows] == [
        ("a", "copg", 0.1),
        ("a", "copg", 1.0),
        ("b", "copg", 0.1),
        ("b", "dpo", 0.5),
    ]
    changes = [row["change/reward"] for row in rows]
    assert changes[2] == pytest.approx(0.5) == rows[2]["change/objective"]
    # The seeds changed alike, prompt by prompt: 0, 0.5, 1.
    assert rows[2]["change/reward_se_prompts"] == pytest.approx(0.5 / math.sqrt(3))
    assert rows[2]["change/reward_se_seeds"] == pytest.approx(0.0)
    assert all(map(math.isnan, [changes[0], changes[1], changes[3]]))


def test_rewards_of_another_zero_are_not_subtracted():
    other = replace(BASE, reward=BASE.reward + 1)
    runs = tuple(replace(one, baseline=other) for one in COPG.runs)
    rows = rows_by_group({"a": [COPG], "b": [replace(COPG, runs=runs)]}, beta=0.5)
    assert math.isnan(rows[1]["change/reward"])


def test_groups_of_other_rewards_share_one_table():
    rows = rows_by_group({"a": [COPG], "b": [with_gold(COPG)]}, beta=0.5)
    header, first, second = tables.to_csv(rows).splitlines()
    assert "reward/gold" in header.split(",")
    at = header.split(",").index("reward/gold")
    assert first.split(",")[at] == "" and float(second.split(",")[at]) == pytest.approx(-3.0)
    assert "| gold alone |" in to_markdown(rows, beta=0.5)


def test_a_reward_by_name_has_its_change_where_its_own_zero_is_the_same():
    other = replace(BASE, reward=BASE.reward + 1, named={"gold": -BASE.reward})
    changed = shifted(with_gold(COPG), np.full(3, 0.5))
    runs = tuple(
        replace(one, baseline=other, final=replace(one.final, named={"gold": 2 * BASE.reward}))
        for one in changed.runs
    )
    rows = rows_by_group({"a": [with_gold(COPG)], "b": [replace(changed, runs=runs)]}, beta=0.5)
    assert math.isnan(rows[1]["change/reward"])  # its judge has another zero
    golds = [2 * BASE.reward + one.final.reward for one in COPG.runs]
    assert rows[1]["change/reward/gold"] == pytest.approx(np.mean(golds))
    assert "gold: change" in to_markdown(rows, beta=0.5)


def test_the_table_and_the_picture_hold_the_numbers():
    rows = rows_by_group({"a": [COPG], "b": [shifted(COPG, np.full(3, 0.25))]}, beta=0.5)
    lines = to_markdown(rows, beta=0.5).splitlines()
    assert lines[2].startswith("| a | CoPG | 0.1 | 3.000 ±") and lines[2].endswith("| 2 |  |  |")
    assert lines[3].endswith("| 0.250 ± 0.000 ± 0.000 (0.000) | 0.250 ± 0.000 ± 0.000 (0.000) |")
    figure = groups_figure(rows, beta=0.5)
    xs = [x for axes in figure.axes for line in axes.lines for x in np.ravel(line.get_xdata())]
    for name in ("reward", "kl", "objective"):
        assert any(x == pytest.approx(rows[1][name]) for x in xs)
    plt.close(figure)


def test_each_row_of_a_picture_has_a_line_of_its_own_beside_its_group():
    other = replace(COPG, beta=0.3)
    rows = rows_by_group({"a": [COPG, other], "b": [COPG]}, beta=0.5)
    figure = groups_figure(rows, beta=0.5)
    axes = figure.axes[0]
    drawn = {c.get_label(): np.ravel(c.lines[0].get_ydata()).tolist() for c in axes.containers}
    assert drawn == {"CoPG 0.1": [0.0, 3.0], "CoPG 0.3": [1.0]}  # a line between two groups
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_yticks().tolist() == [0.5, 3.0]
    plt.close(figure)


def test_a_front_has_a_point_a_group_where_it_ends_in_both_rewards():
    rows = rows_by_group({"arm_a": [with_gold(COPG)], "arm_b": [COPG]}, beta=0.5)
    figure = front_figure(rows, "judge", "gold")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["a"]  # b has no such rewards
    assert axes.texts[0].xy == (pytest.approx(3.0), pytest.approx(-3.0))
    plt.close(figure)
