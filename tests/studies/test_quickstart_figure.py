"""The picture of the quickstart shows the numbers that were measured."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.studies.comparison import Point, Policy, Trained
from experiments.studies.quickstart_figure import COLOURS, reward_and_frontier, save

SFT = Policy(np.array([1.0, 3.0]), np.zeros(2), np.ones(2), np.ones(2), np.zeros(2))


def trained(method, beta, kl, gain) -> Trained:
    """A run with evaluations at steps 0, 10 and 20 that ends at this KL and gain over SFT."""
    points = [Point(0, 0.0, 0.0, 64), Point(10, kl / 2, gain / 3, 64), Point(20, kl, gain, 64)]
    end = Policy(
        SFT.reward + gain + np.array([0.1, -0.1]),
        kl * np.ones(2),
        np.ones(2),
        np.ones(2),
        np.zeros(2),
    )
    return Trained(method, beta, points, end)


RUNS = [
    trained("copg", 0.3, 0.6, 0.4),
    trained("copg", 0.03, 3.0, 0.2),
    trained("dpo", 0.5, 0.8, 0.3),
    trained("dpo", 5.0, 0.1, 0.1),
]


@pytest.fixture
def figure():
    figure = reward_and_frontier(RUNS, SFT, beta=0.5)
    yield figure
    plt.close(figure)


def drawn(axes, colour):
    """(x, y) of each line of a colour."""
    lines = [line for line in axes.lines if line.get_color() == colour]
    return [(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in lines]


def test_the_curves_are_those_of_the_runs_from_zero_on(figure):
    left, _ = figure.axes
    curves = drawn(left, COLOURS["copg"])
    assert [x for x, _ in curves] == [(0, 10, 20), (0, 10, 20)]
    np.testing.assert_allclose([y for _, y in curves], [(0, 0.4 / 3, 0.4), (0, 0.2 / 3, 0.2)])


def test_the_frontier_joins_the_last_evaluations_in_the_order_of_beta_to_the_sft_model(figure):
    _, right = figure.axes
    wanted = {"copg": ((3.0, 0.6, 0.0), (0.2, 0.4, 0.0)), "dpo": ((0.8, 0.1, 0.0), (0.3, 0.1, 0.0))}
    for method, way in wanted.items():
        (found,) = [line for line in drawn(right, COLOURS[method]) if len(line[0]) == 3]
        np.testing.assert_allclose(found, way)


def test_evaluations_on_the_way_are_shown_once_and_the_ends_with_their_errors(figure):
    _, right = figure.axes
    assert ((0.3,), (pytest.approx(0.4 / 3),)) in drawn(right, COLOURS["copg"])
    bars = [bar for bar in right.containers if bar.has_yerr]
    assert len(bars) == len(RUNS)
    ends = {bar.lines[0].get_ydata()[0] for bar in bars}
    np.testing.assert_allclose(sorted(ends), [0.1, 0.2, 0.3, 0.4])
    low, high = bars[0].lines[2][1].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 0.1)  # ± 0.1, the paired standard error of two prompts


def test_the_same_rank_of_beta_has_the_same_marker_in_all_methods(figure):
    left, _ = figure.axes
    markers = {(line.get_color(), line.get_marker()) for line in left.lines}
    assert markers == {(COLOURS[m], mark) for m in ("copg", "dpo") for mark in ("v", "o")}
    smallest = next(line for line in left.lines if line.get_ydata()[-1] == pytest.approx(0.2))
    assert smallest.get_marker() == "v"


def test_level_lines_have_the_slope_of_the_objective_and_leave_the_axes_alone(figure):
    _, right = figure.axes
    levels = drawn(right, "#bbbbbb")
    assert levels
    for x, y in levels:
        np.testing.assert_allclose(np.diff(y) / np.diff(x), 0.5)
    assert 0 < right.get_xlim()[1] < 4 and right.get_ylim()[1] < 1


def test_the_legend_names_every_beta_and_lies_below_the_axes(figure):
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert {"CoPG, β = 0.03, 0.3", "DPO, β = 0.5, 5", "small β", "large β"} <= set(texts)
    figure.canvas.draw()
    for axes in figure.axes:
        assert not legend.get_window_extent().overlaps(axes.get_tightbbox())


def test_a_saved_picture_is_a_png_and_is_closed(tmp_path):
    save(reward_and_frontier(RUNS[:1], SFT, beta=0.5), tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []
