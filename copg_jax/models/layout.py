"""How the tokens of a batch of groups are packed: all there is to know about it.

Linear layers run on packed tokens: the valid tokens of a bin of groups, one after another without
padding. Attention runs on slots, where every group has rows of its own. A batch has one bin, or
several, for each device and microbatch; all bins have the same shape, so that one compiled program
serves every batch, and capacity that is left over is computed for nothing.

On the host, in NumPy:
1. `pack`, `pack_epochs` and `pack_by_length` deal groups into batches, and batches into bins, of
   nearly equal numbers of tokens, and find the `Shape` that fits them all; `ReusedShapes` keeps
   shapes from call to call.
2. `Shape.collate` makes a `GroupBatch` with its `Layout`, the slots that are computed.

On devices:
3. `Packing` carries arrays between packed tokens and slots. Each way is the other's transpose, so
   the backward pass gathers as well and never scatters.
4. `GroupPacking` is the map of whole groups. Prompts lie in buckets: in each place of a bin is a
   prompt of nearly the same length in all bins, and a bucket is as wide as the longest of them.

A batch without a layout is computed as it is padded, a bin a group.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from copg_jax.data.groups import GroupBatch, TokenGroup, collate
from copg_jax.errors import InputError

WINDOW = 2048
"""Groups, about, that are dealt into batches together: many even out lengths, few keep the
shuffled order. Of 92,000 pairs with lengths as in TL;DR, 128 a step in 64 to 1 bins, 96 to 99 % of
what is computed is useful (94 to 97 % with 512).
"""
_BUCKET = 64
"""Widths of prompts, but for the largest, are multiples of this. With lengths as in TL;DR,
attention computes 1.7 times the scores that it needs instead of the 2.4 times of one width (8
groups a bin), 1.4 times with 128: 6 % of the operations and 12 % of the time of a step of the
benchmark on a CPU, 1 % of the operations at 7B.
"""
_MOST_BUCKETS = 8  # each has an attention of its own, which takes its time to compile
# Forward passes of fewer batches pay more for one compilation than for all their padding, and are
# likely to come again with other lengths, as in evaluations while a policy learns: completions have
# this many slots at least, and capacity to double. In 30 evaluations of 128 prompts all shapes are
# compiled in the first, and 92 % of what is computed is useful.
_MANY_BATCHES = 16
_FEWEST_SLOTS = 64


class Capacity(NamedTuple):
    """Tokens that a bin has room for."""

    tokens: int  # N, of prompts and completions together
    completion_tokens: int  # M


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("token_slots", "completion_slots"),
    meta_fields=("prompt_sizes",),
)
@dataclass(frozen=True)
class Layout:
    """Which slots of a batch are computed, bin after bin: bin r of R has the groups [r B/R, ...).

    Slots of a bin are numbered through: first those of the prompts, place after place, each as wide
    as `prompt_sizes` says, then the completion slots (g K + k) C + c.
    """

    token_slots: Any  # int32 [R, N], slots of the tokens to compute; S past the last one
    completion_slots: Any  # int32 [R, M], completion slots alone, counted from 0; the same
    prompt_sizes: tuple[int, ...]  # by place in a bin, [B / R]

    @property
    def num_computed(self) -> int:
        """Tokens that linear layers compute: the capacity of all bins, filled or not."""
        return self.token_slots.size


class Shape(NamedTuple):
    """The shape of some batches, which fits all their bins."""

    num_bins: int  # R, of a batch
    prompt_sizes: tuple[int, ...]  # P of each place in a bin, at most `prompt_size`
    prompt_size: int  # P of the batch
    num_completions: int  # K
    completion_size: int  # C
    capacity: Capacity

    @property
    def batch_size(self) -> int:
        """B."""
        return self.num_bins * len(self.prompt_sizes)

    def collate(self, groups: Sequence[TokenGroup | None]) -> GroupBatch:
        """Pads groups and lays them out; None leaves a place empty.

        Args:
            groups: all of a batch, or a host's share of its bins.

        Raises:
            InputError: a group is larger than the shape, or a bin than its capacity.
        """
        sizes = self.prompt_size, self.num_completions, self.completion_size
        batch = collate(groups, *sizes)
        return batch._replace(layout=self.layout(batch.prompt_length, batch.completion_length))

    def joined(self, other: Self) -> Self:
        """The least shape that fits what fits either; of as many bins, places and completions."""
        return self._replace(
            prompt_sizes=tuple(map(max, self.prompt_sizes, other.prompt_sizes)),
            capacity=Capacity(*map(max, self.capacity, other.capacity)),
        )

    def with_all_completions(self) -> Self:
        """The same with capacity for completions that fill all slots, even of empty places."""
        own = len(self.prompt_sizes) * self.num_completions * self.completion_size
        prompts = self.capacity.tokens - self.capacity.completion_tokens
        return self._replace(capacity=Capacity(prompts + own, own))

    def prompt_layout(self, prompt_length: np.ndarray) -> Layout:
        """The layout of the prompts alone; length [B]."""
        prompts = self.capacity.tokens - self.capacity.completion_tokens
        alone = self._replace(completion_size=0, capacity=Capacity(prompts, 0))
        return alone.layout(prompt_length, np.zeros((len(prompt_length), 0), np.int32))

    def layout(self, prompt_length: np.ndarray, completion_length: np.ndarray) -> Layout:
        """The layout of groups of these lengths; [B] and [B, K]."""
        num_bins = len(prompt_length) // len(self.prompt_sizes)
        in_place = prompt_length.reshape(num_bins, -1).T  # [B / R, R]
        prompts = [
            np.arange(size) < own[:, None]
            for size, own in zip(self.prompt_sizes, in_place, strict=True)
        ]
        slots = np.arange(self.completion_size) < completion_length[..., None]
        completions = slots.reshape(num_bins, -1)
        return Layout(
            _indices(np.concatenate([*prompts, completions], axis=1), self.capacity.tokens),
            _indices(completions, self.capacity.completion_tokens),
            self.prompt_sizes,
        )


def _indices(valid: np.ndarray, capacity: int) -> np.ndarray:
    """Indices of the true entries of each row, then the row's length as filling; [R, capacity]."""
    num_slots, most = valid.shape[1], int(valid.sum(1).max(initial=0))
    if most > capacity:
        raise InputError(f"A bin has {most} tokens but a capacity of {capacity}.")
    slots = np.full((len(valid), capacity), num_slots, np.int32)
    for row, mask in zip(slots, valid, strict=True):
        found = np.flatnonzero(mask)
        row[: len(found)] = found
    return slots


