"""What devices say to each other: weights in a train step, activations when decoding."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax
import pytest

from copg_jax import losses, sharding
from copg_jax.config.sections import MeshConfig
from copg_jax.data.groups import GroupBatch
from copg_jax.models.forward import make_seq_logp
from copg_jax.models.layout import Layout
from copg_jax.models.params import Architecture, abstract_params, layer_specs, logical_axes
from copg_jax.objective import make_policy_loss
from copg_jax.sampling import make_sampler, row_keys
from copg_jax.sharding import Partitioner
from copg_jax.train import state as train_state
from copg_jax.train.step import make_train_step

ARCH = Architecture(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    qkv_bias=True,
    qk_norm=True,
    rotary_layers=(True, False),
)
B, P, K, C = 48, 40, 2, 24


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of an int32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def layout(num_bins: int, num_tokens: int, num_own: int) -> Layout:
    """Shapes of a layout with prompts in two buckets, each with half the places of every bin."""
    half = B // num_bins // 2
    sizes = (P,) * half + (P // 2,) * half
    return Layout(ints(num_bins, num_tokens), ints(num_bins, num_own), sizes)


def gathered_shapes(
    chunk: int | None = None,
    arch: Architecture = ARCH,
    partitioner: Callable[[jax.sharding.Mesh], Partitioner] = Partitioner,
) -> Counter[tuple[int, ...]]:
    """How many all-gathers the compiled CoPG step on 8 fsdp shards has, by shape."""
    mesh = sharding.make_mesh(MeshConfig())
    optimizer = optax.adam(1e-3)
    params = abstract_params(ARCH)
    train_step = make_train_step(
        make_policy_loss(make_seq_logp(arch, partitioner(mesh), chunk=chunk), losses.copg_loss),
        optimizer,
        mesh=mesh,
        state_shardings=train_state.state_shardings(mesh, optimizer, params, logical_axes(ARCH)),
    )
    state = train_state.with_shardings(
        train_state.abstract_state(optimizer, params),
        train_state.state_shardings(mesh, optimizer, params, logical_axes(ARCH)),
    )
    numbers = jax.ShapeDtypeStruct((B, K), jnp.float32)
    batch = GroupBatch(
        prompt_tokens=ints(B, P),
        prompt_length=ints(B),
        completion_tokens=ints(B, K, C),
        completion_length=ints(B, K),
        reward=numbers,
        ref_logp=numbers,
        layout=layout(8, 160, 48),
    )
    rows = sharding.batch_sharding(mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    return all_gathers(train_step.lower(state, batch, beta=0.1))


def all_gathers(lowered: jax.stages.Lowered) -> Counter[tuple[int, ...]]:
    """Number of all-gathers of float32 arrays in a compiled program, by shape."""
    found = re.findall(r"= f32\[([\d,]*)\]\S* all-gather\(", lowered.compile().as_text() or "")
    return Counter(tuple(int(size) for size in shape.split(",")) for shape in found)


def of_weights(found: Counter[tuple[int, ...]], times: int) -> bool:
    """Whether each matrix of a layer is gathered so many times, and the output matrix once."""
    expected = Counter({(ARCH.hidden_size, ARCH.vocab_size): 1})
    for spec in layer_specs(ARCH).values():
        expected[spec.shape] += times * (len(spec.shape) > 1)
    return {shape: found[shape] for shape in +expected} == dict(+expected)


def activations(shapes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Gathered shapes that are neither a weight (axes may be merged) nor one number a group."""
    params = abstract_params(ARCH)
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
    assert of_weights(gathered_shapes(arch=dataclasses.replace(ARCH, remat="none")), 3)


@pytest.mark.parametrize("tensor", [1, 2])
def test_decoding_gathers_no_weights_and_cuts_heads_as_they_are(tensor):
    mesh = sharding.make_mesh(MeshConfig(tensor=tensor))
    params = abstract_params(ARCH)
    params = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        params,
        sharding.shardings(mesh, logical_axes(ARCH), params),
    )
    sampler = make_sampler(ARCH, end_ids=[0], max_new_tokens=4, mesh=mesh)
    prompts = ints(B, P), ints(B), layout(8 // tensor, 160 * tensor, 0)
    found = all_gathers(sampler.lower(params, *prompts, jax.eval_shape(lambda: row_keys(0, 0, B))))
    if tensor == 1:
        # For the prompts, in the loop over layers and in the last layer.
        assert of_weights(found, 2)
    heads = {ARCH.num_attention_heads, ARCH.num_key_value_heads}
    of_batch = [shape for shape in found if shape[0] in (B * tensor // 8, B * tensor // 16)]
    assert not [shape for shape in of_batch if ARCH.head_dim in shape and heads & {*shape}]


class AlongEmbed(Partitioner):
    """Cuts the residual stream where it must be whole."""

    def constrain_residual(self, x: jax.Array) -> jax.Array:
        return self._constrain(x, jax.sharding.PartitionSpec(None, None, "fsdp"))


class Whole(Partitioner):
    """Leaves every weight cut, for the compiler to gather as it likes."""

    def gather_weight(self, x: jax.Array, axes: sharding.Axes) -> jax.Array:
        del axes
        return x


def test_activations_cut_along_another_axis_would_be_seen():
    assert activations(gathered_shapes(partitioner=AlongEmbed))


def test_weights_left_to_the_compiler_would_be_seen():
    found = gathered_shapes(partitioner=Whole)
    assert activations(found) or not of_weights(found, 3)
