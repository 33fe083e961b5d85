"""Scores a trained model on text: `python -m moe_jax.evaluate --workdir=DIR`.

Prints bits per byte, nats per token and perplexity per token, overall and by domain, dropless and
capacity-limited side by side. The text is the held-out split of the run or of another --corpus, or
the files of --text. The score of the whole held-out split of the run at its newest checkpoint is
written to `DIR/evaluation.json`. --choices answers questions by likelihood instead. --output writes
all results as JSON. Scores of a model that sees later tokens are marked.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from moe_jax import command_line
from moe_jax.config.check import require
from moe_jax.config.json_text import json_text
from moe_jax.config.kinds import kind_of

if TYPE_CHECKING:
    from moe_jax.config import ExperimentConfig
    from moe_jax.data import Data, Example
    from moe_jax.training.state import TrainState

FIELDS = ("text_field", "id_field", "group_field")
UNITS = ("bits/B", "nats/tok", "ppl/tok")
TEXT_SUFFIXES = (".txt", ".md")  # files that are read from a folder


@dataclasses.dataclass(frozen=True)
class Options:
    """What is scored; the flags of the command, whose help explains each."""

    step: int | None = None
    text: Sequence[str] = ()
    corpus: str = ""
    heldout_fraction: float | None = None
    text_field: str = ""
    id_field: str = ""
    group_field: str = ""
    choices: str = ""
    context: int | None = None
    batches: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Checks the flags against each other; a flag with several values gives a list."""
        object.__setattr__(self, "text", tuple(self.text))
        if self.text and self.corpus:
            raise ValueError(
                f"--text and --corpus both name the text: --text={self.text[0]}, "
                f"--corpus={self.corpus}. Leave one out."
            )
        for name in ("heldout_fraction", *FIELDS):
            if getattr(self, name) not in (None, "") and not self.corpus:
                raise ValueError(
                    f"--{name} needs another --corpus: --corpus is not given. Leave it out."
                )
        if self.context and not self.choices:
            raise ValueError("--context needs --choices: --choices is not given. Leave it out.")
        other = next((n for n in ("text", "corpus", "batches") if getattr(self, n)), "")
        if self.choices and other:
            raise ValueError(
                f"--choices must be scored alone: --choices={self.choices} beside --{other}. "
                "Leave one out."
            )


def table(evaluation: dict[str, Any]) -> str:
    """An evaluation as a text table: a row per domain, `UNITS` by kind.

    Targets that are not bytes of a text, such as those of span corruption, have no bits/byte.
    """
    from moe_jax.analysis.names import printable
    from moe_jax.training.evaluation import perplexity
    from moe_jax.training.loss_labels import CAPACITIES, notes_of, recorded_label
    from moe_jax.training.rows import lost_choices

    kinds = [kind for kind in CAPACITIES if kind in evaluation]
    rows = [("all", [evaluation[kind] for kind in kinds])]
    rows += [
        (printable(domain), [evaluation[kind]["domains"][domain] for kind in kinds])
        for domain in evaluation[kinds[0]]["domains"]
    ]
    labels = [recorded_label(kind, evaluation[kind]) for kind in kinds]
    first = max(16, *(len(name) for name, _ in rows))
    width = max(29, *(len(text) for label in labels for text in label))
    lines = [line_of("", [label.label for label in labels], first, width)]
    if any(label.mark for label in labels):
        lines.append(line_of("", [label.mark for label in labels], first, width))
    lines.append(line_of("domain", [cells_of(UNITS)] * len(labels), first, width))
    for domain, losses in rows:
        groups = []
        for loss in losses:
            bits, nats = (loss[key] for key in ("bits_per_byte", "nats_per_token"))
            numbers = (f"{bits:.4f}", f"{nats:.4f}", f"{perplexity(nats):.5g}")
            groups.append(cells_of("-" if number == "nan" else number for number in numbers))
        lines.append(line_of(domain, groups, first, width))
    lines += [
        f"{label.label}: {lost_choices(evaluation[kind]):,} choices lost"
        for kind, label in zip(kinds, labels, strict=True)
        if "buffer_overflow" in evaluation[kind]
    ]
    return "\n".join([*lines, *notes_of(label.mark for label in labels)])


