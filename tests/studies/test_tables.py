"""The numbers of a study's figures against what one computes by hand."""

import csv
import io
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from copg_jax.config.sections import DataConfig
from experiments.studies import pictures, tables
from experiments.studies.comparison import Policy
from experiments.studies.outcomes import (
    Curve,
    Evaluation,
    Outcome,
    best_curves,
    best_values,
    curves,
    paired,
    reward_gap_sd,
    spread,
)

NAN = math.nan
BASE = Policy(np.array([0.0, 1.0, 2.0]), np.zeros(3), np.ones(3), np.ones(3))


def run(method, beta, seed, gains, kl=1.0, steps=((0, 1.0), (10, 2.0)), loss=0.0) -> Outcome:
    """A run that ends at these rewards above π_ref on three prompts."""
    final = Policy(BASE.reward + gains, kl * np.ones(3), 2 * np.ones(3), np.ones(3))
    way = tuple(Evaluation(at, r, 0.3, kl * at, 5.0 + loss * at) for at, r in steps)
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
CURVES = curves(RUNS)
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
    assert found == pytest.approx((3.0, math.sqrt(6.5 / 2 / 3), 1.0, 2))


def test_a_prompt_without_a_number_in_one_seed_is_left_out_and_one_seed_has_no_error():
    found = spread([np.array([1.0, NAN, 3.0]), np.array([2.0, 3.0, 7.0])])
    assert found[:2] == pytest.approx((3.25, 1.75))  # of 1.5 and 5
    assert math.isnan(spread([np.array([1.0, 2.0])]).over_seeds)
    assert math.isnan(spread([np.array([])]).mean)


def test_differences_are_paired_by_prompt_and_by_seed():
    found = paired(COPG, DPO, lambda policy: policy.reward)
    # Seed 0: 1, 1, 1; seed 1: 1, 2, 6. Prompts 1, 1.5, 3.5: mean 2, squares 1 + 0.25 + 2.25 = 3.5.
    assert found == pytest.approx((2.0, math.sqrt(3.5 / 2 / 3), 1.0, 2))
    # Wrongly paired seeds would give 0, 1, 2 and 2, 2, 5: other errors.
    assert paired(DPO, COPG, lambda policy: policy.reward).mean == -found.mean
    other = Curve("ipo", 1.0, (run("ipo", 1.0, 5, np.zeros(3)),))
    assert math.isnan(paired(COPG, other, lambda policy: policy.reward).mean)  # no common seed


def test_rewards_over_steps_are_above_those_of_step_0_of_the_same_seed():
    first, last = tables.rows_over_steps([COPG])
    assert (first["step"], first["reward"]) == (0, 0.0)
    assert last["reward"] == pytest.approx((1.0 + 3.0) / 2)
    assert last["reward_se_seeds"] == pytest.approx(1.0)
    assert last["reward_se_prompts"] == pytest.approx(0.3)
    assert last["kl"] == 10.0 and last["num_seeds"] == 2
    (_, dpo) = tables.rows_over_steps([DPO])
    assert dpo["held_out_loss"] == pytest.approx(1.0)


def test_steps_that_not_all_seeds_have_are_left_out():
    longer = run("copg", 0.1, 2, np.ones(3), steps=((0, 0.0), (5, 9.0), (10, 1.0)))
    rows = tables.rows_over_steps([Curve("copg", 0.1, (RUNS[0], longer))])
    assert [row["step"] for row in rows] == [0, 10]


def test_the_end_by_beta_is_above_pi_ref_with_j_at_the_common_beta_and_beta_in_units_of_sd():
    rows = tables.rows_by_beta(CURVES, beta=0.5, sd=0.4)
    assert rows[0]["reward"] == pytest.approx(3.0)
    assert rows[0]["objective"] == pytest.approx(3.0 - 0.5 * 1.0)
    assert rows[2]["objective"] == pytest.approx(1.0 - 0.5 * 0.5)
    assert [row["beta_in_sd"] for row in rows] == pytest.approx([0.25, 2.5, 1.25])


def test_the_best_beta_is_that_of_the_highest_mean_over_seeds():
    chosen = best_values(RUNS)
    assert chosen == [
        {"loss.name": "copg", "loss.beta": 0.1},
        {"loss.name": "dpo", "loss.beta": 0.5},
    ]
    best = best_curves(CURVES, lambda curve: -curve.beta)
    assert [(curve.method, curve.beta) for curve in best] == [("copg", 0.1), ("dpo", 0.5)]


def test_the_sd_of_reward_gaps_is_over_all_pairs_of_all_groups(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a", "completions": ["x", "y"], "rewards": [3.0, 0.0]}\n'
        '{"prompt": "b", "completions": ["x", "y", "z"], "rewards": [1.0, 1.0, 3.0]}\n'
    )
    # Gaps 3; 0, 2, 2.
    assert reward_gap_sd(DataConfig(path=str(path))) == pytest.approx(math.sqrt(17 / 4))


def test_csv_and_markdown_hold_the_numbers():
    by_beta = tables.rows_by_beta(CURVES, beta=0.5, sd=0.4)
    best = {name: [COPG, DPO] for name in ("reward", "objective")}
    gaps = tables.rows_of_differences(best, beta=0.5)
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(gaps))))
    assert [float(row["difference"]) for row in rows] == pytest.approx([2.0, 1.75])
    assert float(rows[0]["difference_se_prompts"]) == pytest.approx(math.sqrt(3.5 / 6))
    text = tables.to_markdown(by_beta, gaps, beta=0.5, num_prompts=3)
    assert "| CoPG | 0.1 | 0.25 | 3.000 ± 1.041 ± 1.000* |" in text
    assert (
        "| reward | CoPG 0.1 − DPO 0.5 | 2.000 ± 0.764 ± 1.000 | by 2.0 standard errors |" in text
    )
    assert "| J | CoPG 0.1 − DPO 0.5 | 1.750 ± 0.764 ± 1.000 | tie |" in text
    assert tables.to_csv([]) == ""


@pytest.mark.parametrize("name", ["curves", "beta", "best", "frontier", "held_out"])
def test_every_picture_draws_its_rows_also_of_one_seed_and_of_a_loss_of_ones_own(tmp_path, name):
    found = [*CURVES, Curve("my.loss", 0.3, (run("my.loss", 0.3, 0, np.ones(3)),))]
    over_steps = tables.rows_over_steps(found)
    by_beta = tables.rows_by_beta(found, beta=0.5, sd=0.4)
    figure = {
        "curves": lambda: pictures.curves_figure(over_steps),
        "beta": lambda: pictures.beta_figure(by_beta),
        "best": lambda: pictures.best_figure(over_steps),
        "frontier": lambda: pictures.frontier_figure(over_steps, by_beta, beta=0.5),
        "held_out": lambda: pictures.held_out_figure(over_steps),
    }[name]()
    texts = [text.get_text() for axes in figure.axes for text in axes.findobj(plt.Text)]
    assert any("CoPG" in text for text in texts) and any("my.loss" in text for text in texts)
    values = [y for axes in figure.axes for line in axes.lines for y in np.ravel(line.get_ydata())]
    rewards = over_steps if name in ("curves", "best", "held_out") else by_beta
    for row in rewards[:2]:
        assert any(value == pytest.approx(row["reward"]) for value in values)
    pictures.write_picture(figure, tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []
