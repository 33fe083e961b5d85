"""TFDS datasets as corpora, prepared in the test, offline and without TensorFlow."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from moe_jax.config import DataConfig
from moe_jax.data import corpora, open_data, pipeline, tfds_text
from moe_jax.data.documents import SPLITS
from moe_jax.data.records import Fields


class TalesWithoutSplit(tfds.core.GeneratorBasedBuilder):
    """Two hundred tales, all in the train split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "number": np.int32}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("train", 200)}

    def _generate_examples(self, split, count):
        for number in range(count):
            # Keys in a split must differ, or TFDS fails with an error about TensorFlow.
            yield f"{number:08d}", {"text": f"{split} tale \u00e9 {number}", "number": number}


class Tales(TalesWithoutSplit):
    """Eighty tales in the train split, twenty in the validation split."""

    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples("train", 80),
            "validation": self._generate_examples("validation", 20),
        }


def prepare(builder_class, directory, file_format):
    tfds.disable_progress_bar()
    builder = builder_class(data_dir=str(directory), file_format=file_format)
    builder.download_and_prepare()
    return builder.data_dir


@pytest.fixture(scope="module")
def tales(tmp_path_factory):
    """The directory of a prepared version, by file format."""
    root = tmp_path_factory.mktemp("tfds")
    formats = ("array_record", "parquet")
    directories = {name: prepare(Tales, root / name, name) for name in formats}
    directories["tfrecord"] = rewrite_as_tfrecord(directories["array_record"], root / "tfrecord")
    return directories


