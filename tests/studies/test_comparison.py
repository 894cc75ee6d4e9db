"""Comparison of policies: paired differences, rewards above a baseline, points on the way."""

import json
import math

import numpy as np
import pytest

from copg_jax.errors import InputError
from experiments.studies.comparison import (
    Estimate,
    Policy,
    Trained,
    best_of_each,
    differences,
    estimate,
    measure,
    read_points,
    read_policy,
)


def policy(reward, log_ratio=0.0) -> Policy:
    """A policy with these rewards, one a prompt, whose completions have 4 tokens and end."""
    reward = np.asarray(reward, float)
    ones = np.ones_like(reward)
    return Policy(reward, log_ratio * ones, 4 * ones, ones, 0 * ones)


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def generation(index, reward, logp=-1.0, ref_logp=-1.0, length=3, has_eos=True):
    return {
        "index": index,
        "reward": reward,
        "logp": logp,
        "ref_logp": ref_logp,
        "length": length,
        "has_eos": has_eos,
        "completion": "two lines\u2028of one text",
    }


def test_a_policy_is_read_prompt_by_prompt_whatever_the_order_of_the_lines(tmp_path):
    rows = [
        generation(1, None),
        generation(0, 2.0, logp=-3.0, ref_logp=-5.0, length=8, has_eos=False),
        generation(1, 7.0, length=5),
        generation(0, 4.0, logp=-2.0, ref_logp=-6.0, length=6),
        generation(2, None),
    ]
    write_lines(tmp_path / "generations.jsonl", rows)
    found = read_policy(tmp_path)
    np.testing.assert_array_equal(found.reward, [3.0, 7.0, math.nan])
    np.testing.assert_array_equal(found.log_ratio, [3.0, 0.0, 0.0])
    np.testing.assert_array_equal(found.length, [7.0, 4.0, 3.0])
    np.testing.assert_array_equal(found.eos_rate, [0.5, 1.0, 1.0])
    assert found.named == {}


def test_of_several_rewards_each_is_read_by_its_name(tmp_path):
    pairs = [(1.0, 5.0), (3.0, None)]
    rows = [{**generation(0, 1.0), "rewards": {"judge": a, "gold": b}} for a, b in pairs]
    write_lines(tmp_path / "generations.jsonl", rows)
    found = read_policy(tmp_path)
    assert {name: own.tolist() for name, own in found.named.items()} == {
        "judge": [2.0],
        "gold": [5.0],
    }


def test_repetition_is_the_share_of_three_words_that_came_before(tmp_path):
    texts = ["a b c d e", "a b c a b c", "so so so so so", "two words"]
    rows = [{**generation(i, 1.0), "completion": text} for i, text in enumerate(texts)]
    write_lines(tmp_path / "generations.jsonl", rows)
    # abc bca cab abc: one of four again; sososo thrice: two of three.
    np.testing.assert_allclose(read_policy(tmp_path).repetition, [0, 0.25, 2 / 3, 0])


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (None, "generations.jsonl: wanted the generations of an evaluation, got no file"),
        ([generation(0, 1.0), {"index": 1}], "generations.jsonl:2: wanted a generation with"),
        ([[1]], "generations.jsonl:1: wanted a generation with"),
    ],
)
def test_generations_that_are_gone_or_none_are_named(tmp_path, rows, text):
    if rows is not None:
        write_lines(tmp_path / "generations.jsonl", rows)
    with pytest.raises(InputError, match=text):
        read_policy(tmp_path)


def test_an_estimate_is_the_mean_with_its_standard_error_over_prompts_that_have_a_number():
    mean, stderr = estimate(np.array([1.0, 2.0, math.nan, 6.0]))
    assert mean == pytest.approx(3.0)
    assert stderr == pytest.approx(math.sqrt(7.0) / math.sqrt(3.0))  # squares 4 + 1 + 9, over 3 - 1
    assert math.isnan(estimate(np.array([1.0])).stderr)
    assert math.isnan(estimate(np.array([math.nan])).mean)


def test_differences_are_paired_so_that_hard_prompts_cancel():
    easy_and_hard = np.array([-10.0, 0.0, 10.0, 30.0])
    found = measure(policy(easy_and_hard + 0.5), policy(easy_and_hard), beta=0.3)
    assert found["reward"] == pytest.approx((0.5, 0.0))


