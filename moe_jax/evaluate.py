"""Scores a trained model on text: `python -m moe_jax.evaluate --workdir=DIR`.

Prints nats a token and bits a byte, overall and by domain, dropless and capacity-limited side by
side. The text is the held-out split of the run, or of another --corpus, or files of --text. The
score of the whole held-out split of the run at its newest checkpoint is written to
`DIR/evaluation.json`. Losses of a model that sees later tokens are marked.
"""

import dataclasses
import json
import math
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
UNITS = {"bits/B": "bits_per_byte", "nats/tok": "nats_per_token"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is scored: flags of the command, which says what each is."""

    step: int | None = None
    text: Sequence[str] = ()
    corpus: str = ""
    heldout_fraction: float | None = None
    text_field: str = ""
    id_field: str = ""
    group_field: str = ""
    batches: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Checks them against each other; a flag of several values gives a list."""
        object.__setattr__(self, "text", tuple(self.text))
        if self.text and self.corpus:
            raise ValueError(
                f"--text and --corpus both name the text: --text={self.text[0]}, "
                f"--corpus={self.corpus}. Leave one out."
            )
        for name in ("heldout_fraction", *FIELDS):
            if getattr(self, name) not in (None, "") and not self.corpus:
                raise ValueError(
                    f"--{name} is of another --corpus: --corpus is not given. Leave it out."
                )


def table(said: dict[str, Any]) -> str:
    """An evaluation as a table of text: a row a domain, bits/byte and nats/token by kind.

    Targets that are no bytes of a text, such as those of span corruption, have no bits/byte.
    """
    from moe_jax.analysis.names import printable
    from moe_jax.training.rows import lost_choices
    from moe_jax.training.ways import CAPACITIES, notes_of, way_of

    kinds = [kind for kind in CAPACITIES if kind in said]
    rows = [("all", [said[kind] for kind in kinds])]
    rows += [
        (printable(domain), [said[kind]["domains"][domain] for kind in kinds])
        for domain in said[kinds[0]]["domains"]
    ]
    width = max(16, *(len(name) for name, _ in rows))
    ways = [way_of(kind, said[kind]) for kind in kinds]
    names = [f"{way.label} {unit}" for way in ways for unit in UNITS]
    lines = [" ".join([f"{'domain':<{width}}", *(f"{name:>27}" for name in names)])]
    if any(way.mark for way in ways):
        marks = [f"{way.mark:>27}" for way in ways for _ in UNITS]
        lines.append(" ".join([" " * width, *marks]))
    for domain, losses in rows:
        values = [loss[key] for loss in losses for key in UNITS.values()]
        cells = ("-" if math.isnan(value) else f"{value:.4f}" for value in values)
        lines.append(" ".join([f"{domain:<{width}}", *(f"{cell:>27}" for cell in cells)]))
    lines += [
        f"{way.label}: {lost_choices(said[kind]):,} choices lost"
        for kind, way in zip(kinds, ways, strict=True)
        if "buffer_overflow" in said[kind]
    ]
    return "\n".join([*lines, *notes_of(way.mark for way in ways)])


def evaluate_run(
    workdir: pathlib.Path, config: "ExperimentConfig", state: "TrainState", options: Options
) -> dict[str, Any]:
    """Scores the text that the options name; the result says which it was, and of which step."""
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
            "--text is scored token by token, by a decoder alone",
            f"data.objective of the run is {kind_of(objective)!r}",
            "Pass --corpus",
        )
        tokenizer, domains = open_tokenizer_of(config.data), file_names(options.text)
        texts = [read_text(path) for path in options.text]
        batches = text_batches(texts, tokenizer, sequence_length=length, batch_size=rows)[:some]
        named = f"the text of {', '.join(options.text)}"
    else:
        try:
            data = open_other(config, options) if options.corpus else open_run_data(workdir, config)
            batches = heldout_batches(data, batch_size=rows, max_batches=some)
        except ValueError as error:
            if not options.corpus:
                raise
            # What is a setting of a run is a flag of this command.
            raise ValueError(str(error).replace("config.data.", "--")) from error
        tokenizer, domains = data.tokenizer, data.domains
        named = f"the held-out split of {data.config.corpus}"
    of_model = (state.params, state.model_state, config)
    token_bytes_V = objective.token_bytes(tokenizer, length)
    losses = score(*of_model, batches, domains, token_bytes_V, mesh, state.step)
    part = f"{options.batches} batches of {rows} sequences of " if options.batches else ""
    return {"step": int(state.step), "text": part + named, **losses}


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
    """Writes `evaluation.json`, unless a run that goes on has written that of a later step.

    Returns:
        What was done, in words.
    """
    from moe_jax.training.files import write_atomically
    from moe_jax.training.metrics import EVALUATION_FILE

    path = workdir / EVALUATION_FILE
    try:
        there = int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        there = -1  # None, or none that can be read.
    if there > found["step"]:
        return f"left {path}: it is of step {there}"
    write_atomically(path, json_text(found, indent=2) + "\n")
    return f"wrote {path}"


def main() -> None:
    """Loads a checkpoint, evaluates it, and prints what came out."""
    import jax

    from moe_jax.training.saved import load_run

    values = flags.FLAGS
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: getattr(values, name) for name in names})
    workdir = pathlib.Path(values.workdir)
    config, state = load_run(workdir, command_line.mesh_of_flag(), options.step, trust=values.trust)
    found = evaluate_run(workdir, config, state, options)
    if jax.process_index() != 0:
        return
    print(f"step {found['step']}: {found.pop('text')}")
    print(table(found))
    if options == Options(batch_size=options.batch_size):
        print(write_evaluation(workdir, found))


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    command_line.define_mesh_flag()
    command_line.define_trust_flag()
    command_line.define_step_flag()
    flags.DEFINE_multi_string(
        "text", [], "A file of text in place of the held-out split; may be given again."
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
    flags.DEFINE_integer("batches", 0, "Batches to use; 0: all.", lower_bound=0)
    flags.DEFINE_integer(
        "batch_size",
        None,
        "Sequences at once, or as few more as the mesh takes; by default a microbatch of training.",
        lower_bound=1,
    )


command = command_line.Command(main, define_flags, required=("workdir",), several_processes=True)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
