"""Groups of tokens: from text to token ids, and from those to batches.

1. `tokenize_group` encodes a group of text, cuts a long post, leaves out what is over the limits.
2. `collate` pads groups into one `GroupBatch`, the only thing that any stage trains on.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from copg_jax.data import packing
from copg_jax.data.packing import Capacity
from copg_jax.data.prompts import parse_prompt, truncate_prompt
from copg_jax.data.schemas import InvalidRow, TextGroup
from copg_jax.data.tldr import Limits
from copg_jax.data.tokenizer import Encoder
from copg_jax.errors import InputError

TOO_FEW = "too few completions left"
EOS_INSIDE = "EOS inside a completion"


class GroupBatch(NamedTuple):
    """B prompts with K completions each, padded on the right with token 0; NumPy or JAX arrays.

    Block r of R holds the groups [r B/R, (r + 1) B/R). Prompts lie in buckets, so that long ones do
    not pad the others: bucket j has the prompts of n_j neighbouring places of every block, block
    after block, and with all buckets n_1 + n_2 + ... = B/R.

    The last two fields say what is computed. Slots of a block are numbered through: first those of
    the prompts, place after place and each as many as its bucket is wide, then the completion slots
    (g K + k) C + c.
    """

    prompt_tokens: Any  # one int32 [R n_j, P_j] a bucket
    prompt_length: Any  # [B] int32, at least 1
    completion_tokens: Any  # [B, K, C] int32, EOS included
    completion_length: Any  # [B, K] int32, 0 where the slot is absent
    reward: Any  # [B, K] float32, reward units
    ref_logp: Any  # [B, K] float32, nats, summed over the completion
    token_slots: Any  # [R, N] int32, slots of the tokens to compute; S past the last one
    completion_slots: Any  # [R, M] int32, completion slots alone, counted from 0; the same


@dataclass(frozen=True)
class TokenGroup:
    """One prompt with K completions as token ids [p] and [c_k]; texts are what the ids encode."""

    id: str
    where: str
    prompt: str
    prompt_tokens: np.ndarray
    completions: tuple[str, ...]
    completion_tokens: tuple[np.ndarray, ...]
    rewards: np.ndarray | None = None
    ref_logps: np.ndarray | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def tokenize_group(
    group: TextGroup, encoder: Encoder, limits: Limits, counts: Counter[str]
) -> TokenGroup | str:
    """Encodes a group; returns the reason where too few of its completions can be used.

    Args:
        group: text of the group.
        encoder: the tokenizer and its rules.
        limits: most tokens of a prompt and of a completion.
        counts: increased by the prompts cut and the completions left out, by reason.

    Raises:
        InvalidRow: the prompt cannot be cut to the limit, or a completion contains EOS.
    """
    prompt, prompt_ids = _fit_prompt(group, encoder, limits.max_prompt_tokens)
    kept: list[int] = []
    tokens: list[np.ndarray] = []
    for index, completion in enumerate(group.completions):
        ids = encoder.encode_completion(completion)
        if encoder.eos_id in ids[:-1]:
            raise InvalidRow(
                group.where,
                EOS_INSIDE,
                f"completion {index} contains the end-of-sequence token {encoder.eos_token!r} as "
                "text. It is appended by id: remove it from the text.",
            )
        if group.rewards is not None and group.rewards[index] is None:
            counts["completion without a reward"] += 1
        elif group.ref_logps is not None and group.ref_logps[index] is None:
            counts["completion without a reference log-probability"] += 1
        elif len(ids) > limits.max_completion_tokens:
            counts[f"completion over {limits.max_completion_tokens} tokens"] += 1
        else:
            kept.append(index)
            tokens.append(np.asarray(ids, np.int32))
    if len(kept) < min(2, len(group.completions)):
        return TOO_FEW
    counts["prompt cut"] += prompt != group.prompt
    return TokenGroup(
        id=group.id,
        where=group.where,
        prompt=prompt,
        prompt_tokens=np.asarray(prompt_ids, np.int32),
        completions=tuple(group.completions[index] for index in kept),
        completion_tokens=tuple(tokens),
        rewards=_pick(group.rewards, kept),
        ref_logps=_pick(group.ref_logps, kept),
        columns=group.columns,
    )


def collate(
    groups: Sequence[TokenGroup | None],
    *,
    batch_size: int,
    prompt_sizes: Sequence[int],
    num_completions: int,
    completion_size: int,
    num_blocks: int = 1,
    capacity: Capacity | None = None,
) -> GroupBatch:
    """Pads at most `batch_size` groups into one batch; missing groups have only absent completions.

    Args:
        groups: groups to place, first to last; None leaves a place empty.
        batch_size: B.
        prompt_sizes: P of each place in a block, tokens; equal neighbours share a bucket; [B / R].
        num_completions: K.
        completion_size: C, tokens.
        num_blocks: R, divides B.
        capacity: room of a block; None = every slot is computed, valid or not.

    Raises:
        InputError: a group is larger than the batch's shape, or a block than its room.
    """
    slots = (batch_size, num_completions)
    prompt_tokens, rows = _buckets(prompt_sizes, num_blocks)
    batch = GroupBatch(
        prompt_tokens=prompt_tokens,
        prompt_length=np.ones(batch_size, np.int32),
        completion_tokens=np.zeros((*slots, completion_size), np.int32),
        completion_length=np.zeros(slots, np.int32),
        reward=np.zeros(slots, np.float32),
        ref_logp=np.zeros(slots, np.float32),
        token_slots=None,
        completion_slots=None,
    )
    if len(groups) > batch_size:
        raise InputError(f"{len(groups)} groups do not fit a batch of {batch_size}.")
    for index, group in enumerate(groups):
        if group is None:
            continue
        _check_size(group, (len(rows[index]), num_completions, completion_size))
        rows[index][: len(group.prompt_tokens)] = group.prompt_tokens
        batch.prompt_length[index] = len(group.prompt_tokens)
        for slot, ids in enumerate(group.completion_tokens):
            batch.completion_tokens[index, slot, : len(ids)] = ids
            batch.completion_length[index, slot] = len(ids)
        if group.rewards is not None:
            batch.reward[index, : len(group.rewards)] = group.rewards
        if group.ref_logps is not None:
            batch.ref_logp[index, : len(group.ref_logps)] = group.ref_logps
    return with_slots(batch, num_blocks=num_blocks, capacity=capacity)


def _buckets(
    prompt_sizes: Sequence[int], num_blocks: int
) -> tuple[tuple[np.ndarray, ...], list[np.ndarray]]:
    """Empty buckets [R n_j, P_j], and a view of the row [P_j] of each group, in their order."""
    runs = [(len(list(same)), size) for size, same in itertools.groupby(prompt_sizes)]
    blocks = [np.zeros((num_blocks, places, size), np.int32) for places, size in runs]
    rows = [row for block in zip(*blocks, strict=True) for bucket in block for row in bucket]
    return tuple(bucket.reshape(-1, bucket.shape[2]) for bucket in blocks), rows


def _check_size(group: TokenGroup, shape: tuple[int, int, int]) -> None:
    """Raises InputError where a group is larger than (P, K, C)."""
    size = (
        len(group.prompt_tokens),
        len(group.completion_tokens),
        max(len(ids) for ids in group.completion_tokens),
    )
    if any(got > most for got, most in zip(size, shape, strict=True)):
        raise InputError(
            f"{group.where}: prompt tokens, completions, completion tokens are {size}, over the "
            f"batch's {shape}. Make the batch larger or the limits smaller."
        )


def with_slots(
    batch: GroupBatch, *, num_blocks: int = 1, capacity: Capacity | None = None
) -> GroupBatch:
    """Sets the slots to compute, from the lengths; arguments as in `collate`."""
    completion_size = batch.completion_tokens.shape[2]
    sizes = [[bucket.shape[1]] * (len(bucket) // num_blocks) for bucket in batch.prompt_tokens]
    return batch._replace(
        token_slots=packing.token_slots(
            batch.prompt_length,
            batch.completion_length,
            prompt_sizes=list(itertools.chain(*sizes)),
            completion_size=completion_size,
            num_blocks=num_blocks,
            room=capacity and capacity.tokens,
        ),
        completion_slots=packing.completion_slots(
            batch.completion_length,
            completion_size,
            num_blocks,
            capacity and capacity.completion_tokens,
        ),
    )


def _fit_prompt(group: TextGroup, encoder: Encoder, max_tokens: int) -> tuple[str, list[int]]:
    """Returns the prompt, its post cut where it is too long, and its ids."""
    ids = encoder.encode_prompt(group.prompt)
    if len(ids) <= max_tokens:
        return group.prompt, ids
    prompt = truncate_prompt(group.prompt, encoder.token_ends, max_tokens)
    if prompt is None:
        how = (
            "even with the post cut away"
            if parse_prompt(group.prompt)
            else "and it has no post that could be cut"
        )
        raise InvalidRow(
            group.where,
            f"prompt over {max_tokens} tokens",
            f"the prompt has {len(ids)} tokens, over the limit of {max_tokens}, {how}. Raise "
            "data.max_prompt_tokens.",
        )
    if group.ref_logps is not None:
        raise InvalidRow(
            group.where,
            "prompt over the limit after scoring",
            f"the prompt has {len(ids)} tokens, over the limit of {max_tokens}, but ref_logps are "
            "of the whole prompt. Set data.max_prompt_tokens as it was when scoring.",
        )
    return prompt, encoder.encode_prompt(prompt)


def _pick(values: Sequence[float | None] | None, kept: Sequence[int]) -> np.ndarray | None:
    return None if values is None else np.asarray([values[index] for index in kept], np.float32)
