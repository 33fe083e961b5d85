"""Continues texts: `python -m moe_jax.generate --workdir=DIR --prompt="The king"`.

A single text is printed as it is generated; several are printed one by one when complete. The speed
is printed at the end, on stderr. --output also writes each text as a line of JSON; a second start
continues after these.
"""

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from moe_jax import command_line, interrupts
from moe_jax.config.check import require

if TYPE_CHECKING:
    from moe_jax.config import ExperimentConfig
    from moe_jax.inference import Draft, TextPiece
    from moe_jax.inference.answers import AnswerFile, Answers, RouteFiles
    from moe_jax.models.model import LanguageModel

OWN_MODULES = "multi_token"  # a value of --draft
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def note_on(model: "LanguageModel") -> str:
    """Notes on a model that looks or looked at later tokens, and on a model without a cache."""
    from moe_jax.inference.decoding import why_anew
    from moe_jax.training.loss_labels import SEES, loss_labels

    mark, why, note = loss_labels(model)["dropless"].mark, why_anew(model), ""
    if mark:
        loss = ", and a loss with them is not that of a causal language model" * (mark == SEES)
        note = f"note: the model {mark}; when it writes a text there are none{loss}.\n"
    if why:
        note += f"note: {why}, so that the whole context is read anew for every token.\n"
    return note


def read_prompts(path: str) -> list[str]:
    """The prompts in a file: the field `prompt` of each line of a .jsonl file, else each line.

    Blank lines are skipped.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not UTF-8, contains no prompt, or a line has no such field.
    """
    from moe_jax.data.open_file import decode

    # Not `splitlines`, which also ends a line at U+2028 and other characters of texts.
    lines = [
        line.removesuffix("\r")
        for line in decode(pathlib.Path(path).read_bytes(), path).split("\n")
    ]
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    require(bool(numbered), "--prompts is a file of prompts", f"{path} is blank", "Name another")
    if not path.endswith(".jsonl"):
        return [line for _, line in numbered]
    return [prompt_of(line, f"{path} line {i}") for i, line in numbered]


def prompt_of(line: str, where: str) -> str:
    """The field `prompt` of a line of JSON."""
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    require(
        isinstance(prompt, str),
        'a line of a .jsonl of prompts must be an object such as {"prompt": "The king"}',
        f"{where} is {line[:60]!r}",
        "Correct it",
    )
    assert isinstance(prompt, str)
    return prompt


def require_unicode(texts: Sequence[str]) -> None:
    """Refuses lone surrogates, from a flag that is not UTF-8 or an escape in JSON."""
    for text in texts:
        whole = text.encode(errors="ignore").decode()
        require(whole == text, "prompts and stop strings must be text that UTF-8 can write",
                repr(text[:60]), "Correct it")  # fmt: skip


class Speed:
    """Measures tokens per second without compilation; the timed code runs in its context.

    JAX reports the duration of tracing, lowering and compilation; these spans may be nested.
    """

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.spans: list[tuple[float, float]] = []  # begin, seconds

    def __enter__(self) -> "Speed":
        import jax

        jax.monitoring.register_event_duration_secs_listener(self.add)
        return self

    def __exit__(self, *exception: object) -> None:
        import jax

        jax.monitoring.unregister_event_duration_listener(self.add)

    def add(self, event: str, duration_secs: float, **_: object) -> None:
        """Adds a compilation span that has just ended."""
        if not event.startswith("/jax/core/compile/"):
            return
        begin = time.perf_counter() - duration_secs
        while self.spans and self.spans[-1][0] >= begin:
            self.spans.pop()
        self.spans.append((begin, duration_secs))

    def line(self, count: int) -> str:
        """A summary for the end of the command."""
        seconds = time.perf_counter() - self.begin
        compiling = min(sum(span for _, span in self.spans), seconds)
        rate = count / max(seconds - compiling, 1e-9)
        return f"{count} tokens in {seconds:.1f} s, {compiling:.1f} s of it compilation: " + (
            f"{rate:,.0f} tokens/s without it"
        )


@contextlib.contextmanager
def out_of_memory_explained(batch_size: int, context: int) -> Iterator[None]:
    """A context that converts an out-of-memory error to one line.

    Raises:
      MemoryError: with the flags to change.
    """
    from moe_jax.training.memory import is_out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        reasons = str(error).strip().splitlines() or ["MemoryError"]
        raise MemoryError(
            f"{batch_size} texts of at most {context} tokens, each with a cache, ran out of "
            f"memory: {reasons[0].rstrip('.')}. Lower --batch_size (now {batch_size}) or --context "
            f"(now {context}), or split the model by --mesh."
        ) from error


