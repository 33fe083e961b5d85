"""FLOPs of custom calls (library matmuls and kernels), whose work a program's text does not show.

A kernel known by its name counts by the shapes of its arrays, any other by the estimate that it
states, if any.
"""

import math
import re
from collections.abc import Sequence

from moe_jax.planning.hlo_flops import grouped_matmul_flops
from moe_jax.planning.hlo_text import Array, Instruction

# Custom calls that move or reserve buffers and compute nothing.
BOOKKEEPING = frozenset(
    {
        "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone",
        "AsyncCollectiveStart", "ConcatBitcast", "PrepareAsyncCall", "Sharding",
        "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement",
    }
)  # fmt: skip
_OF_INDICES = frozenset({"GatherScatterIndicesBitpacked"})  # no FLOPs, but they move memory
_LIBRARY_MATMULS = ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul")
_CUDNN_ATTENTION = "__cudnn$fmha"
_NAMELESS = ("mosaic_gpu",)  # targets whose kernels have no name of their own
_GROUPED_MATMUL = re.compile(r"ragged.?dot|gmm|grouped", re.IGNORECASE)
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_FLASH = re.compile(r"flash_attention_(forward|query|key)_kernel")  # of `layers/triton.py`
# Number of products per kernel: (over the dims of a query, over the dims of a value). Each backward
# kernel computes scores and their gradient again.
_PRODUCTS = {
    "fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2),
    "forward": (1, 1), "query": (2, 1), "key": (2, 2),
}  # fmt: skip
_STATED = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_TILES = re.compile(r'ragged_dot_tiling="(\d+),')


def custom_call_flops(instruction: Instruction, operands: Sequence[Instruction]) -> int | None:
    """FLOPs of a custom call; None if unknown, 0 if it computes none."""
    arrays = [array for operand in operands for array in operand.arrays]
    name, target = kernel_name(instruction), instruction.target
    if target in BOOKKEEPING | _OF_INDICES or "ragged-dot-metadata" in name:
        return 0
    if target.startswith(_LIBRARY_MATMULS):
        return library_matmul_flops(instruction, arrays)
    if target.startswith(_CUDNN_ATTENTION):
        return cudnn_attention_flops(instruction, arrays)
    for pattern, length_dim in ((_SPLASH, -2), (_FLASH, 1)):
        kernel = pattern.search(name)
        if kernel:
            return attention_flops(kernel[1], arrays, instruction.arrays, length_dim)
    if is_grouped_matmul(instruction):
        flops = grouped_matmul_flops([*arrays, *instruction.arrays])
        if flops is not None:
            return flops
    stated = _STATED.search(instruction.attributes)
    return (stated and int(stated[1])) or None


def kernel_name(instruction: Instruction) -> str:
    """The name of a custom kernel: the last part of its `op_name`.

    For a Pallas call it is the part before, without JAX's wrappers:
    `jit(f)/transpose(jvp(jit(gmm)))/pallas_call` is "gmm".
    """
    parts = (instruction.op_name or instruction.name).split("/")
    if len(parts) > 1 and re.fullmatch(r"pallas_call(\.\d+)?", parts[-1]):
        return (re.findall(r"\w+", parts[-2]) or parts[-1:])[-1]
    return parts[-1]


def is_grouped_matmul(instruction: Instruction) -> bool:
    """Whether a kernel multiplies rows sorted by group by one matrix per group.

    Kernels of targets without kernel names count too: `grouped_matmul_flops` checks their arrays.
    """
    named = _GROUPED_MATMUL.search(kernel_name(instruction))
    return instruction.target.startswith(_NAMELESS) or (
        named is not None and instruction.target not in BOOKKEEPING
    )


def row_tile(instruction: Instruction) -> int | None:
    """Rows per tile of a grouped matmul, if a TPU's compiler states them."""
    tiles = _TILES.search(instruction.attributes)
    return int(tiles[1]) if tiles else None


def library_matmul_flops(instruction: Instruction, arrays: Sequence[Array]) -> int:
    """FLOPs of a cuBLAS or oneDNN matmul of the given operands."""
    written = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    out = instruction.arrays[0]
    if written:
        axes = [int(digits) for digits in re.findall(r"\d+", written[1])]
        return 2 * out.elements * math.prod(arrays[0].dims[axis] for axis in axes)
    return 2 * arrays[0].elements * out.dims[-1]


def attention_flops(
    which: str, operands: Sequence[Array], results: Sequence[Array], length_dim: int
) -> int | None:
    """FLOPs of an attention kernel on the whole square of queries and keys.

    The kernel skips blocks that no query sees, about half of a causal square. The program does not
    show which.

    Args:
      which: a key of `_PRODUCTS`. The kernel for the gradient of keys and values may also compute
        that of queries, one for each block of keys.
      operands: queries, keys and values are the first floating arrays: [..., N, L, D], [..., T, D]
        and [..., T, V] for splash, else [B, L, N, D], [B, T, K, D] and so on.
      results: the kernel's results.
      length_dim: the dim of keys that is T.
    """
    found = attention_sizes(operands, length_dim)
    if found is None:
        return None
    pairs, dim, value_dim, rank = found
    of_queries, of_values = _PRODUCTS[which]
    of_queries += which == "dkv" and any(len(array.dims) > rank for array in results)
    return 2 * pairs * (of_queries * dim + of_values * value_dim)


def cudnn_attention_flops(instruction: Instruction, operands: Sequence[Array]) -> int | None:
    """FLOPs of cuDNN's attention on the whole square; queries are [B, L, N, D], keys [B, T, K, D].

    The backward pass has five products: the scores again, and the gradients of probabilities,
    queries, keys and values.
    """
    found = attention_sizes(operands, length_dim=1)
    if found is None:
        return None
    pairs, dim, value_dim, _ = found
    backward = instruction.target.endswith("Backward")
    return 2 * pairs * (3 * dim + 2 * value_dim if backward else dim + value_dim)


def attention_sizes(operands: Sequence[Array], length_dim: int) -> tuple[int, int, int, int] | None:
    """Query-key pairs of all heads, dims of a query and of a value, rank of queries; or None."""
    floats = [array for array in operands if array.dtype[0] in "bf" and len(array.dims) >= 3]
    if len(floats) < 3:
        return None
    q, k, v = floats[:3]
    if q.dims[-1] != k.dims[-1] or k.dims[length_dim] != v.dims[length_dim]:
        return None
    pairs = q.elements // q.dims[-1] * k.dims[length_dim]
    return pairs, q.dims[-1], v.dims[-1], len(q.dims)
