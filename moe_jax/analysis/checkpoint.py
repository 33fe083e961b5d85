"""The analysis of a run's routers, from its checkpoints to numbers, figures and a page."""

import itertools
import logging
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.analysis.drawing import png_bytes, spread, stamp
from moe_jax.analysis.instability import route_variations
from moe_jax.analysis.measures import Scope, measure_layers
from moe_jax.analysis.options import Options
from moe_jax.analysis.page import analysis_page, choose_passages
from moe_jax.analysis.routed import Routed, route_batches, text_batches
from moe_jax.analysis.routing_figures import routing_figures
from moe_jax.analysis.similarity import moe_weights
from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.config.json_text import json_text
from moe_jax.config.kinds import kind_of
from moe_jax.data import Example, Tokenizer, heldout_batches, open_tokenizer_of
from moe_jax.data.open_file import decode
from moe_jax.files import write_atomically
from moe_jax.models.model import LanguageModel
from moe_jax.training.files import RUN_FILE, DamagedCheckpointError, damage, read_json
from moe_jax.training.loss_labels import loss_labels
from moe_jax.training.run_record import run_record
from moe_jax.training.saved import CHECKPOINTS, kept_steps, load_run, open_run_data
from moe_jax.training.state import TrainState

logger = logging.getLogger(__name__)

JSON_FILE = "analysis.json"
PAGE_FILE = "analysis.html"


class Analysis(NamedTuple):
    """The results of an analysis.

    Attributes:
      settings: what was analysed: names and numbers.
      layers: the result of `measures.measure_layers`.
      routed: the choices at the analysed checkpoint.
      domains: names of the domains.
      tokenizer: the model's tokenizer.
    """

    settings: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    routed: Routed
    domains: tuple[str, ...]
    tokenizer: Tokenizer


def analyze_run(workdir: str | pathlib.Path, options: Options | None = None) -> Analysis:
    """Routes text through a checkpoint of a run and some earlier ones, and measures the routing.

    Args:
      workdir: of the run, which may still be training.
      options: see `Options`.

    Raises:
      ValueError: the directory contains no run with this checkpoint, the model is dense or soft, a
        text is not UTF-8, or there are more texts than tokens.
      DamagedCheckpointError: the checkpoint of this step is damaged, or all are.
    """
    options = options or Options()
    require(
        options.tokens >= len(options.text),
        "An analysis needs at least one token of each text",
        f"--tokens={options.tokens} for {len(options.text)} files of --text",
        "Raise --tokens, or give fewer files",
    )
    texts = [read_text(path) for path in options.text]
    config, state = load_run(workdir, step=options.step, trust=options.trust)
    check_model(config.model, workdir, options)
    tokenizer = open_tokenizer_of(config.data)
    domains, batches = batches_of(workdir, config, tokenizer, options, texts)
    last = int(state.step)
    of = {"of_encoder": options.encoder}
    routed = route_batches(state, config.model, batches, options.tokens, **of)
    varied = route_variations(state, config.model, batches, options.tokens, options.noise, **of)
    weights = moe_weights(state.params, config.model, options.stack)
    del state  # an earlier one takes as much memory
    earlier: dict[int, Routed] = {}
    steps = [step for step in kept_steps(workdir) if step < last]
    for step in spread(steps, options.checkpoints):
        before = load_if_whole(workdir, step, options.trust)
        if before is not None:
            earlier[step] = route_batches(before, config.model, batches, options.tokens, **of)
            del before
    if earlier:
        before_last = max(earlier)
        varied[f"step {before_last:,}"] = earlier[before_last]
    scope = Scope(domains, tokenizer, num_shuffles=options.shuffles, min_count=options.min_count)
    layers = measure_layers(routed, earlier, varied, weights, scope)
    settings = settings_of(workdir, config, options, last, list(earlier), routed)
    return Analysis(settings, layers, routed, domains, tokenizer)


def check_model(model: LanguageModel, workdir: str | pathlib.Path, options: Options) -> None:
    """Refuses a model whose routing cannot be analysed.

    Raises:
      ValueError: it is dense, it has no such stack, the stack routes no tokens, the experts of a
        part mix all tokens, or a text is given for a model with an encoder.
    """
    stack = options.stack
    require(
        bool(model.moe_parts),
        "An analysis of routing needs a model with MoE layers",
        f"the run in {workdir} has the parts {sorted(model.part)}",
        "Pass the --workdir of a MoE run",
    )
    require(
        stack in model.stacks
        and not model.moe_parts.keys().isdisjoint(model.stacks[stack].parts()),
        "The analysed stack, the decoder or with --encoder the encoder, must route tokens",
        f"the run in {workdir} routes in the parts {sorted(model.moe_parts)} of the "
        f"{'other stack' if model.has_encoder else 'decoder, its only stack'}",
        "Pass --noencoder" if stack == "encoder" else "Pass --encoder",
    )
    require(
        not (options.text and model.has_encoder),
        "--text is for models without an encoder",
        f"the run in {workdir} has one",
        "Leave out --text: held-out text is analysed",
    )
    for name, moe in model.moe_parts.items():
        require(
            moe.router.replays or not moe.router.fills_slots(training=False),
            "An analysis of routing needs tokens that choose experts or are chosen by them",
            f"the run in {workdir} has {name}.router={kind_of(moe.router)!r}, which mixes them",
            "Pass the --workdir of a run with another router",
        )


