"""Reading a program's text: loops, FLOPs, names, and real TPU and GPU programs."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.planning.hlo import by_operation, read_program
from tests.hlo_program import compiled, kept, program

# Loops.


def loop(*, note="", start=0, end=7, step=1, relation="LT", body_op="add"):
    """A loop around one matmul of 2 * 4 * 4 * 4 = 128 FLOPs."""
    other = f"""
%body (s: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %s = (s32[]{{:T(128)}}, f32[4,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %copied = s32[]{{:T(128)S(6)}} copy(%i)
  %one = s32[] constant({step})
  %next = s32[] {body_op}(%copied, %one)
  %x = f32[4,4]{{1,0}} get-tuple-element(%s), index=1
  %y = f32[4,4]{{1,0}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = (s32[], f32[4,4]{{1,0}}) tuple(%next, %y)
}}
%cond (s2: (s32[], f32[4,4])) -> pred[] {{
  %s2 = (s32[], f32[4,4]{{1,0}}) parameter(0)
  %j = s32[] get-tuple-element(%s2), index=0
  %end = s32[] constant({end})
  ROOT %lt = pred[] compare(%j, %end), direction={relation}
}}
"""
    entry = f"""
    %zero = s32[] constant({start})
    %a = f32[4,4]{{1,0}} parameter(0)
    %init = (s32[], f32[4,4]{{1,0}}) tuple(%zero, %a)
    ROOT %w = (s32[], f32[4,4]{{1,0}}) while(%init), condition=%cond, body=%body, metadata={{op_name="jit(f)/while"}}{note}
    """
    return program(entry, other=other)


def test_a_noted_trip_count_is_believed():
    note = ', backend_config={"known_trip_count":{"n":"58"},"known_init_step":{"init":"0"}}'
    read = loop(note=note, end=7)
    assert read.flops == 58 * 128
    assert read.unknown_loops == ()


@pytest.mark.parametrize(
    "counter, trips",
    [
        ({"end": 7}, 7),
        ({"start": 2, "end": 9}, 7),
        ({"end": 7, "relation": "LE"}, 8),
        ({"end": 7, "step": 2}, 4),
        ({"start": 5, "end": 0, "step": -1, "relation": "GT"}, 5),
        ({"start": 5, "end": 0, "step": 2, "relation": "GE", "body_op": "subtract"}, 3),
        ({"end": 6, "step": 2, "relation": "NE"}, 3),
        ({"start": 9, "end": 7}, 0),
    ],
)
def test_a_plain_counter_is_understood_without_a_note(counter, trips):
    assert loop(**counter).flops == trips * 128


@pytest.mark.parametrize("counter", [{"body_op": "multiply"}, {"step": 0}, {"relation": "EQ"}])
def test_a_loop_of_unknown_length_counts_once_and_is_named(counter):
    read = loop(**counter)
    assert read.flops == 128
    assert read.unknown_loops == ("jit(f)/while",)


def test_a_loop_that_clears_its_own_flag_is_a_condition():
    """A TPU's compiler writes an `if` like this; like a branch, it counts as taken."""
    read = program(
        """
        %on = pred[] parameter(0)
        %a = f32[4,4]{1,0} parameter(1)
        %init = (pred[], f32[4,4]{1,0}) tuple(%on, %a)
        ROOT %w = (pred[], f32[4,4]{1,0}) while(%init), condition=%cond, body=%body
        """,
        other="""
%body (s: (pred[], f32[4,4])) -> (pred[], f32[4,4]) {
  %s = (pred[], f32[4,4]{1,0}) parameter(0)
  %off = pred[] constant(false)
  %copied = pred[] copy(%off)
  %x = f32[4,4]{1,0} get-tuple-element(%s), index=1
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (pred[], f32[4,4]{1,0}) tuple(%copied, %y)
}
%cond (s2: (pred[], f32[4,4])) -> pred[] {
  %s2 = (pred[], f32[4,4]{1,0}) parameter(0)
  ROOT %flag = pred[] get-tuple-element(%s2), index=0
}
""",
    )
    assert (read.flops, read.unknown_loops) == (128, ())


def test_nested_scans_multiply():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, ws):
        return jax.lax.scan(inner, x, ws)[0], None

    nested = compiled(lambda x, ws: jax.lax.scan(outer, x, ws)[0], (8, 16), (3, 5, 16, 16))
    read = read_program(nested.as_text())
    assert read.flops == 3 * 5 * 2 * 8 * 16 * 16
    assert read.unknown_loops == ()


def test_a_loop_that_runs_until_converged_is_named():
    def halve(x):
        return jax.lax.while_loop(lambda x: (x > 1).any(), lambda x: x @ x, x)

    read = read_program(compiled(halve, (16, 16)).as_text())
    assert read.flops == 2 * 16**3
    assert read.unknown_loops == ("jit(halve)/while",)


def test_a_conditional_counts_as_its_most_expensive_branch():
    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert read_program(compiled(branches, (16, 16)).as_text()).flops == 2 * 2 * 16**3


# FLOPs.


@pytest.mark.parametrize(
    "function, shapes, flops",
    [
        (jnp.matmul, [(8, 16), (16, 32)], 2 * 8 * 16 * 32),
        (jnp.matmul, [(5, 8, 16), (5, 16, 32)], 5 * 2 * 8 * 16 * 32),
        (
            lambda a, b: jnp.einsum("abij,bajk->abik", a, b),
            [(3, 5, 8, 16), (5, 3, 16, 32)],
            15 * 2 * 8 * 16 * 32,
        ),
        # Forward has two matmuls; backward has one per weight and one for the hidden layer.
        (
            jax.grad(lambda w, x: ((jnp.tanh(x @ w[0]) @ w[1]) ** 2).sum()),
            [(2, 32, 32), (8, 32)],
            5 * 2 * 8 * 32 * 32,
        ),
    ],
)
def test_flops_of_matmuls_on_the_cpu(function, shapes, flops):
    assert read_program(compiled(function, *shapes).as_text()).flops == flops


def test_flops_of_a_convolution_are_those_of_the_compilers_own_analysis():
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 1), "SAME", rhs_dilation=(1, 3))

    program = compiled(convolve, (4, 8, 33, 17), (16, 8, 3, 5))
    assert read_program(program.as_text()).flops == program.cost_analysis()["flops"]


