"""The report of a run: its results, how the experts were used, and its settings."""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.analysis import figures
from moe_jax.analysis.drawing import Figure, png_bytes, stamp
from moe_jax.analysis.heldout import HELDOUT_METRIC, Row, newest_heldout
from moe_jax.analysis.names import fenced, in_code, in_markdown, table
from moe_jax.config import ExperimentConfig, difference, read_config, write_config
from moe_jax.config.upgrade import upgrade
from moe_jax.models.trained import describe_trained
from moe_jax.planning.arithmetic import count_parameters
from moe_jax.training.files import (
    CONFIG_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    REPORT,
    RUN_FILE,
    SAMPLE_FILE,
    read_json,
)
from moe_jax.training.loss_labels import (
    CAPACITIES,
    LossLabel,
    loss_labels,
    notes_of,
    recorded_label,
)
from moe_jax.training.metrics import read_metrics, training_seconds
from moe_jax.training.run_record import extensions

LOAD_METRIC = re.compile(r"(?P<part>[^/]+)/(?P<layer>layer_(?P<number>\d+))/expert_load")


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of a run.

    Attributes:
      rows: rows of metrics.jsonl, at least one.
      record: content of run.json.
      settings: content of config.json, nested.
      evaluation: content of evaluation.json; {} if there is none.
      sample: text of sample.txt; None if there is none.
    """

    rows: list[Row]
    record: Row
    settings: Row
    evaluation: Row
    sample: str | None

    @property
    def step(self) -> int:
        """The last step that has metrics."""
        return int(self.rows[-1]["step"])

    @functools.cached_property
    def heldout(self) -> Row:
        """Its newest held-out losses, in the form of evaluation.json; {} without any."""
        return newest_heldout(self.evaluation, self.rows)

    @property
    def extended(self) -> str:
        """Such as "extended from 1,000", if the run later got more steps; else ""."""
        before = " and ".join(f"{num_steps:,}" for _, num_steps in extensions(self.record))
        return f"extended from {before}" * bool(before)

    @functools.cached_property
    def loss_labels(self) -> dict[str, LossLabel]:
        """How its losses are measured: as recorded, or from the config if that needs no import."""
        recorded = self.record.get("losses", {})
        if not recorded and not self.settings["sources"]:
            model = read_config(self.settings, ExperimentConfig).model
            recorded = {kind: label._asdict() for kind, label in loss_labels(model).items()}
        return {
            kind: recorded_label(kind, recorded.get(kind, {})) for kind in ("train", *CAPACITIES)
        }

    @functools.cached_property
    def layers(self) -> dict[str, str]:
        """The MoE layers that have metrics, in order, with the prefix of their metrics.

        Example: {"layer_01": "moe/layer_01"}. If several parts of a layer route, its name includes
        the part.
        """
        names = {name for row in self.rows for name in row}
        matches = map(LOAD_METRIC.fullmatch, names)
        found = sorted((int(m["number"]), m["part"], m["layer"]) for m in matches if m)
        numbers = [number for number, *_ in found]
        return {
            (f"{layer}_{part}" if numbers.count(number) > 1 else layer): f"{part}/{layer}"
            for number, part, layer in found
        }

    @property
    def num_experts(self) -> dict[str, int]:
        """How many experts each of these layers has, including zero-computation experts."""
        return {name: len(self.last(f"{place}/expert_load")) for name, place in self.layers.items()}

    def curve(self, name: str) -> figures.Curve:
        """The steps at which a metric was written, and its values."""
        points = [(row["step"], row[name]) for row in self.rows if name in row]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, np.int64), np.array(values, np.float64)

    def last(self, name: str) -> Any:
        """The last value of a metric; None if it was never written."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)


