"""Text datasets of TensorFlow Datasets (TFDS), read without TensorFlow.

TFDS reads array_record and parquet files by random access, and grain reads tfrecord files, all
without TensorFlow. *Preparing* a dataset, the download and conversion, is another matter: most
builders of text need TensorFlow or Apache Beam for it. So a dataset is prepared once, wherever
that is possible, and read here. `DATASETS` says what each needs.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import grain
import tensorflow_datasets as tfds

from moe_jax.data.documents import HELDOUT, TRAIN, Corpus, Document, split_of

# Names that builders give the main text, the first that is present is read.
TEXT_FEATURES = ("text", "book_text", "passage", "article", "document", "content")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What preparing a dataset takes, besides the network.

    Attributes:
        packages: what must be installed beside TFDS.
        module: to be imported before TFDS knows the name; '' if it knows it by itself. Modules
            of the older builders are imported lazily, so that `tfds.builder('c4/en')` in a
            fresh process finds no c4.
        config: an example of a name with its config.
    """

    packages: tuple[str, ...]
    module: str
    config: str


DATASETS: Mapping[str, Needs] = MappingProxyType(
    {
        "c4": Needs(("apache_beam",), "tensorflow_datasets.text.c4", "c4/en"),
        "librispeech_lm": Needs((), "", "librispeech_lm"),
        "lm1b": Needs(("tensorflow",), "", "lm1b"),
        "pg19": Needs(("tensorflow",), "", "pg19"),
        "tiny_shakespeare": Needs(("tensorflow",), "", "tiny_shakespeare"),
        "wiki40b": Needs(
            ("apache_beam", "tensorflow"), "tensorflow_datasets.text.wiki40b", "wiki40b/en"
        ),
        "wikipedia": Needs(
            ("apache_beam",), "tensorflow_datasets.text.wikipedia", "wikipedia/20230601.en"
        ),
    }
)


class TfdsTextCorpus(Corpus):
    """A prepared TFDS dataset as a corpus of one domain.

    The split `validation` is held out, or `test` where there is no `validation`, and
    `heldout_fraction` has no effect. Where there is neither, documents of the training split
    are held out by the hash of their index.
    """

    def __init__(self, spec: str):
        """Describes the dataset; reads nothing.

        Args:
            spec: `NAME`, `NAME/CONFIG`, either with `:VERSION`, in the directory of TFDS
                (`$TFDS_DATA_DIR` or `~/tensorflow_datasets`), or the path of a prepared
                version's directory; then optionally `@` and the part to train on, such as
                `@train[:1%]`.
        """
        self.name = f"tfds:{spec}"
        self._dataset, _, train_split = spec.partition("@")
        self._train_split = train_split or "train"

    def domains(self) -> tuple[str, ...]:
        """The name of the dataset and its config, as in `c4_en`."""
        info = self._builder.info
        parts = (info.name, info.config_name) if info.config_name else (info.name,)
        return ("_".join(parts).replace("/", "_"),)

    def documents(self, domain: str, heldout_fraction: float) -> Iterator[tuple[str, Document]]:
        """Yields (split, document); see the class for the rule, `Corpus` for the contract."""
        heldout_split = self._heldout_split()
        for document in self._read(self._train_split, domain):
            by_hash = split_of(document.id, heldout_fraction)
            yield TRAIN if heldout_split else by_hash, document
        if heldout_split:
            for document in self._read(heldout_split, domain):
                yield HELDOUT, document

    def fingerprint(self) -> str:
        """Sha256 of the name, version, files and sizes that TFDS has on record."""
        info = self._builder.info
        splits = {
            name: (split.num_examples, split.num_bytes, split.shard_lengths)
            for name, split in info.splits.items()
        }
        record = [info.full_name, str(info.file_format), self._train_split, splits]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    @functools.cached_property
    def _builder(self) -> Any:
        if pathlib.Path(self._dataset).is_dir():
            return tfds.builder_from_directory(self._dataset)
        needs = DATASETS.get(self._base_name)
        if needs and needs.module:
            importlib.import_module(needs.module)
        try:
            builder = tfds.builder(self._dataset)
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(
                f"A TFDS dataset is named as TFDS knows it, or by the directory of a prepared "
                f"version: {self._dataset!r} is neither a name, nor prepared in "
                f"{tfds.core.constants.DATA_DIR}, nor a directory. Correct config.data.corpus."
            ) from error
        if not builder.info.splits:
            raise ValueError(self._not_prepared(builder.data_dir))
        return builder

    @property
    def _base_name(self) -> str:
        return self._dataset.partition("/")[0].partition(":")[0]

    def _heldout_split(self) -> str:
        splits = self._builder.info.splits
        return next((name for name in ("validation", "test") if name in splits), "")

    def _read(self, split: str, domain: str) -> Iterator[Document]:
        feature = self._text_feature()
        for index, example in enumerate(self._examples(split)):
            id_ = f"{split}/{index:09d}"
            text = example[feature]
            text = text.decode() if isinstance(text, bytes) else str(text)
            if text:
                yield Document(domain, id_, text, id_)

    def _examples(self, split: str) -> Iterator[Mapping[str, Any]]:
        info = self._builder.info
        if info.file_format == tfds.core.FileFormat.TFRECORD:
            yield from self._tfrecord_examples(split)
            return
        source = self._builder.as_data_source(split)
        expected = info.splits[split].num_examples
        # TFDS 4.9.10 writes parquet by `_batched`, which skips examples after the first hundred
        # of a shard, and its parquet source ignores the limits of a slice.
        if info.file_format == tfds.core.FileFormat.PARQUET and len(source) != expected:
            raise ValueError(
                f"A parquet dataset must hold the examples that its metadata count: {split!r} in "
                f"{self._builder.data_dir} has {len(source)}, not {expected}. TFDS loses examples "
                "when it writes parquet, and reads no part of a parquet split: prepare the "
                "dataset with file_format='array_record'."
            )
        for index in range(len(source)):
            yield source[index]

    def _tfrecord_examples(self, split: str) -> Iterator[Mapping[str, Any]]:
        info = self._builder.info
        if split not in info.splits:
            raise ValueError(
                "Of a dataset of tfrecord files a whole split is read, in order: "
                f"{split!r} is none of {sorted(info.splits)} in {self._builder.data_dir}. "
                "Name one, or prepare the dataset with file_format='array_record'."
            )
        for path in info.splits[split].filepaths:
            for record in grain.experimental.TFRecordIterDataset(str(path)):
                yield info.features.deserialize_example_np(record)

    def _text_feature(self) -> str:
        features = self._builder.info.features
        for name in TEXT_FEATURES:
            if name in features:
                return name
        raise ValueError(
            f"A text dataset has a feature named one of {TEXT_FEATURES}: {self._dataset!r} has "
            f"{sorted(features)}. Add its name to moe_jax.data.tfds_text.TEXT_FEATURES."
        )

    def _not_prepared(self, directory: str) -> str:
        known = DATASETS.get(self._base_name, Needs((), "", ""))
        installed = "".join(f", {package}" for package in known.packages)
        imports = f"import {known.module}; " if known.module else ""
        return (
            f"A TFDS dataset must have been prepared before it is read: there is no "
            f"{self._dataset!r} in {directory}. Where there is a network and "
            f"tensorflow_datasets{installed}, run\n"
            f'  python -c "{imports}import tensorflow_datasets as tfds; '
            f"tfds.builder('{self._dataset}', file_format='array_record').download_and_prepare()\""
            "\nand set the environment variable TFDS_DATA_DIR to where the result is."
        )
