"""The numbers of a study's figures against what one computes by hand."""

import csv
import io
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pytest

from copg_jax.config.policy_data import PolicyDataConfig, SourceSpec
from copg_jax.config.sections import DataConfig
from experiments.studies import pictures, tables
from experiments.studies.comparison import Policy
from experiments.studies.outcomes import (
    Curve,
    Evaluation,
    Outcome,
    Spread,
    best_curves,
    best_values,
    curves,
    paired,
    reward_gap_sd,
    spread,
)
from experiments.studies.runner import DIVERGED, DONE
from experiments.studies.study_config import FIGURES

NAN = math.nan
BASE = Policy(np.array([0.0, 1.0, 2.0]), np.zeros(3), np.ones(3), np.ones(3), np.zeros(3))


def run(method, beta, seed, gains, kl=1.0, steps=((0, 1.0), (10, 2.0)), loss=0.0) -> Outcome:
    """A run that ends at these rewards above π_ref on three prompts."""
    final = Policy(BASE.reward + gains, kl * np.ones(3), 2 * np.ones(3), np.ones(3), np.zeros(3))
    residuals = {"residual_samples": 1.5, "residual_held_out": 0.5}
    way = tuple(Evaluation(at, r, 0.3, kl * at, 5.0 + loss * at, **residuals) for at, r in steps)
    values = {"loss.name": method, "loss.beta": beta, "seed": seed}
    return Outcome(f"{method}{beta}{seed}", "", values, method, beta, seed, way, final, BASE)


RUNS = [
    run("copg", 0.1, 0, np.array([1.0, 2.0, 3.0]), steps=((0, 1.0), (10, 2.0))),
    run("copg", 0.1, 1, np.array([2.0, 3.0, 7.0]), steps=((0, 1.5), (10, 4.5))),
    run("dpo", 0.5, 1, np.array([1.0, 1.0, 1.0]), kl=0.5, loss=0.1),
    run("dpo", 0.5, 0, np.array([0.0, 1.0, 2.0]), kl=0.5, loss=0.1),
    run("copg", 1.0, 0, np.array([0.5, 0.5, 0.5]), kl=0.0),
    run("copg", 1.0, 1, np.array([0.5, 0.5, 0.5]), kl=0.0),
]
DONE_ALL = {(run.method, run.beta): [DONE, DONE] for run in RUNS}
CURVES = curves(RUNS, DONE_ALL)
COPG, MILD, DPO = CURVES


def test_runs_are_curves_by_method_and_beta_each_with_its_seeds():
    assert [(c.method, c.beta, [r.seed for r in c.runs]) for c in CURVES] == [
        ("copg", 0.1, [0, 1]),
        ("copg", 1.0, [0, 1]),
        ("dpo", 0.5, [0, 1]),
    ]


def test_a_spread_has_the_errors_over_prompts_and_over_seeds_by_hand():
    found = spread([np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 7.0])])
    # Prompts: 1.5, 2.5, 5; their mean 3, squares 2.25 + 0.25 + 4 = 6.5, over 2, over 3.
    # Seeds: 2 and 4; squares 1 + 1, over 1, over 2.
    assert found == pytest.approx((3.0, math.sqrt(6.5 / 2 / 3), 1.0, 2, 3))


def test_a_prompt_without_a_number_in_one_seed_is_left_out_and_one_seed_has_no_error():
    found = spread([np.array([1.0, NAN, 3.0]), np.array([2.0, 3.0, 7.0])])
    assert found[:2] == pytest.approx((3.25, 1.75))  # of 1.5 and 5
    assert math.isnan(spread([np.array([1.0, 2.0])]).over_seeds)
    assert math.isnan(spread([np.array([])]).mean)


def test_differences_are_paired_by_prompt_and_by_seed():
    found = paired(COPG, DPO, lambda policy: policy.reward)
    # Seed 0: 1, 1, 1; seed 1: 1, 2, 6. Prompts 1, 1.5, 3.5: mean 2, squares 1 + 0.25 + 2.25 = 3.5.
    assert found == pytest.approx((2.0, math.sqrt(3.5 / 2 / 3), 1.0, 2, 3))
    # Wrongly paired seeds would give 0, 1, 2 and 2, 2, 5: other errors.
    assert paired(DPO, COPG, lambda policy: policy.reward).mean == -found.mean
    other = Curve("ipo", 1.0, (run("ipo", 1.0, 5, np.zeros(3)),), (DONE,))
    assert math.isnan(paired(COPG, other, lambda policy: policy.reward).mean)  # no common seed


