"""Several rewards: names, the weight 0, clipping, and what long completions cost."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from copg_jax.config.reward_spec import OverlongPenalty, RewardSpec
from copg_jax.errors import InputError
from copg_jax.rewards.functions import WeightedRewards

VALUES: list[float | None] = [-9.0, -0.5, 0.25, 9.0, None]


def values(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """What the test wants."""
    return VALUES[: len(completions)]


def ones(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for each."""
    return [1.0] * len(completions)


def rewarded(*specs: RewardSpec, num_tokens: Any = (1,) * 5) -> tuple[Any, Any, Counter[str]]:
    """Total, rewards by name and counts of five completions."""
    counts: Counter[str] = Counter()
    function = WeightedRewards(specs)
    texts = ["t"] * len(num_tokens)
    total, by_name = function(texts, texts, {}, num_tokens=num_tokens, counts=counts)
    return total, by_name, counts


def spec(function: str, **options: Any) -> RewardSpec:
    """A reward of this file."""
    return RewardSpec(f"{__name__}.{function}", **options)


def test_a_reward_of_weight_zero_is_kept_by_its_name_and_decides_nothing():
    total, by_name, _ = rewarded(spec("ones", weight=2.0), spec("values", weight=0.0, name="gold"))
    assert total.tolist() == [2.0] * 5
    assert list(by_name) == ["ones", "gold"]
    np.testing.assert_array_equal(by_name["gold"], [-9.0, -0.5, 0.25, 9.0, math.nan])
    # With any other weight, it decides.
    total, _, _ = rewarded(spec("ones"), spec("values", weight=1e-3))
    assert np.isnan(total).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("names", [{}, {"name": "ones"}])
def test_two_rewards_of_one_name_are_refused_with_the_fix(names):
    with pytest.raises(InputError, match=r"rewards: .*2 that are named 'ones'.*name: ones_2"):
        WeightedRewards([spec("ones"), spec("ones", **names)])
    _, by_name, _ = rewarded(spec("ones"), spec("ones", name="other"))
    assert list(by_name) == ["ones", "other"]


def test_values_outside_a_clip_are_set_to_the_nearer_end_and_counted_before_they_are_weighed():
    total, by_name, counts = rewarded(spec("values", clip=[-0.5, 1.0], weight=-2.0))
    np.testing.assert_array_equal(by_name["values"], [-0.5, -0.5, 0.25, 1.0, math.nan])
    np.testing.assert_array_equal(total, [1.0, 1.0, -0.5, -2.0, math.nan])
    assert counts == {"rewards/values/clipped": 2, "rewards/values/dropped/none": 1}


# DAPO's Eq. 13 with L_max = 20 and L_cache = 4: 0 up to 16 tokens, −1 from 20.
SOFT = {15: 0.0, 16: 0.0, 17: -0.25, 19: -0.75, 20: -1.0, 21: -1.0, 900: -1.0}
HARD = {15: 0.0, 16: 0.0, 17: 0.0, 19: 0.0, 20: 0.0, 21: -1.0, 900: -1.0}


@pytest.mark.parametrize(("buffer", "wanted"), [(4, SOFT), (0, HARD)])
def test_a_long_completion_costs_what_dapo_says(buffer, wanted):
    overlong = OverlongPenalty(20, buffer, penalty=3.0)
    _, by_name, counts = rewarded(spec("ones", overlong=overlong), num_tokens=list(wanted))
    np.testing.assert_allclose(by_name["ones"], 1 + 3 * np.array(list(wanted.values())))
    assert counts == {"rewards/ones/overlong": sum(cost < 0 for cost in wanted.values())}


def test_a_clip_does_not_take_back_what_a_long_completion_costs_and_none_stays_none():
    options = {"clip": [-1.0, 1.0], "overlong": OverlongPenalty(5, penalty=0.5)}
    _, by_name, counts = rewarded(spec("values", **options), num_tokens=[9] * 5)
    np.testing.assert_array_equal(by_name["values"], [-1.5, -1.0, -0.25, 0.5, math.nan])
    assert counts.pop("rewards/values/dropped/none") == 1
    assert counts == {"rewards/values/clipped": 2, "rewards/values/overlong": 4}


def test_the_provenance_has_the_name_and_what_changes_the_values():
    specs = [
        spec("ones"),
        spec("ones", name="other"),
        spec("ones", clip=[0.0, 1.0]),
        spec("ones", overlong=OverlongPenalty(5)),
    ]
    found = [WeightedRewards([one]) for one in specs]
    assert [one.provenance[0]["name"] for one in found] == ["ones", "other", "ones", "ones"]
    assert len({one.fingerprint for one in found}) == 4
