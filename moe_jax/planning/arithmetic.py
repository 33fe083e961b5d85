"""Parameters and FLOPs of a model, counted from its parts (legend: `moe_jax.moe`)."""

import dataclasses
from collections.abc import Mapping

from moe_jax.config import Lengths
from moe_jax.models.model import LanguageModel
from moe_jax.planning.flops import FlopCount, count_flops
from moe_jax.planning.parameters import ParameterCount, count_parameters

__all__ = ["FlopCount", "ParameterCount", "count_flops", "count_parameters", "summary"]


def summary(model: LanguageModel, sequence_length: int | Lengths) -> str:
    """Parameters and FLOPs of a model as a text table."""
    parameters, flops = (
        count_parameters(model, sequence_length),
        count_flops(model, sequence_length),
    )
    counts: Mapping[str, tuple[ParameterCount | FlopCount, Mapping[str, float]]] = {
        "parameters": (parameters, {"total": parameters.total, "active": parameters.active}),
        "forward FLOPs a token": (flops, {"model": flops.model, "computed": flops.computed}),
    }
    lines = []
    for title, (count, totals) in counts.items():
        cells = [f"{name} {value:,.0f}" for name, value in totals.items()]
        cells += [f"{k} {v:,.0f}" for k, v in dataclasses.asdict(count).items() if v]
        lines.append(f"{title}: " + ", ".join(cells))
    return "\n".join(lines)