def test_rewards_over_steps_are_levels_whose_error_is_known_and_also_above_step_0():
    """The error of a difference from step 0, on the same prompts, is not that of the level."""
    first, last = tables.rows_over_steps([COPG])
    assert (first["step"], first["reward"], first["reward_above_start"]) == (0, 1.25, 0.0)
    assert first["reward_se_prompts"] == last["reward_se_prompts"] == pytest.approx(0.3)
    assert last["reward"] == pytest.approx((2.0 + 4.5) / 2)
    assert last["reward_above_start"] == pytest.approx((1.0 + 3.0) / 2)
    assert last["reward_se_seeds"] == pytest.approx(1.25)
    assert last["kl"] == 10.0 and last["num_seeds"] == 2
    (_, dpo) = tables.rows_over_steps([DPO])
    assert dpo["held_out_loss"] == pytest.approx(1.0)


def test_steps_that_not_all_seeds_have_are_left_out():
    longer = run("copg", 0.1, 2, np.ones(3), steps=((0, 0.0), (5, 9.0), (10, 1.0)))
    rows = tables.rows_over_steps([Curve("copg", 0.1, (RUNS[0], longer), (DONE, DONE))])
    assert [row["step"] for row in rows] == [0, 10]


def test_the_end_by_beta_is_above_pi_ref_with_j_at_the_common_beta_and_beta_in_units_of_sd():
    rows = tables.rows_by_beta(CURVES, beta=0.5, sd=0.4)
    assert rows[0]["reward"] == pytest.approx(3.0)
    assert rows[0]["objective"] == pytest.approx(3.0 - 0.5 * 1.0)
    assert rows[2]["objective"] == pytest.approx(1.0 - 0.5 * 0.5)
    assert [row["beta_in_sd"] for row in rows] == pytest.approx([0.25, 2.5, 1.25])


def test_the_best_beta_is_that_of_the_highest_mean_over_seeds():
    chosen = best_values(CURVES)
    assert chosen == [
        {"loss.name": "copg", "loss.beta": 0.1},
        {"loss.name": "dpo", "loss.beta": 0.5},
    ]
    best = best_curves(CURVES, lambda policy: -policy.log_ratio)
    assert [(curve.method, curve.beta) for curve in best] == [("copg", 1.0), ("dpo", 0.5)]


def test_a_beta_that_collapsed_or_lost_a_seed_is_not_the_best():
    nan = run("copg", 0.01, 0, np.array([NAN, NAN, NAN]))
    survivor = run("copg", 0.03, 1, np.array([9.0, 9.0, 9.0]))
    ends = {("copg", 0.01): [DONE], ("copg", 0.03): [DIVERGED, DONE, DIVERGED], **DONE_ALL}
    ends["ipo", 0.1] = [DIVERGED]
    found = curves([nan, survivor, *RUNS], ends)
    assert best_values(found)[0] == {"loss.name": "copg", "loss.beta": 0.1}
    kept = [curve for curve in found if curve.runs]
    assert tables.lost(found) == "No seed is done of IPO 0.1 (1 of 1 diverged)."
    assert tables.lost(kept) == ""
    rows = tables.rows_by_beta(kept, beta=0.5, sd=0.4)
    lines = tables.to_markdown(rows, [], beta=0.5, num_prompts=3).splitlines()
    assert lines[0].endswith("| repeats | seeds | prompts without reward |")
    assert lines[2].startswith("| CoPG | 0.01 |") and lines[2].endswith("| 1 | 3 |")
    assert lines[3].endswith("| 1 of 3, 2 diverged | 0 |")
    assert ["*" in line for line in lines[2:7]] == [False, False, True, False, True]


def test_a_prompt_without_a_reward_is_counted_where_it_is_left_out():
    holed = curves([run("copg", 0.1, 0, np.array([1.0, NAN, 3.0]))], {("copg", 0.1): [DONE]})
    (row,) = tables.rows_by_beta(holed, beta=0.5, sd=0.4)
    assert (row["reward"], row["prompts_without_reward"]) == (2.0, 1)


