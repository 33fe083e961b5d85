"""Encodes documents into token files, made once and kept in a cache.

A directory of token files, `CACHE/<corpus>-<tokenizer>-<key>/`:

    manifest.json                    what it was made from, its counts, sha256 of its files
    train/<domain>.tokens.npy        uint16 or uint32 [N], the documents one after the other
    train/<domain>.offsets.npy       int64 [documents + 1], where each begins; the last entry is N
    heldout/<domain>...              the same for the held-out split

The key is a hash of all that determines the contents, so a directory is never out of date. It is
written under a temporary name and renamed when complete: a killed process leaves no directory of
that name. Files are read-only, and opening them compares their checksums: damaged files are made
again.
"""

import array
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from moe_jax.config.check import require
from moe_jax.data.documents import (
    SPLITS,
    TRAIN,
    Corpus,
    Document,
    heldout_digests,
    text_digest,
)
from moe_jax.data.npy_writer import NpyWriter, flush_to_disk
from moe_jax.data.tokenizer import DocumentEncoder
from moe_jax.files import sha256_of, whole_or_absent

FORMAT_VERSION = 4  # Also goes up when the held-out rule changes.
_MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Size of one domain in one split.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, including two per document (`bos_id`, `eos_id`).
        bytes: UTF-8 bytes of the text.
    """

    documents: int
    tokens: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """A finished directory of token files.

    Attributes:
        directory: its path.
        domains: names of the domains; a domain's id is its index here.
        counts: by split, then by domain.
        dtype: dtype of the tokens, uint16 or uint32.
    """

    directory: pathlib.Path
    domains: tuple[str, ...]
    counts: dict[str, dict[str, Counts]]
    dtype: np.dtype

    def tokens_path(self, split: str, domain: str) -> pathlib.Path:
        """Path of a .npy file of `dtype` [N]."""
        return self.directory / split / f"{domain}.tokens.npy"

    def offsets_path(self, split: str, domain: str) -> pathlib.Path:
        """Path of an int64 [documents + 1] .npy file."""
        return self.directory / split / f"{domain}.offsets.npy"


def prepare_token_files(
    corpus: Corpus,
    encoder: DocumentEncoder,
    *,
    heldout_fraction: float,
    cache_dir: str = "",
    corpus_sha256: str = "",
) -> TokenFiles:
    """Opens the token files of a corpus, making them first if the cache has no intact ones.

    Safe under concurrent calls: one makes the files while the others wait for it. Processes
    that share a cache directory must see each other's `flock`.

    Training documents whose text is also held out, in any domain, are left out.

    Args:
        corpus: the documents.
        encoder: encodes the documents: a tokenizer, or the `encoder` of an objective.
        heldout_fraction: share of the text to hold out, in [0, 1).
        cache_dir: '' for `$XDG_CACHE_HOME/moe_jax`, or `~/.cache/moe_jax`.
        corpus_sha256: fingerprint of the corpus that the caller opened; '' for the current one.

    Returns:
        The token files.

    Raises:
        ValueError: if `heldout_fraction` is out of range, the corpus has no text, it changed
            while it was read, or it is packed and damaged.
        OSError: the cache cannot be written.
    """
    if not 0 <= heldout_fraction < 1:
        raise ValueError(
            f"heldout_fraction must be a share of the text, in [0, 1): got {heldout_fraction}. "
            "Set config.data.heldout_fraction, e.g. to 0.03."
        )
    source = {
        "format_version": FORMAT_VERSION,
        "corpus_sha256": corpus_sha256 or corpus.fingerprint(),
        "tokenizer_sha256": encoder.fingerprint(),
        "heldout_fraction": heldout_fraction,
        "dtype": encoder.dtype.name,
    }
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
    cache = pathlib.Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    with _writing_to(cache):
        unpacked = corpus.unpacked(cache, source)
        if unpacked is not None:
            try:
                return open_token_files(unpacked, source)
            except DamagedTokenFilesError as damage:
                logger.warning("%s It is unpacked again.", damage)
                shutil.rmtree(unpacked)
            try:
                return open_token_files(corpus.unpacked(cache, source) or unpacked, source)
            except DamagedTokenFilesError:
                raise ValueError(
                    "A packed corpus must have the tokens that its manifest names: "
                    f"{corpus.name!r} has others. Copy or pack it again."
                ) from None
    directory = cache / f"{_slug(corpus.name)}-{_slug(encoder.name)}-{key}"
    try:
        return open_token_files(directory, source)
    except FileNotFoundError:
        pass
    except DamagedTokenFilesError as damage:
        logger.warning("%s They are made again.", damage)
    with _writing_to(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f".{directory.name}.lock")):
            with contextlib.suppress(FileNotFoundError, DamagedTokenFilesError):
                return open_token_files(directory, source)  # Another process made it.
            names = {"corpus": corpus.name, "tokenizer": encoder.name}
            _build(directory, corpus, encoder, source | names)
    return open_token_files(directory, source)


class DamagedTokenFilesError(Exception):
    """Token files differ from what was written."""


def open_token_files(directory: pathlib.Path, source: dict[str, Any]) -> TokenFiles:
    """Opens a directory that `prepare_token_files` made, and compares its checksums.

    Reads every byte once: about a second for 1 to 2 GB of tokens.

    Args:
        directory: the finished directory.
        source: what it was made from; its manifest must have the same entries.

    Returns:
        The token files.

    Raises:
        FileNotFoundError: there is no such directory.
        DamagedTokenFilesError: with what is damaged.
    """
    if not directory.exists():
        raise FileNotFoundError(f"There are no token files in {directory}.")
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        counts = {
            split: {domain: Counts(**count) for domain, count in domains.items()}
            for split, domains in manifest["counts"].items()
        }
        dtype, sha256 = np.dtype(manifest["dtype"]), dict(manifest["sha256"])
        files = TokenFiles(directory, tuple(manifest["domains"]), counts, dtype)
        whole = digest_of_manifest(manifest) == manifest["manifest_sha256"]
        whole = whole and {name: manifest.get(name) for name in source} == source
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise _damage(directory, _MANIFEST)
    for name, expected in sha256.items():
        path = directory / name
        if not path.is_file() or sha256_of(path) != expected:
            raise _damage(directory, name)
    return files


def digest_of_manifest(manifest: dict[str, Any]) -> str:
    """Sha256 of a manifest except its own `manifest_sha256`."""
    rest = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _damage(directory: pathlib.Path, name: str) -> DamagedTokenFilesError:
    return DamagedTokenFilesError(
        f"The token files in {directory} are damaged: {name} is not as it was written."
    )


def default_cache_dir() -> pathlib.Path:
    """`$XDG_CACHE_HOME/moe_jax`, or `~/.cache/moe_jax` if that variable is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "moe_jax"


