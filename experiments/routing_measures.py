"""Routing measures of a finished run: results of an analysis, averaged over layers."""

import pathlib
import statistics
from typing import Any

from moe_jax.analysis.checkpoint import analyze_run
from moe_jax.analysis.options import Options
from moe_jax.training.files import METRICS_FILE
from moe_jax.training.metrics import read_metrics
from moe_jax.training.saved import load_run

TOKENS = 262_144  # held-out tokens: 1,024 sequences at `small`
LATE = 0.5  # routing is averaged over the logged steps after this fraction of the run


def late_rows(rows: list[dict[str, Any]], last: int) -> list[dict[str, Any]]:
    """The metrics rows of the later half of a run of `last` steps."""
    return [row for row in rows if row["step"] > LATE * last]


def late_values(rows: list[dict[str, Any]], name: str, last: int) -> list[float]:
    """Values of a metric, for every MoE layer and late step; [] for a dense run."""
    late = late_rows(rows, last)
    return [value for row in late for key, value in row.items() if key.endswith(f"/{name}")]


def late_metric(workdir: pathlib.Path, name: str) -> float:
    """A metric averaged over MoE layers and the later half of the steps.

    Raises:
      ValueError: the run has no such metric.
    """
    rows = read_metrics(workdir / METRICS_FILE)
    values = late_values(rows, name, max(row["step"] for row in rows))
    if not values:
        raise ValueError(f"a run of MoE layers has the metric {name}: {workdir} has none.")
    return statistics.fmean(values)


def routes(workdir: pathlib.Path) -> bool:
    """Whether a run has MoE layers."""
    return bool(load_run(workdir)[0].model.moe_parts)


def routing_of(workdir: pathlib.Path) -> dict[str, float]:
    """Specialisation and instability of the routers of a run; {} for a dense run.

    Returns:
      "domain_bits" and "token_bits": mutual information of a token's expert with its domain and
      with its id, in bits; "..._shuffled": the same with the routing shuffled over tokens;
      "..._first" and "..._last": the difference of both in the first and the last MoE layer.
      "domain_by_ids": the bits of the domain that token ids explain. "noise_flips", "router_flips",
      "compute_flips" and "checkpoint_flips": fractions of tokens whose first choice changes under
      an input noise of 0.01, with the router in another precision, with all else in another
      precision, and since the previous checkpoint; "..._set": the same for any choice. All are
      means over layers, except "..._first" and "..._last".
    """
    if not routes(workdir):
        return {}
    layers = list(analyze_run(workdir, Options(tokens=TOKENS, checkpoints=1)).layers.values())
    found: dict[str, float] = {}
    for name, key in (("domain", "domains"), ("token", "tokens")):
        bits = [information(layer[key]) for layer in layers]
        found[f"{name}_bits"] = statistics.fmean(own for own, _ in bits)
        found[f"{name}_shuffled"] = statistics.fmean(shuffled for _, shuffled in bits)
        for place, where in ((0, "first"), (-1, "last")):
            own, shuffled = bits[place]
            found[f"{name}_{where}"] = own - shuffled
    by_ids = [layer["domains"]["information"]["explained_by_ids"] for layer in layers]
    found["domain_by_ids"] = statistics.fmean(by_ids)
    for name, start in (
        ("noise", "input noise"), ("router", "router in"), ("compute", "compute in"),
        ("checkpoint", "step "),
    ):  # fmt: skip
        flips = [
            flipped
            for layer in layers
            for varied, flipped in layer["flips"].items()
            if varied.startswith(start)
        ]
        if flips:
            found[f"{name}_flips"] = statistics.fmean(flipped["first"] for flipped in flips)
            found[f"{name}_flips_set"] = statistics.fmean(flipped["set"] for flipped in flips)
    return found


def information(measures: dict[str, Any]) -> tuple[float, float]:
    """The bits of a category, with the actual and with the shuffled routing."""
    return measures["information"]["bits"], measures["information"]["shuffled"]
