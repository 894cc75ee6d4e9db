"""The order of training: from a data set to the same batches on one host or many.

1. Rows are shuffled anew in each epoch and the epochs are laid end to end (grain, index by index).
   Of a pool with shares each source is, and the next position is that of the source that is most
   behind its share.
2. A `Pack` composes batches of neighbours in that order; a tail that does not fill a batch is left
   out. Batches are composed when they are loaded, so the number of epochs costs nothing.
3. They have one shape, that of the largest batch of the first epochs (`num_measured`). A larger one
   in a later epoch has a larger shape, which is compiled then.
4. Each host loads its slice of every batch, in background threads; resuming is starting at a step.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import grain
import numpy as np

from copg_jax.data.dataset import GroupDataset
from copg_jax.data.group_list import GroupList
from copg_jax.data.groups import GroupBatch, TokenGroup
from copg_jax.data.pool import JoinedPool, Pool
from copg_jax.errors import InputError

# Loading is a copy out of a memory map: few threads are enough to stay ahead of a training step.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Batch(Protocol):
    """Which groups a batch holds, and how these are collated."""

    @property
    def rows(self) -> np.ndarray:
        """The position of each of its groups in the order of training; int [B]."""
        ...

    def collate(self, groups: Sequence[TokenGroup | None]) -> GroupBatch:
        """Of all groups of the batch, or of a host's share."""
        ...


Groups = GroupDataset | GroupList | Pool | JoinedPool
"""What is read by index; its length is that of an epoch."""

Pack = Callable[..., Callable[[int], Batch]]
"""(num_tokens: positions [n] → [n, 2], batch_size=, num_bins=, sizes=(P, K, C), epoch_size=,
num_fitted=) → (index → Batch). See `models.layout.pack_epochs`."""


def num_measured(num_rows: int, num_epochs: int) -> int:
    """Returns the number of epochs whose batches are measured before the first step.

    They bound the time until then: as many as half a million rows make, but 16 to 64 (an epoch of
    117,000 takes a second).
    """
    return min(num_epochs, max(16, min(64, 2**19 // num_rows)))


def num_steps(num_rows: int, batch_size: int, num_epochs: int) -> int:
    """Returns the number of full batches in `num_epochs` passes laid end to end."""
    return num_rows * num_epochs // batch_size


class GroupStream:
    """Iterates over `(ids, GroupBatch)` from `start_step` to the last step; each pass is the same.

    Args:
        dataset: groups to read.
        pack: composes batches, see `Pack`.
        batch_size: groups in a global batch, over all hosts.
        num_epochs: number of times each group is seen, but for the tail.
        seed: decides the order; 0 to 2**32 - 1.
        num_bins: of a global batch: devices along data and fsdp times microbatches.
        start_step: first step to yield, as if the earlier ones had been.
        host: index of this host; it gets rows [host B/num_hosts, (host+1) B/num_hosts).
        num_hosts: number of hosts that share each batch.

    Attributes:
        dataset: the groups.
        num_steps: steps of the whole run.

    Raises:
        InputError: fewer rows than a batch, batch not divisible by hosts or bins, or a start
            after the end.
    """

    def __init__(
        self,
        dataset: Groups,
        pack: Pack,
        *,
        batch_size: int,
        num_epochs: int,
        seed: int,
        num_bins: int = 1,
        start_step: int = 0,
        host: int = 0,
        num_hosts: int = 1,
    ) -> None:
        _check(len(dataset), batch_size, num_bins, num_hosts)
        self.num_steps = num_steps(len(dataset), batch_size, num_epochs)
        if start_step > self.num_steps:
            raise InputError(
                f"Resuming at step {start_step}, but {num_epochs} epochs of {len(dataset)} groups "
                f"in batches of {batch_size} are {self.num_steps} steps. Resume with the data and "
                "batch size that the checkpoint was trained with."
            )
        self.dataset = dataset
        self._start_step, self._host, self._num_hosts = start_step, host, num_hosts
        self._order = _order(dataset, seed)
        self._batch = pack(
            lambda positions: dataset.num_tokens(self._in_order(positions)),
            batch_size=batch_size,
            num_bins=num_bins,
            sizes=dataset.shape(),
            epoch_size=len(dataset),
            num_fitted=num_steps(len(dataset), batch_size, num_measured(len(dataset), num_epochs)),
        )

    def _in_order(self, positions: np.ndarray) -> np.ndarray:
        """Rows of the data set at these positions in the order of training."""
        return np.array([self._order[i] for i in positions.tolist()])

    def __iter__(self) -> Iterator[tuple[list[str], GroupBatch]]:
        # No index of grain's is larger, and no run is longer.
        after = min(self.num_steps, sys.maxsize)
        steps = grain.MapDataset.range(self._start_step, after).map(self.load)
        return iter(steps.to_iter_dataset(_READ_OPTIONS))

    def rows(self, step: int) -> np.ndarray:
        """Rows of the data set in the whole batch after `step`; int [B]."""
        return self._in_order(self._batch(step).rows)

    def load(self, step: int) -> tuple[list[str], GroupBatch]:
        """Ids of this host's share of the batch after `step`, and the share."""
        batch = self._batch(step)
        own = np.split(batch.rows, self._num_hosts)[self._host]
        groups = [self.dataset[int(row)] for row in self._in_order(own)]
        return [group.id for group in groups], batch.collate(groups)


def _order(dataset: Groups, seed: int) -> grain.MapDataset:
    """Index of the group at each position of any number of epochs."""
    ranges = dataset.ranges if isinstance(dataset, Pool) else [(0, len(dataset), 1.0)]
    # The seed goes through `.seed`: `shuffle(seed)` adds the epoch to it, so that the second
    # epoch of one seed would be the first epoch of the next.
    orders = [
        grain.MapDataset.range(first, first + size).seed(seed).shuffle().repeat()
        for first, size, _ in ranges
    ]
    shares = [share for *_, share in ranges]
    return grain.MapDataset.mix(orders, weights=shares) if len(orders) > 1 else orders[0]


def _check(num_rows: int, batch_size: int, num_bins: int, num_hosts: int) -> None:
    if num_rows < batch_size:
        raise InputError(
            f"The data set has {num_rows} groups, fewer than one batch of {batch_size}: "
            "no step can be made. Lower the batch size or give more data."
        )
    if batch_size % num_bins:
        raise InputError(
            f"A batch of {batch_size} groups cannot be cut into {num_bins} equal bins (devices "
            f"along data and fsdp times microbatches). Make it a multiple of {num_bins}."
        )
    if batch_size % num_hosts or num_bins % num_hosts:
        raise InputError(
            f"A batch of {batch_size} groups in {num_bins} bins cannot be shared equally by "
            f"{num_hosts} hosts. Make both multiples of {num_hosts}."
        )
