"""The step of a stage as its script would jit it, with abstract arrays for arguments.

Batches have the lengths of TL;DR, in the shape that a run has whose longest prompt and completion
are as long as the config allows.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from copg_jax import sharding
from copg_jax.config.sections import ModelConfig
from copg_jax.config.stages import (
    EvaluateConfig,
    PolicyConfig,
    RewardModelConfig,
    SFTConfig,
    TrainConfig,
)
from copg_jax.data.groups import GroupBatch, TokenGroup
from copg_jax.errors import InputError
from copg_jax.flops import block_parameters, useful_flops
from copg_jax.hf.weights import read_architecture
from copg_jax.models.forward import make_score, make_seq_logp
from copg_jax.models.layout import WINDOW, pack, pack_by_length, round_up
from copg_jax.models.params import Architecture, abstract_params, cast_matrices, logical_axes
from copg_jax.objective import (
    LossFn,
    find_coefficients,
    find_objective,
    make_bradley_terry_loss,
    make_nll_loss,
    make_policy_loss,
)
from copg_jax.sampling import make_sampler, row_keys
from copg_jax.sharding import Partitioner
from copg_jax.train import optim
from copg_jax.train.loop import check_batch
from copg_jax.train.run import as_arguments
from copg_jax.train.state import abstract_state, state_shardings, with_shardings
from copg_jax.train.step import make_train_step

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
    keywords: Mapping[str, Any] = MappingProxyType({})  # numbers
    frozen_bytes: float = 0.0  # of one chip: models that the stage holds beside the arguments


def open_architecture(section: ModelConfig) -> Architecture:
    """Reads config.json of a local folder, which needs to hold nothing else.

    Raises:
        InputError: not a folder with a config.json that this model can compute.
    """
    if not (Path(section.path) / "config.json").is_file():
        raise InputError(
            f"model.path {section.path}: wanted a local folder with a config.json (a plan needs no "
            "weights), got none. Fix: for example model.path=configs/models/llama2_7b."
        )
    return replace(read_architecture(section.path), dtype=section.dtype)


def make_program(
    config: TrainConfig | EvaluateConfig, arch: Architecture, mesh: jax.sharding.Mesh
) -> Program:
    """The step of the stage that `config` configures."""
    if isinstance(config, EvaluateConfig):
        program = _sampling_program(config, arch, mesh)
        return program._replace(frozen_bytes=_frozen_bytes(config, arch, mesh))
    partitioner = Partitioner(mesh)
    if isinstance(config, RewardModelConfig):
        loss_fn = make_bradley_terry_loss(make_score(arch, partitioner))
        return _training_program(config, arch, mesh, loss_fn, num_completions=2, head="score")
    seq_logp = make_seq_logp(arch, partitioner, chunk=getattr(config, "logits_chunk", None))
    if not isinstance(config, PolicyConfig):
        return _training_program(config, arch, mesh, make_nll_loss(seq_logp), num_completions=1)
    program = _training_program(
        config,
        arch,
        mesh,
        make_policy_loss(seq_logp, find_objective(config.loss)),
        num_completions=2,
        coefficients=as_arguments(find_coefficients(config.loss)),
    )
    return program._replace(frozen_bytes=_frozen_bytes(config, arch, mesh))


def _frozen_bytes(
    config: PolicyConfig | EvaluateConfig, arch: Architecture, mesh: jax.sharding.Mesh
) -> float:
    """π_ref and reward models, which an evaluation holds; these are taken to be like the policy."""
    if config.evaluation is None:
        return 0.0
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(arch)))
    # As `rewards.RewardModel` cuts itself, whatever the mesh.
    found = sum(
        size
        * jnp.dtype(spec.arguments.get("dtype", "float32")).itemsize
        / math.gcd(mesh.size, arch.hidden_size)
        for spec in config.evaluation.rewards
        if spec.function.endswith(".RewardModel")
    )
    if isinstance(config, PolicyConfig) or config.reference is not None:
        found += size * _itemsize(arch) / (mesh.shape["fsdp"] * mesh.shape["tensor"])
    return found


def _training_program(
    config: TrainConfig,
    arch: Architecture,
    mesh: jax.sharding.Mesh,
    loss_fn: LossFn,
    *,
    num_completions: int,
    head: str = "lm",
    coefficients: Mapping[str, Any] = MappingProxyType({}),
) -> Program:
    training = config.training
    check_batch(training.batch_size, training.num_microbatches, mesh)
    optimizer = optim.make_optimizer(config.optim)
    params, axes = abstract_params(arch, head=head), logical_axes(arch, head=head)
    layout = state_shardings(mesh, optimizer, params, axes)
    function = make_train_step(
        loss_fn,
        optimizer,
        mesh=mesh,
        state_shardings=layout,
        num_microbatches=training.num_microbatches,
    )
    batch = _full_batch(
        config,
        num_completions,
        num_bins=sharding.num_batch_shards(mesh) * training.num_microbatches,
    )
    lengths = batch.prompt_length, batch.completion_length
    state = abstract_state(optimizer, params)
    return Program(
        function,
        trains=True,
        arguments=(
            with_shardings(state, layout),
            _abstract(batch, sharding.batch_sharding(mesh)),
        ),
        keywords={**coefficients} | as_arguments({"learning_rate": config.optim.learning_rate}),
        num_groups=training.batch_size,
        num_tokens=int(sum(map(np.sum, lengths))),
        useful_flops=useful_flops(arch, *lengths, head=head),
        # Matrices are read in the forward and in the backward pass, their gradient is written.
        hbm_bytes=3 * training.num_microbatches * _matrix_bytes(arch, mesh),
        loop_trips=1,
    )


def _full_batch(config: TrainConfig, num_completions: int, *, num_bins: int) -> GroupBatch:
    """A batch with the lengths of TL;DR, in the shape that a run has whose longest prompt and
    completion are as long as the config allows.
    """
    size, data = config.training.batch_size, config.data
    num_groups = round_up(WINDOW, size)
    prompts = _lengths(_PROMPT_TOKENS, num_groups, data.max_prompt_tokens, seed=0)
    completions = np.stack(
        [
            _lengths(_COMPLETION_TOKENS, num_groups, data.max_completion_tokens, seed=k + 1)
            for k in range(num_completions)
        ],
        axis=1,
    )
    prompts[prompts.argmax()] = data.max_prompt_tokens
    longest = round_up(data.max_prompt_tokens, 8), round_up(data.max_completion_tokens, 8)
    batches = pack(
        np.stack([prompts, completions.sum(1)], axis=1),
        batch_size=size,
        num_bins=num_bins,
        sizes=(longest[0], num_completions, longest[1]),
        epoch_size=num_groups,
    )
    return batches.collate([_token_group(int(prompts[i]), completions[i]) for i in batches.rows[0]])


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
    config: EvaluateConfig, arch: Architecture, mesh: jax.sharding.Mesh
) -> Program:
    """Sampling for the first batch of an evaluation, which has its longest prompts, all of them to
    the last token.
    """
    generation, num_bins = config.evaluation.generation, sharding.num_batch_shards(mesh)
    num_steps = generation.max_new_tokens
    params = jax.eval_shape(partial(cast_matrices, arch), abstract_params(arch))
    function = make_sampler(
        arch,
        end_ids=[0],
        max_new_tokens=num_steps,
        num_samples=generation.num_samples,
        temperature=generation.sampling_temperature,
        mesh=mesh,
    )
    most = config.evaluation.data.max_prompt_tokens
    lengths = _lengths(_PROMPT_TOKENS, generation.num_prompts, most, seed=0)
    lengths[lengths.argmax()] = most
    first, *_ = pack_by_length(
        np.stack([lengths, np.zeros_like(lengths)], axis=1),
        batch_size=min(generation.batch_size, generation.num_prompts),
        num_bins=num_bins,
        sizes=(generation.num_samples, num_steps),
    )
    shape = first.shape.with_all_completions()
    completions = np.full((shape.batch_size, generation.num_samples), num_steps, np.int32)
    batch = shape.collate(
        [None if i < 0 else _token_group(int(lengths[i]), completions[0]) for i in first.rows[0]]
    )
    length, rows = batch.prompt_length, sharding.batch_sharding(mesh)
    keys = jax.eval_shape(lambda: row_keys(0, 0, shape.batch_size))
    heads = arch.num_key_value_heads * arch.head_dim * arch.num_hidden_layers
    cached = num_bins * sum(shape.prompt_sizes)
    cache = 2 * cached * heads * _itemsize(arch) / mesh.size
    return Program(
        function,
        trains=False,
        arguments=(
            _abstract(params, sharding.shardings(mesh, logical_axes(arch), params)),
            *_abstract((batch.prompt_tokens, length, shape.prompt_layout(length), keys), rows),
        ),
        num_groups=shape.batch_size,
        num_tokens=int(length.sum() + completions.sum()),
        useful_flops=useful_flops(arch, length, completions, training=False),
        # The prompts read the matrices; every token after the first the chip's own part of them,
        # and the prompts' cache.
        hbm_bytes=_matrix_bytes(arch, mesh)
        + (num_steps - 1) * (_matrix_bytes(arch, mesh) / mesh.shape["fsdp"] + cache),
        loop_trips=num_steps - 1,
    )


def _matrix_bytes(arch: Architecture, mesh: jax.sharding.Mesh) -> float:
    """All matrices of the layers in the compute dtype, as far as one chip multiplies by them."""
    return block_parameters(arch) * _itemsize(arch) / mesh.shape["tensor"]


def _itemsize(arch: Architecture) -> int:
    return jnp.dtype(arch.dtype).itemsize


def _abstract(tree: Any, shardings: Any) -> Any:
    """Shapes with shardings, which are a tree as well or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
