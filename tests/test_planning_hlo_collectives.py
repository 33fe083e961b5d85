"""The collectives read from a program's text: payload, group, and how often."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.planning.hlo import Collective, by_operation, read_program
from moe_jax.planning.hlo_collectives import first_group
from tests.hlo_program import program


def collective_of(entry, **kwargs):
    (one,) = program(entry, **kwargs).collectives
    return one


@pytest.mark.parametrize(
    "text, group",
    [
        ("{{0,1},{2,3}}, dimensions={0}", (0, 1)),
        ("{{0,4,8}}", (0, 4, 8)),
        ("[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0), to_apply=%add", (0, 4)),
        ("[4,2]<=[2,2,2]T(0,2,1)", (0, 2)),
        ("mesh['a'=2,'b'=4] {'b'}, dimensions={1}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=4] {'a'}, dimensions={1}", (0, 4)),
        ("mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'a','b'}, x=1", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", (3, 1)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("{}, dimensions={0}", tuple(range(8))),
    ],
)
def test_the_first_group_in_every_form(text, group):
    assert first_group(text, 8) == group


@pytest.mark.parametrize(
    "instruction, kind, size",
    [
        ("f32[64]{0} all-gather(%a), dimensions={0}", "all-gather", 256),
        (
            "(f32[16]{0}, f32[64]{0}) all-gather-start(%a), dimensions={0}",
            "all-gather",
            256,
        ),
        (
            "((f32[16]{0}, bf16[8]{0}), (f32[64]{0}, bf16[32]{0})) all-gather-start(%a, %b)",
            "all-gather",
            256 + 64,
        ),
        ("f32[16]{0} all-reduce-start(%a), to_apply=%add", "all-reduce", 64),
        (
            "(f32[16]{0}, bf16[8]{0}) all-reduce(%a, %b), to_apply=%add",
            "all-reduce",
            64 + 16,
        ),
        (
            "((f32[16]{0}), f32[4]{0}) reduce-scatter-start(%a), to_apply=%add",
            "reduce-scatter",
            64,
        ),
        ("((f32[16]{0}), f32[16]{0}) all-to-all-start(%a)", "all-to-all", 64),
        ("(f32[16]{0}, bf16[8]{0}) all-to-all(%a, %b)", "all-to-all", 64 + 16),
        ("f32[16]{0} ragged-all-to-all(%a, %a, %i, %i, %i, %i)", "ragged-all-to-all", 64),
        ("f32[16]{0} collective-broadcast(%a)", "collective-broadcast", 64),
    ],
)
def test_bytes_are_those_of_the_payload_on_its_larger_side(instruction, kind, size):
    one = collective_of(f"""
        %a = f32[16]{{0}} parameter(0)
        %b = bf16[8]{{0}} parameter(1)
        %i = s32[4]{{0}} parameter(2)
        ROOT %c = {instruction}, replica_groups=[2,4]<=[8]
    """)
    assert (one.operation, one.bytes, one.group, one.count) == (kind, size, (0, 1, 2, 3), 1)


def test_an_asynchronous_pair_counts_once():
    read = program("""
        %a = f32[16]{0} parameter(0)
        %s = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, metadata={op_name="jit(f)/layer/ppermute"}
        ROOT %d = f32[16]{0} collective-permute-done(%s)
    """)
    assert read.collectives == (
        Collective("collective-permute", "f32[16]", 64, (0, 1), "jit(f)/layer/ppermute", 1),
    )
    assert read.hbm_bytes == 64 + 64


def test_a_computation_that_is_started_asynchronously_is_followed():
    one = collective_of(
        """
        %a = f32[16]{0} parameter(0)
        %s = ((f32[16]{0}), f32[4]{0}, u32[]) async-start(%a), calls=%wrapped
        ROOT %d = f32[4]{0} async-done(%s), calls=%wrapped
        """,
        other="""
%wrapped (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  ROOT %r = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}, execution_thread="parallel"
""",
    )
    assert (one.operation, one.bytes, one.count) == ("reduce-scatter", 64, 1)


def test_a_tpus_three_fusions_of_one_collective_count_once():
    def part(name, before, root):
        return f"""
