"""Files out of package archives, without unpacking to disk or installing anything."""

import contextlib
import gzip
import hashlib
import io
import lzma
import pathlib
import re
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO

Wanted = Callable[[str], bool]


def selector(*suffixes: str, under: str = "", skip: tuple[str, ...] = ()) -> Wanted:
    """Selects files by their paths.

    Args:
        *suffixes: one of which the path must end with.
        under: a regular expression that the path must match from its beginning.
        skip: none of which the path may contain.

    Returns:
        A function from a path to whether it is selected.
    """
    prefix = re.compile(under)

    def wanted(path: str) -> bool:
        is_there = path.endswith(suffixes) and prefix.match(path) is not None
        return is_there and not any(part in path for part in skip)

    return wanted


def read_files(archive: pathlib.Path, wanted: Wanted) -> dict[str, bytes]:
    """Reads the regular files of a package whose names are wanted.

    Args:
        archive: a .deb, .tgz, .tar.gz, .tar.xz, .zip or .whl.
        wanted: from a path inside the archive, without a leading `./`, to whether to read it.

    Returns:
        Contents by path, in the order of the paths; .gz files are decompressed.

    Raises:
        OSError: if the archive is damaged.
    """
    with _damage_named(archive):
        return _read_files(archive, wanted)


@contextlib.contextmanager
def _damage_named(archive: pathlib.Path) -> Iterator[None]:
    """Makes an OSError of what the readers of archives raise."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise OSError(
            f"An archive is as it was published: {archive} is damaged: {error}. Fetch it again."
        ) from error


def _read_files(archive: pathlib.Path, wanted: Wanted) -> dict[str, bytes]:
    if archive.suffix == ".deb":
        with _deb_tar(archive) as tar:
            return _select(tar, wanted)
    with archive.open("rb") as file:
        return _read_stream(archive.name, file, wanted)


def read_nested_files(archive: pathlib.Path, inner: Wanted, wanted: Wanted) -> dict[str, bytes]:
    """Reads files of an archive that is itself a file of a package.

    Args:
        archive: the package.
        inner: selects the inner archive, of which there must be one.
        wanted: as in `read_files`, of paths inside the inner archive.

    Returns:
        Contents by path, in the order of the paths.

    Raises:
        OSError: if there is not one inner archive, or it is damaged.
    """
    found = read_files(archive, inner)
    if len(found) != 1:
        raise OSError(f"expected one inner archive in {archive}, found {sorted(found)}")
    ((name, contents),) = found.items()
    with _damage_named(archive):
        return _read_stream(name, io.BytesIO(contents), wanted)


def in_hash_order(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Yields (path, contents) in an order that has nothing to do with folders.

    A prefix of it is then a fair sample of the archive.
    """
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        yield name, files[name]


def _read_stream(name: str, stream: IO[bytes], wanted: Wanted) -> dict[str, bytes]:
    if name.endswith((".zip", ".whl")):
        with zipfile.ZipFile(stream) as archive:
            return {n: archive.read(n) for n in sorted(archive.namelist()) if wanted(n)}
    with tarfile.open(fileobj=stream) as tar:
        return _select(tar, wanted)


@contextlib.contextmanager
def _deb_tar(archive: pathlib.Path) -> Iterator[tarfile.TarFile]:
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            yield tar
        process.stdout.read()  # What follows the last file, lest dpkg-deb lose its reader.
    if process.returncode:
        raise OSError(f"`{' '.join(command)}` failed with status {process.returncode}")


def _select(tar: tarfile.TarFile, wanted: Wanted) -> dict[str, bytes]:
    files = {}
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isfile() and wanted(name) and (stream := tar.extractfile(member)) is not None:
            contents = stream.read()
            files[name] = gzip.decompress(contents) if name.endswith(".gz") else contents
    return dict(sorted(files.items()))
