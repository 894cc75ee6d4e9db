"""What devices say to each other in a train step: weights, never activations."""

import math
import re
from collections import Counter
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax
import pytest

from copg_jax import sharding, step, train_state
from copg_jax.data.groups import GroupBatch
from copg_jax.models import functional
from copg_jax.models.llama import LlamaConfig, layer_specs

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
B, P, K, C = 48, 40, 2, 24


def gathered_shapes(chunk: int | None = None) -> Counter[tuple[int, ...]]:
    """How many all-gathers the compiled CoPG step on 8 fsdp shards has, by shape."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    optimizer = optax.adam(1e-3)
    params = functional.abstract_params(CONFIG)
    axes = functional.logical_axes(CONFIG)
    train_step = step.make_train_step(
        step.make_policy_loss(CONFIG, "copg", beta=0.1, chunk=chunk),
        optimizer,
        mesh=mesh,
        state_shardings=train_state.state_shardings(mesh, optimizer, params, axes),
    )
    ints = {"prompt_tokens": (B, P), "prompt_length": (B,)}
    ints |= {"completion_tokens": (B, K, C), "completion_length": (B, K)}
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in ints.items()}
    floats = dict.fromkeys(("reward", "ref_logp"), jax.ShapeDtypeStruct((B, K), jnp.float32))
    slots = {"token_slots": (8, 160), "completion_slots": (8, 48)}
    slots = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in slots.items()}
    state = train_state.abstract_state(optimizer, params)
    compiled = train_step.lower(state, GroupBatch(**arrays, **floats, **slots)).compile()
    found = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    return Counter(tuple(int(size) for size in shape.split(",")) for shape in found)


def activations(shapes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Gathered shapes that are neither a weight (axes may be merged) nor one number a group."""
    params = functional.abstract_params(CONFIG)
    stacks = params.pop("layers"), params.pop("last_layer")
    sizes = {math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(stacks)}
    sizes |= {leaf.size for leaf in jax.tree.leaves(params)} | {B}
    return [shape for shape in shapes if math.prod(shape) not in sizes]


@pytest.mark.parametrize("chunk", [None, 8])
def test_weights_are_gathered_once_forward_and_once_backward_and_nothing_else_is(chunk):
    found = gathered_shapes(chunk)
    assert activations(found) == []
    # Loops over layers forward and backward; the last layer goes forth and back at once.
    expected = Counter[tuple[int, ...]]()
    for spec in layer_specs(CONFIG).values():
        expected[spec.shape] += 3
    expected[CONFIG.hidden_size, CONFIG.vocab_size] = 1
    assert {shape: n for shape, n in found.items() if len(shape) > 1} == {
        shape: n for shape, n in expected.items() if len(shape) > 1
    }


def test_activations_cut_along_another_axis_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    mesh = sharding.make_mesh(sharding.MeshConfig())
    along_embed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "fsdp"))
    monkeypatch.setattr(
        functional,
        "constrain_batch",
        lambda x: jax.lax.with_sharding_constraint(x, along_embed),
    )
    assert activations(gathered_shapes())