%{name} (p: bf16[4]) -> bf16[8] {{
  %p = bf16[4]{{0}} parameter(0)
  %g = bf16[8]{{0}} all-gather(%p), replica_groups={{{{0,1}}}}, backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}
  {before}
  ROOT %r = {root}
}}
"""

    start = '(bf16[4]{0}, bf16[8]{0}, u32[]{:S(2)}) custom-call(%g), custom_call_target="'
    done = 'bf16[8]{0} custom-call(%p, %g), custom_call_target="'
    read = program(
        """
        %a = bf16[4]{0} parameter(0)
        %s = (bf16[4]{0}, bf16[8]{0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start, metadata={op_name="jit(f)/dense"}
        %p = bf16[4]{0} get-tuple-element(%s), index=0
        %o = (bf16[4]{0}, bf16[8]{0}) fusion(%p), kind=kOutput, output_to_operand_aliasing={{0}: (0, {})}, calls=%other
        %q = bf16[4]{0} get-tuple-element(%o), index=0
        ROOT %d = bf16[8]{0} fusion(%q), kind=kCustom, calls=%done
        """,
        other=part("start", "", f'{start}AsyncCollectiveStart"')
        + part("other", "", "(bf16[4]{0}, bf16[8]{0}) tuple(%p, %g)")
        + part("done", "", f'{done}AsyncCollectiveDone"'),
    )
    assert read.collectives == (Collective("all-gather", "bf16[8]", 16, (0, 1), "jit(f)/dense"),)
    assert read.hbm_bytes == 8 + 16  # the shard is read and the whole is written, once


def test_a_fused_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    one = collective_of(
        """
        %a = bf16[64]{0} parameter(0)
        %i = s32[] parameter(1)
        ROOT %f = bf16[16]{0} fusion(%a, %i), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="jit(f)/g"}
        """,
        other="""
%all-reduce-scatter (p: bf16[64], i: s32[]) -> bf16[16] {
  %p = bf16[64]{0} parameter(0)
  %i = s32[] parameter(1)
  %r = bf16[64]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = bf16[16]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={16}
}
""",
    )
    assert one == Collective("reduce-scatter", "bf16[64]", 128, (0, 1, 2, 3), "jit(f)/g")


@pytest.mark.parametrize(
    "kind, share",
    [
        ("all-gather", 3 / 4),
        ("reduce-scatter", 3 / 4),
        ("all-reduce", 6 / 4),
        ("all-to-all", 3 / 4),
        ("ragged-all-to-all", 3 / 4),
        ("collective-permute", 1),
        ("collective-broadcast", 1),
    ],
)
def test_bytes_that_a_device_must_send(kind, share):
    assert Collective(kind, "f32[256]", 1024, (0, 1, 2, 3)).wire_bytes == share * 1024


def test_nothing_is_sent_in_a_group_of_one():
    assert Collective("all-reduce", "f32[256]", 1024, (5,)).wire_bytes == 0


def test_collectives_of_a_sharded_scan_on_eight_devices():
    mesh = jax.make_mesh((2, 4), ("data", "model"))

    def layer(x, w):
        with jax.named_scope("layer"):
            w = jax.lax.all_gather(w, "data", axis=0, tiled=True)
            x = jax.lax.ppermute(x @ w, "model", [(i, (i + 1) % 4) for i in range(4)])
            return jax.lax.all_to_all(x, "model", 0, 0, tiled=True), None

    def step(x, ws):
        x = jax.lax.scan(layer, x, ws)[0]
        return jax.lax.psum_scatter(x, "model", tiled=True) + jax.lax.psum(x[:2], "data")

    local = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(("data", "model")), P(None, "data")),
        out_specs=P(("data", "model")),
        check_vma=False,
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in [((64, 32), P(("data", "model"))), ((6, 32, 32), P(None, "data"))]
    ]
    read = read_program(jax.jit(local).lower(*arguments).compile().as_text())
    assert read.flops == 6 * 2 * 8 * 32 * 32
    assert by_operation(read.collectives) == {
        "all-gather": (6, 6 * 32 * 32 * 4),
        "all-reduce": (1, 2 * 32 * 4),
        "all-to-all": (6, 6 * 8 * 32 * 4),
        "collective-permute": (6, 6 * 8 * 32 * 4),
        "reduce-scatter": (1, 8 * 32 * 4),
    }
    groups = {one.operation: one.group for one in read.collectives}
    assert groups["all-gather"] == groups["all-reduce"] == (0, 4)
    assert groups["all-to-all"] == groups["collective-permute"] == (0, 1, 2, 3)
    assert all("/layer/" in one.op_name for one in read.collectives if one.count == 6)
