"""The data of a run, opened once: corpus, tokenizer and token files, with their checksums."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moe_jax.config import DataConfig
from moe_jax.data.corpora import open_corpus
from moe_jax.data.documents import Corpus
from moe_jax.data.file_layout import files_of_pattern
from moe_jax.data.records import Fields
from moe_jax.data.token_files import TokenFiles, prepare_token_files
from moe_jax.data.tokenizers import Tokenizer, open_tokenizer


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run, as it was when it was opened.

    Batches for training and evaluation come from this one object, so that an edit of the corpus
    during a run changes none of them.

    Attributes:
        config: the config that was opened.
        corpus: the documents.
        tokenizer: what encodes them.
        domains: names of the domains; the `domain` of an example is an index into them, whether or
            not `config.domain_weights` leaves some out of training.
        fingerprints: hexadecimal sha256 of the contents, by "corpus" and "tokenizer", and by the
            names of other files that the objective reads.
    """

    config: DataConfig
    corpus: Corpus
    tokenizer: Tokenizer
    domains: tuple[str, ...]
    fingerprints: Mapping[str, str]

    @functools.cached_property
    def files(self) -> TokenFiles:
        """The token files, found in the cache or made on first use.

        Raises:
            ValueError: the corpus has changed since it was opened, or a document is refused.
        """
        return prepare_token_files(
            self.corpus,
            self.config.objective.encoder(self.tokenizer),
            heldout_fraction=self.config.heldout_fraction,
            cache_dir=self.config.cache_dir,
            corpus_sha256=self.fingerprints["corpus"],
        )


def open_tokenizer_of(config: DataConfig) -> Tokenizer:
    """Opens the tokenizer of a run, without its corpus."""
    return open_tokenizer(config.tokenizer, config.bos_token, config.eos_token)


def with_whole_paths(config: DataConfig) -> DataConfig:
    """The config with absolute data paths, for use from another folder."""

    def whole(name: str) -> str:
        form, colon, path = name.rpartition(":")
        place = pathlib.Path(path)
        is_path = place.exists() or bool(files_of_pattern(place))
        is_path = is_path and name not in ("embedded", "byte", "bytes")
        return f"{form}{colon}{place.absolute()}" if is_path else name

    paths: Any = {name: whole(getattr(config, name)) for name in ("corpus", "tokenizer")}
    return dataclasses.replace(config, objective=config.objective.with_whole_paths(), **paths)


def open_data(config: DataConfig) -> Data:
    """Opens and checksums the corpus and the tokenizer.

    Args:
        config: which corpus and tokenizer, and how to read them.

    Returns:
        The data. Token files are made when they are first needed.

    Raises:
        ValueError: there is no such corpus or tokenizer.
    """
    objective = config.objective
    named = (config.text_field, config.id_field, config.group_field)
    fields = Fields(*named, conversations=objective.reads_conversations)
    corpus = open_corpus(config.corpus, fields)
    tokenizer = open_tokenizer_of(config)
    fingerprints = {"corpus": corpus.fingerprint(), "tokenizer": tokenizer.fingerprint()}
    fingerprints |= objective.fingerprints(tokenizer)
    return Data(config, corpus, tokenizer, corpus.domains(), MappingProxyType(fingerprints))
