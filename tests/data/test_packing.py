"""Dealing evens out totals and loses nothing."""

import numpy as np
import pytest

from copg_jax.data.packing import Capacity, balance, deal, room_of, slots_of, token_slots
from copg_jax.errors import InputError


@pytest.mark.parametrize(("num_items", "num_bins"), [(64, 8), (12, 12), (30, 1)])
def test_balance_deals_every_item_once_in_ascending_order(num_items, num_bins):
    bins = balance(np.random.default_rng(0).integers(1, 100, num_items), num_bins)
    assert bins.shape == (num_bins, num_items // num_bins)
    assert sorted(bins.reshape(-1).tolist()) == list(range(num_items))
    assert (np.diff(bins, axis=1) > 0).all()


def test_balanced_totals_are_nearly_equal():
    sizes = np.random.default_rng(1).normal(400, 100, 128).clip(50).astype(int)
    totals = sizes[balance(sizes, 16)].sum(1)
    shuffled = sizes.reshape(16, 8).sum(1)
    assert np.ptp(totals) < 150 < 300 < np.ptp(shuffled)


def test_deal_leaves_places_empty_where_a_batch_is_not_full():
    dealt = deal(np.array([5, 1, 4, 2, 3]), batch_size=4, num_blocks=2)
    assert dealt.shape == (2, 4)
    assert sorted(dealt.reshape(-1).tolist()) == [-1, -1, -1, 0, 1, 2, 3, 4]


def test_a_block_that_is_too_full_is_refused_with_the_numbers():
    with pytest.raises(InputError, match="7 tokens but room for 6"):
        slots_of(np.array([3, 4]), 5, 1, 6)


def test_room_is_that_of_the_fullest_block_rounded_up():
    room = room_of(np.array([3, 4, 1, 9]), np.array([[1], [1], [2], [1]]), num_blocks=2, multiple=4)
    assert room == Capacity(16, 4)


def test_without_room_every_slot_is_listed():
    slots = token_slots(
        np.array([1, 2]),
        np.array([[0], [1]]),
        prompt_size=2,
        completion_size=3,
        num_blocks=2,
        room=None,
    )
    assert slots.tolist() == [[0, 1, 2, 3, 4]] * 2
