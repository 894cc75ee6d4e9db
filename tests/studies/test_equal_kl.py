"""Runs at equal KL: what is read off, against what one computes by hand."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.studies.equal_kl import BEST, measures, paths_figure, rows_at_kl, to_markdown
from experiments.studies.outcomes import Curve, Evaluation
from experiments.studies.runner import DONE
from tests.studies.test_tables import BASE, COPG, DPO, run, with_gold


def curve(*ways) -> Curve:
    """CoPG at one β; of each seed (step, reward, KL)."""
    runs = []
    for seed, way in enumerate(ways):
        steps = tuple(Evaluation(step, reward, 0.1, kl, math.nan) for step, reward, kl in way)
        runs.append(replace(run("copg", 0.1, seed, np.zeros(3)), steps=steps))
    return Curve("copg", 0.1, tuple(runs), (DONE,) * len(runs))


# The first rises to 4 nats, falls back and rises again; the second stays below 1 nat.
FAR = ((0, 1.0, 0.0), (10, 2.0, 1.0), (20, 2.5, 4.0), (30, 2.0, 0.25), (40, 9.0, 4.0))
NEAR = ((0, 2.0, 0.0), (10, 2.6, 0.36), (20, 2.8, 0.81))


def by_level(groups) -> dict:
    return {(row["of"], row["group"], row["at"]): row for row in rows_at_kl(groups)}


def test_rewards_are_read_off_on_a_line_in_the_root_where_a_run_first_gets_there():
    rows = by_level({"": [curve(FAR, NEAR)]})
    low = rows["reward", "", 0.3]
    parts = math.sqrt(0.3), math.sqrt(0.3) / 0.6  # of the first ten steps of each
    assert low["reward"] == pytest.approx((parts[0] * 1.0 + parts[1] * 0.6) / 2)
    assert low["step"] == pytest.approx(5 * (parts[0] + parts[1]))
    three = rows["reward", "", 3.0]
    # FAR alone: from 1 to 2 in √KL, so √3 - 1 of the way; the second time it is at 3 nats is later.
    assert three["reward"] == pytest.approx(1.0 + 0.5 * (math.sqrt(3) - 1))
    assert (three["num_reached"], three["num_seeds"]) == (1, 2)
    assert math.isnan(three["reward_se_seeds"])
    assert ("reward", "", 10.0) not in rows  # nobody gets there


def test_a_run_that_jumps_over_a_level_says_nothing_about_it():
    jump = ((0, 0.0, 0.0), (10, 1.0, 4.1))
    rows = by_level({"": [curve(jump, FAR)]})
    assert rows["reward", "", 1.0]["num_reached"] == 1  # 4.1 is more than four times 1
    assert rows["reward", "", 3.0]["num_reached"] == 2


def test_the_best_step_is_that_of_each_run():
    best = by_level({"": [curve(FAR, NEAR)]})["reward", "", BEST]
    assert best["reward"] == pytest.approx((8.0 + 0.8) / 2)
    assert (best["step"], best["kl"]) == (30.0, pytest.approx((4.0 + 0.81) / 2))


def test_another_reward_is_read_at_the_same_place_and_the_one_trained_on_once():
    rows = by_level({"a": [with_gold(COPG)], "b": [with_gold(DPO)]})
    assert {of for of, _, _ in rows} == {"reward", "gold"}  # the judge is what is trained on
    assert rows["gold", "a", 3.0]["reward"] == pytest.approx(-rows["reward", "a", 3.0]["reward"])
    # At the best step of the reward, where gold is at its worst.
    assert rows["gold", "a", BEST]["reward"] == pytest.approx(-2.0)


def test_the_table_says_how_many_seeds_got_there():
    text = to_markdown(rows_at_kl({"": [curve(FAR, NEAR)]}))
    lines = text.splitlines()
    assert lines[0].endswith("| reward at 0.3 nats | reward at 1 nats | reward at 3 nats |")
    assert lines[2].startswith("| all | CoPG | 0.1 | 4.400 ± 3.600 | 30 | 2.41 |")
    assert lines[2].endswith("| 1.000 (1/2) | 1.366 (1/2) |")
    assert "(one evaluation has 0.100 over prompts)" in text


def test_rewards_of_another_zero_are_not_put_beside_each_other():
    other = replace(
        BASE, reward=BASE.reward + 1, named={"judge": BASE.reward + 1, "gold": -BASE.reward}
    )
    runs = tuple(replace(one, baseline=other) for one in with_gold(COPG).runs)
    groups = {"a": [with_gold(COPG)], "b": [replace(with_gold(COPG), runs=runs)]}
    assert list(measures(groups)) == ["gold"]
    # In a picture each is drawn by itself, in units of its own spread.
    wide = replace(other, reward=np.append(10 * BASE.reward, np.nan))  # one prompt has none
    groups["b"] = [
        replace(one, runs=tuple(replace(run, baseline=wide) for run in one.runs))
        for one in groups["b"]
    ]
    figure = paths_figure(groups)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "own reward above step 0,\nin s.d. of π_ref's over prompts",
        "gold above step 0",
    ]
    figure.canvas.draw()
    left = [axes.yaxis.label.get_window_extent() for axes in figure.axes]
    assert all(box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in left)  # none is cut off
    ways = [np.asarray(line.get_ydata()) for line in figure.axes[0].lines[0:4:2]]  # and their ends
    assert np.abs(ways[0]).max() > 0
    np.testing.assert_allclose(ways[0], 10 * ways[1])
    plt.close(figure)


def test_the_picture_has_a_panel_a_measure_method_and_beta_and_a_curve_a_group():
    figure = paths_figure({"a": [with_gold(COPG)], "b": [with_gold(COPG), with_gold(DPO)]})
    assert len(figure.axes) == 4
    panels = [[line for line in axes.lines if line.get_ls() != "None"] for axes in figure.axes]
    # Two groups of CoPG and one of DPO, and the line at 0; CoPG ends at 10 nats, DPO at 5.
    assert [len(lines) for lines in panels] == [3, 2, 3, 2]
    ends = [[line.get_xdata()[-1] for line in lines[:-1]] for lines in panels]
    assert ends[0] == [pytest.approx(math.sqrt(10.0))] * 2 and ends[1] == [pytest.approx(5**0.5)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    plt.close(figure)
