"""Tensors in MXFP4, read as bfloat16: blocks of 32 numbers of 4 bits with one scale.

`NAME_blocks` is uint8 [E, rows, blocks, 16], with two numbers per byte, the lower half first.
`NAME_scales` is uint8 [E, rows, blocks], where 127 means 1 and 128 means 2. Together they encode
`NAME` [E, 32 * blocks, rows]. bfloat16 represents the numbers exactly for scales up to 2^125.

Source: OCP Microscaling Formats (MX) specification 1.0; gpt-oss; `mxfp4.py` of transformers.
"""

import ml_dtypes
import numpy as np

from moe_jax.config.check import require
from moe_jax.interchange.tensor_files import Stored, TensorFiles

# Numbers with one sign bit, two exponent bits and one mantissa bit, indexed by their bits.
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = np.array([*POSITIVE, *(-one for one in POSITIVE)], np.float32)
ONE = 127  # encodes the scale 1; the next integer doubles it
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Mxfp4Files:
    """Files with some tensors in MXFP4, which appear as bfloat16.

    Args:
      files: the files.

    Raises:
      ValueError: blocks have no scales, or another shape or dtype; names the tensor.
    """

    def __init__(self, files: TensorFiles):
        self.files, self.path = files, files.path
        self.tensors: dict[str, Stored] = {}
        for name, found in files.tensors.items():
            if name.endswith("_blocks"):
                name = name.removesuffix("_blocks")
                self.tensors[name] = self.dequantised(name, found)
            elif not name.endswith("_scales"):
                self.tensors[name] = found

    def dequantised(self, name: str, blocks: Stored) -> Stored:
        """The tensor that blocks and their scales encode."""
        scales = self.files.tensors.get(f"{name}_scales")
        shape = blocks.shape
        require(
            scales is not None
            and (len(shape) == 4 and shape[3] == 16 and scales.shape == shape[:3])
            and blocks.dtype == scales.dtype == np.uint8,
            f"{name}_blocks must be uint8 [E, rows, blocks, 16], {name}_scales uint8 [E, rows, "
            "blocks]",
            f"{blocks.dtype} {shape} and {scales and scales.shape} in {blocks.path}",
            "Download the files again",
        )
        experts, rows, count, _ = shape
        return blocks._replace(dtype=BFLOAT16, shape=(experts, 32 * count, rows))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """A tensor, or one row of its first dim: the matrix of an expert."""
        if name in self.files:
            return self.files.read(name, row)
        blocks, scales = (self.files.read(f"{name}_{one}", row) for one in ("blocks", "scales"))
        return dequantise(blocks, scales).astype(BFLOAT16)


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Blocks [..., rows, blocks, 16] and scales [..., rows, blocks] as float32 [..., values, rows].

    >>> blocks = np.array([[[0x21] * 16]], np.uint8)  # 0.5, 1, 0.5, 1, ... times 2
    >>> dequantise(blocks, np.array([[128]], np.uint8))[:3, 0].tolist()
    [1.0, 2.0, 1.0]
    """
    pairs = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1)
    values = pairs.reshape(*blocks.shape[:-1], 32)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - ONE)
    return np.swapaxes(values.reshape(*values.shape[:-2], -1), -1, -2)
