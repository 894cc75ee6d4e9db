"""Pools: sources with shares by position, rounds as one source, and groups joined by prompt."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from copg_jax.config.sections import Limits
from copg_jax.data.dataset import GroupDataset, prepare
from copg_jax.data.groups import TokenGroup
from copg_jax.data.pool import JoinedPool, Pool, Source
from copg_jax.data.stream import GroupStream
from copg_jax.errors import InputError
from copg_jax.models.layout import pack_epochs


def group(prompt: int, name: str, size: int = 2) -> TokenGroup:
    """A scored group whose ids say what it is."""
    return TokenGroup(
        id=name,
        where=f"{name}:1",
        prompt=f"p{prompt}",
        prompt_tokens=np.array([5, prompt], np.int32),
        completions=tuple(f"{name} {k}" for k in range(size)),
        completion_tokens=tuple(np.array([7, 8 + k], np.int32) for k in range(size)),
        rewards=np.arange(size, dtype=np.float32),
        ref_logps=-np.arange(size, dtype=np.float32),
        has_eos=np.array([True] + [False] * (size - 1)),
    )


def dataset(folder: Path, groups: list[TokenGroup], tokenizer) -> GroupDataset:
    """These groups as a data set."""
    path = folder / f"{groups[0].id}.arrow"
    return prepare(groups, tokenizer, path=path, limits=Limits(), vocab_size=500)


@pytest.fixture
def rounds(with_bos, tmp_path) -> list[GroupDataset]:
    """Two rounds, of 6 and 4 groups."""
    return [
        dataset(tmp_path, [group(i, f"a{i}") for i in range(6)], with_bos),
        dataset(tmp_path, [group(10 + i, f"b{i}") for i in range(4)], with_bos),
    ]


@pytest.fixture
def offline(with_bos, tmp_path) -> GroupDataset:
    """30 groups of three completions, the first ones of the prompts of the first round."""
    return dataset(tmp_path, [group(i, f"o{i}", 3) for i in range(30)], with_bos)


def order(pool: Pool | JoinedPool, num_epochs: int = 2, **settings) -> list[str]:
    """Ids in the order of training, in batches of two."""
    stream = GroupStream(pool, pack_epochs, batch_size=2, num_epochs=num_epochs, seed=1, **settings)
    return [name for ids, _ in stream for name in ids]


def test_a_pool_reads_the_groups_of_all_data_sets_by_index(rounds, offline):
    pool = Pool([Source(rounds, origin=1), Source([offline])])
    assert [one.id for one in pool] == [one.id for of in (*rounds, offline) for one in of]
    assert len(pool) == pool.num_groups == 40
    assert pool[7].id == "b1" and pool[7].origin.tolist() == [1, 1] and pool[12].origin is None
    assert pool.shape(1) == (2, 3, 2) and pool.has_rewards
    np.testing.assert_array_equal(pool.num_tokens([39, 0]), [[2, 6], [2, 4]])
    with pytest.raises(IndexError):
        pool[40]


def test_without_shares_each_group_comes_once_an_epoch(rounds, offline):
    seen = order(Pool([Source(rounds), Source([offline])]))
    assert set(Counter(seen[:40]).values()) == {1} and len(seen) == 80


def test_shares_hold_at_every_position_and_no_group_is_left_out(rounds, offline):
    pool = Pool([Source(rounds, 0.25), Source([offline], 0.75)])
    assert len(pool) == 40  # until both were seen whole
    seen = order(pool)
    fresh = np.cumsum([name[0] in "ab" for name in seen])
    positions = np.arange(1, 81)
    # A window of neighbours is dealt into batches by length, so that single ones may move.
    assert fresh[39] == 10 and fresh[79] == 20
    assert np.abs(fresh - positions / 4).max() <= 10
    assert set(seen[:40]) == {one.id for one in pool}
    half = Pool([Source(rounds, 0.5), Source([offline], 0.5)])
    assert len(half) == 60
    counts = Counter(order(half, 1))
    assert sum(counts[one.id] for of in rounds for one in of) == 30
    assert {counts[one.id] for of in rounds for one in of} == {3}
    assert {counts[one.id] for one in offline} == {1}


def test_the_order_is_the_same_again_and_after_resuming(rounds, offline):
    pool = Pool([Source(rounds, 0.25), Source([offline], 0.75)])
    assert order(pool) == order(pool)
    assert order(pool, start_step=7) == order(pool)[14:]


def test_other_shares_origins_and_data_are_another_pool(rounds, offline):
    made = [
        [Source(rounds, 0.25), Source([offline], 0.75)],
        [Source(rounds, 0.75), Source([offline], 0.25)],
        [Source(rounds, 0.25, origin=1), Source([offline], 0.75)],
        [Source(rounds[:1], 0.25), Source([offline], 0.75)],
    ]
    assert len({Pool(sources).fingerprint for sources in made}) == 4


def test_groups_of_a_prompt_are_joined_with_their_origins(rounds, offline):
    joined = JoinedPool(Pool([Source(rounds, origin=0), Source([offline], origin=1)]))
    assert len(joined) == 10  # prompts of both: 0 to 5 of the first round, 10 to 13 of the second
    assert joined.num_left_out == 20
    first = joined[0]
    assert first.completions == ("a0 0", "a0 1", "o0 0", "o0 1", "o0 2")
    assert first.origin.tolist() == [0, 0, 1, 1, 1]
    assert first.rewards.tolist() == [0, 1, 0, 1, 2] and first.mu_logps is None
    assert first.has_eos.tolist() == [True, False, True, False, False]
    assert joined.shape(1) == (2, 5, 2)
    np.testing.assert_array_equal(joined.num_tokens([0, 9]), [[2, 10], [2, 10]])
    assert set(Counter(order(joined, 1)).values()) == {1}


def test_completions_of_one_origin_make_no_pair_across(rounds, offline):
    with pytest.raises(InputError, match="pairs=cross: wanted prompts with completions of diff"):
        JoinedPool(Pool([Source(rounds), Source([offline])]))


def test_groups_that_have_two_origins_by_themselves_need_no_join(with_bos, tmp_path):
    both = replace(group(1, "x"), origin=np.array([3, 0], np.int8))
    joined = JoinedPool(Pool([Source([dataset(tmp_path, [both], with_bos)])]))
    assert len(joined) == 1 and joined[0].origin.tolist() == [3, 0]
    assert joined[0].completions == both.completions
