"""Several data sets as one: sources with shares, or joined by prompt.

1. A `Source` is one or more data sets, such as the rounds of a run, with its share and its origin.
2. A `Pool` is read by index like a data set, over all groups of its sources. Where they have
   shares, the order of training takes each position from a source so that the shares hold from its
   first groups on; see `stream`.
3. `join` makes one group of all completions of a prompt, so that completions of different origins
   meet in pairs.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from copg_jax.data.dataset import GroupDataset
from copg_jax.data.group_list import GroupList
from copg_jax.data.groups import NUMBERS, TokenGroup
from copg_jax.errors import InputError


@dataclass(frozen=True)
class Source:
    """Data sets that are one source; `share` of the groups of training, None: all of them."""

    datasets: Sequence[GroupDataset | GroupList]
    share: float | None = None
    origin: int | None = None  # of its completions; None: as stored

    def __len__(self) -> int:
        return sum(map(len, self.datasets))


class Pool:
    """The groups of several sources; `pool[i]` reads group i only.

    Its length is that of an epoch: all groups once; with shares, until every source was seen whole,
    so that the groups of others come again.

    Args:
        sources: at least one.

    Attributes:
        ranges: (first index, number of groups, share) of each source; one without shares.
        fingerprint: hash of what it is made of.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        datasets = [(one, source.origin) for source in sources for one in source.datasets]
        self._datasets, self._origins = zip(*datasets, strict=True)
        sizes = list(map(len, self._datasets))
        self._ends = np.cumsum(sizes)
        self.num_groups = int(self._ends[-1])
        if sources[0].share is None:
            self.ranges = [(0, self.num_groups, 1.0)]
        else:
            firsts = np.cumsum([0, *map(len, sources)])[:-1].tolist()
            self.ranges = [
                (first, len(source), source.share or 0.0)
                for first, source in zip(firsts, sources, strict=True)
            ]
        made_of = [
            ([one.fingerprint for one in source.datasets], source.share, source.origin)
            for source in sources
        ]
        self.fingerprint = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def __len__(self) -> int:
        return max(int(np.ceil(size / share)) for _, size, share in self.ranges)

    def __getitem__(self, index: int) -> TokenGroup:
        if not 0 <= index < self.num_groups:
            raise IndexError(index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        group = self._datasets[which][index - int(self._ends[which]) + len(self._datasets[which])]
        if (origin := self._origins[which]) is None:
            return group
        return replace(group, origin=np.full(len(group.completions), origin, np.int8))

    def __iter__(self) -> Iterator[TokenGroup]:
        return (self[index] for index in range(self.num_groups))

    def num_tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `GroupDataset.num_tokens`."""
        indices = np.asarray(indices)
        which = np.searchsorted(self._ends, indices, side="right")
        sizes = np.empty((len(indices), 2), int)
        for number in np.unique(which):
            own, here = self._datasets[number], which == number
            sizes[here] = own.num_tokens(indices[here] - int(self._ends[number]) + len(own))
        return sizes

    def posts(self) -> Iterator[float]:
        """See `GroupDataset.posts`."""
        return (post for dataset in self._datasets for post in dataset.posts())

    @property
    def has_rewards(self) -> bool:
        """Whether every group has a reward for each completion."""
        return all(dataset.has_rewards for dataset in self._datasets)

    def shape(self, multiple: int = 8) -> tuple[int, int, int]:
        """See `GroupDataset.shape`."""
        sizes = [dataset.shape(multiple) for dataset in self._datasets]
        prompt, count, completion = np.max(sizes, axis=0).tolist()
        return prompt, count, completion


class JoinedPool:
    """The groups of a pool, those of a prompt in one; only prompts with two origins are left.

    Args:
        pool: sources without shares.

    Attributes:
        num_left_out: prompts with completions of one origin.

    Raises:
        InputError: no prompt has completions of two origins.
    """

    def __init__(self, pool: Pool) -> None:
        by_prompt: dict[bytes, list[int]] = {}
        origins: dict[bytes, set[int]] = {}
        for index, group in enumerate(pool):
            key = group.prompt_tokens.tobytes()
            by_prompt.setdefault(key, []).append(index)
            origins.setdefault(key, set()).update(origins_of(group))
        self._pool = pool
        self._members = [own for key, own in by_prompt.items() if len(origins[key]) > 1]
        self.fingerprint = f"{pool.fingerprint} joined"
        self.num_left_out = len(by_prompt) - len(self._members)
        if not self._members:
            raise InputError(
                f"loss.pairs=cross: wanted prompts with completions of different origins, got "
                f"{self.num_left_out} with one each. Fix: data.sources of the same prompts with an "
                "origin each, or loss.pairs=all."
            )

    def __len__(self) -> int:
        return len(self._members)

    def members(self, index: int) -> Sequence[int]:
        """The groups of the pool that are joined in one."""
        return self._members[index]

    def __getitem__(self, index: int) -> TokenGroup:
        first, *others = groups = [self._pool[member] for member in self._members[index]]
        if not others:
            return first
        numbers = {}
        for name in NUMBERS:
            values = [getattr(group, name) for group in groups]
            known = all(value is not None for value in values)
            numbers[name] = np.concatenate(values) if known else None
        if numbers["origin"] is None:
            numbers["origin"] = np.concatenate([origins_of(group) for group in groups])
        if numbers["has_eos"] is None:
            whole = [np.ones(len(group.completions), bool) for group in groups]
            ended = [group.has_eos for group in groups]
            pairs = zip(ended, whole, strict=True)
            numbers["has_eos"] = np.concatenate([w if e is None else e for e, w in pairs])
        return replace(
            first,
            completions=tuple(text for group in groups for text in group.completions),
            completion_tokens=tuple(ids for group in groups for ids in group.completion_tokens),
            kept=None,
            columns={},
            **numbers,
        )

    def __iter__(self) -> Iterator[TokenGroup]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def _num_tokens(self) -> np.ndarray:
        """(prompt, all completions) of each group, [n, 2]."""
        sizes = [self._pool.num_tokens(own) for own in self._members]
        return np.array([(own[0, 0], own[:, 1].sum()) for own in sizes], int)

    def num_tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `GroupDataset.num_tokens`."""
        return self._num_tokens[np.asarray(indices)]

    def posts(self) -> Iterator[float]:
        """See `GroupDataset.posts`."""
        return self._pool.posts()

    @property
    def has_rewards(self) -> bool:
        """Whether every group has a reward for each completion."""
        return self._pool.has_rewards

    def shape(self, multiple: int = 8) -> tuple[int, int, int]:
        """See `GroupDataset.shape`."""
        prompt, _, completion = self._pool.shape(multiple)
        return prompt, max(len(group.completions) for group in self), completion


def origins_of(group: TokenGroup) -> np.ndarray:
    """The origin of each completion, int8 [K]."""
    return np.zeros(len(group.completions), np.int8) if group.origin is None else group.origin