@contextlib.contextmanager
def _writing_to(cache: pathlib.Path) -> Iterator[None]:
    """Makes an error of writing to the cache name the cache and what to do.

    Raises:
        OSError: in one line.
    """
    try:
        yield
    except OSError as error:
        # A failed write names no file; an error with a message of our own has no errno.
        elsewhere = error.filename and not str(error.filename).startswith(str(cache))
        if error.errno is None or elsewhere:
            raise
        raise OSError(
            f"Token files are written to a cache: {cache}: {error.strerror}. Make room or give "
            "permission there, or set config.data.cache_dir to another folder."
        ) from error


def _build(
    directory: pathlib.Path, corpus: Corpus, encoder: DocumentEncoder, manifest: dict[str, Any]
) -> None:
    """Makes the complete `directory`. The caller holds its lock."""
    if directory.exists():
        shutil.rmtree(directory)  # Damaged; its readers keep their open files.
    with whole_or_absent(directory) as partial:
        manifest = manifest | _write_domains(partial, corpus, encoder, manifest)
        require(
            corpus.fingerprint() == manifest["corpus_sha256"],
            "A corpus must not change while it is read",
            f"{corpus.name!r} has changed since it was opened",
            "Start again when it is complete",
        )
        manifest |= {"manifest_sha256": digest_of_manifest(json.loads(json.dumps(manifest)))}
        with (partial / _MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            flush_to_disk(file)
        for path in partial.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o444)
        partial.chmod(0o755)  # A cache may be shared, whatever the umask.


