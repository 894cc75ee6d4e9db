"""π_ref of rounds: the model that training began with, or the policy at the last reset."""

import hashlib
import json
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from copg_jax import checksums
from copg_jax.config.stages import OnlineConfig
from copg_jax.models.params import Architecture, cast_matrices
from copg_jax.train.checkpoint import Checkpoints
from copg_jax.train.fresh import Drawer
from copg_jax.train.run import Run
from copg_jax.train.state import TrainState, joined

log = logging.getLogger(__name__)


class Reference:
    """π_ref: the model that training began with, or the policy at the last reset.

    Args:
        run: the run.
        config: of it.
        checkpoints: entered Checkpoints; the step of a reset stays among them.
        frozen: see `run.Feed.begin`.
        start: steps that are done.
    """

    def __init__(
        self,
        run: Run,
        config: OnlineConfig,
        checkpoints: Checkpoints,
        frozen: Mapping[str, Any] | None,
        start: int,
    ) -> None:
        self._run, self._config, self._checkpoints = run, config, checkpoints
        self._frozen, self._held = frozen, (-1, None)
        self._copy = jax.jit(partial(_copied, run.model.arch))
        if at := self.reset_before(start // config.steps_per_round) * config.steps_per_round:
            self._pin(at)

    def reset_before(self, number: int) -> int:
        """The round at whose beginning the policy became π_ref; 0 is the model itself."""
        every = self._config.reference_every
        return 0 if every is None else number // every * every

    def drawer(self, number: int, step: int, state: TrainState) -> Drawer:
        """The policy after `step`, at which the round begins, and its reference."""
        config = self._config
        at = self.reset_before(number) * config.steps_per_round
        is_whole = config.generator is None and config.sampling.is_whole_model
        copies = config.reference_every is not None and at == step
        never = is_whole and (config.rounds == 1 or config.reference_every == 1)
        if at == step > 0 and not never:
            self._reset(step, state)
        return Drawer(
            params=joined(self._frozen, state.params),
            trained=state.params,
            policy_hash=self._hash(step),
            reference=None if never else self._weights(at, state if copies else None),
            reference_hash=self._hash(at),
            is_reference=is_whole and at == step,
        )

    def _hash(self, step: int) -> str:
        run = self._run
        return hash_of_policy(run.inputs, run.config.seed, step) if step else run.model.hash

    def _reset(self, step: int, state: TrainState) -> None:
        """Makes the policy of the moment π_ref."""
        log.info("step %d: the policy becomes π_ref", step)
        self._held = -1, None  # before there is another
        self._held = step, joined(self._frozen, self._copy(state.params))
        self._pin(step)
        self._checkpoints.save(step, state)

    def _pin(self, at: int) -> None:
        """Keeps the checkpoint of a reset, and that of the one before: an older step may be gone
        back to.
        """
        every = (self._config.reference_every or 0) * self._config.steps_per_round
        self._checkpoints.pin(at - every, at)

    def _weights(self, at: int, state: TrainState | None) -> Any:
        """Those of π_ref since step `at`, in the compute dtype.

        Args:
            at: step.
            state: of that step, where they shall be copied.
        """
        if self._held[0] != at:
            if at:
                run, folder = self._run, self._checkpoints.folder
                fix = f"π_ref is lost. Fix: restore it, or delete {folder} to begin anew."
                checksums.check(folder / str(at), fix=fix)
                params = self._checkpoints.restore_params(at, run.shapes, run.shardings)
                weights = joined(self._frozen, self._copy(params))
            elif state is not None:  # another will take its place
                weights = joined(self._frozen, self._copy(state.params))
            else:
                weights = self._frozen or self._run.model.load_frozen()
            self._held = at, weights
        return self._held[1]


def _copied(arch: Architecture, params: Any) -> Any:
    """Parameters as those of a model that is only read; their own are donated to the next step."""
    return jax.tree.map(jnp.copy, cast_matrices(arch, params))


def hash_of_policy(made_of: Mapping[str, str], seed: int, step: int) -> str:
    """Name of the policy after some updates of a run: of its inputs, seed and step."""
    text = json.dumps([dict(made_of), seed, step], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