def rewrite_as_tfrecord(directory, target):
    """Writes what TFDS with TensorFlow would: the same records in other frames."""
    target = target / "tales" / "1.0.0"
    target.mkdir(parents=True)
    for path in tfds.core.Path(directory).iterdir():
        if ".array_record-" not in path.name:
            shutil.copy(path, target / path.name)
            continue
        with (target / path.name.replace("array_record", "tfrecord")).open("wb") as file:
            for record in ArrayRecordDataSource([str(path)]):
                # Length, checksum, record, checksum; the reader checks no checksum.
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
    info = json.loads((target / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (target / "dataset_info.json").write_text(json.dumps(info))
    return str(target)


@pytest.mark.parametrize("file_format", ["array_record", "parquet", "tfrecord"])
def test_all_splits_and_texts_are_read_from_every_format(tales, file_format):
    corpus = corpora.open_corpus(f"tfds:{tales[file_format]}")
    assert corpus.domains() == ("tales",)
    documents = list(corpus.documents("tales", 0.5))
    texts = {split: set() for split in SPLITS}
    for split, document in documents:
        texts[split].add(document.text)
    assert texts["train"] == {f"train tale \u00e9 {i}" for i in range(80)}
    assert texts["heldout"] == {f"validation tale \u00e9 {i}" for i in range(20)}
    assert len({document.id for _, document in documents}) == 100


def test_the_order_is_that_of_the_files(tales):
    orders = [
        [document.text for _, document in corpora.open_corpus(f"tfds:{path}").documents("tales", 0)]
        for path in (tales["array_record"], tales["array_record"], tales["tfrecord"])
    ]
    assert orders[0] == orders[1] == orders[2]


def test_without_a_validation_split_documents_are_held_out_by_hash(tmp_path):
    path = prepare(TalesWithoutSplit, tmp_path, "array_record")
    corpus = corpora.open_corpus(f"tfds:{path}")
    splits = [split for split, _ in corpus.documents("tales_without_split", 0.2)]
    assert len(splits) == 200
    assert 20 < splits.count("heldout") < 60


def test_a_part_holds_out_the_documents_that_the_whole_does(tmp_path):
    path = prepare(TalesWithoutSplit, tmp_path, "array_record")

    def heldout(part):
        documents = corpora.open_corpus(f"tfds:{path}{part}").documents("tales_without_split", 0.2)
        return {document.text for split, document in documents if split == "heldout"}

    first, second = heldout("@train[:50%]"), heldout("@train[50%:]")
    assert first and second and first | second == heldout("")


def test_a_part_of_the_training_split_may_be_named(tales):
    corpus = corpora.open_corpus(f"tfds:{tales['array_record']}@train[:10%]")
    splits = [split for split, _ in corpus.documents("tales", 0.5)]
    assert (splits.count("train"), splits.count("heldout")) == (8, 20)
    whole = corpora.open_corpus(f"tfds:{tales['array_record']}")
    assert corpus.fingerprint() != whole.fingerprint()


def test_parquet_that_tfds_wrote_with_losses_is_refused(tmp_path):
    # Two hundred examples in one shard, of which TFDS 4.9.10 writes only the first hundred.
    path = prepare(TalesWithoutSplit, tmp_path, "parquet")
    corpus = corpora.open_corpus(f"tfds:{path}")
    with pytest.raises(ValueError, match=r"has 100, not 200\. TFDS loses examples"):
        list(corpus.documents("tales_without_split", 0.1))


def test_a_part_of_a_tfrecord_split_is_refused(tales):
    corpus = corpora.open_corpus(f"tfds:{tales['tfrecord']}@train[:10%]")
    with pytest.raises(ValueError, match=r"'train\[:10%\]' is not one of .*array_record"):
        list(corpus.documents("tales", 0.5))


def test_a_tfds_dataset_trains_and_evaluates(tales, tmp_path):
    config = DataConfig(
        corpus=f"tfds:{tales['parquet']}", sequence_length=32, cache_dir=str(tmp_path)
    )
    data = open_data(config)
    assert next(pipeline.train_batches(data, global_batch_size=4))["inputs"].shape == (4, 32)
    counted = sum(b["loss_weights"].sum() for b in pipeline.heldout_batches(data, batch_size=4))
    texts = [f"validation tale \u00e9 {i}" for i in range(20)]
    assert counted == sum(len(text.encode()) + 1 for text in texts)


def test_a_dataset_that_tfds_knows_but_is_not_prepared_is_refused_with_the_command(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    corpus = corpora.open_corpus("tfds:c4/en")
    with pytest.raises(ValueError) as error:
        corpus.domains()
    message = str(error.value)
    assert "there is no 'c4/en' in " in message
    assert "tensorflow_datasets, apache_beam, run" in message
    assert "import tensorflow_datasets.text.c4; import tensorflow_datasets as tfds" in message
    assert "tfds.builder('c4/en', file_format='array_record').download_and_prepare()" in message


def test_an_unknown_dataset_is_refused():
    with pytest.raises(ValueError, match=r"'no_such_tales' is neither a name, nor prepared in"):
        corpora.open_corpus("tfds:no_such_tales").domains()


def test_a_dataset_without_text_is_refused(tmp_path):
    class Numbers(TalesWithoutSplit):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"number": np.int32})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _generate_examples(self, split, count):
            for number in range(3):
                yield number, {"number": number}

    corpus = corpora.open_corpus(f"tfds:{prepare(Numbers, tmp_path, 'array_record')}")
    with pytest.raises(ValueError, match=r"has the features \['number'\]\. It has no text field"):
        list(corpus.documents("numbers", 0.1))


@pytest.mark.parametrize("name", sorted(tfds_text.DATASETS))
def test_the_builders_of_the_table_are_known_and_have_a_text(name):
    needs = tfds_text.DATASETS[name]
    corpus = tfds_text.TfdsTextCorpus(needs.config)
    with tfds.testing.mock_data():
        with pytest.raises(ValueError, match="must have been prepared"):
            corpus.domains()
        features = tfds.builder(needs.config).info.features
    assert set(tfds_text.TEXT_FEATURES) & set(features)


def test_a_mocked_dataset_is_read_by_its_name(tmp_path):
    with tfds.core.registered.skip_registration():
        # Metadata of a prepared lm1b, which mock_data fills with random text.
        lm1b = type("Lm1b", (Tales,), {"VERSION": tfds.core.Version("1.1.0")})
    prepare(lm1b, tmp_path, "array_record")
    corpus = corpora.open_corpus("tfds:lm1b")
    with tfds.testing.mock_data(num_examples=3, data_dir=str(tmp_path)):
        assert corpus.domains() == ("lm1b",)
        splits = [split for split, _ in corpus.documents("lm1b", 0.1)]
    assert splits == ["train"] * 3 + ["heldout"] * 3


def test_reading_imports_no_tensorflow(tales):
    code = (
        "import sys; from moe_jax.data import corpora; "
        f"list(corpora.open_corpus('tfds:{tales['array_record']}').documents('tales', 0.1)); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_fingerprints_are_sha256(tales):
    fingerprint = corpora.open_corpus(f"tfds:{tales['parquet']}").fingerprint()
    assert len(fingerprint) == len(hashlib.sha256().hexdigest())
    assert fingerprint == corpora.open_corpus(f"tfds:{tales['parquet']}").fingerprint()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("train+validation", "split 'validation' of a TFDS dataset is held out and never trains"),
        ("validation", "split 'validation' of a TFDS dataset is held out and never trains"),
        ("train[:5%]+validation[:1]", "split 'validation' of a TFDS dataset is held out"),
        ("all", "split 'validation' of a TFDS dataset is held out"),
        ("train[:60%]+train[50%:]", r"holds some of 'train' twice"),
        ("trian", r"a part of its splits \['train', 'validation'\]: 'trian'"),
        ("train[", r"a part of its splits \['train', 'validation'\]: 'train\['"),
    ],
)
def test_a_part_that_would_train_on_what_is_held_out_is_refused(tales, part, message):
    corpus = corpora.open_corpus(f"tfds:{tales['array_record']}@{part}")
    with pytest.raises(ValueError, match=message) as refused:
        corpus.fingerprint()
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=message):
        list(corpus.documents("tales", 0.5))