def test_batch_dims_that_a_tpu_writes_as_a_dilated_window():
    read = program("""
        %a = bf16[8,512,256]{2,1,0} parameter(0)
        %b = bf16[8,256,384]{2,1,0} parameter(1)
        ROOT %c = bf16[8,512,384]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
    """)
    assert read.flops == 8 * 2 * 512 * 256 * 384


# Text.


def test_names_and_strings_cannot_pass_for_attributes():
    read = program(
        r"""
        %a = f32[16]{0} parameter(0), metadata={op_name="x[\"{(\"]"}
        ROOT %c = f32[16]{0} call(%a), to_apply=%inner, frontend_attributes={note="}, to_apply=%nowhere"}, metadata={op_name="jit(f)/\"q\"/{a}, calls=%b) (" source_file="f.py"}
        """,
        other=r"""
%inner (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  ROOT %r = f32[16]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add, metadata={op_name="jit(f)/\"q\"/{a}, replica_groups={{7}}"}
}
""",
    )
    (one,) = read.collectives
    assert one.group == (0, 1)
    assert one.op_name == r"jit(f)/\"q\"/{a}, replica_groups={{7}}"


def test_what_a_kernel_says_of_itself_may_be_of_many_lines():
    """A line of a kernel's description that begins with a brace does not end the computation."""
    read = program(
        """
        %a = f32[4,4]{1,0} parameter(0)
        %k = f32[4,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/of_many_lines/pallas_call" stack_frame_id=9}
        ROOT %d = f32[4,4]{1,0} dot(%k, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
        """
    )
    assert (read.flops, read.uncounted) == (128, {"tpu_custom_call of_many_lines": 1})


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        read_program("module @jit_f attributes {mhlo.num_partitions = 1 : i32} {\n}\n")


# Real programs for machines that are not here, described in tests/hlo/make_programs.py.


TOKENS, DIM, HIDDEN, NUM_LAYERS = 8192 // 4, 1024, 4096, 3


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_a_training_step_of_scanned_layers(chip):
    """Two matmuls forward and four backward; weights gathered twice, gradients scattered once."""
    read = kept(f"{chip}_layers")
    assert read.flops == NUM_LAYERS * 6 * 2 * TOKENS * DIM * HIDDEN
    assert (read.unknown_loops, read.uncounted) == ((), {})
    gathered = [one for one in read.collectives if one.operation == "all-gather"]
    assert sum(one.count * one.bytes for one in gathered) == NUM_LAYERS * 4 * 2 * DIM * HIDDEN
    assert {one.group for one in gathered} == {(0, 1, 2, 3)}
    assert all("/while/body/" in one.op_name for one in gathered)


def test_collectives_of_the_training_step_on_a_gpu():
    gradient = 2 * DIM * HIDDEN
    assert by_operation(kept("h100_layers").collectives) == {
        "all-gather": (2 * NUM_LAYERS, 4 * NUM_LAYERS * gradient),
        "reduce-scatter": (NUM_LAYERS, 2 * NUM_LAYERS * gradient),
    }


def test_collectives_of_the_training_step_on_a_tpu():
    """The compiler pads one reduce-scatter from 1,024 to 1,056 rows and permutes the excess."""
    row = 2 * HIDDEN
    assert by_operation(kept("v5e_layers").collectives) == {
        "all-gather": (4 * NUM_LAYERS, 4 * NUM_LAYERS * DIM * row),
        "collective-permute": (NUM_LAYERS, NUM_LAYERS * 24 * row),
        "reduce-scatter": (2 * NUM_LAYERS, NUM_LAYERS * (DIM + DIM + 32) * row),
    }


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_every_kind_of_collective_on_real_machines(chip):
    rows, dim, width = 1024, 1024, 768
    read = kept(f"{chip}_exchange")
    assert by_operation(read.collectives) == {
        "all-gather": (1, 2 * (rows // 4 * width) * 2),
        "all-reduce": (1, 2 * (rows // 4 * width) * 2),
        "all-to-all": (1, rows * width * 2),
        "collective-permute": (1, rows * dim * 2),
        "ragged-all-to-all": (1, rows * dim * 2),
        "reduce-scatter": (1, rows * width * 2),
    }
    groups = {one.operation: one.group for one in read.collectives}
    over_data = {"all-gather", "all-reduce"}
    assert {kind for kind, group in groups.items() if group == (0, 4)} == over_data
    assert {groups[kind] for kind in groups.keys() - over_data} == {(0, 1, 2, 3)}
    # A GPU multiplies every row by all four matrices; a TPU has a kernel that does not.
    assert read.flops == 2 * rows * dim * width * (1 if chip == "v5e" else 4)
    assert read.uncounted == {}


@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_batched_matmuls_on_real_machines(chip):
    read = kept(f"{chip}_einsum")
    left, right, out = (2 * 15 * size for size in (256 * 128, 128 * 384, 256 * 384))
    assert read.flops == 3 * 5 * 2 * 256 * 128 * 384
    # A GPU first copies the right side with its batch dims in the other order.
    assert read.hbm_bytes == left + right + out + (2 * right if chip == "h100" else 0)
