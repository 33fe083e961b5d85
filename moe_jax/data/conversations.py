"""Prompts with their answers: a JSON record as a sequence of messages.

A record is a pair, `{"prompt": "2+2?", "answer": "4"}`, or a conversation,
`{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}`.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.config.check import require

ROLES = ("system", "user", "assistant")
EXAMPLE = '{"prompt": "...", "answer": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
_LEAVE_OUT = "Correct the line or leave it out"


class Message(NamedTuple):
    """A message of one role.

    Attributes:
        role: one of `ROLES`; the assistant's messages are the answers.
        content: the text; not empty if it is an answer.
    """

    role: str
    content: str


class Conversation(NamedTuple):
    """The messages of a record, with at least one answer after a prompt.

    Attributes:
        messages: in order.
        is_pair: whether the record was a prompt and an answer: a user's message, which may be
            empty, and an assistant's.
    """

    messages: tuple[Message, ...]
    is_pair: bool

    def to_text(self) -> str:
        """The conversation as the text of a document; equal conversations have equal texts."""
        if self.is_pair:
            return json.dumps([message.content for message in self.messages], ensure_ascii=False)
        return json.dumps({"messages": self.messages}, ensure_ascii=False)

    @classmethod
    def of_text(cls, text: str) -> "Conversation":
        """The conversation that `to_text` turned into this text."""
        value = json.loads(text)
        if isinstance(value, list):
            return pair(*value)
        return cls(tuple(Message(*message) for message in value["messages"]), is_pair=False)


def pair(prompt: str, answer: str) -> Conversation:
    """A prompt and its answer."""
    return Conversation((Message("user", prompt), Message("assistant", answer)), is_pair=True)


def conversation_of(record: Mapping[str, Any], where: str) -> Conversation:
    """Reads a record; fields other than those of a pair or a conversation are ignored.

    Args:
        record: values by field.
        where: file and line, for messages.

    Raises:
        ValueError: a field is missing or has the wrong type, a role is unknown, an answer is empty
            or missing, or `heldout` is "tail".
    """
    has_messages = "messages" in record
    names = ("messages",) if has_messages else ("prompt", "answer")
    missing = [name for name in names if name not in record]
    require(
        not missing,
        "A record must have a prompt and an answer, or messages",
        f"{where} has the fields {sorted(record)}, and no {' and no '.join(missing)}",
        f"Rename its fields: a line is {EXAMPLE}",
    )
    require(
        not (has_messages and ("prompt" in record or "answer" in record)),
        "A record must be a prompt and an answer, or messages, but not both",
        f"{where} has the fields {sorted(record)}",
        "Remove one of them",
    )
    require(
        record.get("heldout") != "tail",
        "An answer must be held out whole, with its prompt",
        f'{where} has "heldout": "tail"',
        'Remove that field, or move the line to a file "validation.jsonl" beside "train.jsonl"',
    )
    if not has_messages:
        prompt, answer = (_text(record[name], f"{name!r} of {where}") for name in names)
        _check_answer(answer, where)
        return pair(prompt, answer)
    given = record["messages"]
    require(
        isinstance(given, list) and bool(given),
        "The messages of a record must be a list of one or more",
        f"{where} has {json.dumps(given)[:60]}",
        _LEAVE_OUT,
    )
    messages = tuple(_message(one, number, where) for number, one in enumerate(given, 1))
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    require(
        bool(answers) and answers[0] > 0,
        "The messages of a record must have an answer, of the role 'assistant', after a prompt",
        f"{where} has the roles {[message.role for message in messages]}",
        _LEAVE_OUT,
    )
    return Conversation(messages, is_pair=False)


def _message(given: Any, number: int, where: str) -> Message:
    place = f"message {number} of {where}"
    require(
        isinstance(given, dict) and given.keys() == {"role", "content"},
        'A message must be {"role": "user", "content": "..."}',
        f"{place} is {json.dumps(given)[:80]}",
        _LEAVE_OUT,
    )
    require(
        given["role"] in ROLES,
        f"The role of a message must be one of {', '.join(ROLES)}",
        f"{place} has {given['role']!r}",
        "Rename the role, or leave the line out",
    )
    content = _text(given["content"], f"the content of {place}")
    if given["role"] == "assistant":
        _check_answer(content, place)
    return Message(given["role"], content)


def _text(value: Any, place: str) -> str:
    require(
        isinstance(value, str), "A message must be text", f"{place} is {value!r:.60}", _LEAVE_OUT
    )
    return str(value)


def _check_answer(answer: str, place: str) -> None:
    require(bool(answer), "An answer must have text", f"the answer of {place} is empty", _LEAVE_OUT)
