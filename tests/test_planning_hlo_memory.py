"""The bytes of main memory read from a program's text."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.planning.hlo import read_program
from moe_jax.planning.hlo_text import parse_arrays
from tests.hlo_program import compiled, program


def test_memory_of_programs_without_loops_is_what_the_compilers_own_analysis_says():
    matmul = compiled(jnp.matmul, (128, 256), (256, 64))
    assert read_program(matmul.as_text()).hbm_bytes == matmul.cost_analysis()["bytes accessed"]
    assert read_program(matmul.as_text()).hbm_bytes == 4 * (128 * 256 + 256 * 64 + 128 * 64)


def test_what_only_names_memory_is_free():
    read = program("""
        %a = f32[64]{0} parameter(0)
        %c = f32[] constant(1)
        %b = f32[8,8]{1,0} bitcast(%a)
        %t = (f32[8,8]{1,0}, f32[64]{0}) tuple(%b, %a)
        %g = f32[64]{0} get-tuple-element(%t), index=1
        %n = token[] after-all()
        ROOT %p = u32[] partition-id()
    """)
    assert read.hbm_bytes == 0


def test_slices_are_read_and_updates_written_not_the_buffers_that_hold_them():
    read = program("""
        %stack = f32[58,100]{1,0} parameter(0)
        %row = f32[1,100]{1,0} parameter(1)
        %i = s32[] parameter(2)
        %s = f32[1,100]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,100}
        ROOT %u = f32[58,100]{1,0} dynamic-update-slice(%stack, %row, %i, %i)
    """)
    index = 4
    assert read.hbm_bytes == (400 + 400 + index) + (400 + 400 + index)


def test_the_same_inside_a_fusion():
    read = program(
        """
        %stack = f32[58,100]{1,0} parameter(0)
        %saved = f32[58,100]{1,0} parameter(1)
        %i = s32[] parameter(2)
        ROOT %f = (f32[58,100]{1,0}, f32[100]{0}) fusion(%stack, %saved, %i), calls=%fused
        """,
        other="""
%fused (p: f32[58,100], q: f32[58,100], i: s32[]) -> (f32[58,100], f32[100]) {
  %p = f32[58,100]{1,0} parameter(0)
  %q = f32[58,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %half = f32[58,100]{1,0} negate(%q)
  %s = f32[1,100]{1,0} dynamic-slice(%half, %i, %zero), dynamic_slice_sizes={1,100}
  %v = f32[100]{0} bitcast(%s)
  %u = f32[58,100]{1,0} dynamic-update-slice(%p, %s, %i, %zero)
  ROOT %t = (f32[58,100]{1,0}, f32[100]{0}) tuple(%u, %v)
}
""",
    )
    index = 4
    assert read.hbm_bytes == 400 + index + 400 + 400  # one slice is read, two values are written


def test_an_update_through_another_layout_of_the_buffer_is_in_place():
    """A TPU writes booleans into a buffer of another tiling by a nested aliased fusion."""
    read = program(
        """
        %saved = pred[58,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
        %row = pred[1,32,128]{2,1,0:T(32,128)(4,1)} parameter(1)
        ROOT %f = pred[58,32,128]{2,1,0:T(32,128)(4,1)} fusion(%saved, %row), calls=%fused
        """,
        other="""
%relaid (p: pred[58,32,128]) -> pred[58,32,128] {
  %p = pred[58,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = pred[58,32,128]{2,1,0:T(8,128)(4,1)} copy(%p)
}
%fused (p: pred[58,32,128], q: pred[1,32,128]) -> pred[58,32,128] {
  %p = pred[58,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %q = pred[1,32,128]{2,1,0:T(32,128)(4,1)} parameter(1)
  %zero = s32[] constant(0)
  %r = pred[58,32,128]{2,1,0:T(8,128)(4,1)} fusion(%p), output_to_operand_aliasing={{}: (0, {})}, calls=%relaid
  ROOT %u = pred[58,32,128]{2,1,0:T(32,128)(4,1)} dynamic-update-slice(%r, %q, %zero, %zero, %zero)
}
""",
    )
    assert read.hbm_bytes == 32 * 128 + 32 * 128


def test_an_update_of_something_made_in_the_fusion_writes_all_of_it():
    read = program(
        """
        %row = f32[1,100]{1,0} parameter(0)
        ROOT %f = f32[58,100]{1,0} fusion(%row), kind=kLoop, calls=%fused
        """,
        other="""
%fused (p: f32[1,100]) -> f32[58,100] {
  %p = f32[1,100]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %none = f32[] constant(0)
  %empty = f32[58,100]{1,0} broadcast(%none), dimensions={}
  ROOT %u = f32[58,100]{1,0} dynamic-update-slice(%empty, %p, %zero, %zero)
}
""",
    )
    assert read.hbm_bytes == 400 + 58 * 400


def test_the_residuals_of_a_scan_cost_in_proportion_to_its_length():
    def loss(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0].sum()

    moved = [
        read_program(compiled(jax.grad(loss), (n, 32, 32), (64, 32)).as_text()).hbm_bytes
        for n in (10, 20, 30)
    ]
    assert moved[2] - moved[1] == moved[1] - moved[0]


def test_on_chip_and_host_memory_are_not_main_memory():
    read = program("""
        %a = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
        %s = (bf16[256,128]{1,0:T(8,128)(2,1)S(1)}, bf16[256,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
        %d = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%s)
        %e = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} negate(%d)
        ROOT %h = bf16[256,128]{1,0:T(8,128)(2,1)S(5)} copy(%a)
    """)
    assert read.hbm_bytes == 2 * (2 * 256 * 128)  # each copy reads it once


@pytest.mark.parametrize(
    "shape, elements, size, stored",
    [
        ("f32[10,100]{1,0}", 1000, 4000, 4000),
        ("f32[10,100]{1,0:T(8,128)}", 1000, 4000, 16 * 128 * 4),
        ("f32[10,100]{0,1:T(8,128)}", 1000, 4000, 104 * 128 * 4),
        ("bf16[3,16,8]{2,1,0:T(8,128)(2,1)}", 384, 768, 3 * 16 * 128 * 2),
        ("bf16[100]{0:T(256)(128)(2,1)}", 100, 200, 512),
        ("s32[]{:T(128)}", 1, 4, 4),
        ("f32[128,128]{1,0:T(8,128)S(1)}", 128 * 128, 128 * 128 * 4, 0),
        ("f32[16]{0:S(1)}", 16, 64, 64),  # a GPU's memory for collectives is its main memory
        ("f32[16]{0:S(5)}", 16, 64, 0),
        ("s4[5]{0:E(4)}", 5, 3, 3),
        ("f8e4m3fn[5]{0}", 5, 5, 5),
        ("pred[5]{0}", 5, 5, 5),
        ("c64[5]", 5, 40, 40),
        ("u32[<=5]{0}", 5, 20, 20),
        ("token[]", 1, 0, 0),
        ("opaque[]", 1, 0, 0),
    ],
)
def test_sizes_of_arrays(shape, elements, size, stored):
    (array,) = parse_arrays(shape)
    assert (array.elements, array.bytes, array.hbm_bytes) == (elements, size, stored)
