"""A toy training problem (no model, so that nothing takes long to compile), a tiny Llama and its
relatives.

The toy loss draws eight numbers to the rewards of the data: loss = (mean(w) - R)^2 summed over the
present completions. It reaches every part of step, loop and checkpoint that a real one does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from copg_jax import distributed, sharding
from copg_jax.config.sections import MeshConfig
from copg_jax.data.groups import GroupBatch
from copg_jax.models.layout import Capacity, Shape, round_up
from copg_jax.models.params import Architecture
from copg_jax.objective import LossFn, LossOutput
from copg_jax.train.state import abstract_state, create_state, state_shardings
from copg_jax.train.step import make_train_step

LLAMA = Architecture(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    remat="none",
)
RELATIVES = {
    "mistral": replace(LLAMA, model_type="mistral", sliding_window=1024),
    "qwen2": replace(LLAMA, model_type="qwen2", qkv_bias=True),
    "qwen3": replace(LLAMA, model_type="qwen3", qk_norm=True, head_dim=8),
    "smollm3": replace(LLAMA, model_type="smollm3", rotary_layers=(True, False)),
}
# One model with all that the others have, which no family has.
EVERYTHING = replace(LLAMA, qkv_bias=True, qk_norm=True, rotary_layers=(True, False))
AXES = {"w": ("embed",)}


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """The first data x fsdp x tensor virtual devices as a mesh."""
    sizes = MeshConfig(data, fsdp, tensor)
    if jax.device_count() < data * fsdp * tensor:
        pytest.fail("one device here: name this test's file in EIGHT_DEVICES of tests/conftest.py")
    return sharding.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def group_batch(reward: Any, length: Any = None, ref_logp: Any = None, seed: int = 0) -> GroupBatch:
    """A batch with these rewards [B, K] and random tokens; all completions present by default."""
    rng = np.random.default_rng(seed)
    reward = np.asarray(reward, np.float32)
    b, k = reward.shape
    p, c = 6, 5
    draw = rng.integers(1, c + 1, (b, k))
    length = draw if length is None else np.asarray(length)
    return GroupBatch(
        prompt_tokens=rng.integers(0, LLAMA.vocab_size, (b, p)).astype(np.int32),
        prompt_length=rng.integers(1, p + 1, b).astype(np.int32),
        completion_tokens=rng.integers(0, LLAMA.vocab_size, (b, k, c)).astype(np.int32),
        completion_length=length.astype(np.int32),
        reward=reward,
        ref_logp=np.zeros((b, k), np.float32)
        if ref_logp is None
        else np.asarray(ref_logp, np.float32),
        mu_logp=np.zeros((b, k), np.float32),
    )


def in_bins(batch: GroupBatch, num_bins: int) -> GroupBatch:
    """The batch with a layout of so many bins, each with a little more capacity than the fullest
    needs, and prompts as wide as the longest with the same number in its bin.
    """
    widths = batch.prompt_length.reshape(num_bins, -1).max(0)
    own = batch.completion_length.reshape(num_bins, -1).sum(1).max()
    both = (batch.prompt_length + batch.completion_length.sum(1)).reshape(num_bins, -1).sum(1).max()
    capacity = Capacity(round_up(int(both), 5), round_up(int(own), 5))
    shape = Shape(
        num_bins,
        tuple(map(int, widths)),
        batch.prompt_tokens.shape[1],
        *batch.completion_tokens.shape[1:],
        capacity,
    )
    return batch._replace(layout=shape.layout(batch.prompt_length, batch.completion_length))


def toy_params(value: float = 1.0) -> dict[str, jax.Array]:
    """Eight numbers; new buffers at every call, since steps donate them."""
    return {"w": jnp.linspace(0.5, 1.5, 8) * value}


def toy_loss(params: Any, batch: GroupBatch) -> LossOutput:
    """See the module's docstring."""
    present = batch.completion_length > 0
    error = jnp.where(present, (params["w"].mean() - batch.reward) ** 2, 0.0)
    per_group, weight = error.sum(-1), present.sum().astype(jnp.float32)
    total = per_group.sum()
    return LossOutput(total, weight, per_group, {"loss": (total, weight)})


class Toy:
    """State, shardings and train step of the toy problem on a mesh."""

    def __init__(
        self,
        on: jax.sharding.Mesh | None = None,
        *,
        optimizer: optax.GradientTransformation | None = None,
        loss_fn: LossFn = toy_loss,
        num_microbatches: int = 1,
        value: float = 1.0,
    ) -> None:
        self.mesh = on or mesh()
        self.optimizer = optimizer or optax.adam(0.1)
        self.layout = state_shardings(self.mesh, self.optimizer, jax.eval_shape(toy_params), AXES)
        self.abstract = abstract_state(self.optimizer, jax.eval_shape(toy_params))
        params = jax.device_put(toy_params(value), self.layout.params)
        self.state = create_state(self.optimizer, params, self.layout)
        self.step = make_train_step(
            loss_fn,
            self.optimizer,
            mesh=self.mesh,
            state_shardings=self.layout,
            num_microbatches=num_microbatches,
        )

    def place(self, batch: GroupBatch) -> GroupBatch:
        """The batch on the mesh."""
        return distributed.place(batch, sharding.batch_sharding(self.mesh))


def toy_batches(num_steps: int, start: int = 0) -> Iterator[tuple[list[str], GroupBatch]]:
    """Ids and batches of steps start + 1 to num_steps, a function of the step alone."""
    for at in range(start + 1, num_steps + 1):
        reward = np.random.default_rng(at).normal(size=(8, 2))
        yield [f"step{at}-row{row}" for row in range(8)], group_batch(reward, seed=at)


def leaves(tree: Any) -> list[np.ndarray]:
    """Copies of all arrays of a tree on the host."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def assert_trees_equal(left: Any, right: Any) -> None:
    """Bit for bit."""
    for a, b in zip(leaves(left), leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def names_all(text: str, wanted: Sequence[str]) -> None:
    """An error text says all of this."""
    missing = [part for part in wanted if part not in text]
    assert not missing, f"{missing} not in: {text}"
