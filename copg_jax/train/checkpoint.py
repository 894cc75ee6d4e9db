"""Saving and restoring the whole train state with Orbax, asynchronously.

1. One folder a saved step; the newest two and the best (by a metric given when saving) are kept.
   The data order needs no file of its own: batches are a function of the step.
2. A step is sealed with checksums of all its files before it appears (Orbax and TensorStore have
   none of the arrays themselves), and with what is known of its evaluation.
3. Opening reads the newest step whole. A damaged one is set aside, and the one before it is taken;
   one that cannot be read now ends the run and stays where it is.

Of several processes all see the steps that process 0 lists.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from copg_jax import checksums, distributed
from copg_jax.errors import Damaged, InputError
from copg_jax.files import bucket_errors, is_remote
from copg_jax.train import state as train_state
from copg_jax.train.state import TrainState

log = logging.getLogger(__name__)

# Until all is written and sealed. Orbax's own 20 minutes are not enough for sealing hundreds of GB
# in a bucket, which are read back; after it a save has failed, and the run with it.
_COMMIT_SEC = 4 * 3600
_OF_ORBAX = "_CHECKPOINT_METADATA"  # written again after sealing; nothing here reads it


@dataclass
class _LatestAndBest(policies.PreservationPolicy):
    """Keeps the newest two steps, `best` and those that are pinned."""

    best: int | None = None
    pinned: tuple[int, ...] = ()

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: policies.PreservationContext
    ) -> list[bool]:
        kept = {info.step for info in checkpoints[-2:]} | {self.best, *self.pinned}
        return [info.step in kept for info in checkpoints]


class Checkpoints:
    """Checkpoints of one run, in `folder`; a context manager that waits for pending writes at its
    end.

    Args:
        folder: made when absent.
        best_metric: name of the metric whose largest value marks the best step, or None to keep the
            newest only.

    Raises:
        InputError: a step cannot be read now.
    """

    def __init__(self, folder: epath.PathLike, *, best_metric: str | None = None) -> None:
        self.folder = epath.Path(folder)
        if not is_remote(folder):
            self.folder = self.folder.resolve()  # Orbax wants it absolute
        self._best_metric = best_metric
        self._best: tuple[int, float] | None = None
        self._is_evaluated: dict[int, bool] = {}
        self._kept = _LatestAndBest()
        self._saving: tuple[int, dict[str, Any]] | None = None
        found = None
        # A process that did not see it would not take part when Orbax lists the steps.
        with distributed.main_first(self.folder), bucket_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if distributed.is_main_process():
                found = self._newest_whole()
        self._take_over(found)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                single_host_load_and_broadcast=True,  # others may list a bucket differently
                preservation_policy=self._kept,
                lightweight_initialize=True,  # what Orbax notes of a step is not needed
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    timeout_secs=_COMMIT_SEC, post_finalization_callback=self._seal
                ),
            ),
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._manager.close()
        except Exception:
            self._manager.close()  # a save that failed is told once; now its threads are ended
            raise

    @property
    def latest_step(self) -> int | None:
        """Newest saved step, None without any."""
        return self._manager.latest_step()

    def best(self) -> tuple[int, float] | None:
        """Step and value of the best saved metric; None where none was saved with one."""
        return self._best

    def save(
        self,
        step: int,
        state: TrainState,
        value: float | None = None,
        *,
        is_evaluated: bool = True,
    ) -> None:
        """Starts saving `state` as `step` and returns once the state may be donated.

        Args:
            step: of one saved before the state is left alone; it may get its rank now.
            state: what to save.
            value: the metric that ranks the step, the same in all processes; None or NaN leaves it
                out of the ranking.
            is_evaluated: False where a run leaves before the evaluation that is due at `step`.
        """
        self._manager.wait_until_finished()
        is_there = step in self._manager.all_steps()
        if is_there and (self._is_evaluated[step] or not is_evaluated):
            return
        best = -math.inf if self._best is None else self._best[1]
        # Of equals the earlier; NaN is never the best.
        if self._best_metric is not None and value is not None and best < value < math.inf:
            self._best, self._kept.best = (step, value), step
        self._is_evaluated[step] = is_evaluated
        facts = {"is_evaluated": is_evaluated, "metric": self._best_metric, "best": self._best}
        if is_there:
            if distributed.is_main_process():
                checksums.note(self.folder / str(step), facts)
            return
        self._saving = step, facts
        self._manager.save(step, args=ocp.args.StandardSave(state._asdict()))

    def pin(self, *steps: int) -> None:
        """Keeps these steps, and no others that were pinned, when newer ones are saved."""
        self._kept.pinned = steps

    @property
    def newest(self) -> list[int]:
        """The steps that a run can go on from: the newest two, or fewer."""
        return sorted(self._manager.all_steps())[-2:]

    def raise_failure(self) -> None:
        """Raises what a save in the background has failed with; never waits for one."""
        if not self._manager.is_saving_in_progress():
            self._manager.wait_until_finished()

    def is_evaluated(self, step: int) -> bool:
        """Whether the evaluation due at the newest step, if any, was done when it was saved."""
        return self._is_evaluated[step]

    def restore(self, step: int, state: TrainState, shardings: TrainState) -> TrainState:
        """Reads the state of `step` straight into its shards; the mesh may differ from the one it
        was saved on.

        Args:
            step: a saved step.
            state: shapes and dtypes, e.g. from `train_state.abstract_state`.
            shardings: where each array shall lie.

        Raises:
            InputError: the checkpoint holds other parameters than this model has.
        """
        target = train_state.with_shardings(state, shardings)._asdict()
        handler = ocp.StandardCheckpointHandler()
        self._check(step, target, handler.metadata(self._arrays(step)).tree)
        with ocp.Checkpointer(handler) as reader:
            restored = reader.restore(self._arrays(step), args=ocp.args.StandardRestore(target))
        # A run that halted on a non-finite loss may try again.
        return TrainState(**restored)._replace(halted=jax.device_put(False, shardings.halted))

    def restore_params(self, step: int, state: TrainState, shardings: TrainState) -> Any:
        """`restore` of the parameters alone, in a third of the memory."""
        target = {"params": train_state.with_shardings(state, shardings).params}
        options = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,  # which the manager's own handler does not know
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self._arrays(step), args=options)["params"]

    def _arrays(self, step: int) -> epath.Path:
        place = self.folder / str(step) / "default"
        if not place.exists():
            raise InputError(
                f"{place}: missing: wanted the checkpoint of step {step}. Fix: restore it from a "
                f"copy, or delete {self.folder} to train anew with the same command."
            )
        return place

    def _newest_whole(self) -> tuple[int, dict[str, Any]] | None:
        """The newest step that is as it was saved, and what it knows; without a best step that is
        not there whole. Damaged ones are set aside.
        """
        steps = sorted(ocp.utils.checkpoint_steps(self.folder), reverse=True)
        for step in steps:
            facts = self._facts(step)
            if facts is None:
                continue
            best = facts["best"]
            # It is also gone where a step that was set aside was better.
            if best is not None and best[0] != step and self._facts(best[0]) is None:
                log.warning(
                    "%s: step %d, the best until step %d, is not there whole: best/ will be made "
                    "of the steps that are evaluated from here on, if any.",
                    self.folder,
                    best[0],
                    step,
                )
                facts = facts | {"best": None}
            return step, facts
        if steps:
            log.warning("%s: no step is whole: the run goes on from its start.", self.folder)
        return None

    def _facts(self, step: int) -> dict[str, Any] | None:
        """What a step knows; None where it is not as it was saved, and is now out of the way."""
        folder = self.folder / str(step)
        try:
            return checksums.check(folder, fix="It cannot be gone on with.")
        except Damaged as error:
            log.warning("%s", error)
        if folder.exists():
            names = {item.name for item in self.folder.iterdir()}
            number = next(i for i in range(len(names) + 1) if f"damaged-{step}-{i}" not in names)
            aside = self.folder / f"damaged-{step}-{number}"
            folder.rename(aside)
            log.warning("%s is now %s. Delete it when you have seen why.", folder, aside)
        return None

    def _take_over(self, found: tuple[int, dict[str, Any]] | None) -> None:
        """Takes what the newest whole step, which process 0 has found, says of the evaluations."""
        step, facts = found or (-1, {})
        best = facts.get("best") if facts.get("metric") == self._best_metric else None
        numbers = [step, facts.get("is_evaluated", False), best[0] if best else -1]
        step, is_evaluated, best_step = map(int, distributed.from_main(np.array(numbers, np.int32)))
        (value,) = distributed.from_main(np.array([best[1] if best else math.nan])).tolist()
        self._is_evaluated[step] = bool(is_evaluated)
        if best_step >= 0:
            self._best, self._kept.best = (best_step, value), best_step

    def _seal(self) -> None:
        """Orbax calls it in its own thread, when all files are written and before the step's folder
        gets its name.
        """
        if not distributed.is_main_process() or self._saving is None:
            return
        step, facts = self._saving
        written = self.folder / f"{step}{ocp.utils.TMP_DIR_SUFFIX}"
        if not written.exists():  # in a bucket, where a file marks the end instead
            written = self.folder / str(step)
        checksums.seal(written, facts, leave_out=_OF_ORBAX)

    def _check(self, step: int, target: Any, tree: Any) -> None:
        """Raises InputError unless the arrays of a saved step are those of `target`."""
        paths, _ = jax.tree_util.tree_flatten_with_path(target)
        wanted = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
            for path, leaf in paths
        }
        got = {leaf.name: leaf.shape for leaf in jax.tree.leaves(tree)}
        differences = [
            f"  {name}: wanted {wanted.get(name, 'nothing')}, got {got.get(name, 'nothing')}"
            for name in [*wanted, *(name for name in got if name not in wanted)]
            if wanted.get(name) != got.get(name)
        ]
        if differences:
            more = f"\n  and {len(differences) - 8} more" if len(differences) > 8 else ""
            raise InputError(
                f"{self.folder / str(step)}: wanted a checkpoint of this model and optimiser, got "
                "one of another:\n" + "\n".join(differences[:8]) + more + "\nFix: give another "
                "output_dir, or the config and the version of copg_jax that it was started with."
            )