def test_an_error_bar_is_of_prompts_and_seeds_together():
    row = {"difference_se_prompts": 1.0, "difference_se_seeds": 1.0}
    assert tables.total_stderr(row, "difference") == pytest.approx(math.sqrt(2))
    assert tables.total_stderr(row | {"difference_se_seeds": NAN}, "difference") == 1.0
    none = {"difference_se_prompts": NAN, "difference_se_seeds": NAN}
    assert math.isnan(tables.total_stderr(none, "difference"))


def test_what_tells_methods_apart_knows_how_few_seeds_there_are():
    # Student's quantiles of one and of two degrees of freedom have closed forms.
    one, two = math.tan(math.pi * 0.475), 0.95 * math.sqrt(2 / (1 - 0.95**2))
    gap = Spread(3.0, over_prompts=0.5, over_seeds=0.1, num_seeds=2, num_prompts=3)
    width = math.hypot(two * 0.5, one * 0.1)
    assert gap.half_width == pytest.approx(width)
    single = gap._replace(over_seeds=NAN, num_seeds=1)  # the error over seeds is not known
    assert single.half_width == pytest.approx(two * 0.5)
    assert math.isnan(single._replace(over_prompts=NAN).half_width)


@pytest.mark.parametrize(
    ("gap", "told"),
    [
        (Spread(2.1, 0.0, 0.5, 3, 3), "tie"),
        (Spread(-2.2, 0.0, 0.5, 3, 3), "yes"),
        (Spread(2.2, 0.5, NAN, 1, 3), "over prompts"),  # says nothing of other seeds
        (Spread(1.0, NAN, NAN, 1, 1), "not known"),
        (Spread(NAN, NAN, NAN, 3, 0), "not known"),
        (Spread(0.0, 0.0, 0.0, 3, 3), "tie"),
    ],
)
def test_the_table_says_which_methods_are_told_apart(gap, told):
    row = {"of": "J", "first": "copg", "first_beta": 0.1, "second": "dpo", "second_beta": 0.5}
    row |= {"num_prompts": gap.num_prompts, "num_seeds": gap.num_seeds}
    row |= tables.columns("difference", gap)
    text = tables.to_markdown([], [row], beta=0.5, num_prompts=3)
    assert f"| {gap.num_prompts} | {gap.num_seeds} | {told} |" in text
    assert (f"({gap.half_width:.3f}) |" in text) == (told != "not known")


def test_the_sd_of_reward_gaps_is_over_all_pairs_of_all_groups(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a", "completions": ["x", "y"], "rewards": [3.0, 0.0]}\n'
        '{"prompt": "b", "completions": ["x", "y", "z"], "rewards": [1.0, 1.0, 3.0]}\n'
    )
    # Gaps 3; 0, 2, 2.
    config = SimpleNamespace(data=DataConfig(path=str(path)))
    assert reward_gap_sd(cast(Any, config)) == pytest.approx(math.sqrt(17 / 4))


def test_the_sd_of_reward_gaps_is_over_all_sources(tmp_path):
    for name, gap in (("a", 3.0), ("b", 1.0)):
        rows = f'{{"prompt": "{name}", "completions": ["x", "y"], "rewards": [{gap}, 0.0]}}\n'
        (tmp_path / f"{name}.jsonl").write_text(rows)
    sources = [SourceSpec(path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")]
    section = PolicyDataConfig(path=None, sources=sources)
    assert reward_gap_sd(cast(Any, SimpleNamespace(data=section))) == pytest.approx(math.sqrt(5.0))


def with_gold(curve: Curve) -> Curve:
    """The same curve with a second reward that is minus the first."""
    runs = []
    for one in curve.runs:
        own = [replace(p, named={"judge": p.reward, "gold": -p.reward}) for p in (one.final, BASE)]
        way = tuple(s._replace(named={"judge": s.reward, "gold": -s.reward}) for s in one.steps)
        runs.append(replace(one, final=own[0], baseline=own[1], steps=way))
    return replace(curve, runs=tuple(runs))


def test_of_several_rewards_each_has_its_columns_along_training_and_at_the_end():
    gold = with_gold(COPG)
    _, last = tables.rows_over_steps([gold])
    assert last["reward/gold_above_start"] == -last["reward_above_start"] != 0
    (row,) = tables.rows_by_beta([gold], beta=0.5, sd=0.4)
    assert row["reward/gold"] == pytest.approx(-3.0) == -row["reward/judge"]
    text = tables.to_markdown([row], [], beta=0.5, num_prompts=3)
    assert "| judge alone | gold alone | KL" in text and "| -3.000 ± 1.041 ± 1.000 | 1.000" in text
    (plain,) = tables.rows_by_beta([COPG], beta=0.5, sd=0.4)
    assert tables.named_columns([plain]) == []


def test_csv_and_markdown_hold_the_numbers():
    by_beta = tables.rows_by_beta(CURVES, beta=0.5, sd=0.4)
    best = {name: [COPG, DPO] for name in ("reward", "objective")}
    gaps = tables.rows_of_differences(best, beta=0.5)
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(gaps))))
    assert [float(row["difference"]) for row in rows] == pytest.approx([2.0, 1.75])
    assert float(rows[0]["difference_se_prompts"]) == pytest.approx(math.sqrt(3.5 / 6))
    text = tables.to_markdown(by_beta, gaps, beta=0.5, num_prompts=3)
    assert "| CoPG | 0.1 | 0.25 | 3.000 ± 1.041 ± 1.000* |" in text
    # √((4.303 · 0.764)² + (12.706 · 1)²), by Student's factors of three prompts and of two seeds.
    rest = "± 0.764 ± 1.000 (13.124) | 3 | 2 | tie |"
    assert f"| reward | CoPG 0.1 − DPO 0.5 | 2.000 {rest}" in text
    assert f"| J | CoPG 0.1 − DPO 0.5 | 1.750 {rest}" in text
    assert tables.to_csv([]) == ""


