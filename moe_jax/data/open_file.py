"""Opens a file that a user named, and reports in one line what is wrong with it."""

import contextlib
import gzip
import io
import pathlib
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from moe_jax.config.check import require
from moe_jax.config.installed import LFS_SIGN, is_lfs_pointer

# Control characters that no text has in any encoding of one byte per character.
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))


def check_file(path: pathlib.Path, what: str) -> None:
    """Refuses a path that is not a readable file, or is a Git LFS pointer.

    Args:
        path: the file.
        what: what it should be, such as "A tokenizer".

    Raises:
        ValueError: with the path, what is there, and what to do.
        OSError: it cannot be read.
    """
    require(
        path.exists(), f"{what} must be a file", f"there is none at {str(path)!r}", "Correct it"
    )
    found = "a folder" if path.is_dir() else "a device or pipe"
    require(path.is_file(), f"{what} must be a file", f"{path} is {found}", "Name a file")
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_SIGN))
    except PermissionError as error:
        raise OSError(
            f"{what} must be readable: {path}: {error.strerror}. Permit it: chmod +r {path}."
        ) from None
    require(
        not is_lfs_pointer(start),
        f"{what} must be a file with its contents",
        f"{path} is a Git LFS pointer",
        "Run `git lfs pull` where it came from",
    )


@contextlib.contextmanager
def open_stream(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file of a corpus, unpacking .gz and .zst as it is read.

    Raises:
        ValueError: the file is missing or damaged, also if the body finds the damage.
    """
    check_file(path, "A corpus file")
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(path, "rb") as stream:
                yield cast(BinaryIO, stream)
        elif suffix == ".zst":
            import pyarrow as pa

            with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
                yield io.BufferedReader(stream, 2**20)
        else:
            with path.open("rb") as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(path, error) from None
    except OSError as error:
        if suffix != ".zst" or error.errno is not None:
            raise
        raise damaged(path, error) from None


def damaged(path: pathlib.Path, error: Exception) -> ValueError:
    """The error of a corpus file that a reader cannot read to its end."""
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"A corpus file must be whole: {path} is damaged, cut short, or not {path.suffix}: "
        f"{reason}. Copy or make it again."
    )


def decode(data: bytes, where: str) -> str:
    """Decodes UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is not text, or not UTF-8; with the command that converts it.
    """
    path = where.partition(" line ")[0]
    first, then = "Convert", ""
    if path.lower().endswith((".gz", ".zst")):
        first, then = "Unpack", ", and convert it"
        path = path.rpartition(".")[0]
    for mark, name in ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16")):
        require(
            not data.startswith(mark),
            "Text is read as UTF-8",
            f"{where} is {name}",
            f"{first} it{then}: iconv -f {name} -t UTF-8 {path}",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        at = where if " line " in where else f"{where} line {line}"
        num_controls = len(data) - len(data.translate(None, _CONTROLS))
        require(
            100 * num_controls < len(data),
            "A text file must contain text",
            f"{num_controls:,} of the {len(data):,} bytes of {where} are control characters",
            "Name a file of text, or leave it out",
        )
        raise ValueError(
            f"Text is read as UTF-8: {at} has the byte 0x{data[error.start]:02x}. {first} the "
            f"file{then}, from the encoding that it has: iconv -f LATIN1 -t UTF-8 {path}."
        ) from None
