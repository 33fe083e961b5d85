"""Continues texts, with the tokenizer of the run and stop strings."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.data import open_tokenizer_of
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.inference.anew import stream_anew
from moe_jax.inference.decoding import why_anew
from moe_jax.inference.draft import Draft
from moe_jax.inference.generation import stream_tokens

CUT = "\ufffd"  # how a tokenizer decodes a part of a character


class TextPiece(NamedTuple):
    """New text of one row.

    Attributes:
      row: of the text: prompt i, sample s is i * num_samples + s.
      text: in order; never a partial character or the possible beginning of a stop string.
      num_tokens: number of tokens added, those of a stop string included.
      ended: whether the text has ended, at the end of a document or at a stop string.
      tokens: their ids; the last one completes the stop string, if there is one.
      routes: the experts of tokens, see `Piece`.
    """

    row: int
    text: str
    num_tokens: int
    ended: bool
    tokens: Sequence[int] = ()
    routes: np.ndarray | None = None


def stream_text(
    config: ExperimentConfig,
    params: Any,
    prompts: Sequence[str],
    num_tokens: int,
    *,
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    context: int | None = None,
    num_samples: int = 1,
    ended: Iterable[int] = (),
    **settings: Any,
) -> Iterator[TextPiece]:
    """Continues prompts, and yields new text as it is generated.

    A model that cannot continue from a cache (`decoding.why_anew`) reads its whole context anew for
    every token.

    Args:
      config: of the run, or of the imported model.
      params: parameters of the model.
      prompts: any texts. The encoder of an encoder-decoder reads them.
      num_tokens: maximum number of tokens to add to each; a text stops at the end of a document.
      stop: strings before which a text ends.
      tokenizer: of the model; None: the one of the config.
      context: maximum number of tokens seen; None: `data.sequence_length`. See `stream_tokens`.
      num_samples: texts per prompt.
      ended: rows that are not continued.
      **settings: other arguments of `stream_tokens`, such as `state`, `step`, `draft` and `record`.

    Raises:
      ValueError: see `stream_tokens`; `prompts` or `stop` is one string; a stop string is empty;
        the draft has another tokenizer.
    """
    require_strings("prompts", prompts)
    require_strings("stop", stop)
    require("" not in stop, "a stop string must not be empty", repr(list(stop)), "Leave it out")
    tokenizer = tokenizer or open_tokenizer_of(config.data)
    encoded = [config.data.objective.prompt_ids(tokenizer, prompt) for prompt in prompts]
    yield from stream_encoded(
        config, params, encoded, num_tokens, tokenizer=tokenizer, stop=stop, context=context,
        num_samples=num_samples, ended=ended, **settings,
    )  # fmt: skip


def require_strings(name: str, given: Sequence[str]) -> None:
    """Raises `ValueError` for one string in place of a list."""
    require(
        not isinstance(given, str), f"{name} must be a list of strings", f"{name}={given!r}",
        f"Pass {name}=[{given!r}]",
    )  # fmt: skip


def stream_encoded(
    config: ExperimentConfig,
    params: Any,
    encoded: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    tokenizer: Tokenizer,
    stop: Sequence[str] = (),
    context: int | None = None,
    num_samples: int = 1,
    ended: Iterable[int] = (),
    **settings: Any,
) -> Iterator[TextPiece]:
    """Continues prompts given as token ids; otherwise as `stream_text`."""
    ids: dict[str, Any] = {
        "num_ids": config.data.objective.vocab_size(tokenizer, config.data.sequence_length),
        "stop_tokens": config.data.objective.stop_ids(tokenizer),
    }
    context = context or config.data.sequence_length
    check_draft(config, settings.get("draft"), tokenizer)
    if config.model.has_encoder:
        ids["start_token"] = tokenizer.pad_id
    stream: Any = stream_tokens
    why = why_anew(config.model)
    if why and not config.model.has_encoder:
        stream, ids["pad_id"] = stream_anew, tokenizer.pad_id
        settings.pop("batch_size", None)  # it writes one text after another
        cached = [name for name in ("draft", "record", "capacity") if settings.pop(name, None)]
        require(
            not cached,
            "a model without caches reads the whole text again for every token",
            f"{why}, so that it has no {' and no '.join(cached)}",
            "Leave it out",
        )
    done = set(ended)
    how = {"context": context, "num_samples": num_samples, "ended": done, **ids, **settings}
    texts = [Text(tokenizer, stop, num_tokens) for _ in range(len(encoded) * num_samples)]
    for piece in stream(config, params, encoded, num_tokens, **how):
        text = texts[piece.row]
        if not text.ended:
            new, count, ends = text.add(piece.tokens, piece.ended)
            read = len(encoded[piece.row // num_samples]) + len(text.ids)
            routes = text.routes_within(read, piece.routes)
            shown = TextPiece(piece.row, new, count, ends, piece.tokens[:count], routes)
            if shown.ended:
                done.add(piece.row)
            yield shown


def check_draft(config: ExperimentConfig, draft: Draft | None, tokenizer: Tokenizer) -> None:
    """Raises `ValueError` for a draft that does not fit a model and its tokenizer."""
    if draft is None:
        return
    if draft.config is not None:
        other = open_tokenizer_of(draft.config.data)
        require(
            other.fingerprint() == tokenizer.fingerprint(),
            "a draft must have the tokenizer of the model",
            f"draft {draft.config.data.tokenizer!r}, model {config.data.tokenizer!r}",
            "Use a draft that was trained with the same one",
        )
    draft.drafter(config.model, tokenizer.vocab_size)


class Text:
    """One text that grows by tokens: decides which part can be shown, and where it ends."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], num_tokens: int):
        self.tokenizer, self.stop, self.num_tokens = tokenizer, stop, num_tokens
        self.ids: list[int] = []
        self.shown, self.ended, self.num_routed = 0, False, 0

    def add(self, tokens: Sequence[int], ended: bool) -> tuple[str, int, bool]:
        """The text that can now be shown, the number of new tokens, and whether the text ended.

        Tokens behind the one that completes a stop string do not count.
        """
        before = len(self.ids)
        self.ids.extend(tokens)
        if self.stops():
            while self.stops():
                last = self.ids.pop()
            self.ids.append(last)
        text = self.decoded()
        found = [text.find(one) for one in self.stop if one in text]
        self.ended = ended or bool(found)
        if found:
            text = text[: min(found)]
        elif not ended and len(self.ids) < self.num_tokens:
            text = text[: self.settled(text)]
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new, len(self.ids) - before, self.ended

    def stops(self) -> bool:
        """Whether the tokens contain a stop string."""
        text = self.decoded() if self.stop else ""
        return any(one in text for one in self.stop)

    def decoded(self) -> str:
        """The text of the tokens; sentinels that follow the tokenizer's ids have none."""
        return self.tokenizer.decode([i for i in self.ids if i < self.tokenizer.vocab_size])

    def routes_within(self, length: int, routes: np.ndarray | None) -> np.ndarray | None:
        """The routes of a piece that are of the first `length` tokens of prompt and text."""
        if routes is None:
            return None
        routes = routes[: length - self.num_routed]
        self.num_routed += len(routes)
        return routes

    def settled(self, text: str) -> int:
        """The number of characters before a partial one or a possible start of a stop string."""
        end = len(text.rstrip(CUT))
        for one in self.stop:
            begun = [n for n in range(1, len(one)) if text[:end].endswith(one[:n])]
            end -= max(begun, default=0)
        return end


def continue_text(
    params: Any,
    state: Mapping[str, Any] | None,
    config: ExperimentConfig,
    prompt: str,
    *,
    num_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    step: jax.Array | None = None,
) -> str:
    """Continues one prompt and returns the whole text; see `stream_text`.

    Returns:
      The continuation, without the prompt.
    """
    settings: dict[str, Any] = {
        "state": state, "step": step, "temperature": temperature, "seed": seed
    }  # fmt: skip
    pieces = stream_text(config, params, [prompt], num_tokens, **settings)
    return "".join(piece.text for piece in pieces)
