"""Documents to files of tokens, made once and kept in a cache.

A directory of token files, `CACHE/<corpus>-<tokenizer>-<key>/`:

    manifest.json                    what it was made from, and its counts
    train/<domain>.tokens.npy        uint16 [N], the documents one after the other
    train/<domain>.offsets.npy       int64 [documents + 1], where each begins; the last is N
    heldout/<domain>...              the same for the held-out split

The key is a hash of all that decides the contents, so a directory is never out of date. It is
written under a temporary name and renamed when whole: a kill leaves no directory of that name.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from moe_jax.config.check import require
from moe_jax.data.documents import SPLITS, Corpus
from moe_jax.data.tokenizers import Tokenizer

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Counts:
    """Size of one domain in one split.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, two a document (`bos_id`, `eos_id`) included.
        bytes: UTF-8 bytes of the text.
    """

    documents: int
    tokens: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """A finished directory of token files.

    Attributes:
        directory: where it is.
        domains: names of the domains; a domain's id is its index here.
        counts: by split, then by domain.
    """

    directory: pathlib.Path
    domains: tuple[str, ...]
    counts: dict[str, dict[str, Counts]]

    def tokens_path(self, split: str, domain: str) -> pathlib.Path:
        """Path of a uint16 [N] .npy file."""
        return self.directory / split / f"{domain}.tokens.npy"

    def offsets_path(self, split: str, domain: str) -> pathlib.Path:
        """Path of an int64 [documents + 1] .npy file."""
        return self.directory / split / f"{domain}.offsets.npy"


def prepare_token_files(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    heldout_fraction: float,
    cache_dir: str = "",
    corpus_sha256: str = "",
) -> TokenFiles:
    """Opens the token files of a corpus, making them first if the cache has none.

    Safe under concurrent calls: one makes the files while the others wait for it. Processes
    that share a cache directory must see each other's `flock`.

    Args:
        corpus: the documents.
        tokenizer: what encodes them.
        heldout_fraction: share of the text to hold out, in [0, 1).
        cache_dir: '' for `$XDG_CACHE_HOME/moe_jax`, or `~/.cache/moe_jax`.
        corpus_sha256: of the corpus as the caller knows it; '' for as it is now.

    Returns:
        The token files.

    Raises:
        ValueError: if `heldout_fraction` is out of range, or the corpus changed while it was read.
    """
    if not 0 <= heldout_fraction < 1:
        raise ValueError(
            f"heldout_fraction is a share of the text, in [0, 1): got {heldout_fraction}. "
            "Set config.data.heldout_fraction, e.g. to 0.03."
        )
    source = {
        "format_version": FORMAT_VERSION,
        "corpus_sha256": corpus_sha256 or corpus.fingerprint(),
        "tokenizer_sha256": tokenizer.fingerprint(),
        "heldout_fraction": heldout_fraction,
    }
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()[:16]
    cache = pathlib.Path(cache_dir) if cache_dir else default_cache_dir()
    directory = cache / f"{_slug(corpus.name)}-{_slug(tokenizer.name)}-{key}"
    if not directory.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f".{directory.name}.lock")):
            if not directory.exists():
                names = {"corpus": corpus.name, "tokenizer": tokenizer.name}
                _build(directory, corpus, tokenizer, source | names)
    return open_token_files(directory)


def open_token_files(directory: pathlib.Path) -> TokenFiles:
    """Opens a directory that `prepare_token_files` made.

    Args:
        directory: the finished directory.

    Returns:
        The token files.

    Raises:
        ValueError: if the directory has no manifest of this format version.
    """
    manifest_path = directory / _MANIFEST
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"Token files need a {_MANIFEST} of format version {FORMAT_VERSION}: "
            f"{directory} has {manifest.get('format_version', 'none')}. "
            "Delete the directory; it is made anew at the next start."
        )
    counts = {
        split: {domain: Counts(**count) for domain, count in domains.items()}
        for split, domains in manifest["counts"].items()
    }
    return TokenFiles(directory, tuple(manifest["domains"]), counts)


def default_cache_dir() -> pathlib.Path:
    """`$XDG_CACHE_HOME/moe_jax`, or `~/.cache/moe_jax` where that variable is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "moe_jax"


def _build(
    directory: pathlib.Path, corpus: Corpus, tokenizer: Tokenizer, manifest: dict[str, Any]
) -> None:
    """Makes `directory` whole. The caller holds its lock."""
    prefix = f".{directory.name}.partial-"
    for abandoned in directory.parent.glob(f"{prefix}*"):
        shutil.rmtree(abandoned, ignore_errors=True)  # Its builder was killed: we have the lock.
    partial = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    try:
        heldout_fraction = manifest["heldout_fraction"]
        counts: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
        for domain in corpus.domains():
            domain_counts = _write_domain(partial, corpus, tokenizer, domain, heldout_fraction)
            for split, count in domain_counts.items():
                counts[split][domain] = dataclasses.asdict(count)
        require(
            corpus.fingerprint() == manifest["corpus_sha256"],
            "A corpus stays as it is while it is read",
            f"{corpus.name!r} has changed since it was opened",
            "Start again when it is complete",
        )
        contents = manifest | {"domains": corpus.domains(), "counts": counts}
        with (partial / _MANIFEST).open("w") as file:
            json.dump(contents, file, indent=1)
            _flush_to_disk(file)
        partial.chmod(0o755)  # mkdtemp is private; a cache may be shared.
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_domain(
    directory: pathlib.Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    domain: str,
    heldout_fraction: float,
) -> dict[str, Counts]:
    """Writes one domain's files, in memory that does not grow with its tokens."""
    with contextlib.ExitStack() as stack:
        tokens, offsets, num_bytes = {}, {split: [0] for split in SPLITS}, dict.fromkeys(SPLITS, 0)
        for split in SPLITS:
            (directory / split).mkdir(exist_ok=True)
            path = directory / split / f"{domain}.tokens.npy"
            tokens[split] = stack.enter_context(_NpyWriter.open(path, np.dtype(np.uint16)))
        for split, document in corpus.documents(domain, heldout_fraction):
            ids = tokenizer.encode_document(document.text)
            tokens[split].append(ids)
            offsets[split].append(offsets[split][-1] + len(ids))
            num_bytes[split] += len(document.text.encode())
    for split in SPLITS:
        with (directory / split / f"{domain}.offsets.npy").open("wb") as file:
            np.save(file, np.asarray(offsets[split], np.int64))
            _flush_to_disk(file)
    return {
        split: Counts(len(offsets[split]) - 1, offsets[split][-1], num_bytes[split])
        for split in SPLITS
    }


class _NpyWriter:
    """Appends to a one-dimensional .npy file whose length is not known beforehand."""

    def __init__(self, file: BinaryIO, dtype: np.dtype):
        self._file = file
        self._dtype = dtype
        self._length = 0
        self._write_header()

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: pathlib.Path, dtype: np.dtype) -> Iterator["_NpyWriter"]:
        with path.open("wb") as file:
            writer = cls(file, dtype)
            yield writer
            file.seek(0)
            writer._write_header()
            _flush_to_disk(file)

    def append(self, values: np.ndarray) -> None:
        assert values.dtype == self._dtype, values.dtype
        self._file.write(values.tobytes())
        self._length += len(values)

    def _write_header(self) -> None:
        # The format pads its header so that the first dimension can grow in place.
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _flush_to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds an exclusive lock, which the system releases however the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _slug(name: str) -> str:
    """The last part of a corpus or tokenizer name, fit for a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name)[-40:].strip("_")
