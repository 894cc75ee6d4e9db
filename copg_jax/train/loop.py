"""The one training loop; what happens beside the steps is the work of hooks.

1. Each step: take a batch, place it, call the step function. Metrics are read one step late, so
   that the device never waits for the host.
2. Hooks are called with (step, state) where they are due: `EvaluationHook` measures,
   `CheckpointHook` keeps the newest and the best state.
3. SIGTERM, SIGHUP and Ctrl-C, to any process, save and leave with the shell's exit code, after the
   step or the batch of an evaluation that runs; the same command goes on from there.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from copg_jax import distributed, sharding
from copg_jax.config.sections import StepsConfig
from copg_jax.data.groups import GroupBatch
from copg_jax.errors import InputError
from copg_jax.runtime import GracefulExit, LeaveRequest
from copg_jax.tracking import MetricsLogger
from copg_jax.train.checkpoint import Checkpoints
from copg_jax.train.metrics import LateMetrics, NonFiniteLoss
from copg_jax.train.state import TrainState

log = logging.getLogger(__name__)

StepFn = Callable[[int, TrainState, GroupBatch], tuple[TrainState, dict[str, Any]]]
"""(number of the step, from 1, state, placed batch) → (state, metrics)."""
Batches = Iterator[tuple[list[str], GroupBatch]]
Evaluate = Callable[[Any, int], tuple[dict[str, float], dict[str, str]]]
"""(params, step) → (metrics, texts)."""


class Hook(Protocol):
    """Something that happens at some steps, beside training."""

    def is_due(self, step: int) -> bool:
        """Whether it is to be called after `step`; 0 is before the first step."""
        ...

    def __call__(self, step: int, state: TrainState) -> None:
        """Does it; called after the steps at which any hook is due, in the order of the hooks."""
        ...

    def raise_failure(self) -> None:
        """Raises what it does in the background has failed with; called after every step."""
        ...

    def leave(self, step: int, state: TrainState) -> None:
        """The run stops after `step`, before its time."""
        ...


class EvaluationHook:
    """Evaluates every `config.eval_every` steps, before the first and after the last, and logs.

    Args:
        config: how often.
        num_steps: of the whole run.
        evaluate: (params, step) → metrics and texts.
        logger: an entered MetricsLogger.
        best_metric: metric that ranks the steps.

    Attributes:
        last: newest evaluated step and its value of `best_metric`, None where it has none.
    """

    def __init__(
        self,
        config: StepsConfig,
        num_steps: int,
        evaluate: Evaluate,
        logger: MetricsLogger,
        best_metric: str | None = None,
    ) -> None:
        self._every, self._num_steps = config.eval_every, num_steps
        self._evaluate, self._logger, self._best_metric = evaluate, logger, best_metric
        self.last: tuple[int, float | None] = -1, None

    def is_due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._num_steps

    def __call__(self, step: int, state: TrainState) -> None:
        if not self.is_due(step):
            return
        metrics, texts = self._evaluate(state.params, step)
        self._logger.log(step, metrics, text=texts)
        value = metrics.get(self._best_metric) if self._best_metric else None
        if value is not None and not np.isfinite(value):
            log.warning("step %d: no %s, so that it cannot be the best", step, self._best_metric)
        self.last = step, value

    def raise_failure(self) -> None:
        pass

    def leave(self, step: int, state: TrainState) -> None:
        pass


class CheckpointHook:
    """Saves every `config.save_every` steps, after the last, and where an evaluation was the best.

    Args:
        config: how often.
        num_steps: of the whole run.
        checkpoints: an entered Checkpoints.
        logger: what it has logged is on disk before a checkpoint is.
        evaluation: the hook before this one, which ranks the steps.
    """

    def __init__(
        self,
        config: StepsConfig,
        num_steps: int,
        checkpoints: Checkpoints,
        logger: MetricsLogger,
        evaluation: EvaluationHook | None = None,
    ) -> None:
        self._every, self._num_steps = config.save_every, num_steps
        self._checkpoints, self._logger, self._evaluation = checkpoints, logger, evaluation
        found = checkpoints.best()
        self._best = -np.inf if found is None else found[1]

    def is_due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._num_steps

    def __call__(self, step: int, state: TrainState) -> None:
        if step == 0:  # the model that it started from
            return
        at, value = self._evaluation.last if self._evaluation else (-1, None)
        # Of process 0: a reward function may tell each process something else.
        ranked = value if at == step and value is not None else np.nan
        value = float(distributed.from_main(ranked))
        is_best = value > self._best
        self._best = value if is_best else self._best
        if is_best or self.is_due(step):
            self._logger.sync()
            self._checkpoints.save(step, state, value)

    def raise_failure(self) -> None:
        """Raises what a save has failed with: at the next step, not at the next save."""
        self._checkpoints.raise_failure()

    def leave(self, step: int, state: TrainState) -> None:
        """Saves, saying whether the evaluation of this step is still to be done."""
        if step == 0:
            return
        owed = self._evaluation is not None and self._evaluation.is_due(step)
        done = not owed or (self._evaluation is not None and self._evaluation.last[0] == step)
        self._logger.sync()
        self._checkpoints.save(step, state, is_evaluated=done)


def check_batch(batch_size: int, num_microbatches: int, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError unless every microbatch can be cut evenly over the mesh."""
    shards = sharding.num_batch_shards(mesh)
    piece = num_microbatches * shards
    if batch_size % piece:
        below, above = batch_size // piece * piece, -(-batch_size // piece) * piece
        raise InputError(
            f"training.batch_size: wanted a multiple of num_microbatches x data x fsdp = "
            f"{num_microbatches} x {shards}, got {batch_size}; the nearest is "
            + (f"{below} or {above}" if below else f"{above}")
        )


