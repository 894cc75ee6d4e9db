"""Dealing evens out totals and loses nothing."""

import numpy as np
import pytest

from copg_jax.errors import InputError
from copg_jax.models.layout import (
    Capacity,
    balance,
    batches_by_length,
    capacity_of,
    completion_slots,
    deal,
    in_places,
    prompt_sizes_of,
    prompt_slots,
    token_slots,
)


@pytest.mark.parametrize(("num_items", "num_bins"), [(64, 8), (12, 12), (30, 1)])
def test_balance_deals_every_item_once_in_ascending_order(num_items, num_bins):
    bins = balance(np.random.default_rng(0).integers(1, 100, (num_items, 2)), num_bins)
    assert bins.shape == (num_bins, num_items // num_bins)
    assert sorted(bins.reshape(-1).tolist()) == list(range(num_items))
    assert (np.diff(bins, axis=1) > 0).all()


def test_balanced_bins_have_nearly_equal_totals_and_completions():
    rng = np.random.default_rng(1)
    prompts = rng.normal(340, 100, 256).clip(50).astype(int)
    tokens = np.stack([prompts, rng.normal(72, 16, 256).clip(16).astype(int)], axis=1)
    dealt, shuffled = (tokens[rows].sum(1) for rows in (balance(tokens, 32), _in_order(256, 32)))
    assert np.ptp(dealt.sum(1)) < 0.04 * dealt.sum(1).mean() < 0.2 * np.ptp(shuffled.sum(1))
    assert np.ptp(dealt[:, 1]) < 0.15 * dealt[:, 1].mean() < 0.5 * np.ptp(shuffled[:, 1])


def test_prompts_without_completions_are_balanced_in_every_round():
    prompts = np.random.default_rng(1).normal(340, 100, 256).clip(50).astype(int)
    tokens = np.stack([prompts, np.zeros(256, int)], axis=1)
    totals = prompts[balance(tokens, 32)].sum(1)
    assert np.ptp(totals) < 0.05 * totals.mean()


def _in_order(num_items, num_bins):
    return np.arange(num_items).reshape(num_bins, -1)


def test_deal_leaves_places_empty_where_a_batch_is_not_full():
    tokens = np.array([[5, 0], [1, 0], [4, 0], [2, 0], [3, 0]])
    dealt = deal(tokens, batch_size=4, num_blocks=2)
    assert dealt.shape == (2, 4)
    assert sorted(dealt.reshape(-1).tolist()) == [-1, -1, -1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_blocks_are_dealt_equal_totals_and_run_from_the_longest_prompt_to_the_shortest(num_blocks):
    rng = np.random.default_rng(2)
    tokens = np.stack([rng.integers(50, 500, 62), rng.integers(2, 100, 62)], axis=1)
    dealt = deal(tokens, batch_size=16, num_blocks=num_blocks)
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(62))
    places = in_places(tokens, dealt, num_blocks=num_blocks)
    assert places.shape == (4, num_blocks, 16 // num_blocks, 2)
    assert (np.diff(places[..., 0], axis=2) <= 0).all()
    totals = places.sum((2, 3))
    assert np.ptp(totals) < 0.15 * totals.mean()


def test_a_block_that_is_too_full_is_refused_with_the_numbers():
    with pytest.raises(InputError, match="7 tokens but room for 6"):
        completion_slots(np.array([[3], [4]]), 5, 1, 6)


def test_the_shape_is_that_of_the_fullest_block_and_of_the_longest_prompt_in_each_place():
    first = [[[400, 30], [130, 9]], [[90, 20], [64, 7]]]
    second = [[[410, 5], [90, 60]], [[70, 2], [65, 3]]]
    places = np.array([first, second])
    assert prompt_sizes_of(places, most=512) == (448, 192)
    assert prompt_sizes_of(places, most=416) == (416, 192)
    assert capacity_of(places) == Capacity(576, 72)
    assert capacity_of(places, multiple=1) == Capacity(569, 65)


def test_prompts_have_few_sizes_however_long_they_are():
    places = np.stack([np.arange(4096, 0, -1), np.ones(4096, int)], axis=1)[None, None]
    sizes = prompt_sizes_of(places, most=4096)
    assert len(set(sizes)) == 8 and sizes[0] == 4096 and sizes[-1] == 512
    assert (np.array(sizes) >= places[0, 0, :, 0]).all()


def test_prompt_slots_are_numbered_place_after_place_however_wide():
    slots = prompt_slots(np.array([2, 1, 3, 1]), (3, 2), 2, 4)
    assert slots.tolist() == [[0, 1, 3, 5], [0, 1, 2, 3]]


def test_without_room_every_slot_is_listed():
    slots = token_slots(
        np.array([1, 2]),
        np.array([[0], [1]]),
        prompt_sizes=(2,),
        completion_size=3,
        num_blocks=2,
        room=None,
    )
    assert slots.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_tokens_of_a_place_are_those_of_its_group_and_one_without():
    tokens = np.array([[5, 1], [7, 2], [9, 3]])
    dealt = np.array([[0, 2, 1, -1]])
    assert in_places(tokens, dealt, num_blocks=2).tolist() == [[[[5, 1], [9, 3]], [[7, 2], [1, 0]]]]


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
        blocks = in_places(tokens, batch.rows[None], num_blocks=num_blocks)[0].sum(1)
        assert blocks.sum(-1).max() <= batch.capacity.tokens
        assert blocks[:, 1].max() <= batch.capacity.completion_tokens
        assert prompts[batch.rows[batch.rows >= 0]].max() <= batch.prompt_size
        lengths = np.where(batch.rows < 0, 1, prompts[batch.rows]).reshape(num_blocks, -1)
        assert (lengths <= batch.prompt_sizes).all() and max(
            batch.prompt_sizes
        ) <= batch.prompt_size
        capacities.setdefault(batch.prompt_size, set()).add(batch.capacity)
    assert list(capacities) == sorted(capacities, reverse=True)
    assert {len(found) for found in capacities.values()} == {1}


@pytest.mark.parametrize(
    ("length", "size", "sizes"),
    [
        (1, 64, (64, 64)),
        (64, 64, (64, 64)),
        (65, 96, (96, 64)),
        (96, 96, (96, 64)),
        (97, 128, (128, 64)),
        (513, 768, (640, 128)),
    ],
)
def test_prompt_sizes_are_powers_of_two_and_half_as_much_again(length, size, sizes):
    (batch,) = batches_by_length(np.array([[length, 3]]), batch_size=2, num_blocks=1)
    assert batch == (batch.rows, size, sizes, Capacity(length + 3 + 1, 3))


def test_no_groups_make_no_batches():
    assert batches_by_length(np.empty((0, 2), int), batch_size=4, num_blocks=2) == []
