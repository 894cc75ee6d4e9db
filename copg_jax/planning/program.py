"""The step of a stage as its script would jit it, with abstract arrays for arguments.

Batches have the lengths of TL;DR, in the shape that a run has whose longest prompt and completion
are as long as the config allows.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from copg_jax import optim, sharding, step, train_state
from copg_jax.config import (
    EvaluateConfig,
    ModelConfig,
    PolicyConfig,
    RewardModelConfig,
    SFTConfig,
    TrainConfig,
)
from copg_jax.data import groups, packing
from copg_jax.data.groups import GroupBatch, TokenGroup
from copg_jax.data.stream import WINDOW
from copg_jax.errors import InputError
from copg_jax.flops import block_parameters, useful_flops
from copg_jax.loop import check_batch
from copg_jax.models import functional, hf_weights
from copg_jax.models.llama import LlamaConfig
from copg_jax.sampling import make_sampler, row_keys
from copg_jax.step import LossFn

STAGES: dict[str, type] = {
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "policy": PolicyConfig,
    "evaluate": EvaluateConfig,
}
"""Stages whose step can be planned; of `evaluate`, it is the sampling of one batch of prompts."""

# TL;DR under a Llama tokenizer: mean and standard deviation.
_PROMPT_TOKENS, _COMPLETION_TOKENS = NormalDist(343, 100), NormalDist(34, 11)


class Program(NamedTuple):
    """A step, and what it needs whoever compiles it."""

    function: Any  # jitted
    trains: bool
    arguments: tuple[Any, ...]  # ShapeDtypeStructs with shardings
    num_groups: int
    num_tokens: int  # useful ones: no padding
    useful_flops: float  # all chips together
    hbm_bytes: float  # that a chip reads and writes at least, arguments and results aside
    loop_trips: int  # of a loop that the data can end early: all of them
    frozen_bytes: float = 0.0  # of one chip: models that the stage holds beside the arguments


def read_architecture(section: ModelConfig) -> LlamaConfig:
    """Reads config.json of a local folder, which needs to hold nothing else.

    Raises:
        InputError: not a folder with a config.json that this model can compute.
    """
    if not (Path(section.path) / "config.json").is_file():
        raise InputError(
            f"model.path {section.path}: wanted a local folder with a config.json (a plan needs no "
            "weights), got none. Fix: for example model.path=configs/models/llama2_7b."
        )
    return replace(hf_weights.read_config(section.path), dtype=section.dtype)


def make_program(
    config: TrainConfig | EvaluateConfig, model: LlamaConfig, mesh: jax.sharding.Mesh
) -> Program:
    """The step of the stage that `config` configures."""
    if isinstance(config, EvaluateConfig):
        program = _sampling_program(config, model, mesh)
        return program._replace(frozen_bytes=_frozen_bytes(config, model, mesh))
    chunk = getattr(config, "logits_chunk", None)
    if isinstance(config, PolicyConfig):
        loss_fn = step.make_policy_loss(
            model,
            config.loss.name,
            beta=config.loss.beta,
            baseline=config.loss.baseline,
            chunk=chunk,
        )
        program = _training_program(config, model, mesh, loss_fn, num_completions=2)
        return program._replace(frozen_bytes=_frozen_bytes(config, model, mesh))
    if isinstance(config, RewardModelConfig):
        loss_fn = step.make_bradley_terry_loss(model)
        return _training_program(config, model, mesh, loss_fn, num_completions=2, head="score")
    return _training_program(
        config, model, mesh, step.make_nll_loss(model, chunk=chunk), num_completions=1
    )


def _frozen_bytes(
    config: PolicyConfig | EvaluateConfig, model: LlamaConfig, mesh: jax.sharding.Mesh
) -> float:
    """π_ref and reward models, which an evaluation holds; these are taken to be like the policy."""
    if config.evaluation is None:
        return 0.0
    size = sum(leaf.size for leaf in jax.tree.leaves(functional.abstract_params(model)))
    # As `rewards.RewardModel` cuts itself, whatever the mesh.
    found = sum(
        size
        * jnp.dtype(spec.arguments.get("dtype", "float32")).itemsize
        / math.gcd(mesh.size, model.hidden_size)
        for spec in config.evaluation.rewards
        if spec.function.endswith(".RewardModel")
    )
    if isinstance(config, PolicyConfig) or config.reference is not None:
        found += size * _itemsize(model) / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    return found


def _training_program(
    config: TrainConfig,
    model: LlamaConfig,
    mesh: jax.sharding.Mesh,
    loss_fn: LossFn,
    *,
    num_completions: int,
    head: str = "lm",
) -> Program:
    training = config.training
    check_batch(training.batch_size, training.num_microbatches, mesh)
    schedule = optim.make_schedule(config.optim, num_steps=1)
    optimizer = optim.make_optimizer(config.optim, num_steps=1)
    params = functional.abstract_params(model, head=head)
    axes = functional.logical_axes(model, head=head)
    layout = train_state.state_shardings(mesh, optimizer, params, axes)
    function = step.make_train_step(
        loss_fn,
        optimizer,
        mesh=mesh,
        state_shardings=layout,
        num_microbatches=training.num_microbatches,
        schedule=schedule,
    )
    batch = _full_batch(
        config,
        num_completions,
        num_blocks=sharding.num_batch_shards(mesh) * training.num_microbatches,
    )
    lengths = batch.prompt_length, batch.completion_length
    state = train_state.abstract_state(optimizer, params)
    return Program(
        function,
        trains=True,
        arguments=(
            train_state.with_shardings(state, layout),
            _abstract(batch, sharding.batch_sharding(mesh)),
        ),
        num_groups=training.batch_size,
        num_tokens=int(sum(map(np.sum, lengths))),
        useful_flops=useful_flops(model, *lengths, head=head),
        # Matrices are read in the forward and in the backward pass, their gradient is written.
        hbm_bytes=3 * training.num_microbatches * _matrix_bytes(model, mesh),
        loop_trips=1,
    )


def _full_batch(config: TrainConfig, num_completions: int, *, num_blocks: int) -> GroupBatch:
    """A batch with the lengths of TL;DR, in the shape that a run has whose longest prompt and
    completion are as long as the config allows.
    """
    size, data = config.training.batch_size, config.data
    # As the stream deals a window: blocks alike, in a shape that fits them all.
    num_groups = packing.round_up(WINDOW, size)
    prompts = _lengths(_PROMPT_TOKENS, num_groups, data.max_prompt_tokens, seed=0)
    completions = np.stack(
        [
            _lengths(_COMPLETION_TOKENS, num_groups, data.max_completion_tokens, seed=k + 1)
            for k in range(num_completions)
        ],
        axis=1,
    )
    prompts[prompts.argmax()] = data.max_prompt_tokens
    tokens = np.stack([prompts, completions.sum(1)], axis=1)
    dealt = packing.deal(tokens, batch_size=size, num_blocks=num_blocks)
    places = packing.in_places(tokens, dealt, num_blocks=num_blocks)
    longest = packing.round_up(data.max_prompt_tokens, 8)
    return groups.collate(
        [_token_group(int(prompts[i]), completions[i]) for i in dealt[0]],
        batch_size=size,
        prompt_sizes=packing.prompt_sizes_of(places, most=longest),
        num_completions=num_completions,
        completion_size=packing.round_up(data.max_completion_tokens, 8),
        num_blocks=num_blocks,
        capacity=packing.capacity_of(places),
    )


def _lengths(of: NormalDist, size: int, most: int, *, seed: int) -> np.ndarray:
    """`size` lengths at evenly spaced quantiles, clipped to [1, most], in random order."""
    values = [of.inv_cdf((i + 0.5) / size) for i in range(size)]
    values = np.clip(np.round(values), 1, most).astype(np.int32)
    return np.random.default_rng(seed).permutation(values)


def _token_group(prompt_length: int, completion_lengths: np.ndarray) -> TokenGroup:
    completions = tuple(np.zeros(size, np.int32) for size in completion_lengths)
    return TokenGroup(
        id="",
        where="",
        prompt="",
        prompt_tokens=np.zeros(prompt_length, np.int32),
        completions=("",) * len(completions),
        completion_tokens=completions,
    )


def _sampling_program(
    config: EvaluateConfig, model: LlamaConfig, mesh: jax.sharding.Mesh
) -> Program:
    """Sampling for the first batch of an evaluation, which has its longest prompts, all of them to
    the last token.
    """
    generation, shards = config.evaluation.generation, sharding.num_batch_shards(mesh)
    size = packing.round_up(min(generation.batch_size, generation.num_prompts), shards)
    num_steps = generation.max_new_tokens
    params = jax.eval_shape(
        partial(functional.cast_matrices, model), functional.abstract_params(model)
    )
    layout = sharding.shardings(mesh, functional.logical_axes(model), params)
    function = make_sampler(
        model,
        eos_id=0,
        max_new_tokens=num_steps,
        num_samples=generation.num_samples,
        temperature=generation.sampling_temperature,
        mesh=mesh,
        param_shardings=layout,
    )
    rows = sharding.batch_sharding(mesh)
    most = config.evaluation.data.max_prompt_tokens
    lengths = _lengths(_PROMPT_TOKENS, generation.num_prompts, most, seed=0)
    lengths[lengths.argmax()] = most
    tokens = np.stack([lengths, np.zeros_like(lengths)], axis=1)
    first, *_ = packing.batches_by_length(tokens, batch_size=size, num_blocks=shards)
    completions = np.full((size, generation.num_samples), num_steps, np.int32)
    batch = groups.collate(
        [None if i < 0 else _token_group(int(lengths[i]), completions[0]) for i in first.rows],
        batch_size=size,
        prompt_sizes=first.prompt_sizes,
        num_completions=generation.num_samples,
        completion_size=num_steps,
        num_blocks=shards,
    )
    length, room = batch.prompt_length, first.capacity.tokens
    slots = packing.prompt_slots(length, first.prompt_sizes, shards, room)
    keys = jax.eval_shape(lambda: row_keys(0, 0, size))
    heads = model.num_key_value_heads * model.head_dim * model.num_hidden_layers
    cache = 2 * sum(x.size for x in batch.prompt_tokens) * heads * _itemsize(model) / mesh.size
    return Program(
        function,
        trains=False,
        arguments=(
            _abstract(params, layout),
            *_abstract((batch.prompt_tokens, length, slots, keys), rows),
        ),
        num_groups=size,
        num_tokens=int(length.sum() + completions.sum()),
        useful_flops=useful_flops(model, length, completions, training=False),
        # The prompts read the matrices; every token after the first the chip's own part of them,
        # and the prompts' cache.
        hbm_bytes=_matrix_bytes(model, mesh)
        + (num_steps - 1) * (_matrix_bytes(model, mesh) / mesh.shape["fsdp"] + cache),
        loop_trips=num_steps - 1,
    )


def _matrix_bytes(model: LlamaConfig, mesh: jax.sharding.Mesh) -> float:
    """All matrices of the layers in the compute dtype, as far as one chip multiplies by them."""
    return block_parameters(model) * _itemsize(model) / mesh.shape["tensor"]


def _itemsize(model: LlamaConfig) -> int:
    return jnp.dtype(model.dtype).itemsize


def _abstract(tree: Any, shardings: Any) -> Any:
    """Shapes with shardings, which are a tree as well or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
