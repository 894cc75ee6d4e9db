"""Weights that a stage only reads: the base of adapters, and the models of an evaluation."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from copg_jax import sharding
from copg_jax.config.reward_spec import RewardSpec
from copg_jax.config.sections import LoraConfig
from copg_jax.config.stages import EvaluateConfig, PolicyConfig
from copg_jax.hf.pretrained import PretrainedModel
from copg_jax.models.lora import find_targets, lora_specs
from copg_jax.models.params import abstract, axes_of, cast_matrices, param_specs


def frozen_params(model: PretrainedModel) -> tuple[Any, Any]:
    """What adapters are trained beside, as `PretrainedModel.load_frozen` gives it: shapes and
    shardings. A score head is trained.
    """
    whole = param_specs(model.arch, head=model.head)
    specs = {name: spec for name, spec in whole.items() if name != "score"}
    shapes = jax.eval_shape(partial(cast_matrices, model.arch), abstract(specs))
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    return (
        shapes | {"lora_scale": scale},
        sharding.shardings(model.mesh, axes_of(specs), shapes)
        | {"lora_scale": sharding.replicated(model.mesh)},
    )


def evaluation_bytes(config: PolicyConfig | EvaluateConfig, model: PretrainedModel) -> float:
    """π_ref and the reward models, of one chip; these are taken to be like the policy.

    π_ref of adapters is their base, which training holds already.
    """
    if config.evaluation is None:
        return 0.0
    mesh = model.mesh
    own = _num_params(param_specs(model.arch)) * jnp.dtype(model.arch.dtype).itemsize
    own /= mesh.shape["fsdp"] * mesh.shape["tensor"]
    is_held = config.reference is not None if isinstance(config, EvaluateConfig) else not model.lora
    rewards = [_reward_bytes(spec, config, model) for spec in config.evaluation.rewards]
    return sum(rewards) + own * is_held


def _reward_bytes(
    spec: RewardSpec, config: PolicyConfig | EvaluateConfig, model: PretrainedModel
) -> float:
    """A reward model, of which an adapter on the policy's base holds the adapter alone."""
    if spec.function.endswith(".RewardEnsemble"):
        of_one = replace(spec, function="copg_jax.rewards.RewardModel")
        return len(spec.arguments.get("paths", ())) * _reward_bytes(of_one, config, model)
    if not spec.function.endswith(".RewardModel"):
        return 0.0
    arguments, mesh = spec.arguments, model.mesh
    # As `rewards.RewardModel` cuts itself, whatever the mesh.
    num_shards = math.gcd(mesh.size, model.arch.hidden_size)
    dtype = arguments.get("dtype", "float32")
    whole = _num_params(param_specs(model.arch)) * jnp.dtype(dtype).itemsize / num_shards
    if arguments.get("adapter") is None:
        return whole
    lora = model.lora or LoraConfig()
    adapter = lora_specs(model.arch, lora.rank, find_targets(lora.targets))
    base = config.model.path, model.arch.dtype, mesh.shape["fsdp"]
    is_shared = base == (arguments.get("path"), dtype, num_shards)
    return 4 * _num_params(adapter) / num_shards + (0.0 if is_shared else whole)


def _num_params(specs: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(specs)))
