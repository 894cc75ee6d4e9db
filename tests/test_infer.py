"""Forward passes over many groups: every completion once, back in the order they came."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from copg_jax.data.groups import GroupBatch, TokenGroup
from copg_jax.infer import GroupForward, one_late
from copg_jax.models.layout import Shape
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


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[GroupBatch]:
    """Batches on the host, as they are made from now on."""
    found: list[GroupBatch] = []
    collate = Shape.collate

    def noted(*arguments):
        found.append(collate(*arguments))
        return found[-1]

    monkeypatch.setattr(Shape, "collate", noted)
    return found


def forward(on: jax.sharding.Mesh, batch_size: int = 4) -> GroupForward:
    """The forward pass of `digest`."""
    return GroupForward(digest, jnp.float32(2), mesh=on, batch_size=batch_size, name="digest")


def useful_and_shapes(batches: list[GroupBatch]) -> tuple[float, int]:
    """Share of the computed tokens that are no padding, and number of shapes to compile."""
    useful = sum(b.prompt_length.sum() + b.completion_length.sum() for b in batches)
    shapes = {(*(x.shape for x in jax.tree.leaves(b)), b.layout.prompt_sizes) for b in batches}
    return useful / sum(b.layout.token_slots.size for b in batches), len(shapes)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_values_come_back_in_order_whatever_the_lengths(sizes, batches):
    rng = np.random.default_rng(0)
    draw = lambda most: rng.integers(1, 50, rng.integers(1, most)).tolist()
    rows = [group(draw(200), *(draw(40) for _ in range(rng.integers(1, 5)))) for _ in range(23)]
    values = forward(mesh(*sizes))(rows)
    for row, got in zip(rows, values, strict=True):
        np.testing.assert_allclose(got, expected(row), rtol=1e-6)
    # Of what is computed most is useful, though lengths range from 1 to 200.
    assert useful_and_shapes(batches)[0] > 0.5


def test_equal_prompts_and_equal_completions_are_computed_once(batches):
    rows = [
        group([1, 2], [3], [4, 5]),
        group([7], [3]),
        group([1, 2], [4, 5], [6]),
        group([1, 2], [3], [3]),
    ]
    values = forward(mesh())(rows)
    for row, got in zip(rows, values, strict=True):
        np.testing.assert_allclose(got, expected(row), rtol=1e-6)
    (batch,) = batches
    # Prompts [1, 2] with [3], [4, 5], [6] and [7] with [3]; the other two rows are empty.
    assert sorted((batch.completion_length > 0).sum(-1).tolist()) == [0, 0, 1, 3]


def test_a_prompt_with_many_completions_is_cut_into_groups_of_eight(batches):
    rows = [group([5, 6], *([i] for i in range(1, 20)))]
    (values,) = forward(mesh())(rows)
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


def lengths(rng: np.random.Generator, num: int, mean: float, std: int, least: int, most: int):
    """As those of TL;DR are spread."""
    return np.clip(rng.normal(mean, std, num), least, most).astype(int).tolist()


def without_model(batch_size: int) -> GroupForward:
    """A forward pass that computes nothing."""
    run = forward(mesh(), batch_size)
    run._function = lambda params, batch: np.zeros(batch.completion_length.shape)
    return run


def test_scoring_lengths_as_in_tldr_compiles_few_shapes_and_computes_little_padding(batches):
    rng = np.random.default_rng(0)
    run = without_model(batch_size=32)
    for part in range(8):
        prompts = lengths(rng, 512, 340, 100, 64, 512)
        completions = (lengths(rng, 512, 36, 11, 8, 53) for _ in "ab")
        run(
            [
                group(np.r_[part, i, np.ones(p - 2)], *(np.ones(c) for c in own))
                for i, (p, *own) in enumerate(zip(prompts, *completions, strict=True))
            ]
        )
    assert len(batches) == 8 * 512 // 32
    useful, num_shapes = useful_and_shapes(batches)
    assert useful > 0.95 and num_shapes <= 6


@pytest.mark.parametrize("per_call", [128, 32])
def test_evaluations_while_completions_grow_compile_nothing_after_the_first(per_call, batches):
    rng = np.random.default_rng(0)
    prompts = sorted(lengths(rng, 128, 340, 100, 64, 512), reverse=True)
    run = without_model(batch_size=16)
    num_shapes = []
    for mean in np.linspace(34, 48, 30):
        own = lengths(rng, 128, mean, 11, 4, 53)
        rows = [
            group(np.r_[i, np.ones(p - 1)], np.ones(c))
            for i, (p, c) in enumerate(zip(prompts, own, strict=True))
        ]
        for first in range(0, 128, per_call):
            run(rows[first : first + per_call])
        useful, found = useful_and_shapes(batches)
        num_shapes.append(found)
    assert num_shapes == [3] * 30
    assert useful > 0.84


@pytest.mark.parametrize("lengths", [(20, 33, 40, 9), (100, 40, 70, 9)])
def test_completions_that_get_longer_or_shorter_are_computed_in_a_shape_that_is_there(
    lengths, batches
):
    run = forward(mesh())
    for length in lengths:
        row = group(range(1, 30), range(1, 1 + length))
        np.testing.assert_allclose(run([row]), [expected(row)])
    assert useful_and_shapes(batches)[1] == 1
