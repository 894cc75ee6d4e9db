"""Packing evens out totals, loses nothing, and computes little beside what is useful."""

from typing import Any

import grain
import numpy as np
import pytest

from copg_jax.data.groups import TokenGroup
from copg_jax.errors import InputError
from copg_jax.models.layout import (
    Capacity,
    PackedBatches,
    Packing,
    ReusedShapes,
    Shape,
    _balance,
    _deal,
    _fit,
    _in_places,
    pack,
    pack_by_length,
    pack_epochs,
)


@pytest.mark.parametrize(("num_items", "num_bins"), [(64, 8), (12, 12), (30, 1)])
def test_balance_deals_every_item_once_in_ascending_order(num_items, num_bins):
    bins = _balance(np.random.default_rng(0).integers(1, 100, (num_items, 2)), num_bins)
    assert bins.shape == (num_bins, num_items // num_bins)
    assert sorted(bins.reshape(-1).tolist()) == list(range(num_items))
    assert (np.diff(bins, axis=1) > 0).all()


def test_balanced_bins_have_nearly_equal_totals_and_completions():
    rng = np.random.default_rng(1)
    prompts = rng.normal(340, 100, 256).clip(50).astype(int)
    tokens = np.stack([prompts, rng.normal(72, 16, 256).clip(16).astype(int)], axis=1)
    in_order = np.arange(256).reshape(32, -1)
    dealt, shuffled = (tokens[rows].sum(1) for rows in (_balance(tokens, 32), in_order))
    assert np.ptp(dealt.sum(1)) < 0.04 * dealt.sum(1).mean() < 0.2 * np.ptp(shuffled.sum(1))
    assert np.ptp(dealt[:, 1]) < 0.15 * dealt[:, 1].mean() < 0.5 * np.ptp(shuffled[:, 1])


def test_prompts_without_completions_are_balanced_in_every_round():
    prompts = np.random.default_rng(1).normal(340, 100, 256).clip(50).astype(int)
    tokens = np.stack([prompts, np.zeros(256, int)], axis=1)
    totals = prompts[_balance(tokens, 32)].sum(1)
    assert np.ptp(totals) < 0.05 * totals.mean()


def test_deal_leaves_places_empty_where_a_batch_is_not_full():
    tokens = np.array([[5, 0], [1, 0], [4, 0], [2, 0], [3, 0]])
    dealt = _deal(tokens, batch_size=4, num_bins=2)
    assert dealt.shape == (2, 4)
    assert sorted(dealt.reshape(-1).tolist()) == [-1, -1, -1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_bins", [1, 4])
def test_bins_are_dealt_equal_totals_and_run_from_the_longest_prompt_to_the_shortest(num_bins):
    rng = np.random.default_rng(2)
    tokens = np.stack([rng.integers(50, 500, 62), rng.integers(2, 100, 62)], axis=1)
    dealt = _deal(tokens, batch_size=16, num_bins=num_bins)
    assert sorted(dealt[dealt >= 0].tolist()) == list(range(62))
    places = _in_places(tokens, dealt, num_bins)
    assert places.shape == (4, num_bins, 16 // num_bins, 2)
    assert (np.diff(places[..., 0], axis=2) <= 0).all()
    totals = places.sum((2, 3))
    assert np.ptp(totals) < 0.15 * totals.mean()


def test_tokens_of_a_place_are_those_of_its_group_and_one_without():
    tokens = np.array([[5, 1], [7, 2], [9, 3]])
    dealt = np.array([[0, 2, 1, -1]])
    assert _in_places(tokens, dealt, 2).tolist() == [[[[5, 1], [9, 3]], [[7, 2], [1, 0]]]]


def test_the_shape_is_that_of_the_fullest_bin_and_of_the_longest_prompt_in_each_place():
    first = [[[400, 30], [130, 9]], [[90, 20], [64, 7]]]
    second = [[[410, 5], [90, 60]], [[70, 2], [65, 3]]]
    lengths = np.array([first, second])
    found = _fit(lengths, (512, 2, 64), multiple=8)
    assert found == Shape(2, (448, 192), 512, 2, 64, Capacity(576, 72))
    assert found.batch_size == 4
    assert _fit(lengths, (416, 2, 64), multiple=1) == Shape(
        2, (416, 192), 416, 2, 64, Capacity(569, 65)
    )


def test_prompts_have_few_sizes_however_long_they_are():
    lengths = np.stack([np.arange(4096, 0, -1), np.ones(4096, int)], axis=1)[None, None]
    sizes = _fit(lengths, (4096, 1, 1), multiple=8).prompt_sizes
    assert len(set(sizes)) == 8 and sizes[0] == 4096 and sizes[-1] == 512
    assert (np.array(sizes) >= lengths[0, 0, :, 0]).all()


def test_slots_are_numbered_place_after_place_however_wide_then_those_of_completions():
    shape = Shape(2, (3, 2), 3, 1, 3, Capacity(8, 4))
    layout = shape.layout(np.array([2, 1, 3, 1]), np.array([[1], [3], [0], [2]]))
    # 5 slots of prompts and 6 of completions; 11 and 6 stand for filling.
    assert layout.token_slots.tolist() == [[0, 1, 3, 5, 8, 9, 10, 11], [0, 1, 2, 3, 8, 9, 11, 11]]
    assert layout.completion_slots.tolist() == [[0, 3, 4, 5], [3, 4, 6, 6]]
    alone = shape.prompt_layout(np.array([2, 1, 3, 1]))
    assert alone.token_slots.tolist() == [[0, 1, 3, 5], [0, 1, 2, 3]]
    assert alone.completion_slots.shape == (2, 0)


def test_a_host_lays_out_its_share_of_the_bins():
    shape = Shape(2, (3, 2), 3, 1, 3, Capacity(8, 4))
    lengths = np.array([2, 1, 3, 1]), np.array([[1], [3], [0], [2]])
    whole = shape.layout(*lengths)
    for index, (own, completions) in enumerate(
        zip(*(np.split(x, 2) for x in lengths), strict=True)
    ):
        share = shape.layout(own, completions)
        np.testing.assert_array_equal(share.token_slots[0], whole.token_slots[index])
        np.testing.assert_array_equal(share.completion_slots[0], whole.completion_slots[index])


def test_a_bin_that_is_too_full_is_refused_with_the_numbers():
    shape = Shape(1, (1, 1), 1, 1, 5, Capacity(20, 6))
    with pytest.raises(InputError, match="7 tokens but a capacity of 6"):
        shape.layout(np.array([1, 1]), np.array([[3], [4]]))


def test_a_shape_with_all_completions_has_capacity_for_every_length_they_can_have():
    shape = Shape(1, (3, 2), 3, 2, 5, Capacity(5, 0))
    with pytest.raises(InputError, match="capacity of 5"):
        shape.layout(np.array([3, 2]), np.full((2, 2), 5))
    layout = shape.with_all_completions().layout(np.array([3, 2]), np.full((2, 2), 5))
    assert layout.token_slots.tolist() == [list(range(25))]


def test_packing_moves_tokens_to_their_slots_and_back_and_fills_with_zeros():
    packing = Packing.of(np.array([[2, 0, 4]]), 4)  # slot 4 of 4 = filling
    slots = np.array([[10.0, 11.0, 12.0, 13.0]])
    assert packing.pack(slots).tolist() == [[12, 10, 0]]
    assert packing.unpack(packing.pack(slots)).tolist() == [[10, 0, 12, 0]]


@pytest.fixture(scope="module")
def pairs():
    """(prompt, completion, completion) of 5,000 pairs, as in TL;DR: 343 +- 100, 34 +- 11 tokens."""
    rng = np.random.default_rng(0)

    def draw(mean: int, spread: int) -> int:
        return int(np.clip(rng.normal(mean, spread), mean / 5, 2 * mean))

    return np.array([[draw(343, 100), draw(34, 11), draw(34, 11)] for _ in range(5000)])


def _layouts(pairs, packed):
    """Of each batch its lengths, prompts [B] and completions [B, 2], and its layout."""
    for rows in packed.rows:
        lengths = pairs[rows, 0], pairs[rows, 1:]
        yield *lengths, packed.shape.layout(*lengths)


def _packed(pairs, batch_size, num_bins, num_epochs=2):
    """Of epochs laid end to end, in the order of a run; returns the pairs in that order too."""
    order = grain.MapDataset.range(len(pairs)).seed(0).shuffle().repeat(num_epochs)
    ordered = pairs[[order[i] for i in range(len(order))]]
    num_batches = len(ordered) // batch_size
    batch_at = pack_epochs(
        np.stack([ordered[:, 0], ordered[:, 1:].sum(1)], axis=1).__getitem__,
        batch_size=batch_size,
        num_bins=num_bins,
        sizes=(int(pairs[:, 0].max()), 2, int(pairs[:, 1:].max())),
        epoch_size=len(pairs),
        num_fitted=num_batches,
    )
    batches = [batch_at(index) for index in range(num_batches)]
    (shape,) = {batch.shape for batch in batches}
    return ordered, PackedBatches(np.stack([batch.rows for batch in batches]), shape)


@pytest.mark.parametrize(("batch_size", "num_bins"), [(8, 1), (64, 1), (64, 8), (64, 16)])
def test_what_is_computed_is_95_percent_useful_in_one_shape(pairs, batch_size, num_bins):
    pairs, packed = _packed(pairs, batch_size, num_bins)
    assert packed.rows.shape == (len(pairs) // batch_size, batch_size)
    useful = computed = 0
    for prompts, completions, layout in _layouts(pairs, packed):
        assert layout.token_slots.shape == (num_bins, packed.shape.capacity.tokens)
        useful += prompts.sum() + completions.sum()
        computed += layout.token_slots.size
    assert useful >= 0.95 * computed
    # Padded to their bucket, prompts are not much longer than they are.
    valid = pairs[packed.rows.reshape(-1), 0].sum()
    slots = len(packed.rows) * num_bins * sum(packed.shape.prompt_sizes)
    widest = packed.rows.size * packed.shape.prompt_size
    assert slots < 1.45 * valid and slots < 0.75 * widest


def test_groups_that_are_not_dealt_would_be_computed_with_more_padding(pairs):
    in_order = pairs.sum(1)[:4992].reshape(-1, 8).sum(1)
    assert in_order.mean() < 0.85 * in_order.max()


def test_every_valid_token_is_computed_once_and_nothing_else(pairs):
    pairs, packed = _packed(pairs, 16, 4)
    prompts, completions, layout = next(_layouts(pairs, packed))
    widths = packed.shape.prompt_sizes
    assert len(set(widths)) > 1 and list(widths) == sorted(widths, reverse=True)
    completion = np.arange(packed.shape.completion_size) < completions[..., None]
    in_place = prompts.reshape(4, -1).T
    valid = [np.arange(p) < length[:, None] for p, length in zip(widths, in_place, strict=True)]
    valid = np.concatenate([*valid, completion.reshape(4, -1)], axis=1)
    for slots, wanted in (
        (layout.token_slots, valid),
        (layout.completion_slots, completion.reshape(4, -1)),
    ):
        for row, mask in zip(slots, wanted, strict=True):
            assert row[row < wanted.shape[1]].tolist() == np.flatnonzero(mask).tolist()
            assert (row[mask.sum() :] == wanted.shape[1]).all()


@pytest.mark.parametrize("num_epochs", [1, 3])
def test_each_group_is_dealt_once_an_epoch_but_for_the_tail(pairs, num_epochs):
    _, packed = _packed(pairs[:1000], 64, 8, num_epochs)
    rows = packed.rows.reshape(-1)
    assert sorted(rows.tolist()) == list(range(num_epochs * 1000 // 64 * 64))
    # A batch that lies across the end of an epoch holds neighbours of both, others those of one.
    for batch in packed.rows:
        assert len(set(batch // 1000)) == 1 or sorted(batch.tolist()) == list(
            range(batch.min(), batch.max() + 1)
        )


def test_groups_of_no_epochs_are_dealt_together_and_the_last_batch_has_empty_places(pairs):
    num_tokens = np.stack([pairs[:, 0], pairs[:, 1:].sum(1)], axis=1)[:100]
    packed = pack(num_tokens, batch_size=32, num_bins=4, sizes=(700, 2, 70))
    assert packed.rows.shape == (4, 32)
    assert sorted(packed.rows[packed.rows >= 0].tolist()) == list(range(100))


@pytest.mark.parametrize("num_bins", [1, 4])
@pytest.mark.parametrize("num_groups", [1, 8, 83])
def test_batches_by_length_hold_every_group_once_in_capacities_that_fit(rng, num_groups, num_bins):
    edges = np.array([1, 63, 64, 65, 96, 97, 512, 513])
    prompts = np.where(rng.random(num_groups) < 0.5, rng.choice(edges, num_groups), 0)
    prompts = np.where(prompts == 0, rng.integers(1, 600, num_groups), prompts)
    tokens = np.stack([prompts, rng.integers(1, 50, num_groups)], axis=1)
    found = pack_by_length(tokens, batch_size=8, num_bins=num_bins, sizes=(1, 50))
    rows = np.concatenate([batches.rows for batches in found])
    assert sorted(rows[rows >= 0].tolist()) == list(range(num_groups))
    assert rows.shape == (-(-num_groups // 8), 8)
    for batches in found:
        shape = batches.shape
        assert shape[0] == num_bins and shape[3:5] == (1, 50)
        for bins in _in_places(tokens, batches.rows, num_bins):
            assert bins.sum((1, 2)).max() <= shape.capacity.tokens
            assert bins[..., 1].sum(1).max() <= shape.capacity.completion_tokens
            assert (bins[..., 0] <= shape.prompt_sizes).all()
        assert max(shape.prompt_sizes) <= shape.prompt_size
    # One shape a prompt size, longest first.
    sizes = [batches.shape.prompt_size for batches in found]
    assert sizes == sorted(set(sizes), reverse=True)


def test_a_batch_by_length_is_rounded_up_to_a_multiple_of_the_bins():
    (batches,) = pack_by_length(np.array([[5, 1]] * 3), batch_size=3, num_bins=2)
    assert batches.rows.shape == (1, 4) and batches.shape.batch_size == 4


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
    (batches,) = pack_by_length(np.array([[length, 3]]), batch_size=2, num_bins=1)
    assert batches.rows.tolist() == [[0, -1]]
    assert batches.shape == Shape(1, sizes, size, 0, 0, Capacity(length + 3 + 1, 3))


def test_no_groups_make_no_batches():
    assert pack_by_length(np.empty((0, 2), int), batch_size=4, num_bins=2) == []


def _group(prompt: int, *completions: int) -> TokenGroup:
    arrays = tuple(np.ones(length, np.int32) for length in completions)
    return TokenGroup("i", "w", "", np.ones(prompt, np.int32), ("",) * len(arrays), arrays)


def _fit_again(shapes: ReusedShapes, num_batches: int, *groups: TokenGroup) -> Shape:
    """The shape for groups of one batch, which is checked to hold them."""
    lengths = [(len(g.prompt_tokens), sum(map(len, g.completion_tokens))) for g in groups]
    (batches,) = pack_by_length(np.array(lengths), batch_size=len(groups), num_bins=1)
    rows: list[Any] = [groups[i] for i in batches.rows[0]]
    shape = shapes.fit(batches.shape, rows, num_batches=num_batches)
    shape.collate(rows)
    return shape


@pytest.mark.parametrize("num_batches", [1, 100])
def test_shorter_completions_and_prompts_need_no_new_shape(num_batches):
    shapes = ReusedShapes()
    lengths = [(90, 60), (96, 53), (80, 40), (70, 34), (96, 33)]
    assert len({_fit_again(shapes, num_batches, _group(*n), _group(70, 33)) for n in lengths}) == 1


def test_few_batches_take_a_wider_shape_that_is_there_rather_than_one_of_their_own():
    shapes = ReusedShapes()
    wide = _fit_again(shapes, 1, _group(90, 200))
    assert wide.completion_size == 256
    assert _fit_again(shapes, 1, _group(90, 5)) == wide
    # Many are worth a shape that fits them.
    assert _fit_again(shapes, 100, _group(90, 5)).completion_size == 16


@pytest.mark.parametrize(("num_batches", "most"), [(1, 8), (100, 32)])
def test_completions_that_grow_token_by_token_need_few_shapes(num_batches, most):
    shapes = ReusedShapes()
    found = [_fit_again(shapes, num_batches, _group(90, n), _group(80, n)) for n in range(1, 257)]
    assert len(set(found)) <= most
    # All are of sizes that double.
    sizes = {shape.completion_size for shape in found}
    assert sizes <= {16, 32, 64, 128, 256} and max(sizes) == 256


def test_completions_fill_a_capacity_of_all_slots_at_most():
    shape = _fit_again(ReusedShapes(), 1, _group(90, 60), _group(90, 64))
    assert shape.capacity.completion_tokens == 2 * 64
