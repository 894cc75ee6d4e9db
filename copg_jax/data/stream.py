"""The order of training: from a data set to the same batches on one host or many.

1. Rows are shuffled anew in each epoch and the epochs are laid end to end (grain, index by index).
2. Consecutive rows form the global batches; a tail that does not fill one is left out.
3. Each host loads its slice of every batch, in background threads.
4. Any step can be computed without those before it, so resuming is starting at a step.
"""

from collections.abc import Iterator

import grain
import numpy as np

from copg_jax.data.dataset import GroupDataset
from copg_jax.data.groups import GroupBatch, collate
from copg_jax.errors import InputError

# Loading is a copy out of a memory map: few threads are enough to stay ahead of a training step.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


def num_steps(num_rows: int, batch_size: int, num_epochs: int) -> int:
    """Returns the number of full batches in `num_epochs` passes laid end to end."""
    return num_rows * num_epochs // batch_size


class GroupStream:
    """Iterates over `(ids, GroupBatch)` from `start_step` to the last step; each pass is the same.

    Args:
        dataset: groups to read.
        batch_size: groups in a global batch, over all hosts.
        num_epochs: number of times each group is seen, but for the tail.
        seed: decides the order; 0 to 2**32 - 1.
        shape: (P, K, C) of the batches; None is `dataset.shape()`.
        start_step: first step to yield, as if the earlier ones had been.
        host: index of this host; it gets rows [host B/num_hosts, (host+1) B/num_hosts).
        num_hosts: number of hosts that share each batch.

    Raises:
        InputError: fewer rows than a batch, batch not divisible by hosts, or a start after the end.
    """

    def __init__(
        self,
        dataset: GroupDataset,
        *,
        batch_size: int,
        num_epochs: int,
        seed: int,
        shape: tuple[int, int, int] | None = None,
        start_step: int = 0,
        host: int = 0,
        num_hosts: int = 1,
    ) -> None:
        if len(dataset) < batch_size:
            raise InputError(
                f"The data set has {len(dataset)} groups, fewer than one batch of {batch_size}: "
                "no step can be made. Lower the batch size or give more data."
            )
        if batch_size % num_hosts:
            raise InputError(
                f"A batch of {batch_size} groups cannot be shared equally by {num_hosts} hosts. "
                f"Make the batch size a multiple of {num_hosts}."
            )
        self.num_steps = num_steps(len(dataset), batch_size, num_epochs)
        if start_step > self.num_steps:
            raise InputError(
                f"Resuming at step {start_step}, but {num_epochs} epochs of {len(dataset)} groups "
                f"in batches of {batch_size} are {self.num_steps} steps. Resume with the data and "
                "batch size that the checkpoint was trained with."
            )
        self._dataset = dataset
        self._start_step = start_step
        self._prompt_size, self._num_completions, self._completion_size = shape or dataset.shape()
        per_host = batch_size // num_hosts
        self._own_rows = slice(host * per_host, (host + 1) * per_host)
        # The seed goes through `.seed`: `shuffle(seed)` adds the epoch to it, so that the second
        # epoch of one seed would be the first epoch of the next.
        order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat(num_epochs)
        self._steps = order.batch(batch_size, drop_remainder=True).map(self._load)

    def __iter__(self) -> Iterator[tuple[list[str], GroupBatch]]:
        steps = self._steps.slice(slice(self._start_step, None))
        return iter(steps.to_iter_dataset(_READ_OPTIONS))

    def _load(self, indices: np.ndarray) -> tuple[list[str], GroupBatch]:
        groups = [self._dataset[int(index)] for index in indices[self._own_rows]]
        batch = collate(
            groups,
            batch_size=len(groups),
            prompt_size=self._prompt_size,
            num_completions=self._num_completions,
            completion_size=self._completion_size,
        )
        return [group.id for group in groups], batch
