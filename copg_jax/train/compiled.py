"""The train step of a run as the loop calls it: compiled once, also for all runs of a study."""

import logging
import time
from collections.abc import Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from copg_jax import reuse
from copg_jax.config.sections import OptimConfig
from copg_jax.train import optim
from copg_jax.train.state import TrainState

log = logging.getLogger(__name__)


class CompiledStep:
    """The step of a run: a batch of another shape or dtype than the first is an error.

    Args:
        step_fn: from `step.make_train_step`.
        made_of: what it was made of, but for the optimiser; runs of one process for which this is
            equal, as well as the optimiser and the shapes, share a compilation.
        coefficients: numbers of the loss.
        optim_config: gives the learning rate.
        num_steps: of the whole run.
    """

    def __init__(
        self,
        step_fn: Any,
        made_of: Hashable,
        coefficients: Mapping[str, float],
        optim_config: OptimConfig,
        num_steps: int,
    ) -> None:
        self._step_fn = step_fn
        self._coefficients = as_arguments(coefficients)
        self._learning_rate = partial(optim.learning_rate, optim_config, num_steps)
        # The learning rate is an argument.
        alike = replace(optim_config, learning_rate=1.0, warmup_fraction=0.0, decay="constant")
        self._key = made_of, alike
        self._compiled: Any = None

    def __call__(self, step: int, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        arguments = self._coefficients | {
            "learning_rate": np.float32(self._learning_rate(step - 1))
        }
        if self._compiled is None:
            shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch))
            key = self._key, jax.tree.structure((batch, arguments)), shapes
            self._compiled = reuse.once("step", key, lambda: self._compile(state, batch, arguments))
        return self._compiled(state, batch, **arguments)

    def _compile(self, state: TrainState, batch: Any, arguments: dict[str, Any]) -> Any:
        log.info("compiling the training step")
        begin = time.perf_counter()
        compiled = self._step_fn.lower(state, batch, **arguments).compile()
        log.info("compiled in %.0f s", time.perf_counter() - begin)
        return compiled


def as_arguments(coefficients: Mapping[str, float]) -> dict[str, np.float32]:
    """Numbers of a loss as a compiled step takes them."""
    return {name: np.float32(value) for name, value in coefficients.items()}