def run(
    step_fn: StepFn,
    state: TrainState,
    batches: Batches,
    steps: range,
    *,
    mesh: jax.sharding.Mesh,
    metrics: LateMetrics,
    hooks: Sequence[Hook],
    first_hooks: Sequence[Hook] | None = None,
) -> TrainState:
    """Takes the steps and returns the final state; an interrupted run tells its hooks to `leave`.

    Args:
        step_fn: one step.
        state: before the first of the steps; donated.
        batches: yields (ids, host-local batch), beginning with that of the first step.
        steps: their numbers, counted from 1.
        mesh: the device mesh.
        metrics: logs the steps.
        hooks: called in their order, after the steps at which any of them is due.
        first_hooks: called before the first step; None = all. A resumed run has done some of them.

    Raises:
        NonFiniteLoss: names the step and the examples; the state from before it is saved.
        SystemExit: 143, 129 or 130 after SIGTERM, SIGHUP or Ctrl-C, with the state saved.
    """
    with GracefulExit() as exit_request:
        first_hooks = hooks if first_hooks is None else first_hooks
        return _take_steps(
            step_fn, state, batches, steps, mesh, metrics, hooks, first_hooks, exit_request
        )


def _take_steps(
    step_fn: StepFn,
    state: TrainState,
    batches: Batches,
    steps: range,
    mesh: jax.sharding.Mesh,
    metrics: LateMetrics,
    hooks: Sequence[Hook],
    first_hooks: Sequence[Hook],
    exit_request: GracefulExit,
) -> TrainState:
    """The loop itself; `exit_request` is entered, the other arguments are those of `run`."""
    placement = sharding.batch_sharding(mesh)
    host_max, is_alone = distributed.make_host_max(mesh), jax.process_count() == 1
    try:
        _call(first_hooks, steps.start - 1, state)
        metrics.start_clock()
        for step in steps:
            ids, batch = next(batches)
            # Queued before the step, so that the answer does not wait for its end.
            exit_codes = host_max(exit_request.exit_code)
            state, values = step_fn(step, state, distributed.place(batch, placement))
            metrics.add(step, ids, batch, values)
            for hook in hooks:
                hook.raise_failure()
            exit_code = exit_request.exit_code if is_alone else int(exit_codes)
            if exit_code or any(hook.is_due(step) for hook in hooks):
                metrics.flush()
                if exit_code:
                    raise LeaveRequest(exit_code)
                _call(hooks, step, state)
                metrics.start_clock()
    except Exception as error:
        # Whatever stopped it (a signal, a non-finite loss, a failing reward function): keep what is
        # learned. Of several processes only one may have failed; it cannot save alone.
        is_of_all = isinstance(error, NonFiniteLoss | LeaveRequest)
        if not state.step.is_deleted() and (is_alone or is_of_all):
            try:
                if not is_of_all:
                    metrics.flush()
            finally:
                _leave(hooks, int(state.step), state)
        if isinstance(error, LeaveRequest):
            _say_saved(error, int(state.step), steps.stop - 1)
            raise SystemExit(error.exit_code) from None
        raise
    return state


def _call(hooks: Sequence[Hook], step: int, state: TrainState) -> None:
    for hook in hooks:
        hook(step, state)


def _leave(hooks: Sequence[Hook], step: int, state: TrainState) -> None:
    for hook in hooks:
        hook.leave(step, state)


def _say_saved(request: LeaveRequest, step: int, num_steps: int) -> None:
    if distributed.is_main_process():
        saved = f"saved step {step} of {num_steps}" if step else "nothing to save yet"
        print(f"{request}: {saved}", flush=True)
