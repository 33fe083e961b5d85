"""FLOPs of kernels, which a program's text does not show: by names, shapes and estimates.

The calls come from programs compiled for v5e with libtpu 0.0.42.1 and 0.0.50.1, and for H100
with jax 0.12.0.1, without the parts that do not matter.
"""

import pytest

from tests.hlo_program import program

# Rows in 8 groups. Attention heads: queries, half as many keys, and wider heads (192 and 128).
ARRAYS = """
    %s = s32[8]{0} parameter(0)
    %t = s32[23]{0:T(128)S(1)} parameter(1)
    %x = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(2)
    %w = bf16[8,512,1024]{2,1,0:T(8,128)(2,1)} parameter(3)
    %dy = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(4)
    %m = s8[1,2,2]{2,1,0} parameter(5)
    %i = s32[2,8,1024]{2,1,0} parameter(6)
    %q = bf16[2,4,1024,128]{3,2,1,0} parameter(7)
    %k = bf16[2,2,1024,128]{3,2,1,0} parameter(8)
    %q192 = bf16[2,4,1024,192]{3,2,1,0} parameter(9)
    %l = f32[2,4,8,1024]{3,2,1,0} parameter(10)
    %gq = bf16[2,1024,4,128]{3,2,1,0} parameter(11)
    %gk = bf16[2,1024,2,128]{3,2,1,0} parameter(12)
    %a = f32[6,16,32]{2,1,0} parameter(13)
    %b = f32[6,16,64]{2,1,0} parameter(14)
"""
GROUPED = 2 * 2048 * 512 * 1024
PAIRS = 2 * 4 * 1024 * 1024  # pairs of a query and a key in 4 heads, 2 sequences
TPU = 'custom_call_target="tpu_custom_call"'
TRITON = 'custom_call_target="__gpu$xla.gpu.triton"'


def read(call):
    return program(f"{ARRAYS}\n    ROOT %c = {call}")


def splash(shape, operands, name):
    at = f'metadata={{op_name="jit(f)/jit(_splash_attention)/{name}/{name}/pallas_call"}}'
    return f"{shape} custom-call({operands}), {TPU}, {at}"


@pytest.mark.parametrize(
    ("call", "flops"),
    [
        # A GPU's result is followed by a workspace.
        (
            "(f32[6,32,64]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b)"
            ', custom_call_target="__cublas$gemm", backend_config='
            '{"gemm_backend_config":{"dot_dimension_numbers":'
            '{"lhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]}}}',
            6 * 2 * 32 * 16 * 64,
        ),
        (
            'f32[6,32,64]{2,1,0} custom-call(%a, %b), custom_call_target="__onednn$matmul"',
            6 * 2 * 32 * 16 * 64,
        ),
    ],
)
def test_matmuls_of_a_library_count_by_their_shapes(call, flops):
    assert (read(call).flops, read(call).uncounted) == (flops, {})


@pytest.mark.parametrize(
    "call",
    [
        # libtpu's own kernels: forward, and the gradient of the weights.
        f"bf16[2048,1024]{{1,0}} custom-call(%s, %t, %t, %x, %w), {TPU}"
        ', frontend_attributes={mosaic_fusion_entry_point="true"}'
        ', metadata={op_name="jit(run)/jvp()/ragged_dot_general/ragged-dot-none"}',
        f"bf16[8,512,1024]{{2,1,0}} custom-call(%s, %t, %t, %x, %dy), {TPU}"
        ', metadata={op_name="ragged-dot-none.1"}',
        # megablox.
        f"bf16[2048,512]{{1,0}} custom-call(%t, %t, %dy, %w), {TPU}"
        ', metadata={op_name="jit(run)/transpose(jvp(jit(gmm)))/pallas_call" stack_frame_id=18}',
        f"bf16[8,512,1024]{{2,1,0}} custom-call(%t, %t, %x, %dy), {TPU}"
        ', metadata={op_name="jit(run)/transpose(jvp(jit(tgmm)))/pallas_call" stack_frame_id=18}',
        # Pallas through Triton, and through Mosaic, which names no kernel.
        f"bf16[2048,1024]{{1,0}} custom-call(%t, %t, %x, %w), {TRITON}"
        ', metadata={op_name="jit(run)/jvp()/eval_jaxpr/grouped_rows/pallas_call"}',
        'bf16[8,512,1024]{2,1,0} custom-call(%s, %s, %x, %dy), custom_call_target="mosaic_gpu_v2"'
        ', metadata={op_name="jit(run)/transpose(jvp())/body/mpmd_map"}',
    ],
)
def test_a_grouped_matmul_counts_every_row_of_its_buffer_once(call):
    found = read(call)
    assert (found.flops, found.grouped_flops, found.uncounted) == (GROUPED, GROUPED, {})


def test_the_tiles_that_the_compiler_chose_are_read():
    call = (
        f"bf16[2048,1024]{{1,0}} custom-call(%s, %x, %w), {TPU}, frontend_attributes="
        '{mosaic_fusion_entry_point="true",ragged_dot_tiling="128,512,1024"}'
        ', metadata={op_name="ragged-dot-none"}'
    )
    assert read(call).row_tiles == (128,)
    assert read(call.replace("ragged_dot_tiling", "other")).row_tiles == ()


