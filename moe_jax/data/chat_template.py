"""Chat templates: conversations as tokens, rendered by the tokenizer's own template.

A template is a Jinja program that comes with a tokenizer. It runs in a sandbox, sees the messages
and the special tokens, and has no clock: its output is a function of the messages and of an
optional date.
"""

import datetime
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config.check import require
from moe_jax.data.conversations import Message
from moe_jax.data.hugging_face_tokenizer import HuggingFaceTokenizer
from moe_jax.data.open_file import check_file, decode
from moe_jax.data.tokenizer import Tokenizer

BESIDE_TOKENIZER = "tokenizer"  # names the template in the folder of the tokenizer
FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
_FIX = "Set config.data.objective.chat_template to the path of a .jinja file"
# A private-use character as the content of a message, to find what a template writes after it.
_PROBE = "\ue000"
# Templates may mark what the model writes. The marks must be parsed, but are ignored.
_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


class Marked(NamedTuple):
    """A conversation in tokens.

    Attributes:
        ids: int64 [N].
        is_answer: bool [N], whether the token is in an answer, its end included.
    """

    ids: np.ndarray
    is_answer: np.ndarray


class ChatTemplate:
    """A template with the tokenizer that encodes its output."""

    def __init__(
        self, source: str, path: pathlib.Path, tokenizer: HuggingFaceTokenizer, date: str = ""
    ):
        """Compiles a template.

        Args:
            source: the Jinja program.
            path: its file, for messages.
            tokenizer: the tokenizer whose special tokens it may write.
            date: today's date for the template, YYYY-MM-DD; "": none.

        Raises:
            ValueError: `source` is not a template, or the package jinja2 is not installed.
        """
        self.path, self.tokenizer, self.source, self._date = path, tokenizer, source, date
        self._names = _special_names(tokenizer)
        self._clock = (
            {"strftime_now": datetime.datetime.fromisoformat(date).strftime} if date else {}
        )
        self._template = _compile(source, path)

    def render(self, messages: Sequence[Message], *, prompts: bool) -> str:
        """Renders messages as text; with `prompts`, up to where an answer begins.

        Raises:
            ValueError: the template refuses the messages, or one of them names a special token.
        """
        for message in messages:
            named = [name for name in self.tokenizer.special_tokens if name in message.content]
            require(
                not named,
                "A message must not contain the name of a special token, which a chat template "
                "would make one",
                f"{named[0] if named else ''!r} is in the message of the {message.role}",
                "Write it in another way",
            )
        told = [message._asdict() for message in messages]
        try:
            return str(
                self._template.render(
                    messages=told, add_generation_prompt=prompts, tools=None, documents=None,
                    raise_exception=_refuse, **self._clock, **self._names,
                )
            )  # fmt: skip
        except Exception as error:  # A template may raise anything.
            reason = " ".join(str(error).split())[:160]
            fix = "Change the line, or leave it out"
            if "strftime_now" in reason and not self._date:
                reason = "it asks for today's date"
                fix = "Set config.data.objective.date, as in 2026-01-31"
            raise ValueError(
                f"A chat template must render the messages: {self.path} with the roles "
                f"{[message.role for message in messages]}: {reason}. {fix}."
            ) from error

    def prompt_ids(self, messages: Sequence[Message]) -> np.ndarray:
        """The tokens of messages up to where an answer begins."""
        return self.tokenizer.encode_rendered(self.render(messages, prompts=True))

    def encode(self, messages: Sequence[Message], *, last_only: bool = False) -> Marked:
        """The tokens of a conversation, as `apply_chat_template` of transformers returns them.

        An answer begins after the tokens of the messages before it and of the prompt that the
        template puts before an answer. It ends with the first special token after its content, or
        else with the tokens of the messages up to it.

        Args:
            messages: the conversation.
            last_only: whether only the last answer is marked.

        Raises:
            ValueError: the template refuses the messages, or renders a message differently if
                others follow.
        """
        text = self.render(messages, prompts=False)
        ids = self.tokenizer.encode_rendered(text)
        is_answer = np.zeros(len(ids), bool)
        answers = [n for n, message in enumerate(messages) if message.role == "assistant"]
        for answer in answers[-1:] if last_only else answers:
            before = self.render(messages[:answer], prompts=True)
            upto = self._to_end(messages[: answer + 1])
            for part in (before, upto):
                require(
                    text.startswith(part),
                    "A chat template must render messages the same way whatever comes after them",
                    f"{self.path} does not, at message {answer + 1} of {len(messages)}",
                    "Set config.data.objective.last_answer_only=True, and leave out what follows "
                    "the last answer",
                )
            begin, end = (
                _common(ids, self.tokenizer.encode_rendered(part)) for part in (before, upto)
            )
            is_answer[begin:end] = True
        return Marked(ids, is_answer)

    def _to_end(self, messages: Sequence[Message]) -> str:
        """The text up to the special token that ends the last message; all text without one.

        A template may write more after that token, such as the end of a document, only if no
        message follows.
        """
        text = self.render(messages, prompts=False)
        probe = messages[-1]._replace(content=_PROBE)
        behind = self.render([*messages[:-1], probe], prompts=False).rpartition(_PROBE)[2]
        end = self._special.search(behind)
        if end is None or not text.endswith(behind):
            return text
        return text[: len(text) - len(behind) + end.end()]

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches the name of a special token, the longest one at a place."""
        names = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)))

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The special token that ends an answer; () if the template writes none."""
        ids, is_answer = self.encode((Message("user", "a"), Message("assistant", "b")))
        specials = self.tokenizer.special_tokens.values()
        return tuple(last for last in ids[is_answer][-1:].tolist() if last in specials)

    def fingerprint(self) -> str:
        """Sha256 of the template, its names of special tokens and its date."""
        dates = [self._date] if self._date else []
        told = json.dumps([self.source, self._names, *dates], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


@functools.lru_cache(maxsize=8)
def open_chat_template(name: str, tokenizer: Tokenizer, date: str = "") -> ChatTemplate:
    """Opens the chat template that `name` describes.

    Args:
        name: `tokenizer`, for the `chat_template.jinja` or the `tokenizer_config.json` beside the
            tokenizer; or the path of a Jinja file.
        tokenizer: the tokenizer of the template, a `tokenizer.json`.
        date: see `ChatTemplate`.

    Raises:
        ValueError: there is no template, or the tokenizer is not a `tokenizer.json`.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(
            "A chat template needs a tokenizer.json, whose special tokens it writes: "
            f"config.data.tokenizer is {tokenizer.name!r}. Set "
            "config.data.objective.chat_template='', or another config.data.tokenizer."
        )
    if name != BESIDE_TOKENIZER:
        path = pathlib.Path(name).expanduser()
        check_file(path, "A chat template")
        return ChatTemplate(decode(path.read_bytes(), str(path)), path, tokenizer, date)
    folder = tokenizer.path.parent
    if (folder / FILE).is_file():
        path = folder / FILE
        return ChatTemplate(decode(path.read_bytes(), str(path)), path, tokenizer, date)
    source = _config_beside(tokenizer).get("chat_template")
    if isinstance(source, list):  # several by name, from earlier versions of transformers
        by_name = {one.get("name"): one.get("template") for one in source}
        source = by_name.get("default")
    require(
        isinstance(source, str),
        f"A chat template must be in {FILE} or {CONFIG_FILE} beside the tokenizer",
        f"there is none in {folder}",
        _FIX,
    )
    return ChatTemplate(str(source), folder / CONFIG_FILE, tokenizer, date)


def _special_names(tokenizer: HuggingFaceTokenizer) -> Mapping[str, str]:
    """The special tokens by their names in a template, such as `bos_token`."""
    found = {}
    for name, token in _config_beside(tokenizer).items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    if found:
        return found
    by_id = {id_: token for token, id_ in tokenizer.special_tokens.items()}
    return {"bos_token": by_id[tokenizer.bos_id], "eos_token": by_id[tokenizer.eos_id]}


def _config_beside(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`; {} without one."""
    path = tokenizer.path.parent / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{CONFIG_FILE} must be a JSON object: {path} is not. Copy it again.")
    return settings


def _compile(source: str, path: pathlib.Path) -> Any:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError(
            f"A chat template is read by the package jinja2, which is not installed: {path}. "
            "Run: pip install jinja2."
        ) from None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    # A block without effect, so that white space around it is trimmed as around any other.
    source = _MARK.sub(_neutral, source)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"A chat template must be a program in Jinja: {path}: {error}. {_FIX}."
        ) from error


def _neutral(mark: re.Match[str]) -> str:
    block = "endif" if "endgeneration" in mark[0] else "if true"
    return f"{{%{mark[1]} {block} {mark[2]}%}}"


def _refuse(message: str) -> None:
    raise ValueError(message)


def _tojson(value: Any, **how: Any) -> str:
    """JSON as transformers writes it: without escapes for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **how})


def _common(left_N: np.ndarray, right_M: np.ndarray) -> int:
    """The length of the common prefix of two token sequences."""
    length = min(len(left_N), len(right_M))
    differ = np.flatnonzero(left_N[:length] != right_M[:length])
    return int(differ[0]) if len(differ) else length
