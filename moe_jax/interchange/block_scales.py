"""Matrices in 8-bit floats with one scale per block, read as bfloat16.

`NAME` is float8 [R, C]. `NAME_scale_inv` is float32 [R / 128, C / 128], rounded up: one factor per
block of 128 x 128 entries.

Source: DeepSeek-AI 2024, arXiv:2412.19437, sec. 3.3; `weight_dequant` of the code of DeepSeek-V3.
"""

import ml_dtypes
import numpy as np

from moe_jax.config.check import require
from moe_jax.interchange.tensor_files import Stored, TensorFiles

SUFFIX = "_scale_inv"
BLOCK = 128  # rows, and columns, that share a scale
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class BlockScaledFiles:
    """Files with some block-scaled matrices, which appear as bfloat16.

    Args:
      files: the files.

    Raises:
      ValueError: scales do not fit their matrix; names it.
    """

    def __init__(self, files: TensorFiles):
        self.files, self.path = files, files.path
        self.tensors: dict[str, Stored] = {
            name: self.dequantised(name, found) if name + SUFFIX in files else found
            for name, found in files.tensors.items()
            if not (name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in files)
        }

    def dequantised(self, name: str, matrix: Stored) -> Stored:
        """The tensor that a matrix and its scales encode."""
        scales = self.files.tensors[name + SUFFIX]
        wanted = tuple(-(-size // BLOCK) for size in matrix.shape)
        require(
            scales.shape == wanted and len(wanted) == 2,
            f"each scale must cover {BLOCK} rows and columns of a matrix",
            f"{name} is {matrix.shape}, its scales are {scales.shape} in {scales.path}",
            "Dequantise the model first",
        )
        return matrix._replace(dtype=BFLOAT16)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """A tensor, or one row of its first dim."""
        if name + SUFFIX not in self.files:
            return self.files.read(name, row)
        values = dequantise(self.files.read(name), self.files.read(name + SUFFIX))
        return values if row is None else values[row]


def dequantise(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The matrix in bfloat16, from float8 [R, C] and scales [R / 128, C / 128], rounded up."""
    rows, columns = values.shape
    by_row = np.repeat(scales.astype(np.float32), BLOCK, axis=0)[:rows]
    whole = np.repeat(by_row, BLOCK, axis=1)[:, :columns]
    return (whole * values.astype(np.float32)).astype(BFLOAT16)
