"""The order of training: from a data set to the same batches on one host or many.

1. Rows are shuffled anew in each epoch and the epochs are laid end to end (grain, index by index).
   Of a pool with shares each source is, and the next position is that of the source that is most
   behind its share.
2. A `Pack` composes batches of neighbours in that order, all of one shape; a tail that does not
   fill a batch is left out.
3. Steps 1 and 2 are done before the run starts, since the one shape must fit all batches; of a run
   of very many epochs for the first ones (`num_ordered`), after which the same batches come again.
4. Each host loads its slice of every batch, in background threads; resuming is starting at a step.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import grain
import numpy as np

from copg_jax.data.dataset import GroupDataset
from copg_jax.data.groups import GroupBatch, TokenGroup
from copg_jax.data.pool import JoinedPool, Pool
from copg_jax.errors import InputError

# Loading is a copy out of a memory map: few threads are enough to stay ahead of a training step.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Batches(Protocol):
    """Batches of a data set: which groups they hold, and how these are collated."""

    @property
    def rows(self) -> np.ndarray:
        """Index of each group of each batch, -1 = none; int [b, B]."""
        ...

    def collate(self, groups: Sequence[TokenGroup | None]) -> GroupBatch:
        """Of all groups of a batch, or of a host's share."""
        ...


Groups = GroupDataset | Pool | JoinedPool
"""What is read by index; its length is that of an epoch."""

Pack = Callable[..., Batches]
"""(num_tokens [n, 2], batch_size=, num_bins=, sizes=(P, K, C), epoch_size=) → Batches.

See `models.layout.pack`."""


def num_ordered(num_rows: int, num_epochs: int) -> int:
    """Returns the number of epochs that get an order of their own.

    They bound the memory and the time before the first step: as many as half a million rows make,
    but 16 to 64 (grain takes 50 ms for the order of an epoch, however short).
    """
    return min(num_epochs, max(16, min(64, 2**19 // num_rows)))


def num_steps(num_rows: int, batch_size: int, num_epochs: int) -> int:
    """Returns the number of full batches in `num_epochs` passes laid end to end."""
    return num_rows * num_epochs // batch_size


class GroupStream:
    """Iterates over `(ids, GroupBatch)` from `start_step` to the last step; each pass is the same.

    Args:
        dataset: groups to read.
        pack: composes batches of one shape, see `Pack`.
        batch_size: groups in a global batch, over all hosts.
        num_epochs: number of times each group is seen, but for the tail.
        seed: decides the order; 0 to 2**32 - 1.
        num_bins: of a global batch: devices along data and fsdp times microbatches.
        start_step: first step to yield, as if the earlier ones had been.
        host: index of this host; it gets rows [host B/num_hosts, (host+1) B/num_hosts).
        num_hosts: number of hosts that share each batch.

    Attributes:
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
        self._dataset = dataset
        self._start_step, self._host, self._num_hosts = start_step, host, num_hosts
        shuffled = _order(dataset, seed, num_ordered(len(dataset), num_epochs))
        batches = pack(
            dataset.num_tokens(shuffled),
            batch_size=batch_size,
            num_bins=num_bins,
            sizes=dataset.shape(),
            epoch_size=len(dataset),
        )
        self._rows, self._collate = shuffled[batches.rows], batches.collate

    def __iter__(self) -> Iterator[tuple[list[str], GroupBatch]]:
        # No index of grain's is larger, and no run is longer.
        after = min(self.num_steps, sys.maxsize)
        steps = grain.MapDataset.range(self._start_step, after).map(self._load)
        return iter(steps.to_iter_dataset(_READ_OPTIONS))

    def _load(self, step: int) -> tuple[list[str], GroupBatch]:
        rows = np.split(self._rows[step % len(self._rows)], self._num_hosts)[self._host]
        groups = [self._dataset[int(row)] for row in rows]
        return [group.id for group in groups], self._collate(groups)


def _order(dataset: Groups, seed: int, num_epochs: int) -> np.ndarray:
    """Index of the group at each position of so many epochs, int32."""
    ranges = dataset.ranges if isinstance(dataset, Pool) else [(0, len(dataset), 1.0)]
    # The seed goes through `.seed`: `shuffle(seed)` adds the epoch to it, so that the second
    # epoch of one seed would be the first epoch of the next.
    orders = [
        grain.MapDataset.range(first, first + size).seed(seed).shuffle().repeat()
        for first, size, _ in ranges
    ]
    shares = [share for *_, share in ranges]
    order = grain.MapDataset.mix(orders, weights=shares) if len(orders) > 1 else orders[0]
    return np.array([order[i] for i in range(len(dataset) * num_epochs)], np.int32)


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
