"""Turns a record of a corpus, such as a line of JSON or a row of a table, into a document."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moe_jax.config.check import require
from moe_jax.data.conversations import EXAMPLE, conversation_of
from moe_jax.data.documents import Document

# A document is held in memory, in several copies while it is encoded.
MAX_DOCUMENT_BYTES = 2**28
TOO_LARGE = f"A document must have at most {MAX_DOCUMENT_BYTES >> 20} MiB"


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the fields of a record.

    Attributes:
        text: field of the text; "" for `text`.
        id: field of the document's name, text or an integer; "" for `id`, if present.
        group: field of the group, which is never split (translations of a page), text or an
            integer; "" for `group`, if present.
        conversations: whether a record is a prompt and an answer, or messages, instead of a text.
    """

    text: str = ""
    id: str = ""
    group: str = ""
    conversations: bool = False

    @property
    def names(self) -> tuple[str, str, str]:
        """The fields to read: text, id and group."""
        return self.text or "text", self.id or "id", self.group or "group"

    @property
    def example(self) -> str:
        """An example of a record with these fields."""
        return EXAMPLE if self.conversations else json.dumps({self.text or "text": "..."})


def document_of(record: Mapping[str, Any], where: str, domain: str, fields: Fields) -> Document:
    """Makes a document of a record.

    A record without a group is a group of its own, named by its id. A record without an id is
    named by its place; if it has no group either, the hash of its text decides its split, so that
    copies share a split.

    Args:
        record: values by field.
        where: file and line or row, for messages.
        domain: the document's domain.
        fields: names of the fields to read.

    Returns:
        The document; its text may be empty.

    Raises:
        ValueError: the text or a named field is missing, or a value has the wrong type.
    """
    text_field, id_field, group_field = fields.names
    if fields.conversations:
        text = conversation_of(record, where).to_text()
    else:
        text = _text(record, where, text_field)
    check_text(text, where)
    id_ = _name(record, id_field, "id_field", bool(fields.id), where)
    group = _name(record, group_field, "group_field", bool(fields.group), where)
    own = id_ or hashlib.sha256(text.encode()).hexdigest()
    return Document(
        domain,
        id_ or where,
        text,
        group or own,
        has_group=bool(group),
        where=where,
        whole=fields.conversations,
    )


def _text(record: Mapping[str, Any], where: str, text_field: str) -> str:
    """The text of a record; refuses a value that is not text."""
    text = record.get(text_field)
    require(
        text_field in record,
        f"A document must have its text in the field {text_field!r}",
        f"{where} has the fields {sorted(record)}",
        choose_text_field(text_fields(record)),
    )
    require(
        isinstance(text, str),
        f"A document's text must be text: field {text_field!r}",
        f"{where} has {_described(text)}",
        "Leave the record out of the corpus"
        if text is None
        else choose_text_field(text_fields(record)),
    )
    return str(text)


def check_text(text: str, where: str) -> None:
    """Refuses text that UTF-8 cannot express, or that is too long.

    Raises:
        ValueError: with the place.
    """
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Text must be what UTF-8 can express: {where} has a lone surrogate "
            f"{text[error.start]!a} at character {error.start}. Repair it, for instance by "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
        ) from None
    require(
        num_bytes <= MAX_DOCUMENT_BYTES, TOO_LARGE, f"{where} has {num_bytes >> 20}", "Cut it up"
    )


def text_fields(record: Mapping[str, Any]) -> list[str]:
    """Names of the fields that hold text, except `id`, `group` and `heldout`."""
    names = (name for name, value in record.items() if isinstance(value, str))
    return sorted(name for name in names if name not in ("id", "group", "heldout"))


def choose_text_field(names: list[str]) -> str:
    """The fix to suggest when the text is not in the field that was read."""
    if not names:
        return "It has no text field: use another corpus"
    return f"Set config.data.text_field, here to one of {names}"


def _name(record: Mapping[str, Any], field: str, setting: str, named: bool, where: str) -> str:
    """The id or group of a record, "" if absent; required if the config `named` its field."""
    value = record.get(field)
    require(
        not named or value is not None,
        f"Every record must have the field {field!r} that the config names",
        f"{where} has {'null' if field in record else sorted(record)}",
        f"Correct config.data.{setting}, or the record",
    )
    require(
        value is None or (isinstance(value, (str, int)) and not isinstance(value, bool)),
        f"Field {field!r} must name a document by text or an integer",
        f"{where} has {_described(value)}",
        f"Correct it, or set config.data.{setting}",
    )
    if value is None:
        return ""
    check_text(str(value), f"{where}, field {field!r},")
    return str(value)


def _described(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
