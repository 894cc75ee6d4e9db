"""Which tokens a batch computes: blocks of groups without the padding between them.

1. `deal` composes batches and their blocks so that all blocks have nearly equal numbers of tokens,
   and orders each block from its longest prompt to its shortest; `batches_by_length` deals among
   groups of similar prompt length.
2. `prompt_sizes_of` and `capacity_of` give the shape that all blocks fit in.
3. `token_slots`, `prompt_slots` and `completion_slots` list what is valid in each block of a
   padded batch.

A batch has one block for each device and microbatch. All blocks have the same shape, so that one
compiled program serves every batch; room that is left over is computed for nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from copg_jax.errors import InputError


class Capacity(NamedTuple):
    """Room of a block."""

    tokens: int  # N, of prompts and completions together
    completion_tokens: int  # M


_BUCKET = 64
"""Sizes of prompts, but for the largest, are multiples of this, or of more where there would be too
many.

With lengths as in TL;DR, all prompts padded to 512, attention computes 2.4 times the scores that it
needs; with multiples of 128, 64 and 32 it is 1.9, 1.7 and 1.5 (8 groups a block), 1.6, 1.4 and 1.3
(128 groups).
"""
_MOST_BUCKETS = 8  # each has an attention of its own, which takes its time to compile


def token_slots(
    prompt_length: np.ndarray,
    completion_length: np.ndarray,
    *,
    prompt_sizes: Sequence[int],
    completion_size: int,
    num_blocks: int,
    room: int | None,
) -> np.ndarray:
    """Slots of the valid tokens of each block; see `GroupBatch.token_slots`.

    Args:
        prompt_length: [B].
        completion_length: [B, K].
        prompt_sizes: P of each place in a block; [B / R].
        completion_size: C.
        num_blocks: R, divides B.
        room: N; None = every slot, valid or not, for lengths that are not known yet.

    Returns:
        int32 [R, N].

    Raises:
        InputError: a block has more tokens than room.
    """
    prompts = _valid_prompts(prompt_length, prompt_sizes, num_blocks)
    completions = _valid_completions(completion_length, completion_size, num_blocks)
    return _list(np.concatenate([prompts, completions], axis=1), room)


def prompt_slots(
    length: np.ndarray, sizes: Sequence[int], num_blocks: int, room: int | None
) -> np.ndarray:
    """Slots of the valid prompt tokens of each block.

    Args:
        length: [B].
        sizes: P of each place in a block; [B / R].
        num_blocks: R, divides B.
        room: as in `token_slots`.

    Returns:
        int32 [R, room].
    """
    return _list(_valid_prompts(length, sizes, num_blocks), room)


def completion_slots(
    length: np.ndarray, size: int, num_blocks: int, room: int | None
) -> np.ndarray:
    """Slots of the valid completion tokens of each block, counted from 0.

    Args:
        length: [B, K].
        size: C.
        num_blocks: R, divides B.
        room: M; None = every slot.

    Returns:
        int32 [R, room].
    """
    return _list(_valid_completions(length, size, num_blocks), room)


def in_places(tokens: np.ndarray, dealt: np.ndarray, *, num_blocks: int) -> np.ndarray:
    """Tokens in each place of each block of dealt batches, as (prompt, all completions).

    Args:
        tokens: of each item, the same two numbers; [n, 2].
        dealt: from `deal`; [b, B].
        num_blocks: R, divides B.

    Returns:
        int64 [b, R, B / R, 2].
    """
    # A place without a group still has a prompt of one token.
    found = np.where(dealt[:, :, None] < 0, [1, 0], tokens[dealt])
    return found.reshape(len(dealt), num_blocks, -1, 2)


def prompt_sizes_of(places: np.ndarray, *, most: int) -> tuple[int, ...]:
    """Slots for the prompt in each place of a block, in few sizes, that fit all blocks.

    Args:
        places: tokens from `in_places`; [b, R, B / R, 2].
        most: the largest size, at least the longest prompt.

    Returns:
        P of each place; [B / R].
    """
    bucket = round_up(-(-most // _MOST_BUCKETS), _BUCKET)
    return tuple(min(round_up(int(p), bucket), most) for p in places[..., 0].max((0, 1)))


def capacity_of(places: np.ndarray, *, multiple: int = 8) -> Capacity:
    """The least capacity, rounded up to `multiple`, that fits all blocks.

    Args:
        places: tokens from `in_places`; [b, R, B / R, 2].
        multiple: what it is a multiple of.
    """
    prompts, completions = np.moveaxis(places.sum(2), -1, 0)
    most = (prompts + completions).max(), completions.max()
    return Capacity(*(round_up(int(number), multiple) for number in most))


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def _valid_prompts(length: np.ndarray, sizes: Sequence[int], num_blocks: int) -> np.ndarray:
    """True at the slots of prompt tokens, by block; [R, sum of sizes]."""
    in_place = length.reshape(num_blocks, -1).T  # [B / R, R]
    valid = (np.arange(p) < own[:, None] for p, own in zip(sizes, in_place, strict=True))
    return np.concatenate(list(valid), axis=1)


def _valid_completions(length: np.ndarray, size: int, num_blocks: int) -> np.ndarray:
    """True at the slots of completion tokens, by block; [R, B / R K C]."""
    return (np.arange(size) < length[..., None]).reshape(num_blocks, -1)


def _list(valid: np.ndarray, room: int | None) -> np.ndarray:
    """Indices of the true entries of each row, then the row's length as filling; [R, room]."""
    num_blocks, num_slots = valid.shape
    if room is None:
        return np.tile(np.arange(num_slots, dtype=np.int32), (num_blocks, 1))
    if valid.sum(1).max() > room:
        raise InputError(f"A block has {valid.sum(1).max()} tokens but room for {room}.")
    slots = np.full((num_blocks, room), num_slots, np.int32)
    for row, mask in zip(slots, valid, strict=True):
        found = np.flatnonzero(mask)
        row[: len(found)] = found
    return slots