@pytest.mark.parametrize(
    ("call", "products"),
    [
        # Scores and weighted values.
        (
            splash(
                "(bf16[2,4,1024,128]{3,2,1,0}, f32[2,4,1024,128]{3,2,1,0})",
                "%m, %m, %q, %k, %k, %i",
                "splash_mha_fwd_segmented_residuals",
            ),
            128 + 128,
        ),
        (
            splash(
                "(f32[2,512,128]{2,1,0}, bf16[2,4,1024,128]{3,2,1,0})",
                "%m, %m, %q192, %q192, %q, %i",
                "splash_mha_fwd_no_residuals",
            ),
            192 + 128,
        ),
        # Backward in two kernels. The first computes scores, their gradient and that of queries;
        # the second the same with the gradients of keys and values.
        (
            splash(
                "(f32[2,512,128]{2,1,0}, bf16[2,4,1024,128]{3,2,1,0})",
                "%m, %m, %q, %k, %k, %i, %l, %q",
                "splash_mha_dq_segmented_no_residuals",
            ),
            3 * 128,
        ),
        (
            splash(
                "(f32[2,512,128]{2,1,0}, bf16[2,4,1024,128]{3,2,1,0}, bf16[2,4,1024,128]{3,2,1,0})",
                "%m, %m, %q, %q, %q, %i, %l, %q",
                "splash_mha_dkv_segmented_no_residuals",
            ),
            4 * 128,
        ),
        # Backward in one kernel: one gradient of the queries for each of two blocks of keys.
        (
            splash(
                "(bf16[2,2,4,1024,192]{4,3,2,1,0}, bf16[2,4,1024,192]{3,2,1,0}, "
                "bf16[2,4,1024,128]{3,2,1,0})",
                "%m, %m, %q192, %q192, %q, %i, %l, %q",
                "splash_mha_dkv_segmented_no_residuals",
            ),
            3 * 192 + 2 * 128,
        ),
        # Triton: forward, and the gradients of queries and of keys and values.
        *(
            (
                f"({results}) custom-call({operands}), {TRITON}, "
                f'metadata={{op_name="jit(f)/jvp(flash_attention_{name}_kernel)/pallas_call"}}',
                products * 128,
            )
            for name, results, operands, products in (
                (
                    "forward",
                    "bf16[2,1024,4,128]{3,2,1,0}, f32[2,4,1024]{2,1,0}",
                    "%gq, %gk, %gk",
                    2,
                ),
                ("query", "bf16[2,1024,4,128]{3,2,1,0}", "%gq, %gk, %gk, %i, %i, %gq, %l", 3),
                (
                    "key",
                    "bf16[2,1024,4,128]{3,2,1,0}, bf16[2,1024,4,128]{3,2,1,0}",
                    "%gq, %gk, %gk, %i, %i, %gq, %l",
                    4,
                ),
            )
        ),
        # cuDNN, with and without a bias.
        (
            "(bf16[2,4,1024,128]{3,1,2,0}, f32[2,4,1024]{2,1,0}, u8[0]{0}) custom-call"
            '(%gq, %gk, %gk), custom_call_target="__cudnn$fmhaSoftmax"',
            128 + 128,
        ),
        (
            "(bf16[2,4,1024,128]{3,1,2,0}, bf16[2,2,1024,128]{3,1,2,0}, "
            "bf16[2,2,1024,128]{3,1,2,0}, u8[0]{0}) custom-call(%gq, %gk, %gk, %l, %gq, %gq)"
            ', custom_call_target="__cudnn$fmhaScaleBiasSoftmaxBackward"',
            5 * 128,
        ),
    ],
)
def test_attention_counts_its_products_on_the_whole_square(call, products):
    found = read(call)
    assert (found.flops, found.grouped_flops, found.uncounted) == (2 * PAIRS * products, 0, {})


def test_an_unknown_kernel_counts_what_it_states_and_is_named_if_it_states_nothing():
    at = 'metadata={op_name="jit(f)/vmap(mine)/pallas_call"}'
    call = f"f32[6,16,64]{{2,1,0}} custom-call(%a, %b), {TPU}, {at}"
    estimate = (
        ', backend_config={{"custom_call_config":{{"body":"TUzvUg==","cost_estimate":{{"flops":'
        '"{}","transcendentals":"0","bytes_accessed":"30408704"}}}}}}'
    )
    stated = read(call + estimate.format(12345))
    assert (stated.flops, stated.uncounted) == (12345, {})
    for unknown in (call, call + estimate.format(0)):
        assert (read(unknown).flops, read(unknown).uncounted) == (0, {"tpu_custom_call mine": 1})


def test_a_grouped_kernel_of_other_arrays_is_named():
    found = read(f'f32[6,16,64]{{2,1,0}} custom-call(%a), {TPU}, metadata={{op_name="f/gmm.2"}}')
    assert (found.flops, found.uncounted) == (0, {"tpu_custom_call gmm": 1})


def test_other_custom_calls_are_listed_with_their_count():
    found = program("""
        %a = f32[64]{0} parameter(0)
        %b = f32[64]{0} custom-call(%a), custom_call_target="__cudnn$convForward"
        %c = f32[64]{0} custom-call(%b), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/flash_attention.2"}
        %d = f32[64]{0} custom-call(%c), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/flash_attention.3"}
        %g = f32[64]{0} custom-call(%d), custom_call_target="GatherScatterIndicesBitpacked"
        ROOT %e = f32[64]{0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
    """)
    assert found.uncounted == {"__cudnn$convForward": 1, "tpu_custom_call flash_attention": 2}
    assert found.hbm_bytes == 4 * (256 + 256)
