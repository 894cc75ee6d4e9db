"""Groups of tokens: from text to token ids, and from those to batches.

1. `tokenize_group` encodes a group of text and cuts a long post.
2. `fit_group` leaves out completions over the limits; groups that come as ids begin here.
3. `collate` pads groups into one `GroupBatch`, the only thing that any stage trains on.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from copg_jax.config.sections import Limits
from copg_jax.data.formats.choice import FORMATS
from copg_jax.data.formats.engine import encode_engine
from copg_jax.data.formats.texts import Text, TextGroup, Written
from copg_jax.data.formats.tldr import parse_prompt
from copg_jax.data.rows import InvalidRow
from copg_jax.data.tokenizer import NOT_EXACT, Encoder
from copg_jax.errors import InputError

log = logging.getLogger(__name__)

TOO_FEW = "too few completions left"
EOS_INSIDE = "EOS inside a completion"
NO_TOKENS = "no tokens"
REPEATED = "prompt that all its completions begin with"


class GroupBatch(NamedTuple):
    """B prompts with K completions each, padded on the right; NumPy or JAX arrays.

    `layout` says how a model may leave the padding out; only the models that make and read it know
    what is inside. Without one every model computes the batch as it is padded.
    """

    prompt_tokens: Any  # [B, P] int32
    prompt_length: Any  # [B] int32, at least 1
    completion_tokens: Any  # [B, K, C] int32, the end token included
    completion_length: Any  # [B, K] int32, 0 where the completion is absent
    reward: Any  # [B, K] float32, reward units
    ref_logp: Any  # [B, K] float32, nats, summed over the completion
    origin: Any = None  # [B, K] int8, which µ the completion is from; None: no loss asks
    mu_logp: Any = None  # [B, K] float32, ln µ, nats, NaN where not known; None: no loss asks
    layout: Any = None


@dataclass(frozen=True)
class TokenGroup:
    """One prompt with K completions as token ids [p] and [c_k], with their texts.

    `rewards` and `ref_logps` (nats, summed) are float32 [K], None where the data has none; a reward
    of NaN marks a completion to leave out. `has_eos`, bool [K]: the completion really ended, in an
    end token; None: each one does. `origin`, int8 [K]: which µ it is from; None: all are from 0.
    `mu_logps`, float32 [K]: ln µ of its ids where a sampler knows it, nats.
    `kept`, bool [K of the row]: which of the row's completions these are; None: all. `format`: of
    the texts, by its name.
    """

    id: str
    where: str
    prompt: Text
    prompt_tokens: np.ndarray
    completions: tuple[Text, ...]
    completion_tokens: tuple[np.ndarray, ...]
    rewards: np.ndarray | None = None
    ref_logps: np.ndarray | None = None
    has_eos: np.ndarray | None = None
    origin: np.ndarray | None = None
    mu_logps: np.ndarray | None = None
    kept: np.ndarray | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    format: str = "text"


def columns_by_completion(rows: Iterable[TokenGroup]) -> tuple[set[str], dict[str, str]]:
    """Columns that hold in every row a list with one entry for each completion, or null; and those
    that do so in some rows only, by name, with where the first other row is.
    """
    lists: set[str] = set()
    others: dict[str, str] = {}
    for row in rows:
        size = len(row.completions if row.kept is None else row.kept)
        for name, values in row.columns.items():
            if isinstance(values, list) and values and len(values) == size:
                lists.add(name)
            elif values is not None:
                others.setdefault(name, row.where)
    return lists - others.keys(), {name: others[name] for name in sorted(lists & others.keys())}


def warn_of_lists(prompts: Iterable[TokenGroup]) -> None:
    """Warns of columns that are about completions which were left out for new ones."""
    if whole := columns_by_completion(prompts)[0]:
        log.warning(
            "columns with one entry for each completion of the data: %s: functions receive the "
            "whole list for each generated completion",
            ", ".join(sorted(whole)),
        )


NUMBERS = ("rewards", "ref_logps", "has_eos", "origin", "mu_logps")
"""Fields of a `TokenGroup` with one number a completion, or None."""


def tokenize_group(
    group: TextGroup, encoder: Encoder, limits: Limits, counts: Counter[str]
) -> TokenGroup | str:
    """Encodes a group; returns the reason where too few of its completions can be used.

    Args:
        group: text of the group.
        encoder: the tokenizer and its rules.
        limits: most tokens of a prompt and of a completion.
        counts: increased by what is changed or left out, and by what is odd, by reason.

    Raises:
        InvalidRow: the prompt cannot be cut to the limit, or a completion contains an end token or
            has text but no tokens.
    """
    written = FORMATS[group.format].write(group, encoder)
    encoder, (prompt, prompt_ids) = written.encoder, _fit_prompt(group, written, limits)
    encoded = encoder.encode_completions(prompt, prompt_ids, written.completions)
    completions, notes = zip(*encoded, strict=True) if encoded else ((), ())
    has_ended = None
    if group.engine is None or group.engine.completion_ids is None:
        for index, ids in enumerate(completions):
            _check_completion(group, index, ids, written)
    if group.engine is not None:
        completions, ends = encode_engine(group.engine, completions, encoder, group.where, counts)
        has_ended = np.array(ends, bool)
        notes = notes if group.engine.completion_ids is None else ()
    is_cut = prompt != written.prompt
    whole = TokenGroup(
        id=group.id,
        where=group.where,
        prompt=prompt if is_cut else group.prompt,
        prompt_tokens=np.asarray(prompt_ids, np.int32),
        completions=group.completions,
        completion_tokens=tuple(np.asarray(ids, np.int32) for ids in completions),
        rewards=None if group.rewards is None else np.array(group.rewards, np.float32),
        has_eos=has_ended,
        columns=group.columns,
        format=group.format,
    )
    fitted = fit_group(whole, limits, counts)
    if isinstance(fitted, TokenGroup) and group.num_left_out:
        fitted = replace(fitted, kept=np.zeros(group.num_left_out, bool))
    if fitted != TOO_FEW:
        counts["prompt cut"] += is_cut
        counts[NOT_EXACT] += not encoder.gives_back(prompt, prompt_ids)
        counts[REPEATED] += _is_repeated(written)
        counts.update(filter(None, notes))
    return fitted


def fit_group(group: TokenGroup, limits: Limits, counts: Counter[str]) -> TokenGroup | str:
    """Leaves out completions over the limit or without a reward; never changes a token.

    Returns the reason where too few are left; the arguments are those of `tokenize_group`.

    Raises:
        InvalidRow: the prompt is over the limit.
    """
    length = len(group.prompt_tokens)
    if length > limits.max_prompt_tokens:
        raise InvalidRow(
            group.where,
            f"prompt over {limits.max_prompt_tokens} tokens",
            f"the prompt has {length} tokens, over the limit of {limits.max_prompt_tokens}, and "
            "cannot be cut any more: it was scored as it is. Raise data.max_prompt_tokens, or "
            "score again with this limit.",
        )
    count = len(group.completions)
    absent = np.zeros(count, bool) if group.rewards is None else np.isnan(group.rewards)
    sizes = np.array([len(ids) for ids in group.completion_tokens], int)
    long = (sizes > limits.max_completion_tokens) & ~absent
    counts["completion without a reward"] += int(absent.sum())
    counts[f"completion over {limits.max_completion_tokens} tokens"] += int(long.sum())
    is_kept = ~absent & ~long
    kept = np.flatnonzero(is_kept)
    if len(kept) < min(2, count):
        return TOO_FEW
    return replace(keep(group, kept), kept=None if is_kept.all() else is_kept)


def keep(group: TokenGroup, indices: np.ndarray) -> TokenGroup:
    """The same group with the completions of these indices, int [k], perhaps of none, and with what
    belongs to each.
    """
    numbers = {name: getattr(group, name) for name in NUMBERS}
    return replace(
        group,
        completions=tuple(group.completions[index] for index in indices),
        completion_tokens=tuple(group.completion_tokens[index] for index in indices),
        **{name: None if values is None else values[indices] for name, values in numbers.items()},
    )


def collate(
    groups: Sequence[TokenGroup | None],
    prompt_size: int,
    num_completions: int,
    completion_size: int,
) -> GroupBatch:
    """Pads groups with token 0 into one batch without a layout.

    Args:
        groups: [B]; None leaves a place empty, with only absent completions.
        prompt_size: P, tokens.
        num_completions: K.
        completion_size: C, tokens.

    Raises:
        InputError: a group is larger than the batch's shape.
    """
    batch_size, of_completions = len(groups), (len(groups), num_completions)
    batch = GroupBatch(
        prompt_tokens=np.zeros((batch_size, prompt_size), np.int32),
        prompt_length=np.ones(batch_size, np.int32),
        completion_tokens=np.zeros((*of_completions, completion_size), np.int32),
        completion_length=np.zeros(of_completions, np.int32),
        reward=np.zeros(of_completions, np.float32),
        ref_logp=np.zeros(of_completions, np.float32),
        origin=np.zeros(of_completions, np.int8),
        mu_logp=np.full(of_completions, np.nan, np.float32),
    )
    for index, group in enumerate(groups):
        if group is None:
            continue
        _check_size(group, (prompt_size, num_completions, completion_size))
        batch.prompt_tokens[index, : len(group.prompt_tokens)] = group.prompt_tokens
        batch.prompt_length[index] = len(group.prompt_tokens)
        for k, ids in enumerate(group.completion_tokens):
            batch.completion_tokens[index, k, : len(ids)] = ids
            batch.completion_length[index, k] = len(ids)
        if group.rewards is not None:
            batch.reward[index, : len(group.rewards)] = group.rewards
        if group.ref_logps is not None:
            batch.ref_logp[index, : len(group.ref_logps)] = group.ref_logps
        if group.origin is not None:
            batch.origin[index, : len(group.origin)] = group.origin
        if group.mu_logps is not None:
            batch.mu_logp[index, : len(group.mu_logps)] = group.mu_logps
    return batch


def _check_size(group: TokenGroup, shape: tuple[int, int, int]) -> None:
    """Raises InputError where a group is larger than (P, K, C)."""
    size = (
        len(group.prompt_tokens),
        len(group.completion_tokens),
        max((len(ids) for ids in group.completion_tokens), default=0),
    )
    if any(got > most for got, most in zip(size, shape, strict=True)):
        raise InputError(
            f"{group.where}: prompt tokens, completions, completion tokens are {size}, over the "
            f"batch's {shape}. Make the batch larger or the limits smaller."
        )


def _check_completion(group: TextGroup, index: int, ids: list[int], written: Written) -> None:
    """Raises InvalidRow where a completion has no tokens, or an end token before its end."""
    encoder, text = written.encoder, written.completions[index]
    if len(ids) == 1 and text:
        raise InvalidRow(
            group.where,
            NO_TOKENS,
            f"completion {index}, {text!r:.60}, has no tokens: the tokenizer leaves out all of its "
            "text.",
        )
    if inside := [end for end in encoder.end_ids if end in ids[:-1]]:
        raise InvalidRow(
            group.where,
            EOS_INSIDE,
            f"completion {index} contains the end token {encoder.token_text(inside[0])!r} as text, "
            f"at which a generation ends. Completions end in {encoder.eos_token!r}, which is "
            "appended by id: remove it from the text.",
        )


def _is_repeated(written: Written) -> bool:
    """Whether all completions begin with the prompt, as in rows that hold whole dialogues."""
    prompt, texts = written.prompt.strip(), written.completions
    return bool(texts) and all(text.lstrip().startswith(prompt) for text in texts)


def _fit_prompt(group: TextGroup, written: Written, limits: Limits) -> tuple[str, list[int]]:
    """Returns the prompt, cut by the rule of its format where it is too long, and its ids."""
    encoder, max_tokens = written.encoder, limits.max_prompt_tokens
    if group.engine is not None and group.engine.prompt_ids is not None:
        return written.prompt, group.engine.prompt_ids  # `fit_group` checks their number
    ids = encoder.encode_prompt(written.prompt)
    if len(ids) <= max_tokens:
        return written.prompt, ids
    prompt = FORMATS[group.format].cut(written.prompt, encoder.token_ends, max_tokens)
    if prompt is None:
        is_post = group.format == "tldr" and parse_prompt(written.prompt)
        how = "even with the post cut away" if is_post else "and it has no post that could be cut"
        how = "and a conversation is never cut" if group.format == "chat" else how
        raise InvalidRow(
            group.where,
            f"prompt over {max_tokens} tokens",
            f"the prompt has {len(ids)} tokens, over the limit of {max_tokens}, {how}. Raise "
            "data.max_prompt_tokens.",
        )
    return prompt, encoder.encode_prompt(prompt)
