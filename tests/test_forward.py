"""Forward passes over many groups: every completion once, back in the order they came."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.data.groups import GroupBatch, TokenGroup
from copg_jax.forward import GroupForward, one_late
from tests.toys import mesh


def digest(params, batch: GroupBatch):
    """A number that depends on the tokens of the prompt and of the completion, not on padding."""
    prompt, completion = batch.prompt_tokens, batch.completion_tokens
    in_prompt = jnp.arange(prompt.shape[1])[None, :] < batch.prompt_length[:, None]
    in_completion = (
        jnp.arange(completion.shape[2])[None, None, :] < batch.completion_length[..., None]
    )
    weights = 1.0 + jnp.arange(completion.shape[2])[None, None, :]
    own = jnp.where(in_completion, completion * weights, 0).sum(-1)
    return params * (1000.0 * jnp.where(in_prompt, prompt, 0).sum(-1)[:, None] + own)


def group(prompt: Any, *completions: Any) -> TokenGroup:
    arrays = tuple(np.array(ids, np.int32) for ids in completions)
    return TokenGroup("i", "w", "", np.array(prompt, np.int32), ("",) * len(arrays), arrays)


def expected(row: TokenGroup) -> list[float]:
    return [
        2 * (1000.0 * row.prompt_tokens.sum() + (ids * (1 + np.arange(len(ids)))).sum())
        for ids in row.completion_tokens
    ]


def forward(on, batches: list[GroupBatch], batch_size: int = 4) -> GroupForward:
    """The forward pass of `digest`, which notes the batches that it is given."""
    found = GroupForward(
        digest,
        jnp.float32(2),
        param_shardings=None,
        mesh=on,
        batch_size=batch_size,
        name="digest",
    )
    make = found._collate

    def noted(*args):
        batches.append(make(*args))
        return batches[-1]

    found._collate = noted
    return found


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_values_come_back_in_order_whatever_the_lengths(sizes):
    rng = np.random.default_rng(0)
    draw = lambda most: rng.integers(1, 50, rng.integers(1, most)).tolist()
    rows = [group(draw(200), *(draw(40) for _ in range(rng.integers(1, 5)))) for _ in range(23)]
    batches: list[GroupBatch] = []
    values = forward(mesh(*sizes), batches)(rows)
    for row, got in zip(rows, values, strict=True):
        np.testing.assert_allclose(got, expected(row), rtol=1e-6)
    # Of what is computed most is useful, though lengths range from 1 to 200.
    useful = sum(b.prompt_length.sum() + b.completion_length.sum() for b in batches)
    assert useful > 0.7 * sum(b.token_slots.size for b in batches)


def test_equal_prompts_and_equal_completions_are_computed_once():
    rows = [
        group([1, 2], [3], [4, 5]),
        group([7], [3]),
        group([1, 2], [4, 5], [6]),
        group([1, 2], [3], [3]),
    ]
    batches: list[GroupBatch] = []
    values = forward(mesh(), batches)(rows)
    for row, got in zip(rows, values, strict=True):
        np.testing.assert_allclose(got, expected(row), rtol=1e-6)
    (batch,) = batches
    # Prompts [1, 2] with [3], [4, 5], [6] and [7] with [3]; the other two rows are empty.
    assert sorted((batch.completion_length > 0).sum(-1).tolist()) == [0, 0, 1, 3]


def test_a_prompt_with_many_completions_is_cut_into_groups_of_eight():
    rows = [group([5, 6], *([i] for i in range(1, 20)))]
    batches: list[GroupBatch] = []
    (values,) = forward(mesh(), batches)(rows)
    np.testing.assert_allclose(values, expected(rows[0]), rtol=1e-6)
    assert sum((batch.completion_length > 0).sum() for batch in batches) == 19
    assert {batch.completion_tokens.shape[1] for batch in batches} == {8}


def test_the_next_batch_is_started_before_one_is_read():
    events = []

    def launched():
        for i in range(3):
            events.append(f"start {i}")
            yield i

    for i in one_late(launched()):
        events.append(f"read {i}")
    assert events == ["start 0", "start 1", "read 0", "start 2", "read 1", "read 2"]
    assert list(one_late([])) == []


def test_many_calls_with_lengths_as_in_tldr_compile_few_shapes_and_compute_little_padding():
    rng = np.random.default_rng(0)

    def lengths(mean: int, std: int, least: int, most: int) -> list[int]:
        return np.clip(rng.normal(mean, std, 512), least, most).astype(int).tolist()

    batches: list[GroupBatch] = []
    run = forward(mesh(), batches, batch_size=32)
    run._function = lambda params, batch: np.zeros(batch.completion_length.shape)
    for part in range(8):
        sizes = zip(
            lengths(340, 100, 64, 512), *(lengths(36, 11, 8, 53) for _ in "ab"), strict=True
        )
        rows = [
            group(np.r_[part, i, np.ones(p - 2)], *(np.ones(c) for c in own))
            for i, (p, *own) in enumerate(sizes)
        ]
        run(rows)
    assert len(batches) == 8 * 512 // 32
    assert len({tuple(field.shape for field in batch) for batch in batches}) <= 12
    useful = sum(b.prompt_length.sum() + b.completion_length.sum() for b in batches)
    assert useful > 0.93 * sum(b.token_slots.size for b in batches)