def _write_domains(
    directory: pathlib.Path, corpus: Corpus, encoder: DocumentEncoder, manifest: dict[str, Any]
) -> dict[str, Any]:
    """Writes all files except the manifest, and returns the manifest's entries for them."""
    fraction = manifest["heldout_fraction"]
    never_trains = heldout_digests(corpus, fraction)
    counts: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    repeats: dict[str, int] = {}
    for domain in corpus.domains():
        writer = _DomainWriter(directory, encoder, domain)
        repeats[domain] = writer.write(corpus.documents(domain, fraction), never_trains)
        for split, count in writer.counts().items():
            counts[split][domain] = dataclasses.asdict(count)
    require(
        any(count["documents"] for domains in counts.values() for count in domains.values()),
        "A corpus must have text",
        f"{corpus.name!r} has none in {list(corpus.domains())}",
        "Correct config.data.corpus",
    )
    if any(repeats.values()):
        logger.warning(
            "%d training documents of %r repeat a held-out text and are left out.",
            sum(repeats.values()),
            corpus.name,
        )
    paths = sorted(directory.rglob("*.npy"))
    return {
        "domains": corpus.domains(),
        "counts": counts,
        "repeats_left_out": repeats,
        "sha256": {path.relative_to(directory).as_posix(): sha256_of(path) for path in paths},
    }


class _DomainWriter:
    """Writes one domain's files, in memory that does not grow with its tokens."""

    def __init__(self, directory: pathlib.Path, encoder: DocumentEncoder, domain: str):
        self._directory, self._encoder, self._domain = directory, encoder, domain
        self._offsets = {split: array.array("q", [0]) for split in SPLITS}
        self._bytes = dict.fromkeys(SPLITS, 0)

    def write(
        self, documents: Iterable[tuple[str, Document]], never_trains: frozenset[bytes]
    ) -> int:
        """Writes all documents except repeats of held-out text; returns the number of repeats.

        Args:
            documents: (split, document) of the domain.
            never_trains: digests of held-out text.
        """
        repeats = 0
        with contextlib.ExitStack() as stack:
            tokens = {}
            for split in SPLITS:
                (self._directory / split).mkdir(exist_ok=True)
                path = self._directory / split / f"{self._domain}.tokens.npy"
                tokens[split] = stack.enter_context(NpyWriter.open(path, self._encoder.dtype))
            for split, document in documents:
                if split == TRAIN and text_digest(document.text) in never_trains:
                    repeats += 1
                    continue
                try:
                    ids = self._encoder.encode_document(document.text)
                except ValueError as error:
                    raise ValueError(f"{document.where or document.id}: {error}") from error
                tokens[split].append(ids)
                self._offsets[split].append(self._offsets[split][-1] + len(ids))
                self._bytes[split] += len(document.text.encode())
        for split, offsets in self._offsets.items():
            path = self._directory / split / f"{self._domain}.offsets.npy"
            with path.open("wb") as file:
                np.save(file, np.asarray(offsets, np.int64))
                flush_to_disk(file)
        return repeats

    def counts(self) -> dict[str, Counts]:
        """Counts of what was written, by split."""
        return {
            split: Counts(len(offsets) - 1, offsets[-1], self._bytes[split])
            for split, offsets in self._offsets.items()
        }


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds an exclusive lock, which the system releases however the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _slug(name: str) -> str:
    """The last part of a corpus or tokenizer name, fit for a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name)[-40:].strip("_")