def balance(tokens: np.ndarray, num_bins: int) -> np.ndarray:
    """Deals groups into bins of equal count and nearly equal tokens, completion tokens too.

    In rounds, from the largest groups to the smallest, so that those of a round differ little and
    may be dealt by either number in turn: that with the most goes to the bin with the least so far.
    (Dealt by all tokens alone, the fullest bin has a fifth more completion tokens than the average,
    for which logits are computed.)

    Args:
        tokens: of each group, as (prompt, all completions); [n, 2].
        num_bins: divides n.

    Returns:
        int64 [num_bins, n / num_bins], indices of the groups, ascending in each bin.
    """
    size = np.stack([tokens[:, 1], tokens.sum(1)], axis=1)
    rounds = np.argsort(-size[:, 1], kind="stable").reshape(-1, num_bins)
    filled = np.zeros((num_bins, 2))
    bins = np.empty_like(rounds)
    for number, (dealt, groups) in enumerate(zip(bins, rounds, strict=True), start=1):
        # By all tokens in the last round; equal numbers of the one leave it to the other.
        keys = [1, 0] if (len(rounds) - number) % 2 else [0, 1]
        fullest = groups[np.lexsort(-size[groups][:, keys].T)]
        dealt[np.lexsort(filled[:, keys].T)] = fullest
        filled += size[dealt]
    return np.sort(bins.T, axis=1)


def deal(tokens: np.ndarray, *, batch_size: int, num_blocks: int) -> np.ndarray:
    """Deals groups into batches, and each batch into blocks, of nearly equal totals.

    Args:
        tokens: of each group, as (prompt, all completions); [n, 2].
        batch_size: B.
        num_blocks: R, divides B.

    Returns:
        int64 [ceil(n / B), B], indices of the groups, block after block, in each from the longest
        prompt to the shortest; -1 where a batch has fewer than B.
    """
    num_batches = -(-len(tokens) // batch_size)
    padded = np.zeros((num_batches * batch_size, 2), int)
    padded[: len(tokens)] = tokens
    batches = [rows[balance(padded[rows], num_blocks)] for rows in balance(padded, num_batches)]
    dealt = np.stack(batches)  # [b, R, B / R]
    order = np.argsort(-padded[dealt, 0], axis=2, kind="stable")
    dealt = np.take_along_axis(dealt, order, axis=2).reshape(num_batches, batch_size)
    return np.where(dealt < len(tokens), dealt, -1)


class LengthBatch(NamedTuple):
    """Groups of similar prompt length that are computed together."""

    rows: np.ndarray  # int64 [B], indices of the groups, block after block; -1 = no group
    prompt_size: int  # of all places, 64, 96, 128, 192, 256, ...
    prompt_sizes: tuple[int, ...]  # P of each place in a block, at most that
    capacity: Capacity


def batches_by_length(tokens: np.ndarray, *, batch_size: int, num_blocks: int) -> list[LengthBatch]:
    """Batches of similar prompt length, longest first, so that short prompts are padded little.

    All batches of one prompt size have the same shape, since groups are dealt among them. So there
    are few.

    Args:
        tokens: of each group, as (prompt, all completions); [n, 2].
        batch_size: B.
        num_blocks: R, divides B.
    """
    order = np.argsort(-tokens[:, 0], kind="stable")
    sizes = [_prompt_size(int(longest)) for longest in tokens[order[::batch_size], 0]]
    found = []
    for size in dict.fromkeys(sizes):
        first = sizes.index(size) * batch_size
        rows = order[first : first + sizes.count(size) * batch_size]
        dealt = deal(tokens[rows], batch_size=batch_size, num_blocks=num_blocks)
        places = in_places(tokens[rows], dealt, num_blocks=num_blocks)
        prompt_sizes, capacity = prompt_sizes_of(places, most=size), capacity_of(places, multiple=1)
        dealt_rows = np.where(dealt < 0, -1, rows[dealt])
        found += [LengthBatch(row, size, prompt_sizes, capacity) for row in dealt_rows]
    return found


def _prompt_size(length: int) -> int:
    """The next power of two or half as much again, at least 64."""
    power = 1 << (length - 1).bit_length()
    return max(64, power * 3 // 4 if length <= power * 3 // 4 else power)