def show(
    pieces: "Iterator[TextPiece]",
    answers: "Answers",
    file: "AnswerFile | None",
    joint: str,
    routes: "RouteFiles | None" = None,
) -> None:
    """Prints a single text as it is generated, or each of several when complete.

    Files are written first. `joint` is printed between a prompt and its text.
    """
    alone = len(answers.texts) == 1 and not answers.first
    begin = answers.prompts[0] + joint  # printed only with the first piece, after any error
    for piece in pieces:
        if routes:
            routes.add(piece)
        for record in answers.add(piece):
            if routes:
                routes.write(answers.count)
            if file:
                file.append(record)
            if alone:
                continue
            sample = f", sample {record['sample']}" if answers.num_samples > 1 else ""
            print(f"--- prompt {record['prompt_index']}{sample}")
            print(record["prompt"], record["text"], sep=joint, flush=True)
        if alone:
            print(begin + piece.text, end="", flush=True)
            begin = ""
    if alone:
        print()


def open_answers(
    path: str,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    routes: "RouteFiles | None" = None,
) -> "tuple[Answers, AnswerFile | None]":
    """The answers to generate, after those in the file; the first process reads and writes it.

    Args:
      path: of the file, or "".
      prompts: to continue.
      settings: settings that an answer depends on, including `samples` and `tokens`.
      routes: files of experts, which must exist for the same answers.
    """
    import jax

    from moe_jax.inference.answers import AnswerFile, Answers
    from moe_jax.parallel import processes

    how = (prompts, settings["samples"], settings["tokens"], settings)
    file, first = None, 0
    with processes.all_or_none():
        if path and jax.process_index() == 0:
            file = AnswerFile(pathlib.Path(path))
            first = file.open(Answers(*how))
        if routes and jax.process_index() == 0:
            routes.check(first, goes_on=bool(path))
    first = processes.of_first(first)
    return Answers(*how, first=first), file


def draft_of_flags(config: "ExperimentConfig", step: int) -> "tuple[Draft | None, dict[str, Any]]":
    """The draft of --draft, and its settings that an answer depends on.

    Args:
      config: of the model.
      step: of the model's checkpoint.

    Raises:
      ValueError: the draft does not fit the model.
    """
    from moe_jax.data import open_tokenizer_of
    from moe_jax.inference import Draft
    from moe_jax.inference.text import check_draft
    from moe_jax.training.saved import load_run

    values = flags.FLAGS
    draft, step_of_draft = None, None
    if values.draft == OWN_MODULES:
        draft, step_of_draft = Draft(length=values.draft_length), step
    elif values.draft:
        loaded = load_run(values.draft, command_line.mesh_of_flag(), trust=values.trust)
        draft = Draft(*loaded, length=values.draft_length)
        step_of_draft = int(loaded[1].step)
    check_draft(config, draft, open_tokenizer_of(config.data))
    drawn = bool(values.draft) and values.temperature > 0
    return draft, {
        "draft": values.draft if drawn else None,
        "draft_step": step_of_draft if drawn else None,
        "draft_length": values.draft_length if drawn else None,
    }


def main() -> None:
    """Loads a checkpoint and continues the prompts."""
    import jax

    from moe_jax.inference import Sampling, stream_text
    from moe_jax.training.saved import load_run

    values = flags.FLAGS
    if "" in values.prompt:
        raise ValueError("--prompt is empty: --prompt=. Give it a value.")
    require(
        bool(values.prompt) != bool(values.prompts),
        "prompts must come either from --prompt or from --prompts",
        "both are given" if values.prompt else "neither is given",
        "Give one of them",
    )
    prompts = values.prompt or read_prompts(values.prompts)
    require("" not in values.stop, "a stop string must not be empty", "--stop=", "Leave it out")
    require_unicode([*prompts, *values.stop])
    sampling: dict[str, Any] = {name: getattr(values, name) for name in SAMPLING}
    Sampling(**sampling)  # refuses before anything is loaded
    if values.output:
        command_line.require_file("output", values.output)
    if values.routes:
        command_line.require_folder("routes", values.routes)
    config, state = load_run(
        values.workdir, command_line.mesh_of_flag(), values.step, trust=values.trust
    )
    context = values.context or config.data.sequence_length
    settings = {
        "workdir": values.workdir, "step": int(state.step), **sampling, "tokens": values.tokens,
        "samples": values.samples, "stop": values.stop, "context": context,
    }  # fmt: skip
    draft, of_draft = draft_of_flags(config, int(state.step))
    routes = route_files(config, prompts, context) if values.routes else None
    answers, file = open_answers(values.output, prompts, settings | of_draft, routes)
    is_first = jax.process_index() == 0
    if is_first:
        print(note_on(config.model), end="", file=sys.stderr)
        if answers.first:
            print(there(answers), file=sys.stderr)
    pieces = stream_text(
        config, state.params, prompts, values.tokens,
        state=state.model_state, step=state.step, num_samples=values.samples, stop=values.stop,
        context=context, batch_size=values.batch_size, ended=range(answers.first), draft=draft,
        record=routes is not None, **sampling,
    )  # fmt: skip
    in_memory = out_of_memory_explained(min(values.batch_size, len(answers.texts)), context)
    with Speed() as speed, in_memory:
        if not is_first:
            for _ in pieces:
                pass
            return
        if file:
            more = ", and the same command goes on behind them"
            interrupts.say_before_end(lambda: there(answers) + more)
        show(pieces, answers, file, "\n" if config.model.has_encoder else "", routes)
        interrupts.say_before_end(lambda: "")
    print(speed.line(sum(answers.num_tokens)), file=sys.stderr)
    print(empty(answers), end="", file=sys.stderr)
    if draft and draft.passes:
        print(draft.line(), file=sys.stderr)


