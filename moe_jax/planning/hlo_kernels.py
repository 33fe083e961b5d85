"""FLOPs of custom calls: matmuls of a library, and kernels, which a program's text does not show.

A kernel that is known by its name counts by the shapes of its arrays, another one by the estimate
that it states, if it does.
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
_OF_INDICES = frozenset({"GatherScatterIndicesBitpacked"})  # no FLOPs, but memory is moved
_LIBRARY_MATMULS = ("__cublas$gemm", "__cublas$lt$matmul", "__onednn$matmul")
_CUDNN_ATTENTION = "__cudnn$fmha"
_NAMELESS = ("mosaic_gpu",)  # targets whose kernels have no name of their own
_GROUPED_MATMUL = re.compile(r"ragged.?dot|gmm|grouped", re.IGNORECASE)
_SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_FLASH = re.compile(r"flash_attention_(forward|query|key)_kernel")  # of `layers/triton.py`
# What each multiplies, as numbers of dims of a query and of a value. Backward, scores and their
# gradient are computed again by each kernel.
_PRODUCTS = {
    "fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2),
    "forward": (1, 1), "query": (2, 1), "key": (2, 2),
}  # fmt: skip
_STATED = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_TILES = re.compile(r'ragged_dot_tiling="(\d+),')


def custom_call_flops(instruction: Instruction, operands: Sequence[Instruction]) -> int | None:
    """FLOPs of a custom call; None if they are not known, 0 of those that compute none."""
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
    """The name of a custom kernel, the last part of where it comes from.

    Of a Pallas call that is the part before, without what JAX has put around it:
    `jit(f)/transpose(jvp(jit(gmm)))/pallas_call` is "gmm".
    """
    parts = (instruction.op_name or instruction.name).split("/")
    if len(parts) > 1 and re.fullmatch(r"pallas_call(\.\d+)?", parts[-1]):
        return (re.findall(r"\w+", parts[-2]) or parts[-1:])[-1]
    return parts[-1]


def is_grouped_matmul(instruction: Instruction) -> bool:
    """Whether a kernel multiplies rows sorted by group with one matrix a group.

    Kernels of the targets that name none are taken to: `grouped_matmul_flops` looks at their
    arrays.
    """
    named = _GROUPED_MATMUL.search(kernel_name(instruction))
    return instruction.target.startswith(_NAMELESS) or (
        named is not None and instruction.target not in BOOKKEEPING
    )


def row_tile(instruction: Instruction) -> int | None:
    """Rows of a tile of a grouped matmul, where a TPU's compiler says them."""
    tiles = _TILES.search(instruction.attributes)
    return int(tiles[1]) if tiles else None


def library_matmul_flops(instruction: Instruction, arrays: Sequence[Array]) -> int:
    """FLOPs of a matmul of cuBLAS or oneDNN, of the given operands."""
    written = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    out = instruction.arrays[0]
    if written:
        axes = [int(digits) for digits in re.findall(r"\d+", written[1])]
        return 2 * out.elements * math.prod(arrays[0].dims[axis] for axis in axes)
    return 2 * arrays[0].elements * out.dims[-1]


def attention_flops(
    which: str, operands: Sequence[Array], results: Sequence[Array], length_dim: int
) -> int | None:
    """FLOPs of a kernel of attention on the whole square of queries and keys.

    It leaves out blocks that no query sees, about half of a causal square: which they are does not
    stand in the program.

    Args:
      which: of `_PRODUCTS`. The gradient of keys and values may have that of queries too, one for
        each block of keys.
      operands: among them queries, keys and values, the first floating arrays: of splash
        [..., N, L, D], [..., T, D] and [..., T, V], else [B, L, N, D], [B, T, K, D] and so on.
      results: of the kernel.
      length_dim: which dim of keys is T.
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

    Backward these are five products: scores again, and the gradients of the probabilities, of
    queries, keys and values.
    """
    found = attention_sizes(operands, length_dim=1)
    if found is None:
        return None
    pairs, dim, value_dim, _ = found
    backward = instruction.target.endswith("Backward")
    return 2 * pairs * (3 * dim + 2 * value_dim if backward else dim + value_dim)


def attention_sizes(operands: Sequence[Array], length_dim: int) -> tuple[int, int, int, int] | None:
    """Pairs of a query and a key in all heads, dims of a query and of a value, rank of queries."""
    floats = [array for array in operands if array.dtype[0] in "bf" and len(array.dims) >= 3]
    if len(floats) < 3:
        return None
    q, k, v = floats[:3]
    if q.dims[-1] != k.dims[-1] or k.dims[length_dim] != v.dims[length_dim]:
        return None
    pairs = q.elements // q.dims[-1] * k.dims[length_dim]
    return pairs, q.dims[-1], v.dims[-1], len(q.dims)
