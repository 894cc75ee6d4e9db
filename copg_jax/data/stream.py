"""The order of training: from a data set to the same batches on one host or many.

1. Rows are shuffled anew in each epoch and the epochs are laid end to end (grain, index by index).
2. A window of consecutive rows is dealt into batches of nearly equal numbers of tokens, and each
   batch into blocks; a tail that does not fill a batch is left out.
3. Each host loads its slice of every batch, in background threads.
4. Any step can be computed without those before it, so resuming is starting at a step.
"""

from collections.abc import Iterator
from functools import lru_cache

import grain
import numpy as np

from copg_jax.data.dataset import GroupDataset
from copg_jax.data.groups import GroupBatch, collate
from copg_jax.data.packing import Capacity, deal
from copg_jax.errors import InputError

# Loading is a copy out of a memory map: few threads are enough to stay ahead of a training step.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
_WINDOW = 512
"""Groups that are dealt into batches together: many even out lengths, few keep the shuffled order.
"""
_SAMPLED_WINDOWS = 64
_ROOM_MULTIPLE = 8


def num_steps(num_rows: int, batch_size: int, num_epochs: int) -> int:
    """Returns the number of full batches in `num_epochs` passes laid end to end."""
    return num_rows * num_epochs // batch_size


def _windows(num_rows: int, batch_size: int, num_epochs: int) -> np.ndarray:
    """First steps of the windows, and the number of steps; no window mixes two epochs.

    A batch that lies across the end of an epoch is a window of its own.
    """
    firsts = {num_steps(num_rows, batch_size, num_epochs)}
    for epoch in range(num_epochs):
        first, after = -(-epoch * num_rows // batch_size), (epoch + 1) * num_rows // batch_size
        firsts.update(range(first, after, max(1, _WINDOW // batch_size)), [after])
    return np.array(sorted(firsts))


class GroupStream:
    """Iterates over `(ids, GroupBatch)` from `start_step` to the last step; each pass is the same.

    Linear layers compute packed tokens only, see `GroupBatch`. All batches have one shape, with
    room for the fullest block of many sampled steps; a rare step that needs more computes all its
    padded slots instead. So there are two shapes at most.

    Args:
        dataset: groups to read.
        batch_size: groups in a global batch, over all hosts.
        num_epochs: number of times each group is seen, but for the tail.
        seed: decides the order; 0 to 2**32 - 1.
        num_blocks: blocks of a global batch: devices along data and fsdp times microbatches.
        shape: (P, K, C) of the batches; None is `dataset.shape()`.
        start_step: first step to yield, as if the earlier ones had been.
        host: index of this host; it gets rows [host B/num_hosts, (host+1) B/num_hosts).
        num_hosts: number of hosts that share each batch.

    Attributes:
        num_steps: steps of the whole run.
        capacity: room of a block.

    Raises:
        InputError: fewer rows than a batch, batch not divisible by hosts or blocks, or a start
            after the end.
    """

    def __init__(
        self,
        dataset: GroupDataset,
        *,
        batch_size: int,
        num_epochs: int,
        seed: int,
        num_blocks: int = 1,
        shape: tuple[int, int, int] | None = None,
        start_step: int = 0,
        host: int = 0,
        num_hosts: int = 1,
    ) -> None:
        _check(len(dataset), batch_size, num_blocks, num_hosts)
        self.num_steps = num_steps(len(dataset), batch_size, num_epochs)
        if start_step > self.num_steps:
            raise InputError(
                f"Resuming at step {start_step}, but {num_epochs} epochs of {len(dataset)} groups "
                f"in batches of {batch_size} are {self.num_steps} steps. Resume with the data and "
                "batch size that the checkpoint was trained with."
            )
        self._dataset = dataset
        self._batch_size, self._num_blocks = batch_size, num_blocks
        self._start_step, self._host, self._num_hosts = start_step, host, num_hosts
        self._prompt_size, self._num_completions, self._completion_size = shape or dataset.shape()
        self._windows = _windows(len(dataset), batch_size, num_epochs)
        # The seed goes through `.seed`: `shuffle(seed)` adds the epoch to it, so that the second
        # epoch of one seed would be the first epoch of the next.
        self._order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat(num_epochs)
        # A step needs its whole window: neighbours and threads share the last few.
        self._deal = lru_cache(maxsize=4)(self._deal_window)
        self.capacity = self._sample_capacity()

    def __iter__(self) -> Iterator[tuple[list[str], GroupBatch]]:
        steps = grain.MapDataset.range(self._start_step, self.num_steps).map(self._load)
        return iter(steps.to_iter_dataset(_READ_OPTIONS))

    def _deal_window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the window's steps [steps, B] and tokens of their blocks [steps, R, 2]."""
        first, after = self._windows[window : window + 2]
        rows = np.array(
            [self._order[i] for i in range(first * self._batch_size, after * self._batch_size)]
        )
        tokens = self._dataset.num_tokens(rows)
        dealt = deal(tokens.sum(1), batch_size=self._batch_size, num_blocks=self._num_blocks)
        blocks = tokens[dealt].reshape(len(dealt), self._num_blocks, -1, 2).sum(2)
        return rows[dealt], blocks

    def _sample_capacity(self) -> Capacity:
        sample = np.linspace(0, len(self._windows) - 2, _SAMPLED_WINDOWS, dtype=int)
        blocks = [self._deal_window(int(i))[1].reshape(-1, 2) for i in np.unique(sample)]
        blocks = np.concatenate(blocks)
        tokens, completion_tokens = (
            -(-int(most) // _ROOM_MULTIPLE) * _ROOM_MULTIPLE
            for most in (blocks.sum(1).max(), blocks[:, 1].max())
        )
        return Capacity(tokens, completion_tokens)

    def _load(self, step: int) -> tuple[list[str], GroupBatch]:
        window = int(np.searchsorted(self._windows, step, side="right")) - 1
        rows, blocks = (array[step - self._windows[window]] for array in self._deal(window))
        # Decided from the blocks of all hosts, so that all hosts decide the same.
        fits = blocks.sum(1).max() <= self.capacity.tokens
        fits &= blocks[:, 1].max() <= self.capacity.completion_tokens
        per_host = self._batch_size // self._num_hosts
        own_rows = rows[self._host * per_host : (self._host + 1) * per_host]
        groups = [self._dataset[int(row)] for row in own_rows]
        batch = collate(
            groups,
            batch_size=per_host,
            prompt_size=self._prompt_size,
            num_completions=self._num_completions,
            completion_size=self._completion_size,
            num_blocks=self._num_blocks // self._num_hosts,
            capacity=self.capacity if fits else None,
        )
        return [group.id for group in groups], batch


def _check(num_rows: int, batch_size: int, num_blocks: int, num_hosts: int) -> None:
    if num_rows < batch_size:
        raise InputError(
            f"The data set has {num_rows} groups, fewer than one batch of {batch_size}: "
            "no step can be made. Lower the batch size or give more data."
        )
    if batch_size % num_blocks:
        raise InputError(
            f"A batch of {batch_size} groups cannot be cut into {num_blocks} equal blocks (devices "
            f"along data and fsdp times microbatches). Make it a multiple of {num_blocks}."
        )
    if batch_size % num_hosts or num_blocks % num_hosts:
        raise InputError(
            f"A batch of {batch_size} groups in {num_blocks} blocks cannot be shared equally by "
            f"{num_hosts} hosts. Make both multiples of {num_hosts}."
        )