def line_of(name: str, groups: Iterable[str], first: int, width: int) -> str:
    """A line of the table: a name, and the cells of each evaluation."""
    return "  ".join([f"{name:<{first}}", *(f"{group:>{width}}" for group in groups)])


def cells_of(values: Iterable[str]) -> str:
    """The columns of one evaluation."""
    return " ".join(f"{value:>9}" for value in values)


def score_of_choices(evaluation: dict[str, Any]) -> str:
    """The results of --choices, as lines of text."""
    from moe_jax.training.loss_labels import LossLabel, notes_of

    label = LossLabel(evaluation["label"], evaluation["mark"])
    names = {"accuracy": "accuracy", "accuracy_per_byte": "accuracy per byte"}
    count = len(evaluation["questions"])
    lines = [f"{count} question{'s' * (count != 1)}, {label.name}"]
    lines += [f"{name:<18}{evaluation[key]:.4f}" for key, name in names.items()]
    return "\n".join([*lines, *notes_of([label.mark])])


def evaluate_run(
    workdir: pathlib.Path, config: "ExperimentConfig", state: "TrainState", options: Options
) -> dict[str, Any]:
    """Scores the text that the options name; the result names the text and the step."""
    from moe_jax.analysis.checkpoint import file_names, read_text
    from moe_jax.analysis.routed import text_batches
    from moe_jax.data import heldout_batches, open_tokenizer_of
    from moe_jax.parallel.mesh import make_mesh
    from moe_jax.training.evaluation import score
    from moe_jax.training.placement import inference_rows
    from moe_jax.training.saved import open_run_data

    mesh = make_mesh(config.mesh)
    rows = inference_rows(config, mesh, options.batch_size)
    some = options.batches or None
    batches: Iterable[Example]
    objective, length = config.data.objective, config.data.sequence_length
    if options.text:
        require(
            not objective.encoder_decoder,
            "only a decoder can score --text, token by token",
            f"data.objective of the run is {kind_of(objective)!r}",
            "Pass --corpus",
        )
        paths = texts_of(options)
        tokenizer, domains = open_tokenizer_of(config.data), file_names(paths)
        texts = [read_text(path) for path in paths]
        batches = text_batches(texts, tokenizer, sequence_length=length, batch_size=rows)[:some]
        named = f"the text of {', '.join(options.text)}"
    else:
        try:
            data = open_other(config, options) if options.corpus else open_run_data(workdir, config)
            batches = heldout_batches(data, batch_size=rows, max_batches=some)
        except ValueError as error:
            if not options.corpus:
                raise
            # A setting of a run is a flag of this command.
            raise ValueError(str(error).replace("config.data.", "--")) from error
        tokenizer, domains = data.tokenizer, data.domains
        named = f"the held-out split of {data.config.corpus}"
    of_model = (state.params, state.model_state, config)
    token_bytes_V = objective.token_bytes(tokenizer, length)
    losses = score(*of_model, batches, domains, token_bytes_V, mesh, state.step)
    part = f"{options.batches} batches of {rows} sequences of " if options.batches else ""
    return {"step": int(state.step), "text": part + named, **losses}


def texts_of(options: Options) -> list[str]:
    """The files of all --text."""
    return [path for name in options.text for path in text_files(name)]


def text_files(name: str) -> list[str]:
    """A file of --text, or, in order, the text files in a folder of that name and below."""
    folder = pathlib.Path(name)
    if not folder.is_dir():
        return [name]
    found = sorted(path for path in folder.rglob("*") if path.suffix in TEXT_SUFFIXES)
    require(
        bool(found),
        f"a folder of --text must hold files of {', '.join(TEXT_SUFFIXES)}",
        f"{folder} has none",
        "Name the files, or pass --corpus for those of another kind",
    )
    return [str(path) for path in found]


