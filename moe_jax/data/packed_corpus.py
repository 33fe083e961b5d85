"""A portable corpus of tokens without their text: `packed:DIR`.

    DIR/manifest.json       the manifest of the token files
    DIR/tokens.tar.xz       the token files, see `token_files.py`
    DIR/<tokenizer>         the tokenizer's file

`python -m moe_jax.data.pack` writes it. The token files are unpacked into the cache on first
use. Runs on it need the tokenizer and the held-out fraction that it was packed with.
"""

import fcntl
import json
import lzma
import pathlib
import shutil
import tarfile
from collections.abc import Iterator
from typing import Any

from moe_jax.config.check import require
from moe_jax.data.documents import Corpus, Document
from moe_jax.data.open_file import check_file
from moe_jax.files import whole_or_absent

MANIFEST, TOKENS = "manifest.json", "tokens.tar.xz"


class PackedCorpus(Corpus):
    """Packed token files, without documents."""

    def __init__(self, name: str, path: str):
        """Reads the manifest.

        Args:
            name: name of the corpus.
            path: its folder; a leading ~ is the home of the user.

        Raises:
            ValueError: a file of the folder is missing, or the manifest is damaged.
        """
        self.name = name
        self._directory = pathlib.Path(path).expanduser()
        manifest = self._directory / MANIFEST
        for file in (manifest, self._directory / TOKENS):
            check_file(file, f"A packed corpus has {file.name}, which")
        try:
            self._manifest: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
            self._domains = tuple(self._manifest["domains"])
            self._sha256 = str(self._manifest["corpus_sha256"])
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"The manifest of a packed corpus must be as it was written: {manifest} is "
                "damaged. Copy or pack it again."
            ) from None

    def domains(self) -> tuple[str, ...]:
        """Names of the domains."""
        return self._domains

    def documents(self, domain: str, heldout_fraction: float) -> Iterator[tuple[str, Document]]:
        """Refused: the corpus has no text.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"A packed corpus has only tokens: {self.name!r}. Name the corpus that it was packed "
            "from, to read documents."
        )

    def fingerprint(self) -> str:
        """Hexadecimal sha256 of the corpus and of how much of it was packed."""
        return self._sha256

    def way_to_hold_out(self, fraction: float) -> str:
        """See `Corpus`."""
        del fraction
        return "Pack it again with a larger --heldout_fraction, and set that here"

    def unpacked(self, cache: pathlib.Path, source: dict[str, Any]) -> pathlib.Path:
        """The folder of the token files, unpacked into the cache unless they are there.

        Args:
            cache: the folder of the cache.
            source: what the run makes token files from; it must match the manifest.

        Raises:
            ValueError: `source` does not match, or the archive is damaged.
            OSError: the cache cannot be written.
        """
        for name, value in source.items():
            require(
                self._manifest.get(name) == value,
                f"packed tokens must match the run's {name.removesuffix('_sha256')}",
                f"{self.name!r} has {self._manifest.get(name)}, the run {value}",
                "Set data.tokenizer and data.heldout_fraction as it was packed, or pack it again",
            )
        directory = cache / f"packed-{self._manifest['manifest_sha256'][:16]}"
        if directory.is_dir():
            return directory
        cache.mkdir(parents=True, exist_ok=True)
        with directory.with_name(f".{directory.name}.lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if directory.is_dir():
                return directory  # Another process unpacked it.
            try:
                with whole_or_absent(directory) as partial:
                    with tarfile.open(self._directory / TOKENS, "r:xz") as archive:
                        archive.extractall(partial, filter="data")
                    shutil.copyfile(self._directory / MANIFEST, partial / MANIFEST)
                    partial.chmod(0o755)  # A cache may be shared, whatever the umask.
            except (tarfile.TarError, EOFError, lzma.LZMAError) as error:
                raise ValueError(
                    f"An archive of tokens must be as it was written: {self._directory / TOKENS}: "
                    f"{error}. Copy or pack it again."
                ) from error
        return directory
