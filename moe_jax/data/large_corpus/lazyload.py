"""Reads character vectors from an R lazy-load database, without R.

The database (`Rdata.rdb`) is a sequence of entries: the length of the data in four bytes, then a
zlib stream of an object in R's XDR serialisation. Source: R Internals, sections 1.8 and
"Serialization Formats".
"""

import struct
import zlib
from collections.abc import Iterator

_CHARSXP = 9  # One string.
_STRSXP = 16  # A vector of strings.
_NA_LENGTH = -1


def character_vectors(database: bytes) -> Iterator[list[str]]:
    """Yields the objects that are character vectors.

    Args:
        database: the contents of an .rdb file.

    Yields:
        The strings of one vector; NA is ''.
    """
    offset = 0
    while offset < len(database):
        stream = zlib.decompressobj()
        data = stream.decompress(database[offset + 4 :])
        offset = len(database) - len(stream.unused_data)
        strings = _parse(data)
        if strings is not None:
            yield strings


def _parse(data: bytes) -> list[str] | None:
    """The strings of a serialised character vector; None for any other object."""
    if data[:2] != b"X\n":
        return None
    (version,) = struct.unpack_from(">i", data, 2)
    offset = 14  # Three version numbers follow the two bytes of the format.
    if version >= 3:
        (encoding_length,) = struct.unpack_from(">i", data, offset)
        offset += 4 + encoding_length
    flags, length = struct.unpack_from(">ii", data, offset)
    if flags & 0xFF != _STRSXP:
        return None
    offset += 8
    strings = []
    for _ in range(length):
        flags, num_bytes = struct.unpack_from(">ii", data, offset)
        assert flags & 0xFF == _CHARSXP, flags
        offset += 8
        num_bytes = 0 if num_bytes == _NA_LENGTH else num_bytes
        strings.append(data[offset : offset + num_bytes].decode())
        offset += num_bytes
    return strings
