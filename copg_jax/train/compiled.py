"""The step of a run as the loop calls it: compiled once, also for all runs of a study."""

import logging
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from copg_jax import reuse
from copg_jax.train.state import TrainState

log = logging.getLogger(__name__)


class CompiledStep:
    """Takes steps with the numbers of a loss and the learning rate of each step as arguments.

    Compiled once for each layout of the batches, most often one: a batch of another shape or dtype
    is an error.

    Args:
        step_fn: from `step.make_train_step`.
        made_of: what it was made of; runs of one process for which this is equal, as well as the
            shapes, share a compilation.
        coefficients: (steps taken) → numbers of the loss in the next one.
        learning_rate: (steps taken) → that of the next one.
        frozen: parameters that are not trained, if there are any.
    """

    def __init__(
        self,
        step_fn: Any,
        made_of: Hashable,
        coefficients: Callable[[int], Mapping[str, float]],
        learning_rate: Callable[[int], float],
        frozen: Mapping[str, Any] | None = None,
    ) -> None:
        self._step_fn, self._made_of, self._frozen = step_fn, made_of, frozen
        self._coefficients, self._learning_rate = coefficients, learning_rate
        self._compiled: dict[Any, Any] = {}  # by layout

    def __call__(self, step: int, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        numbers = {**self._coefficients(step - 1), "learning_rate": self._learning_rate(step - 1)}
        arguments = {**as_arguments(numbers), "frozen": self._frozen}
        layout = _shapes(batch.layout)
        if layout not in self._compiled:
            key = self._made_of, _shapes((state, batch, arguments))
            compiled = reuse.once("step", key, lambda: self._compile(state, batch, arguments))
            self._compiled[layout] = compiled
        return self._compiled[layout](state, batch, **arguments)

    def _compile(self, state: TrainState, batch: Any, arguments: dict[str, Any]) -> Any:
        larger = " anew: the batch is larger than those before it" * bool(self._compiled)
        log.info("compiling the training step%s", larger)
        begin = time.perf_counter()
        compiled = self._step_fn.lower(state, batch, **arguments).compile()
        log.info("compiled in %.0f s", time.perf_counter() - begin)
        return compiled


def _shapes(tree: Any) -> Hashable:
    """Structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def as_arguments(coefficients: Mapping[str, float]) -> dict[str, np.float32]:
    """Numbers of a loss as a compiled step takes them."""
    return {name: np.float32(value) for name, value in coefficients.items()}
