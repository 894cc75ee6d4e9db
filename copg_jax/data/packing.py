"""Which tokens a batch computes: blocks of groups without the padding between them.

1. `deal` composes batches and their blocks so that all blocks have nearly equal numbers of tokens;
   `batches_by_length` does so among groups of similar prompt length.
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


def block_tokens(tokens: np.ndarray, dealt: np.ndarray, *, num_blocks: int) -> np.ndarray:
    """Tokens in each block of dealt batches, as (prompts, completions).

    Args:
        tokens: of each item, the same two numbers; [n, 2].
        dealt: from `deal`; [b, B].
        num_blocks: R, divides B.

    Returns:
        int64 [b, R, 2].
    """
    # A place without a group still has a prompt of one token.
    found = np.where(dealt[:, :, None] < 0, [1, 0], tokens[dealt])
    return found.reshape(len(dealt), num_blocks, -1, 2).sum(2)


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


class LengthBatch(NamedTuple):
    """Groups of similar prompt length that are computed together."""

    rows: np.ndarray  # int64 [B], indices of the groups, block after block; -1 = no group
    prompt_size: int  # P
    capacity: Capacity


def batches_by_length(tokens: np.ndarray, *, batch_size: int, num_blocks: int) -> list[LengthBatch]:
    """Batches of similar prompt length, longest first, so that short prompts are padded little.

    Prompt sizes are 64, 96, 128, 192, 256, ...; all batches of one size have the same capacity,
    since groups are dealt among them. So there are few shapes.

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
        dealt = deal(tokens[rows].sum(1), batch_size=batch_size, num_blocks=num_blocks)
        blocks = block_tokens(tokens[rows], dealt, num_blocks=num_blocks)
        capacity = Capacity(int(blocks.sum(-1).max()), int(blocks[..., 1].max()))
        dealt_rows = np.where(dealt < 0, -1, rows[dealt])
        found += [LengthBatch(places, size, capacity) for places in dealt_rows]
    return found


def _prompt_size(length: int) -> int:
    """The next power of two or half as much again, at least 64."""
    power = 1 << (length - 1).bit_length()
    return max(64, power * 3 // 4 if length <= power * 3 // 4 else power)
