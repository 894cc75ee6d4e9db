"""The step of a run, compiled once for each layout of its batches, most often one: a batch of
another shape or dtype is an error.
"""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from copg_jax.train.state import TrainState

log = logging.getLogger(__name__)


class CompiledStep:
    """Takes steps with the numbers of a loss and the learning rate of each step as arguments.

    Args:
        step_fn: from `step.make_train_step`.
        coefficients: numbers of the loss.
        learning_rate: (steps taken) → that of the next one.
        frozen: parameters that are not trained, if there are any.
    """

    def __init__(
        self,
        step_fn: Any,
        coefficients: Mapping[str, float],
        learning_rate: Callable[[int], float],
        frozen: Mapping[str, Any] | None = None,
    ) -> None:
        self._step_fn, self._learning_rate = step_fn, learning_rate
        self._arguments = {**as_arguments(coefficients), "frozen": frozen}
        self._compiled: dict[Any, Any] = {}  # by layout

    def __call__(self, step: int, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        arguments = self._arguments | {"learning_rate": np.float32(self._learning_rate(step - 1))}
        arrays, structure = jax.tree.flatten(batch.layout)
        layout = structure, *(array.shape for array in arrays)
        if layout not in self._compiled:
            larger = " anew: the batch is larger than those before it" * bool(self._compiled)
            log.info("compiling the training step%s", larger)
            begin = time.perf_counter()
            self._compiled[layout] = self._step_fn.lower(state, batch, **arguments).compile()
            log.info("compiled in %.0f s", time.perf_counter() - begin)
        return self._compiled[layout](state, batch, **arguments)


def as_arguments(coefficients: Mapping[str, float]) -> dict[str, np.float32]:
    """Numbers of a loss as a compiled step takes them."""
    return {name: np.float32(value) for name, value in coefficients.items()}
