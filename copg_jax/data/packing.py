"""Which tokens a batch computes: blocks of groups without the padding between them.

1. `deal` composes batches and their blocks so that all blocks have nearly equal numbers of tokens.
2. `token_slots` and `slots_of` list what is valid in each block of a padded batch.

A batch has one block for each device and microbatch. All blocks have the same capacity, so that one
compiled program serves every batch; room that is left over is computed for nothing.
"""

from typing import NamedTuple

import numpy as np

from copg_jax.errors import InputError


class Capacity(NamedTuple):
    """Room of a block."""

    tokens: int  # N, of prompts and completions together
    completion_tokens: int  # M


def token_slots(
    prompt_length: np.ndarray,
    completion_length: np.ndarray,
    *,
    prompt_size: int,
    completion_size: int,
    num_blocks: int,
    room: int | None,
) -> np.ndarray:
    """Slots of the valid tokens of each block; see `GroupBatch.token_slots`.

    Args:
        prompt_length: [B].
        completion_length: [B, K].
        prompt_size: P.
        completion_size: C.
        num_blocks: R, divides B.
        room: N; None = every slot, valid or not, for lengths that are not known yet.

    Returns:
        int32 [R, N].

    Raises:
        InputError: a block has more tokens than room.
    """
    prompt = _valid(prompt_length, prompt_size, num_blocks)
    completion = _valid(completion_length, completion_size, num_blocks)
    return _list(np.concatenate([prompt, completion], axis=1), room)


def slots_of(length: np.ndarray, size: int, num_blocks: int, room: int | None) -> np.ndarray:
    """Slots of the valid tokens of each block, of prompts alone or of completions alone.

    Args:
        length: [B] or [B, K].
        size: P or C.
        num_blocks: R, divides B.
        room: as in `token_slots`.

    Returns:
        int32 [R, room].
    """
    return _list(_valid(length, size, num_blocks), room)


def room_of(
    prompt_length: np.ndarray, completion_length: np.ndarray, *, num_blocks: int, multiple: int
) -> Capacity:
    """The least room, rounded up to `multiple`, that every block of a batch fits in."""
    completion = completion_length.reshape(num_blocks, -1).sum(1)
    tokens = prompt_length.reshape(num_blocks, -1).sum(1) + completion
    return Capacity(*(-(-int(most.max()) // multiple) * multiple for most in (tokens, completion)))


def _valid(length: np.ndarray, size: int, num_blocks: int) -> np.ndarray:
    """True at the positions before `length` in rows of `size`, by block; [R, S]."""
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


def balance(sizes: np.ndarray, num_bins: int) -> np.ndarray:
    """Deals items into bins of equal count and nearly equal totals.

    In rounds, from the largest items to the smallest: the largest item of a round goes to the bin
    with the smallest total so far.

    Args:
        sizes: [n].
        num_bins: divides n.

    Returns:
        int64 [num_bins, n / num_bins], indices of the items, ascending in each bin.
    """
    rounds = np.argsort(-sizes, kind="stable").reshape(-1, num_bins)
    totals = np.zeros(num_bins)
    bins = np.empty_like(rounds)
    for dealt, items in zip(bins, rounds, strict=True):
        dealt[np.argsort(totals, kind="stable")] = items
        totals += sizes[dealt]
    return np.sort(bins.T, axis=1)


def deal(sizes: np.ndarray, *, batch_size: int, num_blocks: int) -> np.ndarray:
    """Deals items into batches, and each batch into blocks, of nearly equal totals.

    Args:
        sizes: [n], e.g. tokens of n groups.
        batch_size: B.
        num_blocks: R, divides B.

    Returns:
        int64 [ceil(n / B), B], indices of the items, block after block; -1 where a batch has fewer
        than B.
    """
    num_batches = -(-len(sizes) // batch_size)
    padded = np.zeros(num_batches * batch_size, int)
    padded[: len(sizes)] = sizes
    batches = [
        items[balance(padded[items], num_blocks)].reshape(-1)
        for items in balance(padded, num_batches)
    ]
    dealt = np.stack(batches)
    return np.where(dealt < len(sizes), dealt, -1)