class PackedBatches(NamedTuple):
    """Batches of one shape, and which groups they hold."""

    rows: np.ndarray  # int [b, B], or [B] of one batch: index of the group in each place; -1 = none
    shape: Shape

    def collate(self, groups: Sequence[TokenGroup | None]) -> GroupBatch:
        """`Shape.collate`."""
        return self.shape.collate(groups)


def pack(
    num_tokens: np.ndarray, *, batch_size: int, num_bins: int, sizes: tuple[int, int, int]
) -> PackedBatches:
    """Deals groups into batches of one shape that fits them all; the last may have empty places.

    Args:
        num_tokens: of each group, as (prompt, all completions); [n, 2].
        batch_size: B.
        num_bins: R, divides B.
        sizes: P, K and C that fit every group.
    """
    rows = _deal(num_tokens, batch_size, num_bins)
    return PackedBatches(rows, _fit(_in_places(num_tokens, rows, num_bins), sizes, multiple=8))


def pack_epochs(
    num_tokens: Callable[[np.ndarray], np.ndarray],
    *,
    batch_size: int,
    num_bins: int,
    sizes: tuple[int, int, int],
    epoch_size: int,
    num_fitted: int,
    at_least: Shape | None = None,
) -> Callable[[int], PackedBatches]:
    """Deals the groups of epochs that are laid end to end, a window of neighbours at a time.

    Args:
        num_tokens: of the groups at these places in the order of training, int [n], as (prompt, all
            completions); [n, 2].
        batch_size: B.
        num_bins: R, divides B.
        sizes: P, K and C that fit every group.
        epoch_size: groups of an epoch, at least B. Only those of one epoch are dealt together.
        num_fitted: batches from the first one that share a shape which fits them all.
        at_least: a shape that theirs is joined with.

    Returns:
        Batch `index`, dealt when it is asked for, with rows [B]. One after `num_fitted` may be
        larger than the shape of the others; it has a shape of its own, the same each time.
    """

    def deal(window: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows [b, B] and tokens by place of the batches of a window."""
        groups = np.arange(window[0] * batch_size, window[1] * batch_size)
        sizes_of_groups = num_tokens(groups)
        rows = _deal(sizes_of_groups, batch_size, num_bins)
        return groups[rows], _in_places(sizes_of_groups, rows, num_bins)

    lengths, after = [], 0
    while after < num_fitted:
        window = _window(after, batch_size, epoch_size)
        lengths.append(deal(window)[1])
        after = window[1]
    shape = _fit(np.concatenate(lengths), sizes, multiple=8)
    shape = shape if at_least is None else shape.joined(at_least)

    @lru_cache(maxsize=4)  # those of neighbours are asked for together
    def dealt(window: tuple[int, int]) -> PackedBatches:
        rows, lengths = deal(window)
        return PackedBatches(rows, _widen(shape, lengths))

    def batch_at(index: int) -> PackedBatches:
        window = _window(index, batch_size, epoch_size)
        of_window = dealt(window)
        return of_window._replace(rows=of_window.rows[index - window[0]])

    return batch_at


def _window(batch: int, batch_size: int, epoch_size: int) -> tuple[int, int]:
    """First batch of the window that a batch is dealt in, and that after it.

    A batch that lies across the end of an epoch is a window of its own; the others of an epoch are
    equally long, but for a batch, as a short one would even out little.
    """
    start = batch * batch_size // epoch_size * epoch_size  # of the epoch
    first, after = -(-start // batch_size), (start + epoch_size) // batch_size
    if batch >= after:
        return batch, batch + 1
    windows = max(1, round((after - first) * batch_size / WINDOW))
    firsts = np.unique(np.linspace(first, after, windows + 1, dtype=int))
    number = int(np.searchsorted(firsts, batch, side="right"))
    return int(firsts[number - 1]), int(firsts[number])


def pack_by_length(
    num_tokens: np.ndarray,
    *,
    batch_size: int,
    num_bins: int,
    sizes: tuple[int, int] = (0, 0),
) -> list[PackedBatches]:
    """Batches of similar prompt length, longest first, so that short prompts are padded little.

    Running out of memory shows at once, not at the end. Batches of one prompt size share a shape.

    Args:
        num_tokens: of each group, as (prompt, all completions); [n, 2].
        batch_size: B, rounded up to a multiple of R.
        num_bins: R.
        sizes: K and C of the shapes, or leave them to `ReusedShapes`.
    """
    batch_size = round_up(batch_size, num_bins)
    order = np.argsort(-num_tokens[:, 0], kind="stable")
    longest = [_prompt_size(int(size)) for size in num_tokens[order[::batch_size], 0]]
    found = []
    for size in dict.fromkeys(longest):
        first = longest.index(size) * batch_size
        own = order[first : first + longest.count(size) * batch_size]
        rows = _deal(num_tokens[own], batch_size, num_bins)
        lengths = _in_places(num_tokens[own], rows, num_bins)
        shape = _fit(lengths, (size, *sizes), multiple=1)
        found.append(PackedBatches(np.where(rows < 0, -1, own[rows]), shape))
    return found


class ReusedShapes:
    """Shapes of batches whose groups differ from call to call, so that few are compiled."""

    def __init__(self) -> None:
        self._capacities: dict[tuple[int, int, int], Capacity] = {}  # by P, K, C

    def fit(self, shape: Shape, groups: Sequence[TokenGroup | None], *, num_batches: int) -> Shape:
        """A shape that was there before, or else a new one, rounded up.

        Args:
            shape: of `pack_by_length`.
            groups: of the batch; they decide K and C.
            num_batches: of the whole call; many are worth shapes of their own.
        """
        completions = [group.completion_tokens for group in groups if group is not None]
        longest = max(len(ids) for of_group in completions for ids in of_group)
        tight = num_batches >= _MANY_BATCHES
        key = shape.prompt_size, _next_size(max(map(len, completions)), bits=1)
        size = _next_size(max(longest, 16 if tight else _FEWEST_SLOTS), bits=1)
        if not tight:  # rather in a wider shape that is compiled than in one of its own
            wider = (c for p, k, c in self._capacities if (p, k) == key)
            size = min((c for c in wider if c >= longest), default=size)
        known = self._capacities.get((*key, size), Capacity(0, 0))
        if any(new > old for new, old in zip(shape.capacity, known, strict=True)):
            most = len(shape.prompt_sizes) * key[1] * size
            known = _larger(known, shape.capacity, most, tight)
            self._capacities[*key, size] = known
        # One width for all places: calls differ in their prompts, and share shapes only so.
        widths = (shape.prompt_size,) * len(shape.prompt_sizes)
        return Shape(shape.num_bins, widths, *key, size, known)

    def fit_prompts(self, shape: Shape) -> Shape:
        """A shape for prompts that are to be completed, of `Shape.with_all_completions`: one that
        was there before, or else a new one, rounded up.
        """
        key = shape.prompt_size, shape.num_completions, shape.completion_size
        own = shape.capacity.completion_tokens
        known = self._capacities.get(key, Capacity(own, own))
        prompts = _next_size(shape.capacity.tokens - own, bits=5)
        known = Capacity(max(known.tokens, prompts + own), own)
        self._capacities[key] = known
        widths = (shape.prompt_size,) * len(shape.prompt_sizes)
        return Shape(shape.num_bins, widths, *key, known)


def _larger(known: Capacity, wanted: Capacity, most: int, tight: bool) -> Capacity:
    """Capacity for what is wanted and what fitted before; `most` completion tokens fill a bin."""
    own = known.completion_tokens
    if own < wanted.completion_tokens:
        own = _next_size(wanted.completion_tokens * (1 if tight else 2), bits=3)
    own = min(own, most)
    prompts = _next_size(wanted.tokens - wanted.completion_tokens, bits=5)
    prompts = max(known.tokens - known.completion_tokens, prompts)
    return Capacity(prompts + own, own)


def _next_size(size: int, *, bits: int) -> int:
    """The next number of which only the first `bits` binary digits are not zero."""
    unit = 1 << max(0, (size - 1).bit_length() - bits)
    return -(-size // unit) * unit


def _prompt_size(length: int) -> int:
    """The next power of two or half as much again, at least 64."""
    power = 1 << (length - 1).bit_length()
    return max(64, power * 3 // 4 if length <= power * 3 // 4 else power)


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def _in_places(num_tokens: np.ndarray, rows: np.ndarray, num_bins: int) -> np.ndarray:
    """Tokens in each place of each bin, as (prompt, all completions); [b, R, B / R, 2]."""
    # A place without a group still has a prompt of one token.
    found = np.where(rows[:, :, None] < 0, [1, 0], num_tokens[rows])
    return found.reshape(len(rows), num_bins, -1, 2)


def _fit(lengths: np.ndarray, sizes: tuple[int, int, int], *, multiple: int) -> Shape:
    """The least shape that fits all bins.

    Args:
        lengths: from `_in_places`; [b, R, B / R, 2].
        sizes: P, K and C.
        multiple: what the capacity is a multiple of.
    """
    width = round_up(-(-sizes[0] // _MOST_BUCKETS), _BUCKET)
    longest = lengths[..., 0].max((0, 1))
    prompt_sizes = tuple(min(round_up(int(size), width), sizes[0]) for size in longest)
    prompts, completions = np.moveaxis(lengths.sum(2), -1, 0)
    most = (prompts + completions).max(), completions.max()
    capacity = Capacity(*(round_up(int(number), multiple) for number in most))
    return Shape(lengths.shape[1], prompt_sizes, *sizes, capacity)


def _widen(shape: Shape, lengths: np.ndarray) -> Shape:
    """The shape where these batches fit in it, else one with more capacity by whole sixteenths, so
    that few are compiled; lengths from `_in_places`.
    """
    sizes = shape.prompt_size, shape.num_completions, shape.completion_size
    own = _fit(lengths, sizes, multiple=1)
    pairs = zip(shape.capacity, own.capacity, strict=True)
    capacity = (
        old if new <= old else round_up(new, round_up(-(-old // 16), 8)) for old, new in pairs
    )
    widths = map(max, shape.prompt_sizes, own.prompt_sizes)
    return shape._replace(prompt_sizes=tuple(widths), capacity=Capacity(*capacity))


def _balance(num_tokens: np.ndarray, num_bins: int) -> np.ndarray:
    """Deals groups into bins of equal count and nearly equal tokens, completion tokens too.

    In rounds, from the largest groups to the smallest, so that those of a round differ little and
    may be dealt by either number in turn: that with the most goes to the bin with the least so far.
    (Dealt by all tokens alone, the fullest bin has a fifth more completion tokens than the average,
    for which logits are computed.)

    Args:
        num_tokens: of each group, as (prompt, all completions); [n, 2].
        num_bins: divides n.

    Returns:
        int64 [num_bins, n / num_bins], indices of the groups, ascending in each bin.
    """
    size = np.stack([num_tokens[:, 1], num_tokens.sum(1)], axis=1)
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


def _deal(num_tokens: np.ndarray, batch_size: int, num_bins: int) -> np.ndarray:
    """Deals groups into batches, and each batch into bins, of nearly equal totals.

    Args:
        num_tokens: of each group, as (prompt, all completions); [n, 2].
        batch_size: B.
        num_bins: R, divides B.

    Returns:
        int64 [ceil(n / B), B], indices of the groups, bin after bin, in each from the longest
        prompt to the shortest; -1 where a batch has fewer than B.
    """
    num_batches = -(-len(num_tokens) // batch_size)
    padded = np.zeros((num_batches * batch_size, 2), int)
    padded[: len(num_tokens)] = num_tokens
    batches = [rows[_balance(padded[rows], num_bins)] for rows in _balance(padded, num_batches)]
    dealt = np.stack(batches)  # [b, R, B / R]
    order = np.argsort(-padded[dealt, 0], axis=2, kind="stable")
    dealt = np.take_along_axis(dealt, order, axis=2).reshape(num_batches, batch_size)
    return np.where(dealt < len(num_tokens), dealt, -1)


class Packing(NamedTuple):
    """A one-to-one map between the packed tokens and the slots of each of R bins."""

    slot: jax.Array  # int32 [R, N]: slot that each packed token comes from; S for filling
    token: jax.Array  # int32 [R, S]: packed token of each slot; N for an empty slot

    @classmethod
    def of(cls, slot: jax.Array, num_slots: int) -> Self:
        """Completes the map.

        Args:
            slot: slot that each packed token comes from, S for filling; int32 [R, N].
            num_slots: S, slots of a bin.
        """
        num_tokens = slot.shape[1]

        def invert(row: jax.Array) -> jax.Array:
            empty = jnp.full(num_slots, num_tokens, jnp.int32)
            return empty.at[row].set(jnp.arange(num_tokens, dtype=jnp.int32), mode="drop")

        return cls(slot, jax.vmap(invert)(slot))

    def pack(self, slots: jax.Array) -> jax.Array:
        """[R, S, ...] → [R, N, ...]; filling is zero."""
        return _move(slots, self.slot, self.token)

    def unpack(self, tokens: jax.Array) -> jax.Array:
        """[R, N, ...] → [R, S, ...]; empty slots are zero."""
        return _move(tokens, self.token, self.slot)


@jax.custom_vjp
def _move(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """`take_rows(x, source)`; `target` is the inverse map, with which the backward pass gathers."""
    del target
    return take_rows(x, source)


def _move_forward(x: jax.Array, source: jax.Array, target: jax.Array):
    return take_rows(x, source), (source, target)


def _move_backward(maps: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    source, target = maps
    return _move(cotangent, target, source), None, None


_move.defvjp(_move_forward, _move_backward)


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[r, index[r, j]], zero where that is out of range; [R, I, ...], [R, J] → [R, J, ...]."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode="fill", fill_value=0))(x, index)


class Slots(NamedTuple):
    """An array of all tokens of a batch of groups, padded."""

    prompts: tuple[jax.Array, ...]  # by bucket, [R n_j, P_j, ...]
    completions: jax.Array  # [B, K, C, ...]


class GroupPacking(NamedTuple):
    """The map between packed tokens and slots [prompts | completions] of a batch of groups."""

    tokens: Packing
    completions: Packing  # completion slots alone
    prompt_length: jax.Array  # [B]
    buckets: tuple[tuple[int, int], ...]  # (n_j, P_j): places of a bin, and how wide they are
    completion_shape: tuple[int, int, int]  # (B, K, C)

    @classmethod
    def of(cls, batch: GroupBatch) -> Self:
        """That of all tokens of a batch."""
        shape = batch.completion_tokens.shape
        return cls._of(batch.layout, batch.prompt_tokens, batch.prompt_length, shape)

    @classmethod
    def of_prompts(cls, tokens: jax.Array, length: jax.Array, layout: Layout | None) -> Self:
        """That of groups with a completion of no tokens: ids [B, P], length [B]."""
        return cls._of(layout, tokens, length, (len(length), 1, 0))

    @classmethod
    def _of(cls, layout: Layout | None, prompts, length, completion_shape) -> Self:
        num_groups, width = prompts.shape
        num_own = math.prod(completion_shape) // num_groups
        if layout is None:  # as it is padded: a bin a group, and every slot
            slots = [jnp.tile(jnp.arange(n), (num_groups, 1)) for n in (width + num_own, num_own)]
            layout = Layout(slots[0], slots[1], (width,))
        num_bins, widths = len(layout.token_slots), layout.prompt_sizes
        num_own *= len(widths)
        return cls(
            Packing.of(layout.token_slots, sum(widths) + num_own),
            Packing.of(layout.completion_slots, num_own),
            length.reshape(num_bins * len(widths)),
            tuple((len(list(same)), size) for size, same in itertools.groupby(widths)),
            completion_shape,
        )

    @property
    def num_bins(self) -> int:
        """R."""
        return len(self.tokens.slot)

    @property
    def num_completion_slots(self) -> int:
        """Completion slots of a bin; its prompt slots come before them."""
        return self.completions.token.shape[1]

    @property
    def _counts(self) -> list[int]:
        return [count for count, _ in self.buckets]

    def slots(self, prompt_tokens: jax.Array, completion_tokens: jax.Array) -> Slots:
        """Ids [B, P] and [B, K, C] with each bucket as narrow as it may be."""
        parts = self.by_bucket(prompt_tokens)
        widths = [width for _, width in self.buckets]
        narrow = (part[:, :width] for part, width in zip(parts, widths, strict=True))
        return Slots(tuple(narrow), completion_tokens)

    def positions(self) -> jax.Array:
        """Of each packed token in its sequence, which begins with the prompt; [R, N]."""
        prompts = (
            jnp.broadcast_to(jnp.arange(width)[None, :], (self.num_bins * count, width))
            for count, width in self.buckets
        )
        own = jnp.arange(self.completion_shape[2])[None, None, :]
        own = jnp.broadcast_to(self.prompt_length[:, None, None] + own, self.completion_shape)
        return self.pack(Slots(tuple(prompts), own))

    def last_prompt_token(self) -> jax.Array:
        """Packed index of the last token of each prompt; [R, B / R]."""
        tokens = self._cut(self.tokens.token).prompts
        last = [
            jnp.take_along_axis(row, (length - 1)[:, None], axis=1)
            for row, length in zip(tokens, self.by_bucket(self.prompt_length), strict=True)
        ]
        return self.from_buckets(last).reshape(self.num_bins, -1)

    def by_bucket(self, x: jax.Array) -> list[jax.Array]:
        """[B, ...] → [R n_j, ...] for the groups of each bucket."""
        return by_bucket(x, self.num_bins, self._counts)

    def from_buckets(self, parts: Sequence[jax.Array]) -> jax.Array:
        """[R n_j, ...] for the groups of each bucket → [B, ...], in the order of the batch."""
        return from_buckets(parts, self.num_bins)

    def pack(self, x: Slots) -> jax.Array:
        """[R, N, ...]."""
        rest = x.completions.shape[3:]
        parts = (part.reshape(self.num_bins, -1, *rest) for part in (*x.prompts, x.completions))
        return self.tokens.pack(jnp.concatenate(list(parts), axis=1))

    def unpack(self, x: jax.Array) -> Slots:
        """Of [R, N, ...]."""
        return self._cut(self.tokens.unpack(x))

    def _cut(self, slots: jax.Array) -> Slots:
        """Of an array by slot, [R, S, ...]."""
        prompts = ((self.num_bins * count, width) for count, width in self.buckets)
        shapes = (*prompts, self.completion_shape)
        parts = _pieces(slots, [math.prod(shape) // self.num_bins for shape in shapes])
        *prompts, completions = (
            part.reshape(*shape, *slots.shape[2:])
            for part, shape in zip(parts, shapes, strict=True)
        )
        return Slots(tuple(prompts), completions)


def by_bucket(x: jax.Array, num_bins: int, counts: Sequence[int]) -> list[jax.Array]:
    """[B, ...] → [R n_j, ...] for the groups of each bucket.

    Args:
        x: an array by group.
        num_bins: R.
        counts: places of each bucket in a bin, n_j.
    """
    # Sizes are spelled out, since completions without tokens leave nothing to infer them from.
    bins = x.reshape(num_bins, sum(counts), *x.shape[1:])
    parts = zip(_pieces(bins, counts), counts, strict=True)
    return [part.reshape(num_bins * count, *x.shape[1:]) for part, count in parts]


def from_buckets(parts: Sequence[jax.Array], num_bins: int) -> jax.Array:
    """[R n_j, ...] for the groups of each bucket → [B, ...], in the order of the batch."""
    rest = parts[0].shape[1:]
    bins = [part.reshape(num_bins, -1, *rest) for part in parts]
    return jnp.concatenate(bins, axis=1).reshape(-1, *rest)


def _pieces(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Pieces of these sizes along the second axis."""
    return jnp.split(x, list(itertools.accumulate(sizes))[:-1], axis=1)
