"""Claims about the order: same on all hosts, resumable, reshuffled, each row once an epoch."""

import hashlib
import itertools
from collections import Counter

import jax
import numpy as np
import pytest

from copg_jax.config.sections import Limits
from copg_jax.data.dataset import prepare
from copg_jax.data.formats.texts import TextGroup
from copg_jax.data.stream import GroupStream, num_measured, num_steps
from copg_jax.errors import InputError
from copg_jax.models.layout import WINDOW, _window, pack_epochs

ROWS = 22


@pytest.fixture(scope="module")
def dataset(plain, tmp_path_factory):
    """22 pairs with ids 0 to 21."""
    groups = (
        TextGroup(str(i), f"f:{i}", f"p{i}", (" a", f" b{i}"), (1.0, 0.0)) for i in range(ROWS)
    )
    path = tmp_path_factory.mktemp("stream") / "a.arrow"
    return prepare(groups, plain, path=path, limits=Limits(), vocab_size=500)


def steps(dataset, **changes):
    settings = {"batch_size": 4, "num_epochs": 3, "seed": 5}
    return list(GroupStream(dataset, pack_epochs, **(settings | changes)))


def assert_same(left, right):
    assert [ids for ids, _ in left] == [ids for ids, _ in right]
    for (_, a), (_, b) in zip(left, right, strict=True):
        assert a.layout.prompt_sizes == b.layout.prompt_sizes
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)


def test_each_row_is_seen_once_an_epoch_but_for_the_tail(dataset):
    ids = [i for batch, _ in steps(dataset) for i in batch]
    assert len(ids) // 4 == num_steps(ROWS, 4, 3) == 16
    assert set(ids[:ROWS]) == set(ids[ROWS : 2 * ROWS]) == set(map(str, range(ROWS)))
    counts = Counter(ids)
    assert sum(counts.values()) == 64 and set(counts.values()) == {2, 3}
    assert ids[:ROWS] != ids[ROWS : 2 * ROWS]


def test_the_second_epoch_of_a_seed_is_not_the_first_of_the_next(dataset):
    orders = [[i for ids, _ in steps(dataset, seed=s, batch_size=22) for i in ids] for s in (5, 6)]
    assert orders[0][ROWS : 2 * ROWS] != orders[1][:ROWS]


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(dataset):
    assert_same(steps(dataset), steps(dataset))
    assert steps(dataset)[0][0] != steps(dataset, seed=6)[0][0]


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_the_hosts_slices_make_up_the_single_host_batch(dataset, num_hosts):
    whole = steps(dataset, num_bins=4)
    slices = [
        steps(dataset, num_bins=4, host=host, num_hosts=num_hosts) for host in range(num_hosts)
    ]
    joined = []
    for parts in zip(*slices, strict=True):
        ids = [i for part, _ in parts for i in part]
        batches = [batch for _, batch in parts]
        joined.append((ids, jax.tree.map(lambda *pieces: np.concatenate(pieces), *batches)))
    assert_same(whole, joined)


@pytest.mark.parametrize("start", [0, 1, 7, 15, 16])
def test_resuming_at_any_step_continues_the_uninterrupted_order(dataset, start):
    assert_same(steps(dataset)[start:], steps(dataset, start_step=start))


def test_one_stream_can_be_iterated_again(dataset):
    stream = GroupStream(dataset, pack_epochs, batch_size=4, num_epochs=1, seed=0)
    assert stream.num_steps == 5
    assert_same(list(stream), list(stream))


def make(tokenizer, folder, num_rows):
    """Pairs of many lengths."""
    groups = (
        TextGroup(
            str(i),
            f"f:{i}",
            f"p{i}" + " a" * (7 * i % 90),
            (" a" * (1 + i * i % 11), f" b{i}"),
            (1.0, 0.0),
        )
        for i in range(num_rows)
    )
    path = folder / f"{num_rows}.arrow"
    return prepare(groups, tokenizer, path=path, limits=Limits(), vocab_size=500)


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "num_epochs", "seed", "num_bins", "recorded"),
    [
        (22, 4, 3, 5, 1, "4bda3e24c37c44b0"),
        (22, 8, 30, 1, 4, "8662228f71004c80"),
        (301, 16, 5, 0, 8, "1021dc0aceba6470"),
        (301, 7, 12, 3, 1, "d057510445cb988d"),
        (2500, 32, 3, 2, 16, "e51c3770e437638c"),
        (2500, 48, 2, 7, 3, "c7c12c02efb0167a"),
    ],
)
def test_batches_and_their_shape_are_those_that_were_recorded(
    num_rows, batch_size, num_epochs, seed, num_bins, recorded, plain, tmp_path
):
    dataset = make(plain, tmp_path, num_rows)
    settings = {"batch_size": batch_size, "num_epochs": num_epochs, "num_bins": num_bins}
    digest = hashlib.sha256()
    for ids, batch in GroupStream(dataset, pack_epochs, seed=seed, **settings):
        sizes = [batch.layout.token_slots.shape, batch.layout.completion_slots.shape]
        digest.update(repr((ids, batch.layout.prompt_sizes, *sizes)).encode())
    assert digest.hexdigest()[:16] == recorded


