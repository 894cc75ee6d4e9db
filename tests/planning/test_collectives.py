"""Collectives of a compiled program: counted as often as loops run them, bytes as one receives."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from copg_jax import sharding
from experiments.planning.collectives import Collective, count

ROWS = PartitionSpec("fsdp")


def compiled(function, *arguments: jax.Array, result: PartitionSpec) -> str:
    """Text of `function` on 8 devices, its arguments cut along their first axis."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    cut = NamedSharding(mesh, ROWS)
    out = NamedSharding(mesh, result)
    jitted = jax.jit(function, in_shardings=(cut,) * len(arguments), out_shardings=out)
    return jitted.lower(*arguments).compile().as_text()


def test_an_all_gather_brings_what_the_others_have():
    text = compiled(lambda x: x * 2, jnp.ones((16, 8)), result=PartitionSpec())
    assert count(text, num_devices=8) == {"all-gather": Collective(1, 16 * 8 * 4 * 7 // 8)}


def test_an_all_reduce_goes_around_twice():
    text = compiled(lambda x: x.sum(0), jnp.ones((16, 8)), result=PartitionSpec())
    assert count(text, num_devices=8) == {"all-reduce": Collective(1, 2 * 8 * 4 * 7 // 8)}


def test_a_loop_counts_as_often_as_it_runs_and_so_does_a_loop_in_it():
    def nested(x, stack):
        def inner(x, weights):
            return jnp.tanh(x @ weights), None

        def outer(x, _):
            return jax.lax.scan(inner, x, jnp.swapaxes(stack, 0, 1))[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    text = compiled(nested, jnp.ones((8, 16)), jnp.ones((16, 5, 16)), result=ROWS)
    found = count(text, num_devices=8)
    assert found["all-gather"].count == 3 * 5
    assert found["all-gather"].bytes == 3 * 5 * 16 * 16 * 4 * 7 // 8


def test_a_loop_that_data_can_end_runs_as_often_as_said():
    def until_small(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)

    text = compiled(until_small, jnp.ones((16, 8)), result=ROWS)
    once = count(text, num_devices=8)["all-reduce"]
    often = count(text, num_devices=8, unknown_trip_count=10)["all-reduce"]
    assert often.count > once.count


TPU_LOOP = """\
HloModule jit_step, is_scheduled=true

%start (p.0: bf16[4,16]) -> (bf16[4,16], bf16[16,16]) {
  %p.0 = bf16[4,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,16]{1,0:T(8,128)} all-gather(%p.0), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%middle (p.1: bf16[4,16]) -> bf16[16,16] {
  %p.1 = bf16[4,16]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,16]{1,0} all-gather(%p.1), channel_id=7, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%wide.windowed_dot_general_body_ag.1 (arg: (u32[], bf16[4,16])) -> (u32[], bf16[4,16]) {
  %arg = (u32[]{:T(128)}, bf16[4,16]{1,0}) parameter(0)
  %index = u32[]{:T(128)} get-tuple-element(%arg), index=0
  %shard = bf16[4,16]{1,0} get-tuple-element(%arg), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%index, %two)
  %permute = (bf16[4,16]{1,0}, bf16[4,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%shard), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %fused = bf16[16,16]{1,0} fusion(%shard), kind=kCustom, calls=%middle
  %done = bf16[4,16]{1,0} collective-permute-done(%permute)
  ROOT %out = (u32[]{:T(128)}, bf16[4,16]{1,0}) tuple(%next, %done)
}

%condition (arg.1: (u32[], bf16[4,16])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %arg.1 = (u32[]{:T(128)}, bf16[4,16]{1,0}) parameter(0)
  %index.1 = u32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%index.1, %eight), direction=LT
}

ENTRY %main (x: bf16[4,16]) -> bf16[4,16] {
  %x = bf16[4,16]{1,0} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %copied = u32[]{:T(128)} copy(%zero)
  %begin = (bf16[4,16]{1,0}, bf16[16,16]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %first = (u32[]{:T(128)}, bf16[4,16]{1,0}) tuple(%copied, %x)
  %loop = (u32[]{:T(128)}, bf16[4,16]{1,0}) while(%first), condition=%condition, \
body=%wide.windowed_dot_general_body_ag.1
  ROOT %last = bf16[4,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_the_forms_of_the_tpu_compiler_are_understood():
    """Trip counts from compare and add, rings by name, an operation over several fusions once."""
    shard = 4 * 16 * 2
    assert count(TPU_LOOP, num_devices=8) == {
        "all-gather": Collective(1, 3 * shard),
        "all-gather ring": Collective(4, 4 * shard),
    }


def test_an_all_reduce_that_keeps_its_own_piece_is_a_reduce_scatter():
    text = """\
%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  %all-reduce.1 = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[4]{0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={4}
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[16]) -> f32[4] {
  %x = f32[16]{0} parameter(0)
  ROOT %y = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert count(text, num_devices=4) == {"reduce-scatter": Collective(1, 16 * 4 * 3 // 4)}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f32[4] reduce-scatter(%x), replica_groups=[2,4]<=[8]", 16 * 3),
        ("f32[8] all-to-all(%x), replica_groups={{0,1},{2,3}}", 16),
        ("f32[8] all-gather(%x), replica_groups={}", 28),
        ("(f32[2], s8[2]) all-reduce(%x, %y), replica_groups={{0,1}}", 10),
        ("f32[8] all-reduce-start(%x), replica_groups={{0,1}}", 32),
        ("(f32[4], f32[8]) all-gather-start(%x), replica_groups={{0,1}}", 16),
        ("((f32[4], pred[4]), (f32[8], pred[8])) all-gather-start(%x, %y), "
         "replica_groups={{0,1}}", 16 + 4),
    ],
)  # fmt: skip
def test_bytes_received_by_form_of_operation(line: str, expected: int):
    text = f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  ROOT %y = {line}\n}}\n"
    ((_, found),) = count(text, num_devices=8).items()
    assert found == Collective(1, expected)
