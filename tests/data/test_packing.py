"""Dealing evens out totals and loses nothing."""

import numpy as np
import pytest

from copg_jax.data.packing import (
    Capacity,
    balance,
    batches_by_length,
    block_tokens,
    deal,
    room_of,
    slots_of,
    token_slots,
)
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


def test_tokens_of_a_block_are_those_of_its_groups_and_one_for_a_place_without():
    tokens = np.array([[5, 1], [7, 2], [9, 3]])
    dealt = np.array([[0, 2, 1, -1]])
    assert block_tokens(tokens, dealt, num_blocks=2).tolist() == [[[14, 4], [8, 2]]]


@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize("num_groups", [1, 8, 83])
def test_batches_by_length_hold_every_group_once_in_rooms_that_fit(rng, num_groups, num_blocks):
    edges = np.array([1, 63, 64, 65, 96, 97, 512, 513])
    prompts = np.where(rng.random(num_groups) < 0.5, rng.choice(edges, num_groups), 0)
    prompts = np.where(prompts == 0, rng.integers(1, 600, num_groups), prompts)
    tokens = np.stack([prompts, rng.integers(1, 50, num_groups)], axis=1)
    batches = batches_by_length(tokens, batch_size=8, num_blocks=num_blocks)
    rows = np.concatenate([batch.rows for batch in batches])
    assert sorted(rows[rows >= 0].tolist()) == list(range(num_groups))
    assert len(rows) == 8 * -(-num_groups // 8)
    capacities: dict[int, set[Capacity]] = {}
    for batch in batches:
        blocks = block_tokens(tokens, batch.rows[None], num_blocks=num_blocks)[0]
        assert blocks.sum(-1).max() <= batch.capacity.tokens
        assert blocks[:, 1].max() <= batch.capacity.completion_tokens
        assert prompts[batch.rows[batch.rows >= 0]].max() <= batch.prompt_size
        capacities.setdefault(batch.prompt_size, set()).add(batch.capacity)
    assert list(capacities) == sorted(capacities, reverse=True)
    assert {len(found) for found in capacities.values()} == {1}


@pytest.mark.parametrize(
    ("length", "size"), [(1, 64), (64, 64), (65, 96), (96, 96), (97, 128), (513, 768)]
)
def test_prompt_sizes_are_powers_of_two_and_half_as_much_again(length, size):
    (batch,) = batches_by_length(np.array([[length, 3]]), batch_size=2, num_blocks=1)
    assert batch == (batch.rows, size, Capacity(length + 3 + 1, 3))


def test_no_groups_make_no_batches():
    assert batches_by_length(np.empty((0, 2), int), batch_size=4, num_blocks=2) == []
