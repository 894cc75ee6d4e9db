"""The numbers of training steps: read one step late, with their rates; a number that is not finite
stops the run.

1. `LateMetrics` logs a step once the next one has been started, so that the device never waits for
   the host.
2. `work_of` says how much a step does; divided by its seconds that becomes its rates.
3. `NonFiniteLoss` names the step and the examples to look at.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from copg_jax import distributed, sharding
from copg_jax.data.groups import GroupBatch
from copg_jax.errors import InputError
from copg_jax.flops import PEAK_TFLOPS
from copg_jax.tracking import MetricsLogger

UsefulFlops = Callable[[GroupBatch], float]
"""Host batch → floating-point operations that its training step needs."""


class NonFiniteLoss(InputError):
    """The loss or its gradient became NaN or infinite."""


def _non_finite(
    step: int, ids: list[str], per_group: np.ndarray, folder: epath.Path
) -> NonFiniteLoss:
    culprits = [name for name, value in zip(ids, per_group, strict=True) if not np.isfinite(value)]
    named = (
        ", ".join(culprits[:8]) or "none by its loss alone: their sum or the gradient overflowed"
    )
    return NonFiniteLoss(
        f"step {step}: the loss or its gradient is not finite. Offending examples: {named}. The "
        f"state from before this step is saved in {folder}; the same command would meet the same "
        "batch. Look at these examples and start again in a new output_dir without them, with a "
        "lower optim.learning_rate, a higher loss.beta or optim.clip_norm."
    )


def work_of(
    batch: GroupBatch, mesh: jax.sharding.Mesh, useful_flops: UsefulFlops | None = None
) -> dict[str, float]:
    """How much a step does, by the name of the rate it becomes when divided by its seconds.

    Args:
        batch: this host's share.
        mesh: the device mesh.
        useful_flops: operations that a batch needs; without it, or where the peak of the devices
            is not known, there is no `perf/mfu`.
    """
    _, num_shares = sharding.batch_share(mesh)
    tokens = int(batch.prompt_length.sum() + batch.completion_length.sum())
    work: dict[str, float] = {
        "perf/pairs_per_sec": num_shares * int((batch.completion_length > 0).any(-1).sum()),
        "perf/tokens_per_sec": num_shares * tokens,
    }
    peak = PEAK_TFLOPS.get(mesh.devices.flat[0].device_kind)
    if useful_flops is not None and peak is not None:
        available = peak * 1e12 * mesh.devices.size
        work["perf/mfu"] = num_shares * useful_flops(batch) / available
    return work


class _Pending(NamedTuple):
    """A step that may still run on the device."""

    step: int
    ids: list[str]
    metrics: dict[str, Any]
    work: dict[str, float]


class LateMetrics:
    """Logs each step when the next one has been started: the device never waits for the host.

    The seconds of a step count from when the step before it was done, or from `start_clock`.

    Args:
        logger: an entered MetricsLogger.
        folder: where the state is saved when a step is not finite; its error says so.
        mesh: the device mesh.
        useful_flops: see `work_of`.
    """

    def __init__(
        self,
        logger: MetricsLogger,
        folder: epath.Path,
        mesh: jax.sharding.Mesh,
        useful_flops: UsefulFlops | None,
    ) -> None:
        self._logger, self._folder = logger, folder
        self._mesh, self._useful_flops = mesh, useful_flops
        self._pending: _Pending | None = None
        self.start_clock()

    def start_clock(self) -> None:
        """Leaves what was done since the last step out of the rates of the next."""
        self._since = time.perf_counter()

    def add(self, step: int, ids: list[str], batch: GroupBatch, metrics: dict[str, Any]) -> None:
        """Takes the metrics of a step that has been started, and logs the step before it.

        Args:
            step: its number.
            ids: one for each group of the batch.
            batch: this host's share.
            metrics: of `step.make_train_step`, still on the device.

        Raises:
            NonFiniteLoss: the step before it was not finite.
        """
        work = work_of(batch, self._mesh, self._useful_flops)
        previous, self._pending = self._pending, _Pending(step, ids, metrics, work)
        if previous is not None:
            self._log(previous)

    def flush(self) -> None:
        """Waits for the newest step and logs it, if that has not been done.

        Raises:
            NonFiniteLoss: it was not finite.
        """
        if self._pending is not None:
            self._log(self._pending)
            self._pending = None

    def _log(self, done: _Pending) -> None:
        """Waits for the step and logs it."""
        values = jax.device_get(done.metrics)
        per_group, finite = values.pop("per_group"), values.pop("finite")
        now = time.perf_counter()
        rates = {name: amount / (now - self._since) for name, amount in done.work.items()}
        self._logger.log(done.step, {name: float(value) for name, value in values.items()} | rates)
        if not finite:
            # Ids are this host's, losses those of the global batch.
            own = distributed.host_rows(per_group, sharding.batch_sharding(self._mesh))
            raise _non_finite(done.step, done.ids, own, self._folder)
        self._since = now
