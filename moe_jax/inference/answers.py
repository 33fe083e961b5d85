"""Complete answers in the order of their prompts, and the JSONL file that stores them."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.config.check import require
from moe_jax.config.json_text import json_text
from moe_jax.files import write_atomically
from moe_jax.inference.generation import joined_routes
from moe_jax.inference.text import TextPiece
from moe_jax.models.token_routes import routes_bytes

FIX = "Name another file, or delete this one"
BEGIN = b'{"prompt_index": '  # of every line


class Answers:
    """Texts that grow piece by piece.

    Attributes:
      first: an earlier start answered the rows below this one.
      count: the rows below this one are complete, and their records are processed.
      texts: the text so far, by row: prompt i, sample s is i * num_samples + s.
      num_tokens: tokens in each text.
      ended: whether each text ended before `most` tokens.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        num_samples: int,
        most: int,
        settings: Mapping[str, Any],
        first: int = 0,
    ):
        """`most` is the limit of tokens per text; every record contains `settings`."""
        self.prompts, self.num_samples, self.most = prompts, num_samples, most
        self.settings, self.first, self.count = dict(settings), first, first
        rows = len(prompts) * num_samples
        self.texts, self.num_tokens, self.ended = [""] * rows, [0] * rows, [False] * rows

    def add(self, piece: TextPiece) -> Iterator[dict[str, Any]]:
        """The records that the piece completes, in order: a record waits for those before it."""
        self.texts[piece.row] += piece.text
        self.num_tokens[piece.row] += piece.num_tokens
        self.ended[piece.row] |= piece.ended
        while self.count < len(self.texts) and self.is_whole(self.count):
            yield self.record(self.count)
            self.count += 1

    def is_whole(self, row: int) -> bool:
        """Whether a text is complete."""
        return self.ended[row] or self.num_tokens[row] >= self.most

    def record(self, row: int) -> dict[str, Any]:
        """The JSON record of a text."""
        return {
            **self.question(row), "text": self.texts[row], "num_tokens": self.num_tokens[row],
            "ended": self.ended[row],
        }  # fmt: skip

    def question(self, row: int) -> dict[str, Any]:
        """The fields of a record that are known before its answer."""
        index, sample = divmod(row, self.num_samples)
        return {
            "prompt_index": index, "sample": sample, "prompt": self.prompts[index],
            "settings": self.settings,
        }  # fmt: skip


class AnswerFile:
    """A .jsonl file of answers that grows by whole lines: a second start appends to them.

    Attributes:
      path: of the file.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path

    def open(self, answers: Answers) -> int:
        """The number of these answers in the file; removes a line that a kill cut short.

        Creates a missing file.

        Raises:
          ValueError: the file contains something else.
          OSError: it cannot be read or written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab"):
            pass
        if not self.path.is_file():  # a device
            return 0
        *lines, rest = self.path.read_bytes().split(b"\n")
        rows = len(answers.texts)
        for i, line in enumerate(lines):
            self.require_answer(i, line, answers.question(i) if i < rows else None)
        require(
            BEGIN.startswith(rest) or rest.startswith(BEGIN),
            "--output must be new or contain answers",
            f"{self.path} ends with {rest[:60]!r}",
            FIX,
        )
        if rest:
            os.truncate(self.path, sum(len(line) + 1 for line in lines))
        return len(lines)

    def require_answer(self, i: int, line: bytes, question: Mapping[str, Any] | None) -> None:
        """Refuses a line that does not answer this question."""
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        where = f"{self.path} line {i + 1}"
        is_answer = isinstance(found, dict) and "text" in found
        require(is_answer, "--output must be new or contain answers",
                f"{where} is {line[:60]!r}", FIX)  # fmt: skip
        expected = json.loads(json_text(question))
        differs = difference(found, expected) if expected else "answers none of the prompts"
        require(
            not differs,
            "--output must be new or contain answers to these prompts, by these settings",
            f"{where} {differs}",
            FIX,
        )

    def append(self, record: Mapping[str, Any]) -> None:
        """Appends an answer, which then survives a kill.

        Raises:
          OSError: it cannot be written.
        """
        try:
            with self.path.open("ab") as stream:
                stream.write(json_text(record).encode() + b"\n")
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise


class RouteFiles:
    """The experts of every token, one file per answer, written before the answer."""

    def __init__(self, folder: pathlib.Path, prompts: Sequence[Sequence[int]], num_samples: int):
        """`prompts` are token ids, as the model reads them."""
        self.folder, self.prompts, self.num_samples = folder, prompts, num_samples
        self.tokens: dict[int, list[int]] = {}
        self.routes: dict[int, list[np.ndarray]] = {}

    def check(self, first: int, *, goes_on: bool) -> None:
        """Refuses a folder that is neither new nor the one of the answers below `first`.

        Raises:
          ValueError: with the name of a file. With `goes_on`, the file of row `first` may exist,
            since a kill can happen between writing it and writing the answer.
        """
        there = self.folder.iterdir() if self.folder.is_dir() else ()
        # A kill leaves a hidden partial file.
        found = {path.name for path in there if not path.name.startswith(".")}
        known = {name_of(row) for row in range(first)}
        for what, names in (
            ("lacks", known - found),
            ("has", found - known - ({name_of(first)} if goes_on else set())),
        ):
            require(
                not names,
                "--routes must be a new folder, or that of the answers in --output",
                f"{self.folder} {what} {min(names, default='')}",
                "Name another folder, and another file" if first else "Name another folder",
            )

    def add(self, piece: TextPiece) -> None:
        """Keeps the tokens and experts of a text until it is complete."""
        self.tokens.setdefault(piece.row, []).extend(piece.tokens)
        if piece.routes is not None:
            self.routes.setdefault(piece.row, []).append(piece.routes)

    def write(self, row: int) -> None:
        """Writes the experts of a complete text; a kill leaves no partial file.

        Raises:
          OSError: it cannot be written.
        """
        tokens = [*self.prompts[row // self.num_samples], *self.tokens.pop(row)]
        routes = joined_routes(self.routes.pop(row), len(tokens))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / name_of(row), routes_bytes(tokens, routes))


def name_of(row: int) -> str:
    """The name of the file with the experts of an answer."""
    return f"{row:06}.npz"


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first expected field that differs, in words; "" if all are equal.

    >>> difference({"settings": {"seed": 1}}, {"settings": {"seed": 2}})
    'has seed=1, not 2'
    """
    for name, value in expected.items():
        other = found.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and other != value:
            return difference(other, value) or "has settings of another version"
        if other != value:
            return f"has {name}={other!r}, not {value!r}"
    return ""