def test_the_fingerprint_follows_the_files(tales, tmp_path):
    copy = shutil.copytree(tales["array_record"], tmp_path / "tales" / "1.0.0")
    corpus = corpora.open_corpus(f"tfds:{copy}")
    before = corpus.fingerprint()
    assert before == corpora.open_corpus(f"tfds:{tales['array_record']}").fingerprint()
    (path,) = copy.glob("*train*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert corpus.fingerprint() != before


FEATURES = {
    "ids": ({"text": tfds.features.Sequence(np.int32)}, {"text": [5, 6]}, "Sequence of int32"),
    "sentences": (
        {"text": tfds.features.Sequence(tfds.features.Text()), "title": tfds.features.Text()},
        {"text": ["One.", "Two."], "title": "t"},
        r"'text' as Sequence of object\. Set config\.data\.text_field, here to one of \['title'\]",
    ),
    "nested": (
        {"document": {"title": tfds.features.Text(), "html": tfds.features.Text()}},
        {"document": {"title": "t", "html": "h"}},
        "'document' as FeaturesDict of ",
    ),
}


def prepare_features(name, directory):
    features, value, _ = FEATURES[name]

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def examples(self, split, count):
        for number in range(3):
            yield f"{number:04d}", value

    members = {"VERSION": tfds.core.Version("1.0.0"), "_info": info, "_generate_examples": examples}
    with tfds.core.registered.skip_registration():
        odd = type(name.title(), (TalesWithoutSplit,), members)
    return prepare(odd, directory, "array_record")


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_that_is_no_text_is_refused_by_name_and_type(name, tmp_path):
    corpus = corpora.open_corpus(f"tfds:{prepare_features(name, tmp_path)}")
    with pytest.raises(ValueError, match=FEATURES[name][2]):
        list(corpus.documents(name, 0.1))


def test_another_feature_may_be_the_text(tmp_path):
    path = prepare_features("sentences", tmp_path)
    corpus = corpora.open_corpus(f"tfds:{path}", Fields(text="title"))
    assert [document.text for _, document in corpus.documents("sentences", 0.0)] == ["t"] * 3
