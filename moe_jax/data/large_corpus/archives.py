"""Reads files from package archives, without unpacking to disk or installing anything."""

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
        *suffixes: the path must end with one of these.
        under: a regular expression that the path must match from its beginning.
        skip: the path may contain none of these.

    Returns:
        A function that is true for selected paths.
    """
    prefix = re.compile(under)

    def wanted(path: str) -> bool:
        is_there = path.endswith(suffixes) and prefix.match(path) is not None
        return is_there and not any(part in path for part in skip)

    return wanted


def read_files(archive: pathlib.Path, wanted: Wanted) -> dict[str, bytes]:
    """Reads the selected regular files of a package.

    Args:
        archive: a .deb, .tgz, .tar.gz, .tar.xz, .zip or .whl.
        wanted: true for paths to read, inside the archive and without a leading `./`.

    Returns:
        Contents by path, sorted by path; .gz files of a tar archive are decompressed.

    Raises:
        OSError: if the archive is damaged.
    """
    with _damage_named(archive):
        return _read_files(archive, wanted)


@contextlib.contextmanager
def _damage_named(archive: pathlib.Path) -> Iterator[None]:
    """Turns errors of damaged archives into an OSError."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise OSError(
            f"An archive must match the published one: {archive} is damaged: {error}. Fetch it "
            "again."
        ) from error


def _read_files(archive: pathlib.Path, wanted: Wanted) -> dict[str, bytes]:
    if archive.suffix == ".deb":
        with _deb_tar(archive) as tar:
            return _select(tar, wanted)
    with archive.open("rb") as file:
        return _read_stream(archive.name, file, wanted)


def read_nested_files(archive: pathlib.Path, inner: Wanted, wanted: Wanted) -> dict[str, bytes]:
    """Reads files of an archive inside a package.

    Args:
        archive: the package.
        inner: selects the inner archive; exactly one file must match.
        wanted: as in `read_files`, for paths inside the inner archive.

    Returns:
        Contents by path, sorted by path.

    Raises:
        OSError: if there is not exactly one inner archive, or an archive is damaged.
    """
    found = read_files(archive, inner)
    if len(found) != 1:
        raise OSError(f"expected one inner archive in {archive}, found {sorted(found)}")
    ((name, contents),) = found.items()
    with _damage_named(archive):
        return _read_stream(name, io.BytesIO(contents), wanted)


def in_hash_order(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Yields (path, contents) in an order that is independent of folders.

    A prefix of the order is then a fair sample of the archive.
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
        process.stdout.read()  # Drains the pipe, or dpkg-deb fails.
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