def open_other(config: "ExperimentConfig", options: Options) -> "Data":
    """The data of --corpus, with the tokenizer and the length of the run."""
    from moe_jax.data import open_data

    fraction = options.heldout_fraction
    if fraction is None:
        fraction = config.data.heldout_fraction
    fields = {name: getattr(options, name) for name in FIELDS}
    return open_data(
        dataclasses.replace(
            config.data,
            corpus=options.corpus,
            heldout_fraction=fraction,
            domain_weights=(),
            **fields,
        )
    )


def write_evaluation(workdir: pathlib.Path, found: dict[str, Any]) -> str:
    """Writes `evaluation.json`, unless a continuing run has written one of a later step.

    Returns:
        What was done, in words.
    """
    from moe_jax.files import write_atomically
    from moe_jax.training.files import EVALUATION_FILE

    path = workdir / EVALUATION_FILE
    try:
        there = int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        there = -1  # No file, or one that cannot be read.
    if there > found["step"]:
        return f"left {path}: it is of step {there}"
    write_atomically(path, json_text(found, indent=2) + "\n")
    return f"wrote {path}"


def main() -> None:
    """Loads a checkpoint, evaluates it, and prints the results."""
    import jax

    from moe_jax.analysis.checkpoint import read_text
    from moe_jax.files import write_atomically
    from moe_jax.inference.choices import choose, read_questions
    from moe_jax.inference.generation import ROWS
    from moe_jax.training.saved import load_run

    values = flags.FLAGS
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: getattr(values, name) for name in names})
    if values.output:
        command_line.require_file("output", values.output, r'\{\s*"step": \d+,\s*"text": "')
    # What cannot be read is refused before the model is loaded.
    questions = read_questions(options.choices) if options.choices else []
    for path in texts_of(options):
        read_text(path)
    workdir = pathlib.Path(values.workdir)
    config, state = load_run(workdir, command_line.mesh_of_flag(), options.step, trust=values.trust)
    found: dict[str, Any]
    if questions:
        found = {"step": int(state.step), "text": options.choices}
        found |= choose(
            config, state.params, questions,
            state=state.model_state, step=state.step,
            context=options.context, batch_size=options.batch_size or ROWS,
        )  # fmt: skip
    else:
        found = evaluate_run(workdir, config, state, options)
    if jax.process_index() != 0:
        return
    print(f"step {found['step']}: {found['text']}")
    print(score_of_choices(found) if questions else table(found))
    if values.output:
        write_atomically(pathlib.Path(values.output), json_text(found, indent=2) + "\n")
    if options == Options(batch_size=options.batch_size):
        found.pop("text")
        print(write_evaluation(workdir, found))


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    command_line.define_mesh_flag()
    command_line.define_trust_flag()
    command_line.define_step_flag()
    flags.DEFINE_multi_string(
        "text",
        [],
        "A file of text in place of the held-out split, or a folder of .txt and .md; may be given "
        "again.",
    )
    flags.DEFINE_string(
        "corpus",
        "",
        "Another corpus, in the forms of data.corpus: its held-out split, by the same rule as "
        "the run's own.",
    )
    flags.DEFINE_float(
        "heldout_fraction", None, "Of another --corpus; by default the run's.", lower_bound=0.0
    )
    for name in FIELDS:
        flags.DEFINE_string(name, "", f"Of another --corpus, as data.{name}.")
    flags.DEFINE_string(
        "choices",
        "",
        "A .jsonl file of questions to answer by likelihood, in place of a text: lines such as "
        '{"question": "The sky is", "choices": ["blue", "an apple"], "answer": 0}.',
    )
    flags.DEFINE_integer(
        "context",
        None,
        "Of --choices: tokens that are read at most, the last ones; by default the sequence_length "
        "of the run.",
        lower_bound=2,
    )
    flags.DEFINE_string("output", "", "A .json file for all that was found.")
    flags.DEFINE_integer("batches", 0, "Batches to use; 0: all.", lower_bound=0)
    flags.DEFINE_integer(
        "batch_size",
        None,
        "Sequences at once, or as few more as the mesh takes; by default a microbatch of training, "
        "and of --choices 32.",
        lower_bound=1,
    )


command = command_line.Command(main, define_flags, required=("workdir",), several_processes=True)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
