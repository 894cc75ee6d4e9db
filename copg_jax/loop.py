"""The one training loop; stages differ by the step function, the stream and the evaluation they
hand it.

1. Each step: take a batch, place it, call the step function. Metrics are read one step late, so
   that the device never waits for the host.
2. Now and then evaluate (held-out loss, generation) and save; keep the newest and the best state.
3. SIGTERM and Ctrl-C, to any process, save and leave with the shell's exit code; the same command
   goes on from there.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from copg_jax import distributed, global_arrays, sharding
from copg_jax.checkpoint import Checkpoints
from copg_jax.cli import option
from copg_jax.data.groups import GroupBatch
from copg_jax.errors import InputError
from copg_jax.metrics import MetricsLogger
from copg_jax.models.llama import REMAT_POLICIES
from copg_jax.runtime import GracefulExit
from copg_jax.step_metrics import LateMetrics, NonFiniteLoss, UsefulFlops
from copg_jax.train_state import TrainState

StepFn = Callable[[TrainState, GroupBatch], tuple[TrainState, dict[str, Any]]]
Batches = Iterator[tuple[list[str], GroupBatch]]
Evaluate = Callable[[Any, int], tuple[dict[str, float], dict[str, str]]]
"""(params, step) → (metrics, texts)."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train and what to write on the way; the defaults are the paper's."""

    batch_size: int = option(128, "groups per optimiser step, over all devices")
    num_microbatches: int = option(1, "pieces a batch is processed in (gradient accumulation)")
    remat: str = option(
        "full", "what the backward pass recomputes: none, dots (all but products), mlp or full"
    )
    num_epochs: int = option(2, "passes over the data")
    max_steps: int | None = option(None, "stop after this many steps; null = all epochs")
    eval_every: int = option(50, "steps between evaluations; one also runs before the first step")
    save_every: int = option(500, "steps between checkpoints (best and last are always saved)")
    log_every: int = option(10, "steps between console lines (metrics.jsonl has every step)")
    tensorboard: bool = option(False, "also write TensorBoard files (needs the tensorboard extra)")

    def __post_init__(self):
        for name in ("batch_size", "num_microbatches", "num_epochs", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.remat not in REMAT_POLICIES:
            raise InputError(
                f"remat must be one of {', '.join(REMAT_POLICIES)}, got '{self.remat}'"
            )
        if self.log_every < 1 or (self.max_steps is not None and self.max_steps < 1):
            raise InputError("log_every must be >= 1 and max_steps >= 1 or null")
        if self.batch_size % self.num_microbatches:
            raise InputError(
                f"batch_size must be a multiple of num_microbatches, got {self.batch_size} and "
                f"{self.num_microbatches}"
            )


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


class _Milestones:
    """What happens at some steps only: evaluation, checkpoints, the best step so far."""

    def __init__(
        self,
        num_steps: int,
        eval_every: int,
        save_every: int,
        evaluate: Evaluate | None,
        best_metric: str | None,
        logger: MetricsLogger,
        checkpoints: Checkpoints,
    ) -> None:
        self._num_steps, self._eval_every, self._save_every = num_steps, eval_every, save_every
        self._evaluate, self._best_metric = evaluate, best_metric
        self._logger, self._checkpoints = logger, checkpoints
        found = checkpoints.best()
        self._best = -np.inf if found is None else found[1]
        self._evaluated = -1

    def _is_evaluation(self, step: int) -> bool:
        due = step % self._eval_every == 0 or step == self._num_steps
        return self._evaluate is not None and due

    def _is_checkpoint(self, step: int) -> bool:
        return step % self._save_every == 0 or step == self._num_steps

    def is_due(self, step: int) -> bool:
        """Whether anything happens at `step`."""
        return self._is_evaluation(step) or self._is_checkpoint(step)

    def reach(self, step: int, state: TrainState) -> None:
        """Evaluates and saves, where that is due or `step` is the best so far."""
        value: float | None = None
        if self._evaluate is not None and self._is_evaluation(step):
            metrics, texts = self._evaluate(state.params, step)
            self._logger.log(step, metrics, text=texts)
            self._evaluated = step
            value = metrics.get(self._best_metric) if self._best_metric is not None else None
        # The state before training is the model it started from: no checkpoint of its own.
        if step == 0:
            return
        # Of process 0: a reward function may tell each process something else.
        value = float(distributed.from_main(np.nan if value is None else value))
        is_best = value > self._best
        self._best = value if is_best else self._best
        if is_best or self._is_checkpoint(step):
            self._logger.sync()
            self._checkpoints.save(step, state, value)

    def leave(self, step: int, state: TrainState) -> None:
        """Saves a run that stops at `step`, saying whether its evaluation is still to be done."""
        done = self._evaluated == step or not self._is_evaluation(step)
        self._logger.sync()
        self._checkpoints.save(step, state, is_evaluated=done)


def _say_saved(exit_code: int, step: int, num_steps: int) -> None:
    if distributed.is_main_process():
        name = signal.Signals(exit_code - 128).name
        print(f"{name}: saved step {step} of {num_steps}", flush=True)


def run(
    *,
    step_fn: StepFn,
    state: TrainState,
    start_step: int,
    num_steps: int,
    batches: Batches,
    mesh: jax.sharding.Mesh,
    logger: MetricsLogger,
    checkpoints: Checkpoints,
    eval_every: int,
    save_every: int,
    evaluate: Evaluate | None = None,
    best_metric: str | None = None,
    useful_flops: UsefulFlops | None = None,
) -> TrainState:
    """Trains from `start_step` to `num_steps` and returns the final state, which is saved.

    Args:
        step_fn: from `step.make_train_step`.
        state: state at `start_step`; donated.
        start_step: steps already done.
        num_steps: steps of the whole run.
        batches: yields (ids, host-local batch), beginning with the batch of step start_step + 1.
        mesh: the device mesh.
        logger: an entered MetricsLogger.
        checkpoints: an entered Checkpoints.
        eval_every: steps between evaluations.
        save_every: steps between checkpoints.
        evaluate: (params, step) → metrics and texts.
        best_metric: metric of `evaluate` whose largest value is worth a checkpoint of its own.
        useful_flops: see `step_metrics.work_of`.

    Raises:
        NonFiniteLoss: names the step and the examples; the state from before it is saved.
        SystemExit: 143 or 130 after SIGTERM or Ctrl-C, with the state saved.
    """
    milestones = _Milestones(
        num_steps, eval_every, save_every, evaluate, best_metric, logger, checkpoints
    )
    with GracefulExit() as exit_request:
        # An evaluation that was due where the run was left is made up for.
        if start_step == 0 or not checkpoints.is_evaluated(start_step):
            milestones.reach(start_step, state)
        return _take_steps(
            range(start_step + 1, num_steps + 1),
            step_fn,
            state,
            batches,
            mesh,
            LateMetrics(logger, checkpoints.folder, mesh, useful_flops),
            milestones,
            exit_request,
        )


def _take_steps(
    steps: range,
    step_fn: StepFn,
    state: TrainState,
    batches: Batches,
    mesh: jax.sharding.Mesh,
    late_metrics: LateMetrics,
    milestones: _Milestones,
    exit_request: GracefulExit,
) -> TrainState:
    """The loop itself; saves the state where a signal or an error ends it before its time.

    Args:
        steps: their numbers.
        step_fn: as in `run`, like the next three.
        state: before the first of the steps.
        batches: from that of the first step on.
        mesh: the device mesh.
        late_metrics: logs them.
        milestones: evaluates and saves.
        exit_request: an entered GracefulExit.
    """
    placement = sharding.batch_sharding(mesh)
    host_max, is_alone = global_arrays.make_host_max(mesh), jax.process_count() == 1
    try:
        for step in steps:
            ids, batch = next(batches)
            # Queued before the step, so that the answer does not wait for its end.
            exit_codes = host_max(exit_request.exit_code)
            state, metrics = step_fn(state, global_arrays.place(batch, placement))
            late_metrics.add(step, ids, batch, metrics)
            exit_code = exit_request.exit_code if is_alone else int(exit_codes)
            if exit_code or milestones.is_due(step):
                late_metrics.flush()
                if exit_code:
                    milestones.leave(step, state)
                    _say_saved(exit_code, step, steps[-1])
                    raise SystemExit(exit_code)
                milestones.reach(step, state)
                late_metrics.start_clock()
    except Exception as error:
        # Whatever stopped it (a non-finite loss, a failing reward function): keep what is
        # learned. Of several processes only one may have failed; it cannot save alone.
        is_non_finite = isinstance(error, NonFiniteLoss)
        if not state.step.is_deleted() and (is_alone or is_non_finite):
            try:
                if not is_non_finite:
                    late_metrics.flush()
            finally:
                milestones.leave(int(state.step), state)
        raise
    return state
