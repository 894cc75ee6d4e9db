"""The optimiser: Adam with a linear warm-up and an optional cosine decay, as an optax transform."""

from dataclasses import dataclass

import optax

from copg_jax.cli import option
from copg_jax.errors import InputError


@dataclass(frozen=True)
class OptimConfig:
    """Adam and its learning-rate schedule; the defaults are the paper's for CoPG, DPO, IPO and the
    reward model.
    """

    learning_rate: float = option(1e-6, "peak learning rate")
    warmup_fraction: float = option(0.1, "share of all steps spent on linear warm-up from 0")
    decay: str = option("constant", "after warm-up: 'constant' or 'cosine' (to 0)")
    b1: float = option(0.9, "Adam's first-moment decay")
    b2: float = option(0.999, "Adam's second-moment decay")
    eps: float = option(1e-8, "Adam's denominator offset")
    weight_decay: float = option(0.0, "decoupled weight decay (the paper uses none)")
    clip_norm: float | None = option(None, "clip the global gradient norm; null = no clipping")

    def __post_init__(self):
        checks = {
            "learning_rate must be > 0": self.learning_rate > 0,
            "warmup_fraction must be in [0, 1]": 0 <= self.warmup_fraction <= 1,
            "decay must be 'constant' or 'cosine'": self.decay in ("constant", "cosine"),
            "b1 and b2 must be in [0, 1)": 0 <= self.b1 < 1 and 0 <= self.b2 < 1,
            "eps must be > 0": self.eps > 0,
            "weight_decay must be >= 0": self.weight_decay >= 0,
            "clip_norm must be > 0 or null": self.clip_norm is None or self.clip_norm > 0,
        }
        if failed := [text for text, holds in checks.items() if not holds]:
            raise InputError(f"{'; '.join(failed)}; got {self}")


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step: 0 → peak over the warm-up, then constant or cosine →
    0.
    """
    warmup = round(config.warmup_fraction * num_steps)
    rest = max(num_steps - warmup, 1)
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, rest)
    else:
        after = optax.constant_schedule(config.learning_rate)
    if not warmup:
        return after
    # The first step already moves: step 0 has 1/warmup of the peak instead of 0.
    ramp = optax.linear_schedule(
        config.learning_rate / warmup, config.learning_rate, max(warmup - 1, 1)
    )
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Builds the gradient transform; its state is float32, like the master parameters."""
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, num_steps)))
    return optax.chain(*parts)
