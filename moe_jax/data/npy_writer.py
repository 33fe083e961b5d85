"""Writes arrays piece by piece."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np


class NpyWriter:
    """Appends to a one-dimensional .npy file whose length is not known beforehand."""

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self._file = file
        self._dtype = dtype
        self._length = 0
        self._write_header()

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: pathlib.Path, dtype: np.dtype) -> Iterator["NpyWriter"]:
        """Opens a new file, which is complete when the block ends."""
        with path.open("wb") as file:
            writer = cls(file, dtype)
            yield writer
            file.seek(0)
            writer._write_header()
            flush_to_disk(file)

    def append(self, values: np.ndarray) -> None:
        """Appends values [N] of the file's dtype."""
        assert values.dtype == self._dtype, values.dtype
        self._file.write(values.tobytes())
        self._length += len(values)

    def _write_header(self) -> None:
        # The format pads its header so that the first dimension can grow in place.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def flush_to_disk(file: Any) -> None:
    """Syncs a file to disk: it survives a crash of the machine."""
    file.flush()
    os.fsync(file.fileno())
