"""The compiled step of a run: one shape, its numbers as arguments, the rate of each step."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from copg_jax.config.sections import OptimConfig, TrainingConfig
from copg_jax.objective import LossOutput
from copg_jax.train import run
from copg_jax.train.compiled import CompiledStep
from copg_jax.train.optim import learning_rate, make_optimizer
from tests.toys import Toy, group_batch, in_bins, leaves, toy_loss

OPTIM = OptimConfig(learning_rate=0.25, warmup_fraction=0.5, decay="cosine", b1=0.0)
STEPS = 6


def scaled_loss(params: Any, batch: Any, scale: Any) -> LossOutput:
    """The toy loss times a number."""
    output = toy_loss(params, batch)
    return output._replace(total=scale * output.total, per_group=scale * output.per_group)


@pytest.fixture
def toy() -> Toy:
    """Its mesh, its layout and its state."""
    return Toy(optimizer=make_optimizer(OPTIM))


@pytest.fixture
def step(toy) -> CompiledStep:
    """As a stage makes it."""
    of_run = SimpleNamespace(
        optimizer=toy.optimizer,
        mesh=toy.mesh,
        shardings=toy.layout,
        num_steps=STEPS,
        model=SimpleNamespace(arch=None),
        config=SimpleNamespace(optim=OPTIM, training=TrainingConfig()),
    )
    stage = SimpleNamespace(make_loss=None, coefficients=lambda done: {"scale": 3.0 + done})
    return run._step(cast(Any, of_run), cast(Any, stage), scaled_loss, None)


def test_each_step_has_the_learning_rate_of_its_number_and_the_numbers_of_the_loss(toy, step):
    state, batch = toy.state, toy.place(group_batch(np.zeros((8, 2))))
    for number in range(1, STEPS + 1):
        before = leaves(state.params)[0]
        state, metrics = step(number, state, batch)
        assert metrics["optim/learning_rate"] == np.float32(learning_rate(OPTIM, STEPS, number - 1))
        scale = 3.0 + (number - 1) / (STEPS - 1)
        wanted = scale * 2 * before.mean() ** 2  # two completions a group, rewards of 0
        np.testing.assert_allclose(metrics["per_group"], np.full(8, wanted), rtol=1e-5)


@pytest.mark.parametrize("changed", ["shape", "dtype"])
def test_a_batch_of_another_shape_or_dtype_is_an_error_and_no_second_compilation(
    toy, step, changed
):
    batch = group_batch(np.ones((8, 2)))
    state, _ = step(1, toy.state, toy.place(batch))
    state, _ = step(2, state, toy.place(group_batch(np.zeros((8, 2)))))
    other = {
        "shape": group_batch(np.ones((8, 3))),
        "dtype": batch._replace(reward=batch.reward.astype(np.float16)),
    }[changed]
    with pytest.raises(TypeError, match="compiled"):
        step(3, state, toy.place(other))
    # What was compiled goes on, and the state was not lost.
    state, metrics = step(3, state, toy.place(batch))
    assert metrics["finite"] and int(state.step) == 3


def test_a_larger_layout_is_compiled_once_and_said_in_the_log(toy, step, caplog):
    batch = group_batch(np.ones((8, 2)))
    state = toy.state
    with caplog.at_level("INFO"):
        for number, num_bins in enumerate([4, 2, 4, 2], start=1):  # 2 bins have more capacity each
            state, metrics = step(number, state, toy.place(in_bins(batch, num_bins)))
    assert metrics["finite"] and int(state.step) == 4
    compiling = [text for text in caplog.messages if text.startswith("compiling")]
    assert compiling == [
        "compiling the training step",
        "compiling the training step anew: the batch is larger than those before it",
    ]