def test_a_constant_added_to_all_rewards_changes_nothing():
    rewards, base = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.5, 1.0])
    plain = measure(policy(rewards, 0.7), policy(base), beta=0.3)
    shifted = measure(policy(rewards + 5, 0.7), policy(base + 5), beta=0.3)
    for name, value in plain.items():
        assert shifted[name] == pytest.approx(value), name
    assert plain["reward"].mean == pytest.approx(3.5 / 3)


def test_the_objective_is_that_of_each_prompt_above_the_baseline_s():
    one = Policy(np.array([1.0, 3.0]), np.array([2.0, 4.0]), np.ones(2), np.ones(2), np.zeros(2))
    base = Policy(np.array([0.0, 1.0]), np.array([0.0, 2.0]), np.ones(2), np.ones(2), np.zeros(2))
    found = measure(one, base, beta=0.5)
    assert found["kl"] == pytest.approx((3.0, 1.0))
    # (1 - 1) - 0 = 0 and (3 - 2) - (1 - 1) = 1
    assert found["objective"] == pytest.approx((0.5, 0.5))


def test_points_on_the_way_are_above_the_reward_of_step_0_whatever_its_level(tmp_path):
    def rows(level):
        return [
            {"step": 0, "eval/reward_mean": level, "eval/kl": 0.0, "eval/num_prompts": 64.0},
            {"step": 1, "loss": 0.5},
            {"step": 2, "eval/reward_mean": None, "eval/kl": 0.1, "eval/num_prompts": 64.0},
            {"step": 9, "eval/reward_mean": level + 2, "eval/kl": 0.8, "eval/num_prompts": 64.0},
        ]

    for level in (-0.25, 0.5):
        write_lines(tmp_path / "metrics.jsonl", rows(level))
        assert read_points(tmp_path) == [(0, 0.0, 0.0, 64), (9, 0.8, 2.0, 64)]


TRAINED = [
    # Small β: more reward, much more KL.
    Trained("copg", 0.1, [], policy([1.0, 2.0, 3.0], log_ratio=9.0)),
    Trained("copg", 1.0, [], policy([0.5, 1.0, 1.5], log_ratio=0.0)),
    Trained("dpo", 0.1, [], policy([0.5, 1.5, 2.5], log_ratio=9.0)),
    Trained("dpo", 1.0, [], policy([0.0, 1.5, 0.0], log_ratio=0.0)),
]


def test_each_method_is_taken_at_the_beta_that_is_best_for_what_is_compared():
    best = best_of_each(TRAINED, lambda one: one.reward)
    assert {name: one.beta for name, one in best.items()} == {"copg": 0.1, "dpo": 0.1}
    best = best_of_each(TRAINED, lambda one: one.regularized(0.3))
    assert {name: one.beta for name, one in best.items()} == {"copg": 1.0, "dpo": 1.0}


@pytest.mark.parametrize("order", [1, -1])
def test_a_beta_without_rewards_is_not_the_best_wherever_it_stands(order):
    nothing = Trained("copg", 0.01, [], policy([math.nan] * 3))
    best = best_of_each([nothing, *TRAINED][::order], lambda one: one.reward)
    assert best["copg"].beta == 0.1


def test_methods_are_compared_by_paired_differences_at_their_best_beta():
    (found,) = differences(TRAINED, lambda one: one.reward)
    assert (found.first.method, found.second.method) == ("copg", "dpo")
    assert found.gap == pytest.approx((0.5, 0.0))
    (found,) = differences(TRAINED, lambda one: one.regularized(0.3))
    assert found.gap == pytest.approx(estimate(np.array([0.5, -0.5, 1.5])))


@pytest.mark.parametrize(("mean", "tie"), [(0.19, True), (-0.19, True), (0.21, False)])
def test_less_than_two_standard_errors_is_a_tie(mean, tie):
    assert Estimate(mean, 0.1).is_tie is tie


def test_an_estimate_reads_with_its_error_and_without_a_negative_zero():
    assert str(Estimate(-0.00001, 0.0123)) == "0.000 ± 0.012"
    assert str(Estimate(-0.25, 0.0)) == "-0.250 ± 0.000"