def load_if_whole(workdir: str | pathlib.Path, step: int, trust: bool) -> TrainState | None:
    """A checkpoint of a run; None, with a warning, if it is damaged or gone.

    A run in training deletes old checkpoints, even while they are read.
    """
    try:
        return load_run(workdir, step=step, trust=trust)[1]
    except (DamagedCheckpointError, ValueError, OSError) as error:
        if damage(pathlib.Path(workdir) / CHECKPOINTS / str(step)) is None:
            raise
        logger.warning("The checkpoint of step %d is left out: %s", step, error)
        return None


def batches_of(
    workdir: str | pathlib.Path,
    config: ExperimentConfig,
    tokenizer: Tokenizer,
    options: Options,
    texts: Sequence[str] = (),
) -> tuple[tuple[str, ...], list[Example]]:
    """The names of the domains, and batches with `options.tokens` tokens or more, if available.

    `texts` are the contents of `options.text`; without any, the held-out split is read.
    """
    rows = config.training.batch_size // config.training.num_microbatches
    if options.text:
        return file_names(options.text), text_batches(
            texts,
            tokenizer,
            sequence_length=config.data.sequence_length,
            batch_size=rows,
            max_tokens=options.tokens,
        )
    batches, missing = [], options.tokens
    data = open_run_data(workdir, config)
    for batch in heldout_batches(data, batch_size=rows):
        batches.append(batch)
        side = "encoder_segment_ids" if options.encoder else "segment_ids"
        missing -= int((batch[side] > 0).sum())
        if missing <= 0:
            break
    return data.domains, batches


def file_names(paths: Sequence[str]) -> tuple[str, ...]:
    """The names of files without their directories; a number distinguishes equal names."""
    names: list[str] = []
    for path in paths:
        name = pathlib.Path(path).name
        alike = (f"{name} ({number})" for number in itertools.count(2))
        names.append(next(each for each in itertools.chain([name], alike) if each not in names))
    return tuple(names)


def read_text(path: str) -> str:
    """A file of text, with line ends as on Unix.

    Raises:
      OSError: it cannot be read.
      ValueError: it is blank, or not UTF-8.
    """
    text = decode(pathlib.Path(path).read_bytes(), path).replace("\r\n", "\n")
    rule = "--text is a file of text"
    require(text.strip() != "", rule, f"the file {path} is blank", "Name another")
    return text


def settings_of(
    workdir: str | pathlib.Path,
    config: ExperimentConfig,
    options: Options,
    step: int,
    earlier: Sequence[int],
    routed: Routed,
) -> dict[str, Any]:
    """The inputs of an analysis, as JSON values; file names without directories."""
    record, run = run_record(), pathlib.Path(workdir).resolve() / RUN_FILE
    corpus = without_directory(config.data.corpus)
    files = file_names(options.text)
    return {
        "config": config.name,
        "run": run.parent.name,
        "step": step,
        "earlier_steps": list(earlier),
        "text": textwrap.shorten(", ".join(files), 80)
        or f"the held-out split of {corpus}" + ", as the encoder reads it" * options.encoder,
        "files": list(files),
        "tokenizer": without_directory(config.data.tokenizer),
        "num_tokens": len(routed.token_J),
        "sequence_length": config.data.sequence_length,
        "mark": loss_labels(config.model)["dropless"].mark,
        "parts": {
            name: part_settings(config.model, name)
            for name in config.model.moe_parts
            if name in config.model.stacks[options.stack].parts()
        },
        "shuffles": options.shuffles,
        "min_count": options.min_count,
        "run_commit": commit_of(run),
        "commit": record["commit"],
        "uncommitted_changes": record["dirty"],
        "versions": record["versions"],
    }


def commit_of(record: pathlib.Path) -> str | None:
    """The commit in the record of a run; None if the record is missing or damaged."""
    try:
        commit = read_json(record).get("commit")
    except (ValueError, OSError):
        return None
    return None if commit is None else str(commit)


def part_settings(model: LanguageModel, name: str) -> dict[str, Any]:
    """The reported settings of an MoE part, as JSON values."""
    moe = model.moe_parts[name]
    factor = moe.capacity_factor(training=False, factor=0.0)
    return {
        "layers": list(model.moe_layers[name]),
        "num_experts": moe.num_options,
        "of_which_compute_nothing": moe.num_options - moe.num_experts,
        "num_selected_experts": moe.num_selected(training=False),
        "router": kind_of(moe.router),
        "capacity": f"slots of training, factor {factor}" if factor else "dropless",
    }


def without_directory(name: str) -> str:
    """The name of a corpus or tokenizer, such as `jsonl:DIR`, with only the end of its path."""
    kind, colon, path = name.partition(":")
    if not colon:
        return pathlib.Path(name).resolve().name
    return name if kind == "tfds" else f"{kind}:{pathlib.Path(path).resolve().name}"


def write_analysis(analysis: Analysis, out: str | pathlib.Path) -> list[pathlib.Path]:
    """Writes `analysis.json`, a PNG per figure, and `analysis.html`, which contains all of them.

    Returns:
      Their paths, the page first.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    analysed: Mapping[str, Any] = {"settings": analysis.settings, "layers": analysis.layers}
    figures = {
        name: (png_bytes(stamp(figure, analysis.settings["mark"])), sentence)
        for name, (figure, sentence) in routing_figures(
            analysis.layers, analysis.settings["text"]
        ).items()
    }
    passages = choose_passages(analysis.routed, analysis.domains)
    page = analysis_page(analysed, figures, passages, analysis.tokenizer)
    paths = [out / PAGE_FILE, out / JSON_FILE, *(out / f"{name}.png" for name in figures)]
    write_atomically(paths[0], page)
    write_atomically(paths[1], json_text(analysed, indent=1) + "\n")
    for path, (png, _) in zip(paths[2:], figures.values(), strict=True):
        path.write_bytes(png)
    return paths
