"""Runs at equal KL: what is read off, against what one computes by hand."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.studies.equal_kl import BEST, paths_figure, rows_at_kl, to_markdown
from experiments.studies.outcomes import Curve, Evaluation
from experiments.studies.runner import DONE
from tests.studies.test_tables import COPG, DPO, run, with_gold


def curve(*ways) -> Curve:
    """CoPG at one β; of each seed (step, reward, KL)."""
    runs = []
    for seed, way in enumerate(ways):
        steps = tuple(Evaluation(step, reward, 0.1, kl, math.nan) for step, reward, kl in way)
        runs.append(replace(run("copg", 0.1, seed, np.zeros(3)), steps=steps))
    return Curve("copg", 0.1, tuple(runs), (DONE,) * len(runs))


# The first rises to 4 nats and falls back, the second stays below 1 nat.
FAR = ((0, 1.0, 0.0), (10, 3.0, 2.0), (20, 2.5, 4.0), (30, 2.0, 0.5))
NEAR = ((0, 2.0, 0.0), (10, 2.6, 0.4), (20, 2.8, 0.8))


def by_level(groups) -> dict:
    return {(row["of"], row["group"], row["at"]): row for row in rows_at_kl(groups)}


def test_rewards_are_read_off_on_a_line_between_evaluations_where_a_run_first_gets_there():
    rows = by_level({"": [curve(FAR, NEAR)]})
    low = rows["reward", "", 0.3]
    # FAR: 0.3 of the 2 nats of its first 10 steps; NEAR: 0.3 of 0.4 nats.
    assert low["reward"] == pytest.approx((0.3 + 0.45) / 2)
    assert low["step"] == pytest.approx((1.5 + 7.5) / 2)
    assert low["reward_se_seeds"] == pytest.approx(0.075)
    three = rows["reward", "", 3.0]
    assert (three["reward"], three["num_reached"], three["num_seeds"]) == (1.75, 1, 2)
    assert math.isnan(three["reward_se_seeds"])
    assert ("reward", "", 10.0) not in rows  # nobody gets there


def test_the_best_step_is_that_of_each_run():
    best = by_level({"": [curve(FAR, NEAR)]})["reward", "", BEST]
    assert best["reward"] == pytest.approx((2.0 + 0.8) / 2)
    assert (best["step"], best["kl"]) == (15.0, pytest.approx(1.4))


def test_another_reward_is_read_at_the_same_place_and_the_one_trained_on_once():
    rows = by_level({"a": [with_gold(COPG)], "b": [DPO]})
    assert {of for of, _, _ in rows} == {"reward", "gold"}  # the judge is what is trained on
    assert rows["gold", "a", 1.0]["reward"] == pytest.approx(-rows["reward", "a", 1.0]["reward"])
    # At the best step of the reward, where gold is at its worst.
    assert rows["gold", "a", BEST]["reward"] == pytest.approx(-2.0)
    assert math.isnan(rows["gold", "b", 1.0]["reward"])


def test_the_table_says_how_many_seeds_got_there():
    text = to_markdown(rows_at_kl({"": [curve(FAR, NEAR)]}))
    lines = text.splitlines()
    assert lines[0].endswith("| reward at 0.3 nats | reward at 1 nats | reward at 3 nats |")
    assert lines[2] == (
        "| all | CoPG | 0.1 | 1.400 ± 0.600 | 15 | 1.40 | 0.375 ± 0.075 | 1.000 (1/2) | "
        "1.750 (1/2) |"
    )


def test_the_picture_has_a_panel_a_measure_method_and_beta_and_a_curve_a_group():
    figure = paths_figure({"a": [with_gold(COPG)], "b": [with_gold(COPG), with_gold(DPO)]})
    assert len(figure.axes) == 4
    first = figure.axes[0]
    curves = [
        line for line in first.lines if len(line.get_xdata()) == 2 and line.get_marker() == "None"
    ]
    ends = [line.get_xdata()[-1] for line in curves[:1]]
    assert ends == [pytest.approx(math.sqrt(10.0))]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    plt.close(figure)
