"""Downloads packages of three registries once, and compares them with the recorded ones.

A work directory has one directory per package, with the archive and the sha256 of the complete
download. A download goes to a `.partial` directory first, so that an interrupted one is never
taken for complete.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType

from moe_jax.files import sha256_of

_RECORDED_FILE = pathlib.Path(__file__).parent.parent / "large_corpus_packages.json"


@dataclasses.dataclass(frozen=True, order=True)
class Package:
    """A package of a registry.

    Attributes:
        kind: `deb`, `npm` or `pip`.
        name: name in its registry.
        version: '' for a deb, because a mirror has only the newest version.
    """

    kind: str
    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


class FetchError(Exception):
    """A package cannot be downloaded."""


@dataclasses.dataclass(frozen=True)
class Downloader:
    """How to download the packages of one kind.

    Attributes:
        tools: names of the programs that it needs.
        available: whether they are installed.
        command: from a package to the command line that downloads it into the current directory.
        advice: what to do when it fails.
    """

    tools: str
    available: Callable[[], bool]
    command: Callable[[Package], list[str]]
    advice: str


def _deb_command(package: Package) -> list[str]:
    return ["apt-get", "download", "--quiet", package.name]


def _npm_command(package: Package) -> list[str]:
    return ["npm", "pack", "--silent", f"{package.name}@{package.version}"]


def _pip_command(package: Package) -> list[str]:
    requirement = f"{package.name}=={package.version}"
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]


DOWNLOADERS: Mapping[str, Downloader] = MappingProxyType(
    {
        "deb": Downloader(
            "apt-get and dpkg-deb",
            lambda: shutil.which("apt-get") is not None and shutil.which("dpkg-deb") is not None,
            _deb_command,
            "Run `apt-get update` if its lists are empty; the packages are of Debian 12.",
        ),
        "npm": Downloader(
            "npm", lambda: shutil.which("npm") is not None, _npm_command, "Check `npm ping`."
        ),
        "pip": Downloader(
            "pip",
            lambda: importlib.util.find_spec("pip") is not None,
            _pip_command,
            "Check `python -m pip --version` and the connection.",
        ),
    }
)


def fetch(
    package: Package,
    work: pathlib.Path,
    *,
    downloaders: Mapping[str, Downloader] = DOWNLOADERS,
) -> pathlib.Path:
    """Returns a package's archive, downloading it unless an intact copy exists.

    Args:
        package: what to fetch.
        work: directory of the downloads; created if needed.
        downloaders: by kind; replaced in tests.

    Returns:
        Path of the archive.

    Raises:
        FetchError: if the program that downloads it is missing or fails.
    """
    directory = work / f"{package.kind}-{package.name.replace('/', '-')}"
    if (archive := _intact_archive(directory)) is not None:
        return archive
    downloader = downloaders[package.kind]
    if not downloader.available():
        raise FetchError(f"{package}: {downloader.tools} not found")
    partial = directory.with_name(f"{directory.name}.partial")
    for stale in (directory, partial):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    command = downloader.command(package)
    done = subprocess.run(command, cwd=partial, capture_output=True, text=True, check=False)
    files = list(partial.iterdir())
    if done.returncode or len(files) != 1:
        raise FetchError(
            f"{package}: `{' '.join(command)}` gave {len(files)} files and status "
            f"{done.returncode}. {downloader.advice} {done.stderr.strip()[-300:]}"
        )
    (partial / "SHA256SUMS").write_text(f"{sha256_of(files[0])}  {files[0].name}\n")
    partial.rename(directory)
    return directory / files[0].name


def _intact_archive(directory: pathlib.Path) -> pathlib.Path | None:
    """The archive in `directory`; None if it is missing or has changed."""
    sums = directory / "SHA256SUMS"
    if not sums.exists():
        return None
    digest, name = sums.read_text().split()
    archive = directory / name
    return archive if archive.exists() and sha256_of(archive) == digest else None


def warn_of_changes(
    archives: Mapping[Package, pathlib.Path], recorded: Mapping[str, str] | None = None
) -> tuple[Package, ...]:
    """Warns of packages that differ from those of the recorded build.

    Args:
        archives: the fetched packages.
        recorded: sha256 by package name; None for the list that ships with moe_jax.

    Returns:
        The packages that differ; the corpus differs from the recorded one in their domains.
    """
    known = recorded_sha256() if recorded is None else recorded
    changed = tuple(p for p, path in archives.items() if sha256_of(path) != known.get(str(p)))
    for package in changed:
        warnings.warn(
            f"{package} is {archives[package].name}, not the one of the recorded build: "
            "figures on its domains are not comparable with published ones.",
            stacklevel=2,
        )
    return changed


@functools.cache
def recorded_sha256() -> Mapping[str, str]:
    """Sha256 of every package of the recorded build, by `str(package)`."""
    recorded = json.loads(_RECORDED_FILE.read_text())
    return MappingProxyType({name: entry["sha256"] for name, entry in recorded.items()})
