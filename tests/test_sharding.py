"""Meshes, the table from logical to mesh axes, and where optimiser state and batches lie."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from copg_jax import distributed, sharding
from copg_jax.config.sections import MeshConfig, OptimConfig
from copg_jax.errors import InputError
from copg_jax.models.params import abstract_params, logical_axes
from copg_jax.sharding import ONE_DEVICE, Partitioner, make_mesh
from copg_jax.train import state as train_state
from copg_jax.train.optim import make_optimizer
from tests.toys import LLAMA, group_batch, mesh, names_all


def test_minus_one_takes_all_devices_that_remain():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(MeshConfig(2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(-1, 4, 1)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [
        ((1, 7, 1), (1, 8, 1)),
        ((1, 16, 1), (1, 8, 1)),
        ((3, -1, 1), (4, 2, 1)),
        ((-1, 2, 3), (1, 2, 4)),
        ((2, 2, 3), (2, 2, 2)),
    ],
)
def test_sizes_that_do_not_lay_out_the_devices_are_refused_with_the_nearest_that_do(sizes, nearest):
    with pytest.raises(InputError) as caught:
        make_mesh(MeshConfig(*sizes))
    asked = "data={} x fsdp={} x tensor={}".format(*sizes)
    first = "Nearest that do: data={} fsdp={} tensor={},".format(*nearest)
    names_all(str(caught.value), ["mesh", asked, "8 device", first, "-1"])


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((0, 1, 1), r"^data must be >= 1, or -1 .*got 0$"),
        ((1, 1, -2), r"^tensor must be >= 1, or -1 .*got -2$"),
        ((-1, -1, 1), r"at most one size of the mesh that is -1, got data=-1 fsdp=-1 tensor=1"),
    ],
)
def test_meshes_without_a_meaning_are_refused(sizes, named):
    with pytest.raises(InputError, match=named):
        MeshConfig(*sizes)


def test_every_axis_that_the_mesh_does_not_divide_is_listed_with_sizes_that_do():
    shapes, axes = abstract_params(LLAMA), logical_axes(LLAMA)
    with pytest.raises(InputError) as caught:
        sharding.shardings(mesh(1, 2, 4), axes, shapes)
    (_, line) = str(caught.value).splitlines()
    names_all(line, ["mesh.tensor=4", "'kv_heads'", "k_proj", "size 2", "may be one of [1, 2]"])
    with pytest.raises(InputError) as caught:
        sharding.shardings(make_mesh(MeshConfig(1, 3, 1), jax.devices()[:3]), axes, shapes)
    names_all(str(caught.value), ["over 3 device", "mesh.fsdp=3", "'embed'", "size 16", "of [1]"])


def test_each_device_holds_its_share_of_parameters_and_of_both_moments():
    on, optimizer = mesh(1, 4, 2), make_optimizer(OptimConfig(clip_norm=1.0, weight_decay=0.1))
    shapes = abstract_params(LLAMA)
    layout = train_state.state_shardings(on, optimizer, shapes, logical_axes(LLAMA))
    # [L, D, H, Hd]: D over fsdp, H over tensor.
    spec = layout.params["layers"]["q_proj"].spec
    assert spec == PartitionSpec(None, "fsdp", "tensor", None)
    abstract = train_state.abstract_state(optimizer, shapes)
    moments = 0
    for leaf, place in zip(
        jax.tree.leaves(abstract.opt_state), jax.tree.leaves(layout.opt_state), strict=True
    ):
        if leaf.ndim:
            moments += math.prod(leaf.shape)
            # Everything is cut over fsdp at least.
            assert math.prod(place.shard_shape(leaf.shape)) <= math.prod(leaf.shape) // 4
        else:
            assert place.is_fully_replicated
    assert moments == 2 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_a_batch_is_cut_along_groups_only():
    on = mesh(2, 2, 2)
    batch = group_batch(np.arange(16.0).reshape(8, 2))
    placed = distributed.place_whole(batch, sharding.batch_sharding(on))
    assert sharding.num_batch_shards(on) == 4
    for array, given in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
        assert {shard.data.shape for shard in array.addressable_shards} == {(2, *array.shape[1:])}
        np.testing.assert_array_equal(array, given)


def hosts(of_devices: list[int], shape: tuple[int, int, int]) -> SimpleNamespace:
    """A mesh of which only the hosts of its devices, in the mesh's order, are known."""
    devices = np.array([SimpleNamespace(process_index=host) for host in of_devices], object)
    names = ("data", "fsdp", "tensor")
    return SimpleNamespace(
        devices=devices.reshape(shape), shape=dict(zip(names, shape, strict=True))
    )


@pytest.mark.parametrize(
    ("of_devices", "shape", "shares"),
    [
        ([0] * 4 + [1] * 4, (1, 8, 1), [(0, 2), (1, 2)]),
        ([1] * 4 + [0] * 4, (1, 8, 1), [(1, 2), (0, 2)]),
        # A ring through both hosts: each has two pieces of the batch, not next to each other.
        ([0, 0, 1, 1, 1, 1, 0, 0], (1, 8, 1), [(0, 2), (1, 2)]),
        ([0] * 4 + [1] * 4, (2, 2, 2), [(0, 2), (1, 2)]),
        ([0] * 4 + [1] * 4, (1, 1, 8), [(0, 1), (0, 1)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], (1, 2, 4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_hosts_load_equal_shares_and_the_same_one_where_they_hold_the_same_rows(
    monkeypatch, of_devices, shape, shares
):
    for host, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        assert sharding.batch_share(hosts(of_devices, shape)) == share


def test_a_tensor_axis_that_cuts_across_hosts_is_refused():
    with pytest.raises(InputError) as caught:
        sharding.batch_share(hosts([0] * 4 + [1] * 4 + [2] * 4, (1, 2, 6)))
    names_all(str(caught.value), ["mesh: tensor=6", "equal shares", "the 4 devices of a host"])


def test_a_partitioner_of_no_mesh_changes_nothing():
    x = jax.numpy.ones((4, 3))
    assert ONE_DEVICE.constrain_batch(x) is ONE_DEVICE.constrain_residual(x) is x
    assert ONE_DEVICE.gather_weight(x, ("embed", "vocab")) is x
    assert ONE_DEVICE.on_shards(abs, in_axes=[("batch",)], out_axes=("batch",)) is abs


def test_a_partitioner_cuts_activations_and_gathers_weights_unless_they_stay_in_place():
    on = mesh(1, 4, 2)
    x, weight = np.ones((8, 16)), np.ones((16, 4))
    train, decode = Partitioner(on), Partitioner(on, weights_in_place=True)
    place = sharding.shardings(on, ("embed", "vocab"), weight)
    weight = jax.device_put(weight, place)

    def shard(function, x, *arguments):
        return jax.jit(lambda x: function(x, *arguments))(x).sharding.shard_shape(x.shape)

    assert shard(train.constrain_batch, x) == shard(train.constrain_residual, x) == (2, 16)
    assert shard(train.constrain_batch, x, "heads") == (2, 8)
    assert shard(decode.constrain_residual, x) == (8, 4)
    assert shard(train.gather_weight, weight, ("embed", "vocab")) == (16, 2)
    assert decode.gather_weight(weight, ("embed", "vocab")) is weight
