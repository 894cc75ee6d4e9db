"""The optimiser: Adam, and a learning rate with a linear warm-up and an optional cosine decay.

The rate is an argument of every update, not part of the compiled step: runs that differ in its peak
or in their number of steps share a compilation.
"""

import math
from typing import Any

import jax
import optax

from copg_jax.config.sections import OptimConfig


def warmup_steps(config: OptimConfig, num_steps: int) -> int:
    """Steps of a run on which the learning rate rises."""
    return round(config.warmup_fraction * num_steps)


def learning_rate(config: OptimConfig, num_steps: int, step: int) -> float:
    """Learning rate of a step: up to the peak over the warm-up, then constant or cosine → 0.

    Args:
        config: peak, warm-up and decay.
        num_steps: of the whole run.
        step: number of updates before this one. Step 0 has 1/warmup of the peak instead of 0, so
            that the first step already moves.
    """
    warmup = warmup_steps(config, num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.decay == "constant":
        return config.learning_rate
    done = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """Builds the gradient transform; its updates take `learning_rate=`, its state is float32."""
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    return optax.chain(*parts, _scale_by_learning_rate())


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params
        if "learning_rate" not in extra_args:
            raise TypeError("this optimizer wants a learning rate: step(..., learning_rate=1e-6)")
        rate = extra_args["learning_rate"]
        return jax.tree.map(lambda update: -rate * update, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
