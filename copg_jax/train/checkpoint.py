"""Saving and restoring the whole train state with Orbax, asynchronously.

One folder a saved step; the newest and the best (by a metric given when saving) are kept. The data
order needs no file of its own: batches are a function of the step. Of several processes all see the
steps that process 0 lists.
"""

import math
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from copg_jax import distributed
from copg_jax.errors import InputError
from copg_jax.files import is_remote
from copg_jax.train import state as train_state
from copg_jax.train.state import TrainState


class Checkpoints:
    """Checkpoints of one run, in `folder`; a context manager that waits for pending writes at its
    end.

    Args:
        folder: made when absent.
        best_metric: name of the metric whose largest value marks the best step, or None to keep the
            newest only.
    """

    def __init__(self, folder: epath.PathLike, *, best_metric: str | None = None) -> None:
        self.folder = epath.Path(folder)
        if not is_remote(folder):
            self.folder = self.folder.resolve()  # Orbax wants it absolute
        # A process that did not see it would not take part when Orbax lists the steps.
        with distributed.main_first(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._best_metric = best_metric
        keep: list[Any] = [policies.LatestN(2)]
        value_of = None
        if best_metric is not None:
            value_of = lambda metrics: metrics.get(best_metric, -math.inf)
        if value_of is not None:
            keep.append(
                policies.BestN(get_metric_fn=value_of, n=1, keep_checkpoints_without_metrics=False)
            )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=value_of,  # without it Orbax does not store metrics
                single_host_load_and_broadcast=True,  # others may list a bucket differently
                preservation_policy=policies.AnyPreservationPolicy(keep),
            ),
            item_handlers=ocp.StandardCheckpointHandler(),  # lets it tell shapes before restoring
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
        if self._best_metric is None:
            return None
        self._manager.wait_until_finished()
        found = [
            (metrics[self._best_metric], -step)  # the earlier of equals, as the loop keeps it
            for step in self._manager.all_steps()
            if (metrics := self._manager.metrics(step)) and self._best_metric in metrics
        ]
        value, step = distributed.from_main(np.array(max(found, default=(math.nan, 0))))
        return None if math.isnan(value) else (-int(step), float(value))

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
            step: a step saved before is left alone, unless it now gets its rank.
            state: what to save.
            value: the metric that ranks the step, the same in all processes; None or NaN leaves it
                out of the ranking.
            is_evaluated: False where a run leaves before the evaluation that is due at `step`.
        """
        ranked = self._best_metric is not None and value is not None and math.isfinite(value)
        if step in self._manager.all_steps():
            if not ranked or self.is_evaluated(step):
                return
            self._manager.delete(step)
        self._manager.save(
            step,
            args=ocp.args.StandardSave(state._asdict()),
            metrics={self._best_metric: value} if ranked else {},  # None: Orbax would warn
            custom_metadata={"is_evaluated": is_evaluated},
        )

    def raise_failure(self) -> None:
        """Raises what a save in the background has failed with; never waits for one."""
        if not self._manager.is_saving_in_progress():
            self._manager.wait_until_finished()

    def is_evaluated(self, step: int) -> bool:
        """Whether the evaluation due at a saved step, if any, was done when it was saved."""
        return self._manager.metadata(step).custom_metadata["is_evaluated"]

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
        self._check(step, target)
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(target))
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
            return reader.restore(self.folder / str(step) / "default", args=options)["params"]

    def _check(self, step: int, target: Any) -> None:
        """Raises InputError unless the arrays of a saved step are those of `target`."""
        paths, _ = jax.tree_util.tree_flatten_with_path(target)
        wanted = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
            for path, leaf in paths
        }
        saved = jax.tree.leaves(self._manager.item_metadata(step).tree)
        got = {leaf.name: leaf.shape for leaf in saved}
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
