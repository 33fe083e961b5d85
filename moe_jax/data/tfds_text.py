"""Text datasets of TensorFlow Datasets (TFDS), read without TensorFlow.

TFDS reads array_record and parquet files by random access, and grain reads tfrecord files, all
without TensorFlow. *Preparing* a dataset, the download and conversion, is different: most text
builders need TensorFlow or Apache Beam. So a dataset is prepared once, wherever that is possible,
and read here. `DATASETS` lists what each dataset needs.
"""

import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from moe_jax.config.check import require
from moe_jax.data.documents import HELDOUT, TRAIN, Corpus, Document, split_documents
from moe_jax.data.open_file import decode
from moe_jax.data.records import Fields, choose_text_field, document_of

# Names that builders give the main text; the first one present is read.
TEXT_FEATURES = ("text", "book_text", "passage", "article", "document", "content")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What preparing a dataset needs, in addition to the network.

    Attributes:
        packages: packages to install in addition to TFDS.
        module: module to import before TFDS knows the name; '' if none is needed. TFDS imports
            older builders lazily, so that `tfds.builder('c4/en')` in a fresh process finds no
            c4.
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

    The split `validation`, or else `test`, is held out, and `heldout_fraction` has no effect; a
    part to train on that contains some of it is refused. Without either split, documents of the
    training split are held out by the hash of their group, id or index.
    """

    def __init__(self, spec: str, fields: Fields | None = None):
        """Describes the dataset; reads nothing.

        Args:
            spec: `NAME`, `NAME/CONFIG`, either with `:VERSION`, in the directory of TFDS
                (`$TFDS_DATA_DIR` or `~/tensorflow_datasets`), or the path of a prepared
                version's directory; then optionally `@` and the part to train on, such as
                `@train[:1%]`.
            fields: features to read; by default the text is the first of `TEXT_FEATURES`.
        """
        self._fields = fields or Fields()
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
        self._check_split(heldout_split)
        training = ((document, False) for document in self._read(self._train_split, domain))
        if not heldout_split:
            yield from split_documents(training, heldout_fraction)
            return
        for document, _ in training:
            yield TRAIN, document
        for document in self._read(heldout_split, domain):
            yield HELDOUT, document

    def fingerprint(self) -> str:
        """Sha256 of TFDS's metadata, and of the files that are read."""
        info, heldout_split = self._builder.info, self._heldout_split()
        read = self._check_split(heldout_split) | ({heldout_split} if heldout_split else set())
        splits = {
            name: (split.num_examples, split.num_bytes, split.shard_lengths)
            for name, split in info.splits.items()
        }
        names = [self._text_feature(), *self._fields.names[1:]]
        record = [info.full_name, str(info.file_format), self._train_split, splits, names]
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
        for path in (path for name in sorted(read) for path in info.splits[name].filepaths):
            if pathlib.Path(path).is_file():
                with pathlib.Path(path).open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _check_split(self, heldout_split: str) -> set[str]:
        """The splits that the part to train on reads.

        Raises:
            ValueError: there is no such split, or a document would train twice or is held out.
        """
        ranges = self._ranges(self._train_split)
        for index, (name, start, stop) in enumerate(ranges):
            require(
                name != heldout_split,
                f"The split {heldout_split!r} of a TFDS dataset is held out and never trains",
                f"config.data.corpus={self.name!r}",
                "Leave it out of what follows the @",
            )
            for other, other_start, other_stop in ranges[:index]:
                require(
                    name != other or stop <= other_start or other_stop <= start,
                    "A part of a TFDS dataset must hold each document only once",
                    f"{self._train_split!r} holds some of {name!r} twice",
                    f"Correct config.data.corpus={self.name!r}",
                )
        return {name for name, _, _ in ranges}

    def _ranges(self, split: str) -> list[tuple[str, int, int]]:
        """The name, start and end of each range of examples in a part such as `train[:1%]`."""
        splits = self._builder.info.splits
        try:
            parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
        except (ValueError, AssertionError, KeyError) as error:
            raise ValueError(
                f"A TFDS dataset must train on a part of its splits {sorted(splits)}: {split!r}: "
                f"{' '.join(str(error).split())} Correct config.data.corpus={self.name!r}."
            ) from None
        return [
            (
                part.splitname,
                part.from_ or 0,
                splits[part.splitname].num_examples if part.to is None else part.to,
            )
            for part in parts
        ]

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
                f"A TFDS dataset must be named as TFDS knows it, or by the directory of a prepared "
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
        names = self._fields.names
        feature = self._text_feature()
        # Numbered within the whole split, so that a part of it holds out what the whole does.
        *others, (name, start, _) = self._ranges(split)
        ranges = [(other, range(first, stop)) for other, first, stop in others]
        places = (
            f"{name}/{index:09d}"
            for name, numbers in [*ranges, (name, itertools.count(start))]
            for index in numbers
        )
        for where, example in zip(places, self._examples(split), strict=False):
            # An id and a group only if the config names them; otherwise the index is the id.
            record = {"text": _decoded(example[feature], f"{self.name} {where}"), "id": where}
            for key, name in zip(("id", "group"), names[1:], strict=True):
                if getattr(self._fields, key):
                    record[key] = _decoded(example[name], f"{self.name} {where}")
            document = document_of(record, where, domain, Fields())
            if document.text:
                yield document

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
                "A tfrecord dataset is read in whole splits, in order: "
                f"{split!r} is not one of {sorted(info.splits)} in {self._builder.data_dir}. "
                "Name one, or prepare the dataset with file_format='array_record'."
            )
        for path in info.splits[split].filepaths:
            for record in grain.experimental.TFRecordIterDataset(str(path)):
                yield info.features.deserialize_example_np(record)

    def _text_feature(self) -> str:
        features = self._builder.info.features
        wanted = self._fields.text
        name = wanted or next((name for name in TEXT_FEATURES if name in features), "")
        texts = sorted(key for key in features if _is_text(features[key]))
        require(
            name in texts,
            "A document must have its text in a feature of text, "
            f"{repr(wanted) if wanted else 'one of'}"
            f"{'' if wanted else ' ' + ', '.join(TEXT_FEATURES)}",
            f"{self._dataset!r} has {name!r} as {type(features[name]).__name__} "
            f"of {features[name].np_dtype}"
            if name in features
            else f"{self._dataset!r} has the features {sorted(features)}",
            choose_text_field(texts),
        )
        for named in filter(None, (self._fields.id, self._fields.group)):
            require(
                named in features,
                f"Every record must have the field {named!r} that the config names",
                f"{self._dataset!r} has the features {sorted(features)}",
                "Correct config.data.id_field or config.data.group_field",
            )
        return name

    def _not_prepared(self, directory: str) -> str:
        known = DATASETS.get(self._base_name, Needs((), "", ""))
        installed = "".join(f", {package}" for package in known.packages)
        imports = f"import {known.module}; " if known.module else ""
        return (
            f"A TFDS dataset must have been prepared before it is read: there is no "
            f"{self._dataset!r} in {directory}. Where there is a network and "
            f"tensorflow_datasets{installed}, run "
            f'python -c "{imports}import tensorflow_datasets as tfds; '
            f"tfds.builder('{self._dataset}', file_format='array_record').download_and_prepare()\""
            " and set the environment variable TFDS_DATA_DIR to where the result is."
        )


def _is_text(feature: Any) -> bool:
    """Whether the value of a feature is a single text."""
    return feature.shape == () and feature.np_dtype in (np.object_, np.str_, np.bytes_)


def _decoded(value: Any, where: str) -> Any:
    """A TFDS value as a Python value: bytes become text, NumPy integers become int."""
    if isinstance(value, bytes):
        return decode(value, where)
    return value.item() if isinstance(value, (np.integer, np.str_)) else value
