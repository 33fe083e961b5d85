"""Corpora by name.

A corpus is named by one string:

* `embedded`: the 5.3 MB that ship with the package (`SOURCES.md`), six domains;
* the path of a file or folder of text, JSON lines, parquet, or a Hugging Face dataset
  (`file_corpus.py`); `text:PATH`, `jsonl:PATH`, `parquet:PATH` and `arrow:PATH` name the kind of
  files to read if a folder holds several;
* `packed:DIR`: tokens without their text, written by `python -m moe_jax.data.pack`;
* `tfds:NAME`: a prepared TFDS text dataset (`tfds_text.py`), one domain.
"""

from moe_jax.config.check import require
from moe_jax.data.documents import HELDOUT, TRAIN, Corpus
from moe_jax.data.embedded import EmbeddedCorpus
from moe_jax.data.file_corpus import FileCorpus
from moe_jax.data.file_layout import SUFFIXES
from moe_jax.data.packed_corpus import PackedCorpus
from moe_jax.data.records import Fields

__all__ = ["HELDOUT", "TRAIN", "EmbeddedCorpus", "FileCorpus", "form_of", "open_corpus"]

FORMS = ("packed", "tfds", *SUFFIXES)  # allowed before a colon


def open_corpus(name: str, fields: Fields | None = None) -> Corpus:
    """Opens the corpus that `name` describes.

    Args:
        name: `embedded`, a path, `KIND:PATH`, `packed:DIR` or `tfds:NAME`.
        fields: the fields to read from its records; None: the usual ones.

    Returns:
        The corpus; documents are read on demand.

    Raises:
        ValueError: there is no such corpus, or it has no such fields.
    """
    fields = fields or Fields()
    form, _, argument = name.partition(":")
    require(
        not fields.conversations or (name != "embedded" and form not in ("tfds", "text", "packed")),
        "Prompts and answers can be read only from JSON lines",
        f"data.corpus={name!r}",
        "Set config.data.corpus to a .jsonl file or a folder of them",
    )
    if name == "embedded" or form == "text":
        require(
            fields == Fields(),
            "Text without records has no fields",
            f"data.corpus={name!r}, {fields}",
            "Leave data.text_field, data.id_field and data.group_field empty",
        )
    if name == "embedded":
        return EmbeddedCorpus()
    if form in FORMS:
        require(
            bool(argument),
            f"A corpus must be named {form}:NAME",
            repr(name),
            "Correct config.data.corpus",
        )
    if form == "packed":
        require(
            fields == Fields(),
            "Tokens without text have no fields",
            f"data.corpus={name!r}, {fields}",
            "Leave data.text_field, data.id_field and data.group_field empty",
        )
        return PackedCorpus(name, argument)
    if form == "tfds":
        # Most runs do not need TFDS, so it is imported only here.
        from moe_jax.data.tfds_text import TfdsTextCorpus

        return TfdsTextCorpus(argument, fields)
    if form in FORMS:
        return FileCorpus(name, argument, form, fields)
    return FileCorpus(name, name, "", fields)


def form_of(name: str) -> str:
    """The form of a corpus or tokenizer name without its path: `jsonl` for `jsonl:/home/me/x`."""
    form, colon, _ = name.partition(":")
    if colon:
        return form
    return "path" if "/" in name or "." in name else name
