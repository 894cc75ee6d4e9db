"""What devices say to each other: weights in a train step, activations when decoding."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax
import pytest

from copg_jax import sharding
from copg_jax.data.groups import GroupBatch
from copg_jax.models.params import Architecture, abstract_params, layer_specs, logical_axes
from copg_jax.sampling import make_sampler, row_keys
from copg_jax.train import state as train_state
from copg_jax.train import step

CONFIG = Architecture(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
B, P, K, C = 48, 40, 2, 24


def gathered_shapes(
    chunk: int | None = None, config: Architecture = CONFIG
) -> Counter[tuple[int, ...]]:
    """How many all-gathers the compiled CoPG step on 8 fsdp shards has, by shape."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    optimizer = optax.adam(1e-3)
    params = abstract_params(CONFIG)
    axes = logical_axes(CONFIG)
    train_step = step.make_train_step(
        step.make_policy_loss(config, "copg", beta=0.1, chunk=chunk),
        optimizer,
        mesh=mesh,
        state_shardings=train_state.state_shardings(mesh, optimizer, params, axes),
    )
    ints = {"prompt_length": (B,)}
    ints |= {"completion_tokens": (B, K, C), "completion_length": (B, K)}
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in ints.items()}
    floats = dict.fromkeys(("reward", "ref_logp"), jax.ShapeDtypeStruct((B, K), jnp.float32))
    slots = {"token_slots": (8, 160), "completion_slots": (8, 48)}
    slots = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in slots.items()}
    state = train_state.abstract_state(optimizer, params)
    # Prompts in two buckets, each with three of the six places of every block.
    prompts = tuple(jax.ShapeDtypeStruct((B // 2, size), jnp.int32) for size in (P, P // 2))
    batch = GroupBatch(prompts, **arrays, **floats, **slots)
    return all_gathers(train_step.lower(state, batch))


def all_gathers(lowered: jax.stages.Lowered) -> Counter[tuple[int, ...]]:
    """Number of all-gathers of float32 arrays in a compiled program, by shape."""
    found = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", lowered.compile().as_text() or "")
    return Counter(tuple(int(size) for size in shape.split(",")) for shape in found)


def of_weights(found: Counter[tuple[int, ...]], times: int) -> bool:
    """Whether each matrix of a layer is gathered so many times, and the output matrix once."""
    expected = Counter({(CONFIG.hidden_size, CONFIG.vocab_size): 1})
    for spec in layer_specs(CONFIG).values():
        expected[spec.shape] += times * (len(spec.shape) > 1)
    return {shape: found[shape] for shape in +expected} == dict(+expected)


def activations(shapes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Gathered shapes that are neither a weight (axes may be merged) nor one number a group."""
    params = abstract_params(CONFIG)
    stacks = params.pop("layers"), params.pop("last_layer")
    sizes = {math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(stacks)}
    sizes |= {leaf.size for leaf in jax.tree.leaves(params)} | {B}
    return [shape for shape in shapes if math.prod(shape) not in sizes]


@pytest.mark.parametrize("chunk", [None, 8])
def test_weights_are_gathered_once_forward_and_once_backward_and_nothing_else_is(chunk):
    found = gathered_shapes(chunk)
    assert activations(found) == []
    # Loops over layers forward and backward; the last layer goes forth and back at once.
    assert of_weights(found, 3)


def test_storing_all_results_stores_no_gathered_weight():
    # A weight that was kept would not be gathered again for the backward pass.
    assert of_weights(gathered_shapes(config=dataclasses.replace(CONFIG, remat="none")), 3)


@pytest.mark.parametrize("tensor", [1, 2])
def test_decoding_gathers_no_weights_and_cuts_heads_as_they_are(tensor):
    mesh = sharding.make_mesh(sharding.MeshConfig(tensor=tensor))
    params = abstract_params(CONFIG)
    sampler = make_sampler(
        CONFIG,
        eos_id=0,
        max_new_tokens=4,
        mesh=mesh,
        param_shardings=sharding.shardings(mesh, logical_axes(CONFIG), params),
    )
    # Prompts in two buckets, each with half the places of every block.
    ints = ((B // 2, P), (B // 2, P // 2)), (B,), (8 // tensor, 160 * tensor)
    rows = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32),
        ints,
        is_leaf=lambda node: isinstance(node[0], int),
    )
    found = all_gathers(sampler.lower(params, *rows, jax.eval_shape(lambda: row_keys(0, 0, B))))
    if tensor == 1:
        # For the prompts, in the loop over layers and in the last layer.
        assert of_weights(found, 2)
    heads = {CONFIG.num_attention_heads, CONFIG.num_key_value_heads}
    of_batch = [shape for shape in found if shape[0] in (B * tensor // 8, B * tensor // 16)]
    assert not [shape for shape in of_batch if CONFIG.head_dim in shape and heads & {*shape}]


def test_activations_cut_along_another_axis_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    mesh = sharding.make_mesh(sharding.MeshConfig())
    along_embed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "fsdp"))
    monkeypatch.setattr(
        functional,
        "constrain_residual",
        lambda x: jax.lax.with_sharding_constraint(x, along_embed),
    )
    assert activations(gathered_shapes())