def read_run(directory: str | pathlib.Path) -> Run:
    """Reads the files of a run.

    Raises:
      ValueError: the directory has no metrics, no config.json or no run.json.
    """
    directory = pathlib.Path(directory)
    for name in (METRICS_FILE, CONFIG_FILE, RUN_FILE):
        if not (directory / name).exists():
            raise ValueError(
                f"a run's directory must have {METRICS_FILE}, {CONFIG_FILE} and {RUN_FILE}: "
                f"{directory} has no {name}. Pass the workdir of a run."
            )
    rows = read_metrics(directory / METRICS_FILE)
    if not rows:
        raise ValueError(
            f"a report needs a run that has metrics: {directory / METRICS_FILE} is empty. Wait for "
            "the first training.log_every steps."
        )
    evaluation, sample = directory / EVALUATION_FILE, directory / SAMPLE_FILE
    return Run(
        rows=rows,
        record=read_json(directory / RUN_FILE),
        settings=dict(upgrade(read_json(directory / CONFIG_FILE))),
        evaluation=read_json(evaluation) if evaluation.exists() else {},
        sample=sample.read_text(encoding="utf-8", errors="replace") if sample.exists() else None,
    )


def write_report(directory: str | pathlib.Path) -> pathlib.Path:
    """Writes `report/report.md` and its figures into a run's directory.

    Args:
      directory: of the run, with metrics.jsonl, config.json and run.json; a finished run also has
        evaluation.json and sample.txt.

    Returns:
      The path of report.md.

    Raises:
      ValueError: see `read_run`; or a file has other content than a run writes. Nothing is written.
    """
    run = read_run(directory)
    try:
        drawn = FIGURES if run.layers else {"loss": FIGURES["loss"]}
        pngs = {name: _png(run, draw(run)) for name, (_, draw) in drawn.items()}
        shown = {
            name: f"![{title}]({name}.png)" if pngs[name] else ""
            for name, (title, _) in drawn.items()
        }
        sections = [_heading(run), _result(run), shown.pop("loss")]
        if run.layers:
            sections += ["## Routing", *shown.values(), _layer_table(run)]
        sections += [_facts(run), _config(run), _sample(run)]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"a report needs the files that a run wrote: in {directory}, {METRICS_FILE}, "
            f"{RUN_FILE} or {EVALUATION_FILE} has other content ({error!r}). Bring back a copy."
        ) from error
    place = pathlib.Path(directory) / REPORT
    place.mkdir(exist_ok=True)
    for name, png in pngs.items():
        if png is None:
            (place / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
        else:
            (place / f"{name}.png").write_bytes(png)
    path = place / "report.md"
    path.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return path


def _png(run: Run, figure: Figure | None) -> bytes | None:
    """A figure as a file, with the mark of the run."""
    return None if figure is None else png_bytes(stamp(figure, run.loss_labels["dropless"].mark))


def _draw_loss(run: Run) -> Figure:
    heldout = {
        run.loss_labels[name].name: run.curve(f"heldout/{name}/nats_per_token")
        for name in CAPACITIES
        if run.last(f"heldout/{name}/nats_per_token") is not None
    }
    matches = (HELDOUT_METRIC.fullmatch(name) for row in run.rows for name in row)
    domains = sorted({match["domain"] for match in matches if match and match["domain"]})
    metric = "heldout/dropless/domain/{}/bits_per_byte"
    names = {metric.format(name): name + " (domain)" * (name == "all") for name in domains}
    names["heldout/dropless/bits_per_byte"] = "all"
    bits = {title: run.curve(name) for name, title in names.items() if run.last(name) is not None}
    labels = {
        "train_label": run.loss_labels["train"].name,
        "bits_label": run.loss_labels["dropless"].label,
    }
    return figures.loss_figure(run.curve("train/loss"), heldout, bits, **labels)


def _draw_load(run: Run) -> Figure | None:
    names = {layer: f"{place}/expert_load" for layer, place in run.layers.items()}
    rows = [row for row in run.rows if all(name in row for name in names.values())]
    if not rows:
        return None
    steps = np.array([row["step"] for row in rows])
    load = {layer: np.array([row[name] for row in rows]) for layer, name in names.items()}
    return figures.load_figure(steps, load)


def _draw_domains(run: Run) -> Figure | None:
    shares = run.heldout.get("domain_expert_share")
    return figures.domain_figure(shares) if shares else None


def _draw_router(run: Run) -> Figure:
    num_experts = run.num_experts

    def curves(metric: str) -> dict[str, figures.Curve]:
        return {layer: run.curve(f"{place}/{metric}") for layer, place in run.layers.items()}

    largest = {
        name: (x, y * num_experts[name]) for name, (x, y) in curves("expert_load_max").items()
    }
    return figures.router_figure(
        curves("dropped_fraction"), curves("router_entropy"), largest, num_experts
    )


def _heading(run: Run) -> str:
    data, training = run.settings["data"], run.settings["training"]
    a_step = training["batch_size"] * data["sequence_length"]
    tokens = run.step * run.record.get("tokens_per_step", a_step)
    state = "" if run.step >= training["num_steps"] else f" of {training['num_steps']:,}"
    extended = f" ({run.extended})" if run.extended else ""
    return (
        f"# {in_markdown(run.settings['name'])}\n\n"
        f"{run.step:,}{state} steps{extended}, {tokens:,} tokens, on {run.record['num_devices']} x "
        f"{run.record['device_kind']} ({run.record['platform']}), started {run.record['started']}."
    )


def _result(run: Run) -> str:
    """The losses: overall and by domain, all evaluations side by side; what marks mean."""
    kinds = [kind for kind in CAPACITIES if kind in run.heldout]
    loss = run.last("train/loss")
    lines = ["## Result", ""]
    if loss is not None:
        mark = run.loss_labels["train"].mark and f" ({run.loss_labels['train'].mark})"
        lines += [f"Training loss at the last logged step: {loss:.4f} nats/token{mark}.", ""]
    notes = [f"\n{note}" for note in notes_of(label.mark for label in run.loss_labels.values())]
    if not kinds:
        return "\n".join([*lines, "Held-out text was not evaluated.", *notes])
    units = ("nats/token", "bits/byte")
    header = [f"{run.loss_labels[kind].name}, {unit}" for kind in kinds for unit in units]
    domains = dict.fromkeys(name for kind in kinds for name in run.heldout[kind].get("domains", {}))
    rows = [("**all**", {kind: run.heldout[kind] for kind in kinds})]
    rows += [
        (
            in_markdown(name),
            {kind: run.heldout[kind].get("domains", {}).get(name, {}) for kind in kinds},
        )
        for name in domains
    ]
    cells = [
        [name, *(
            _number(losses[kind].get(metric), ".4f")
            for kind in kinds for metric in ("nats_per_token", "bits_per_byte")
        )]
        for name, losses in rows
    ]  # fmt: skip
    lines += [f"Held-out text at step {run.heldout['step']:,}:", ""]
    return "\n".join([*lines, table(["domain", *header], cells), *notes])


def _layer_table(run: Run) -> str:
    """The routers' metrics at the last logged step."""
    columns: dict[str, tuple[str, str]] = {
        "fullest expert, x even": ("expert_load_max", ".2f"),
        "max violation": ("max_violation", ".2f"),
        "dropped": ("dropped_fraction", ".2%"),
        "entropy, nats": ("router_entropy", ".3f"),
        "load-balance loss": ("load_balance_loss", ".4f"),
        "z-loss": ("router_z_loss", ".3f"),
    }
    lost = [run.curve(f"{place}/buffer_overflow") for place in run.layers.values()]
    logged = {int(step) for steps, _ in lost for step in steps}
    if logged:  # there is a bounded buffer
        columns["lost in the buffer"] = ("buffer_overflow", ",.0f")
        columns["buffer needed, x even"] = ("buffer_factor", ".2f")
    rows = []
    for layer, place in run.layers.items():
        values = {name: run.last(f"{place}/{name}") for name, _ in columns.values()}
        if values["expert_load_max"] is not None:
            values["expert_load_max"] *= run.num_experts[layer]
        cells = (
            "" if values[name] is None else format(values[name], spec)
            for name, spec in columns.values()
        )
        rows.append([in_markdown(layer), *cells])
    text = "At the last logged step:\n\n" + table(["layer", *columns], rows)
    if logged:
        overflowed = {int(step) for steps, counts in lost for step in steps[counts > 0]}
        text += f"\n\nThe buffer overflowed in {len(overflowed):,} of {len(logged):,} logged steps."
    return text


def _facts(run: Run) -> str:
    """Size, speed, versions."""
    record = run.record
    commit = record.get("commit") or "not run from a checkout"
    facts = {
        "parameters": _parameters(run),
        **_origin(run),
        "time in training steps": f"{training_seconds(run.rows):,.0f} s",
        **_speed(run),
        "commit": commit + (" with uncommitted changes" if record.get("dirty") else ""),
        "command": in_code(" ".join(record["command"])),
        "versions": ", ".join(
            f"{name} {version}"
            for name, version in {"python": record["python"], **record["versions"]}.items()
        ),
    }
    earlier = [session["start_step"] for session in record.get("earlier", [])]
    if earlier:
        starts = ", ".join(f"{step:,}" for step in [*earlier, record["start_step"]])
        facts["sessions"] = f"{len(earlier) + 1}, starting at steps {starts}"
    return "## Run\n\n" + table(["", ""], [[name, value] for name, value in facts.items()])


def _parameters(run: Run) -> str:
    """Total and active parameters: as recorded, or counted from the config."""
    recorded = run.record.get("parameters")
    if recorded is None:
        if run.settings["sources"]:  # parts outside the library, which a report does not import
            return "not recorded"
        config = read_config(run.settings, ExperimentConfig)
        count = count_parameters(config.model, config.lengths)
        recorded = {"total": count.total, "active": count.active}
    return f"{recorded['total']:,} in all, {recorded['active']:,} used by a token"


def _origin(run: Run) -> dict[str, str]:
    """The checkpoint that a run starts from, and what it trains, adapters included, if not all."""
    facts = {}
    if origin := run.record.get("init_from"):
        facts["starts from"] = f"step {origin['step']:,} of {in_code(origin['path'])}"
    trained = run.record.get("trained", {})
    if any(one["trained"] < one["total"] for one in trained.values()):
        facts["trains"] = describe_trained(trained).removeprefix("trains ")
    return facts


def _speed(run: Run) -> dict[str, str]:
    """Medians over the logged steps of each metric that was measured."""
    facts = {}
    for name, metric, spec in (
        ("tokens/s (median)", "perf/tokens_per_s", ",.0f"),
        ("share of peak FLOP/s (median)", "perf/mfu", ".1%"),
    ):
        _, values = run.curve(metric)
        if len(values):
            facts[name] = format(float(np.median(values)), spec)
    return facts


def _config(run: Run) -> str:
    defaults = json.loads(json.dumps(write_config(ExperimentConfig())))
    lines = difference(defaults, run.settings)
    text = "\n".join(lines) or "no differences"
    return f"## Settings that differ from the defaults\n\n{fenced(text)}"


def _sample(run: Run) -> str:
    if run.sample is None:
        return ""
    return f"## Sample\n\n{fenced(run.sample.rstrip())}"


# By name: the title, and the function that draws it; None if the run has no such metrics.
FIGURES: dict[str, tuple[str, Callable[[Run], Figure | None]]] = {
    "loss": ("Loss", _draw_loss),
    "expert_load": ("Expert load by layer", _draw_load),
    "domain_experts": ("Experts of each domain", _draw_domains),
    "router": ("Drops, entropy, fullest expert", _draw_router),
}


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, spec)