def empty(answers: "Answers") -> str:
    """A line about answers without a token; "" if there are none."""
    ended = zip(answers.ended, answers.num_tokens, strict=True)
    count = sum(is_over and not num for is_over, num in ended)
    warning = (
        f"{count} of {len(answers.texts)} texts are empty: their first token ended the document\n"
    )
    return warning * bool(count)


def there(answers: "Answers") -> str:
    """A sentence about the number of answers in --output."""
    return f"{answers.count} of {len(answers.texts)} answers are in {flags.FLAGS.output}"


def route_files(config: "ExperimentConfig", prompts: Sequence[str], context: int) -> "RouteFiles":
    """The files of --routes, for the experts of texts that begin with these prompts.

    Raises:
      ValueError: the model has no experts, or the texts do not fit into the context.
    """
    from moe_jax.data import open_tokenizer_of
    from moe_jax.inference.answers import RouteFiles
    from moe_jax.inference.generation import check_record

    tokenizer, objective = open_tokenizer_of(config.data), config.data.objective
    encoded = [objective.prompt_ids(tokenizer, prompt) for prompt in prompts]
    check_record(config.model, encoded, flags.FLAGS.tokens, context)
    return RouteFiles(pathlib.Path(flags.FLAGS.routes), encoded, flags.FLAGS.samples)


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    command_line.define_mesh_flag()
    command_line.define_trust_flag()
    command_line.define_step_flag()
    flags.DEFINE_multi_string("prompt", [], "The text to continue; may be given again.")
    flags.DEFINE_string(
        "prompts", "", "A file of prompts: one a line, or .jsonl with the field prompt."
    )
    flags.DEFINE_string(
        "output",
        "",
        "A .jsonl file for the answers, beside what is printed; the same command goes on behind "
        "those that it has.",
    )
    flags.DEFINE_integer("tokens", 200, "How many tokens to add at most.", lower_bound=0)
    flags.DEFINE_integer("samples", 1, "Texts for each prompt.", lower_bound=1)
    flags.DEFINE_multi_string("stop", [], "A string before which a text ends; may be given again.")
    flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.", lower_bound=0.0)
    flags.DEFINE_integer("top_k", 0, "Draw among the k likeliest tokens; 0: all.", lower_bound=0)
    flags.DEFINE_float(
        "top_p", 1.0, "Draw among the fewest likeliest tokens of so much probability."
    )
    flags.DEFINE_float("min_p", 0.0, "Leave out tokens below this share of the likeliest's.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Above 1 tokens seen before are less likely.")
    flags.DEFINE_integer(
        "seed", 0, "Equal seeds give equal texts.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_integer(
        "context", None,
        "Tokens that are seen at most: a longer text goes on from its last half. By default the "
        "sequence_length of the run.",
        lower_bound=2,
    )  # fmt: skip
    flags.DEFINE_integer("batch_size", 32, "Texts at once.", lower_bound=1)
    flags.DEFINE_string(
        "draft",
        "",
        f"Speculative decoding: the workdir of a smaller model of the same tokenizer, or "
        f"{OWN_MODULES} for the modules of the model itself.",
    )
    flags.DEFINE_integer(
        "draft_length", 4, "Tokens proposed before a pass of the model.", lower_bound=1,
        upper_bound=8,  # `layers.cache.SPARE`
    )  # fmt: skip
    flags.DEFINE_string(
        "routes", "", "A folder for the experts of every token: an .npz for each answer."
    )


command = command_line.Command(main, define_flags, required=("workdir",), several_processes=True)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