@pytest.mark.parametrize("name", [*FIGURES])
def test_every_picture_draws_its_rows_also_of_one_seed_and_of_a_loss_of_ones_own(tmp_path, name):
    mine = Curve("my.loss", 0.3, (run("my.loss", 0.3, 0, np.ones(3)),), (DONE,))
    found = [with_gold(curve) for curve in (*CURVES, mine)]
    over_steps = tables.rows_over_steps(found)
    by_beta = tables.rows_by_beta(found, beta=0.5, sd=0.4)
    figure = {
        "curves": lambda: pictures.curves_figure(over_steps),
        "beta": lambda: pictures.beta_figure(by_beta),
        "best": lambda: pictures.best_figure(over_steps),
        "frontier": lambda: pictures.frontier_figure(over_steps, by_beta, beta=0.5),
        "held_out": lambda: pictures.held_out_figure(over_steps, {"copg": 0.1}),
        "named": lambda: pictures.named_figure(over_steps),
        "residual": lambda: pictures.residual_figure(over_steps),
    }[name]()
    texts = [text.get_text() for axes in figure.axes for text in axes.findobj(plt.Text)]
    assert any("CoPG" in text for text in texts)
    assert any("my.loss" in text for text in texts) == (name != "residual")
    values = [y for axes in figure.axes for line in axes.lines for y in np.ravel(line.get_ydata())]
    rewards = over_steps if name in ("curves", "best", "held_out", "named", "residual") else by_beta
    columns = {"named": "reward/gold_above_start", "residual": "residual_samples"}
    column = columns.get(name, "reward")
    for row in rewards[:2]:
        assert any(value == pytest.approx(row[column]) for value in values)
    pictures.write_picture(figure, tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []


def test_the_held_out_loss_is_drawn_at_the_least_beta_and_at_the_best_of_the_table():
    rows = tables.rows_over_steps(CURVES)
    betas = sorted({row["beta"] for row in rows if row["method"] == "copg"})
    figure = pictures.held_out_figure(rows, {"copg": betas[-1]})
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_title() == "CoPG"]
    drawn = [text.get_text() for text in legend.get_texts()]
    assert drawn == [f"{beta:g}" for beta in (betas[0], betas[-1])] and len(betas) >= 2
    plt.close(figure)


@pytest.mark.parametrize(("values", "labels"), [((0.17, 6.9), 5), ((1e-3, 5.0), 4)])
def test_the_numbers_of_a_logarithmic_axis_have_room(values, labels):
    figure, axes = plt.subplots()
    axes.plot(values, (0, 1))
    pictures.log_scale(axes)
    figure.canvas.draw()
    low, high = axes.get_xlim()
    ticks = axes.xaxis.get_ticklabels() + axes.xaxis.get_ticklabels(minor=True)
    shown = [t.get_text() for t in ticks if t.get_text() and low <= t.get_position()[0] <= high]
    assert len(shown) == labels and "1" in shown
    plt.close(figure)