@pytest.mark.parametrize(("batch_size", "num_epochs"), [(4, 65), (22, 10**9), (5, 10**25)])
def test_any_number_of_epochs_starts_at_once_and_with_the_batches_of_a_shorter_run(
    dataset, batch_size, num_epochs
):
    settings = {"batch_size": batch_size, "num_epochs": num_epochs, "seed": 5}
    stream = GroupStream(dataset, pack_epochs, **settings)
    assert stream.num_steps == ROWS * num_epochs // batch_size
    few = steps(dataset, batch_size=batch_size, num_epochs=5)
    assert [ids for ids, _ in itertools.islice(stream, 5)] == [ids for ids, _ in few[:5]]


def test_epochs_after_those_that_were_measured_have_an_order_of_their_own(dataset):
    stream = GroupStream(dataset, pack_epochs, batch_size=11, num_epochs=10**13, seed=5)

    def ids_of(epoch):
        return [stream.load(step)[0] for step in (2 * epoch, 2 * epoch + 1)]

    epochs = [0, 1, 63, 64, 65, 128, 10**6, 2**31 + 3, 10**12]
    found = [ids_of(epoch) for epoch in epochs]
    for first, second in found:
        assert sorted(first + second, key=int) == [str(i) for i in range(ROWS)]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert found == [ids_of(epoch) for epoch in epochs]


