"""Multiple choice by likelihood: a model answers with its likeliest choice."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.data import open_tokenizer_of
from moe_jax.data.open_file import decode
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.inference.scoring import Pair, Scored, encode_pair, score_continuations
from moe_jax.training.loss_labels import loss_labels

EXAMPLE = '{"question": "The sky is", "choices": ["blue", "an apple"], "answer": 0}'


class Question(NamedTuple):
    """A question with its choices.

    Attributes:
      question: the text before a choice.
      choices: at least two.
      answer: index of the right choice.
    """

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: str) -> list[Question]:
    """The questions of a .jsonl file; skips blank lines.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not UTF-8, contains no question, or a line is not a question.
    """
    lines = decode(pathlib.Path(path).read_bytes(), path).split("\n")
    found = [
        question_of(line, f"{path} line {i}") for i, line in enumerate(lines, 1) if line.strip()
    ]
    require(bool(found), "--choices is a file of questions", f"{path} is blank", "Name another")
    return found


def question_of(line: str, where: str) -> Question:
    """The question in a line of JSON; ignores other fields."""
    try:
        record = json.loads(line)
        question, choices, answer = (record[name] for name in Question._fields)
        texts = isinstance(question, str) and isinstance(choices, list)
        whole = texts and all(isinstance(choice, str) and choice for choice in choices)
        good = whole and len(choices) >= 2 and type(answer) is int and 0 <= answer < len(choices)
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    require(
        good,
        f"a line of --choices must be an object such as {EXAMPLE}, with an index into choices",
        f"{where} is {line[:60]!r}",
        "Correct it",
    )
    return Question(question, tuple(choices), answer)


def choose(
    config: ExperimentConfig,
    params: Any,
    questions: Sequence[Question],
    *,
    tokenizer: Tokenizer | None = None,
    context: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Selects the likeliest choice of every question, dropless.

    A choice follows its question, with a space between them if neither has one. An
    encoder-decoder reads the question and writes the choice.

    Args:
      config: of the run, or of the imported model.
      params: parameters of the model.
      questions: the questions to answer.
      tokenizer: of the model; None: the one of the config.
      context: maximum number of tokens read; None: `data.sequence_length`. A longer question is cut
        from the left.
      **settings: other arguments of `score_continuations`, such as `state` and `step`.

    Returns:
      `accuracy`, the share of questions whose right choice has the highest log-likelihood;
      `accuracy_per_byte`, the same for the log-likelihood per UTF-8 byte of the choice; the `label`
      and `mark` of such scores (`training.loss_labels`); and `questions`, a list with the fields of
      each question, `log_likelihoods`, `num_tokens` and `is_greedy` by choice, and the indices
      `chosen` and `chosen_per_byte`.

    Raises:
      ValueError: see `score_continuations`.
    """
    tokenizer = tokenizer or open_tokenizer_of(config.data)
    settings |= {"num_ids": tokenizer.vocab_size, "start_token": tokenizer.pad_id}
    context = context or config.data.sequence_length
    pairs = encode_questions(tokenizer, questions, context, config.model.has_encoder)
    scores = iter(score_continuations(config, params, pairs, context=context, **settings))
    records = [record_of(one, [next(scores) for _ in one.choices]) for one in questions]
    shares = {
        name: float(np.mean([record[chosen] == record["answer"] for record in records]))
        for name, chosen in (("accuracy", "chosen"), ("accuracy_per_byte", "chosen_per_byte"))
    }
    return loss_labels(config.model)["dropless"]._asdict() | shares | {"questions": records}


def encode_questions(
    tokenizer: Tokenizer, questions: Sequence[Question], context: int, has_encoder: bool = False
) -> list[Pair]:
    """The (question, choice) pairs in order; a choice has at most `context` tokens."""
    pairs = []
    for i, one in enumerate(questions, 1):
        for choice in one.choices:
            space = "" if has_encoder else space_between(one.question, choice)
            pairs.append(
                encode_pair(tokenizer, one.question, space + choice, has_encoder=has_encoder)
            )
            require(
                len(pairs[-1][1]) <= context,
                "a choice must not have more tokens than are read",
                f"{choice[:40]!r} of question {i} has {len(pairs[-1][1])}, context={context}",
                "Shorten it, or raise context",
            )
    return pairs


def record_of(question: Question, scores: Sequence[Scored]) -> dict[str, Any]:
    """A question with the scores of its choices, ready for JSON."""
    likely = np.array([score.log_likelihood for score in scores])
    num_bytes = [len(choice.encode()) for choice in question.choices]
    return question._asdict() | {
        "log_likelihoods": likely.tolist(),
        "num_tokens": [score.num_tokens for score in scores],
        "is_greedy": [score.is_greedy for score in scores],
        "chosen": int(np.argmax(likely)),
        "chosen_per_byte": int(np.argmax(likely / num_bytes)),
    }


def space_between(question: str, choice: str) -> str:
    """The space between question and choice; "" if one is there or the question is empty."""
    has_one = not question or question[-1].isspace() or choice[0].isspace()
    return "" if has_one else " "
