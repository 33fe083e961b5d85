"""Tensors in safetensors files: read row by row, written shard by shard.

A model is one file, or several with `model.safetensors.index.json`. A file contains the length of a
JSON header in eight bytes, the header, and the bytes of the tensors, little-endian and row-major.
Source: the format description of huggingface/safetensors.
"""

import json
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
LARGEST_HEADER = 100_000_000  # bytes, as in the library
SHARD_BYTES = 5_000_000_000  # default maximum per written file

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("float64", "float32", "float16", "bfloat16")


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
      path: of the file.
      dtype: of the numbers.
      shape: of the tensor.
      start: offset in the file, in bytes.
    """

    path: pathlib.Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


class Files(Protocol):
    """Tensors by name, read on request."""

    path: pathlib.Path

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Where each tensor is."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """A tensor, or one row of its first dim."""


class TensorFiles:
    """The tensors of a model's files, by name. Headers are read at once, tensors on request.

    Args:
      path: a directory, or one file.

    Raises:
      ValueError: there are no files, one is damaged, or the index is wrong; names the file.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.tensors: Mapping[str, Stored] = {}
        for file, expected in files_of(self.path).items():
            found = read_header(file)
            for name in expected - set(found):
                raise ValueError(
                    f"the index must say where every tensor is: {name} is not in {file}, which "
                    f"{self.path / INDEX} names. Download both again."
                )
            for name in set(found) & set(self.tensors):
                raise ValueError(
                    f"a tensor must be in only one file: {name} is in {self.tensors[name].path} "
                    f"and {file}. Remove the file that is not of this model."
                )
            self.tensors = {**self.tensors, **found}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """A tensor, or one row of its first dim.

        Raises:
          OSError: the file was cut after it was opened.
        """
        stored = self.tensors[name]
        shape = stored.shape if row is None else stored.shape[1:]
        out = np.empty(shape, stored.dtype)
        start = stored.start + (row or 0) * out.nbytes
        # NumPy's stubs for Python 3.11 do not say that an array is a buffer.
        data = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        with stored.path.open("rb", buffering=0) as file:
            done = 0
            while done < out.nbytes:
                count = os.preadv(file.fileno(), [data[done:]], start + done)
                if count == 0:
                    raise OSError(f"{stored.path} was cut while it was read, at {name}.")
                done += count
        return out


def files_of(path: pathlib.Path) -> dict[pathlib.Path, set[str]]:
    """The files of a model, and the tensors that the index expects in each.

    Raises:
      ValueError: there are none, the index cannot be read, or it names a missing file.
    """
    if path.is_file():
        return {path: set()}
    if not path.is_dir():
        raise ValueError(f"a model must be a directory of safetensors files: there is no {path}.")
    index = path / INDEX
    if index.exists():
        files: dict[pathlib.Path, set[str]] = {}
        for name, file in read_index(index).items():
            files.setdefault(path / file, set()).add(name)
        for named in files:
            if not named.is_file():
                raise ValueError(
                    f"the index must name files beside it: {index} names {named.name}, which is "
                    "not there. Download it too."
                )
        return files
    if (path / ONE_FILE).is_file():
        return {path / ONE_FILE: set()}
    found = sorted(path.glob("*.safetensors"))
    if not found:
        others = sorted(one.name for one in path.iterdir())[:10]
        raise ValueError(
            f"a model must be a directory of safetensors files: {path} has none, but {others}. "
            "Save a .bin model with safe_serialization=True first."
        )
    return {file: set() for file in found}


def read_index(index: pathlib.Path) -> dict[str, str]:
    """The file of each tensor, from `model.safetensors.index.json`.

    Raises:
      ValueError: it is no valid index.
    """
    try:
        places = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) and "/" not in file for file in places.values()):
            raise ValueError("a file must be named without a folder")
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(
            f'an index must have a "weight_map" from tensors to files: {index} cannot be read as '
            f"one ({error}). Download it again."
        ) from error
    return dict(places)


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one file.

    Raises:
      ValueError: the file is no safetensors file, or is truncated; names the tensor that is cut.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise ValueError(
                f"{path} is not a complete safetensors file: it has {size} bytes, of which the "
                f"header takes {length}. Download it again."
            )
        text = file.read(length)
    try:
        header = dict(json.loads(text).items())
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a safetensors file: its header cannot be read ({error}). Download it "
            "again."
        ) from error
    header.pop("__metadata__", None)
    return {name: stored(path, one, 8 + length, size, name) for name, one in header.items()}


def stored(
    path: pathlib.Path, entry: Mapping[str, Any], data_start: int, size: int, name: str
) -> Stored:
    """One entry of a header, checked against the size of the file."""
    try:
        kind, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
        begin, end = map(int, entry["data_offsets"])
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(
            f"{path} is damaged: its header has no dtype, shape and data_offsets of {name} that "
            f"can be read ({error!r}). Download it again."
        ) from error
    if kind not in DTYPES:
        raise ValueError(
            f"the dtype of {name} in {path} is {kind}: known are {list(DTYPES)}. Convert it first."
        )
    dtype = DTYPES[kind]
    wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if end - begin != wanted or begin < 0:
        raise ValueError(
            f"{path} is damaged: {name} of shape {shape} and dtype {dtype} takes {wanted} bytes, "
            f"and the header gives it {end - begin}. Download it again."
        )
    if data_start + end > size:
        raise ValueError(
            f"{path} is cut: {name} ends at byte {data_start + end}, the file at {size}. "
            "Download it again."
        )
    return Stored(path, dtype, shape, data_start + begin)


class ToWrite(NamedTuple):
    """A tensor to write, whose values are not computed yet.

    Attributes:
      name: of the tensor.
      dtype: of the numbers.
      shape: of the tensor.
      make: computes its values.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_tensors(
    directory: pathlib.Path, tensors: Iterable[ToWrite], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes tensors one after another: one file, or several with an index.

    Args:
      directory: an existing one.
      tensors: in any order; they are written in the order of their names.
      shard_bytes: maximum bytes of tensors per file; a larger tensor gets a file of its own.
    """
    shards: list[list[ToWrite]] = [[]]
    for one in sorted(tensors, key=lambda one: one.name):
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + one.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(one)
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else ONE_FILE
        write_shard(directory / name, shard)
        places |= dict.fromkeys((one.name for one in shard), name)
    if len(shards) > 1:
        total = sum(one.nbytes for shard in shards for one in shard)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_shard(path: pathlib.Path, tensors: list[ToWrite]) -> None:
    """Writes one file; each tensor is computed just before it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for one in tensors:
        offsets = [start, start + one.nbytes]
        dtype, shape = NAMES[one.dtype], list(one.shape)
        header[one.name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for one in tensors:
            values = np.ascontiguousarray(one.make(), one.dtype)
            assert values.shape == one.shape, (one.name, values.shape, one.shape)
            file.write(values.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
