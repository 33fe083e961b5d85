"""FLOPs of one matmul-like HLO instruction: 2 for a multiply-add, 0 for element-wise work."""

import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from moe_jax.planning.hlo_text import Array, Instruction


def matmul_flops(instruction: Instruction, operands: Sequence[Instruction]) -> int:
    """FLOPs of a dot or convolution; 0 for any other instruction, custom calls included."""
    match instruction.opcode:
        case "dot" | "scaled-dot":
            (lhs,) = operands[0].arrays
            sizes = [lhs.dims[axis] for axis in instruction.integers("lhs_contracting_dims")]
            return 2 * instruction.elements * math.prod(sizes)
        case "convolution":
            return convolution_flops(instruction, operands[0].arrays[0], operands[1].arrays[0])
        case "ragged-dot":
            matrices = [one.arrays[0] for one in (*operands[:2], instruction)]
            return grouped_matmul_flops(matrices) or 0
    return 0


def grouped_matmul_flops(arrays: Sequence[Array]) -> int | None:
    """FLOPs of rows [m, k], each times one of the matrices [g, k, n], or of its gradients.

    The three matrices, in any order and transposed or not, have m k, k n and m n elements in their
    last two dims, whose product is (m k n)^2. Every row of the buffer counts, filled or not.

    Args:
      arrays: operands and results; integer arrays (the group sizes) are ignored.

    Returns:
      2 m k n; None if there are not three such matrices.
    """
    matrices = [a for a in arrays if a.dtype[0] in "bf" and len(a.dims) >= 2]
    square = math.prod(math.prod(array.dims[-2:]) for array in matrices)
    root = math.isqrt(square)
    return 2 * root if len(matrices) == 3 and root * root == square else None


def convolution_flops(instruction: Instruction, lhs: Array, rhs: Array) -> int:
    """FLOPs of a convolution: pairs of an output position and a tap inside the input.

    A TPU's matmuls are convolutions. Their batch dimensions are spatial ones, dilated so that each
    output meets one tap.
    """
    (out,) = instruction.arrays
    lhs_labels, rhs_labels, out_labels = re.split("_|->", instruction.attribute("dim_labels") or "")
    window = instruction.attribute("window") or ""
    taps = 1
    for axis in range(len(out_labels) - 2):
        label = str(axis)
        taps *= _valid_taps(
            lhs.dims[lhs_labels.index(label)],
            rhs.dims[rhs_labels.index(label)],
            out.dims[out_labels.index(label)],
            stride=_window_value(window, "stride", axis, 1),
            padding=_window_value(window, "pad", axis, 0),
            dilation=_window_value(window, "rhs_dilate", axis, 1),
            base_dilation=_window_value(window, "lhs_dilate", axis, 1),
        )
    groups, batch_groups = (
        int(instruction.attribute(name) or 1)
        for name in ("feature_group_count", "batch_group_count")
    )
    features = lhs.dims[lhs_labels.index("f")] // groups * out.dims[out_labels.index("f")]
    return 2 * features * (lhs.dims[lhs_labels.index("b")] // batch_groups) * taps


def _window_value(window: str, name: str, axis: int, default: int) -> int:
    """The value for a spatial axis in `size=3x5 stride=2x1 pad=0_1x2_2`; for a pad, the low one."""
    match = re.search(rf"\b{name}=(\S+)", window)
    return int(match[1].split("x")[axis].split("_")[0]) if match else default


@functools.lru_cache(maxsize=4096)
def _valid_taps(
    size: int, taps: int, outputs: int, *, stride: int, padding: int, dilation: int,
    base_dilation: int,
) -> int:  # fmt: skip
    """Pairs (output, tap) of one spatial dimension that meet an element of the input."""
    first = np.arange(outputs) * stride - padding
    count = 0
    for tap in range(taps):
        index, rest = np.divmod(first + tap * dilation, base_dilation)
        count += int(np.count_nonzero((rest == 0) & (index >= 0) & (index < size)))
    return count