def test_a_batch_that_is_larger_than_the_measured_ones_has_a_larger_shape_each_time(uneven):
    batch_at = pack_epochs(
        lambda places: uneven.num_tokens(places * 7919 % 5000),  # stands for an order of training
        batch_size=48,
        num_bins=2,
        sizes=uneven.shape(),
        epoch_size=5000,
        num_fitted=num_steps(5000, 48, 2),
    )
    usual = batch_at(0).shape
    assert batch_at(num_steps(5000, 48, 2) - 1).shape == usual
    # Across the end of an epoch, groups are not dealt: such a batch is the largest most often.
    across = [5000 * epoch // 48 for epoch in range(3, 200) if 5000 * epoch % 48]
    shapes = {step: batch_at(step).shape for step in across}
    larger = {step: shape for step, shape in shapes.items() if shape != usual}
    assert larger and len(set(larger.values())) < len(larger)
    for step, shape in larger.items():
        pairs = zip(shape.prompt_sizes, usual.prompt_sizes, strict=True)
        assert all(
            new >= old for new, old in [*pairs, *zip(shape.capacity, usual.capacity, strict=True)]
        )
        assert batch_at(step).shape == shape


@pytest.mark.parametrize(
    ("num_rows", "num_epochs", "wanted"),
    [(22, 3, 3), (22, 64, 64), (22, 10**9, 64), (20_000, 10**9, 26), (10**7, 20, 16)],
)
def test_the_number_of_measured_epochs_is_bounded(num_rows, num_epochs, wanted):
    assert num_measured(num_rows, num_epochs) == wanted


@pytest.mark.parametrize("num_rows", [22, 2048, 5003, 92_858])
@pytest.mark.parametrize(("batch_size", "num_epochs"), [(1, 1), (8, 2), (128, 3), (4096, 1)])
def test_windows_cover_the_run_in_nearly_equal_parts_and_mix_no_epochs(
    num_rows, batch_size, num_epochs
):
    num_rows = max(num_rows, batch_size)  # fewer are refused
    after, firsts = 0, [0]
    while after < num_steps(num_rows, batch_size, num_epochs):
        first, after = _window(firsts[-1], batch_size, num_rows)
        assert first == firsts[-1] < after
        for inside in {first, (first + after) // 2, after - 1}:
            assert _window(inside, batch_size, num_rows) == (first, after)
        firsts.append(after)
    assert firsts[-1] == num_steps(num_rows, batch_size, num_epochs)
    for epoch in range(num_epochs):
        inside = [f for f in firsts if epoch * num_rows <= f * batch_size <= (epoch + 1) * num_rows]
        sizes = np.diff(inside)
        assert not len(sizes) or np.ptp(sizes) <= 1
        assert (sizes * batch_size < 1.5 * WINDOW + batch_size).all()


@pytest.fixture(scope="module")
def uneven(plain, tmp_path_factory):
    """5,000 pairs whose lengths are spread like those of TL;DR: 343 +- 100 and 34 +- 11 tokens."""
    rng = np.random.default_rng(0)

    def words(mean, spread):
        return " a" * int(np.clip(rng.normal(mean, spread), mean / 5, 2 * mean))

    groups = (
        TextGroup(str(i), f"f:{i}", words(343, 100), (words(34, 11), words(34, 11)), (1.0, 0.0))
        for i in range(5000)
    )
    path = tmp_path_factory.mktemp("uneven") / "a.arrow"
    return prepare(groups, plain, path=path, limits=Limits(1024, 192), vocab_size=500)


@pytest.mark.parametrize(("batch_size", "num_bins"), [(8, 1), (64, 1), (64, 8), (64, 16)])
def test_what_is_computed_is_95_percent_useful_in_one_shape(uneven, batch_size, num_bins):
    stream = GroupStream(
        uneven, pack_epochs, batch_size=batch_size, num_epochs=2, seed=0, num_bins=num_bins
    )
    batches = [batch for _, batch in stream]
    assert len(batches) == num_steps(5000, batch_size, 2)
    (shape,) = {tuple(np.shape(x) for x in jax.tree.leaves(batch)) for batch in batches}
    (widths,) = {batch.layout.prompt_sizes for batch in batches}
    assert shape[-2][0] == shape[-1][0] == num_bins
    useful = sum(b.prompt_length.sum() + b.completion_length.sum() for b in batches)
    assert useful >= 0.95 * sum(b.layout.token_slots.size for b in batches)
    # Padded to the width of their place, prompts are not much longer than they are.
    slots = sum(widths) * num_bins * len(batches)
    widest = max(widths) * batch_size * len(batches)
    assert slots < 1.45 * sum(b.prompt_length.sum() for b in batches) and slots < 0.75 * widest


def test_every_valid_token_is_computed_once_and_nothing_else(uneven):
    stream = GroupStream(uneven, pack_epochs, batch_size=16, num_epochs=1, seed=3, num_bins=4)
    _, batch = next(iter(stream))
    size = batch.completion_tokens.shape[2]
    completion = np.arange(size) < batch.completion_length[..., None]
    in_place, widths = batch.prompt_length.reshape(4, -1).T, batch.layout.prompt_sizes
    assert len(set(widths)) > 1 and list(widths) == sorted(widths, reverse=True)
    prompts = [np.arange(p) < length[:, None] for p, length in zip(widths, in_place, strict=True)]
    valid = np.concatenate([*prompts, completion.reshape(4, -1)], axis=1)
    for slots, wanted, num_slots in (
        (batch.layout.token_slots, valid, valid.shape[1]),
        (batch.layout.completion_slots, completion.reshape(4, -1), completion.size // 4),
    ):
        for row, mask in zip(slots, wanted, strict=True):
            assert row[row < num_slots].tolist() == np.flatnonzero(mask).tolist()
            assert (row[mask.sum() :] == num_slots).all()


def test_impossible_settings_are_refused_with_the_numbers(dataset):
    with pytest.raises(InputError, match="has 22 groups, fewer than one batch of 32"):
        steps(dataset, batch_size=32)
    with pytest.raises(InputError, match="4 groups in 2 bins cannot be shared equally by 4 hosts"):
        steps(dataset, num_bins=2, num_hosts=4)
    with pytest.raises(InputError, match="batch of 4 groups cannot be cut into 3 equal bins"):
        steps(dataset, num_bins=3)
    with pytest.raises(InputError, match="Resuming at step 17, but 3 epochs of 22 groups"):
        steps(dataset, start_step=17)
