"""The metrics of steps and evaluations, by their names in `metrics.jsonl`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.training.loss_labels import CAPACITIES, recorded_label
from moe_jax.training.step import StepMetrics


def metrics_row(metrics: StepMetrics, layers_of: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The metrics of a step by their names in `metrics.jsonl`; of a layer, PART/layer_03/NAME.

    Args:
      metrics: metrics of the step.
      layers_of: the layers that use each part.
    """
    row: dict[str, Any] = {
        "train/loss": metrics.loss,
        "train/total_loss": metrics.total_loss,
        "train/grad_norm": metrics.grad_norm,
        "train/learning_rate": metrics.learning_rate,
        **{f"train/{name}": value for name, value in metrics.of_loss.items()},
    }
    for name, values in metrics.of_parts.items():
        part, _, metric = name.partition("/")
        for layer, value in zip(layers_of[part], np.asarray(values), strict=True):
            row[f"{part}/layer_{layer:02d}/{metric}"] = value
    return row


def evaluation_row(evaluation: Mapping[str, Any]) -> dict[str, float | int]:
    """An evaluation by its names in `metrics.jsonl`; bits per byte only if `has_bits`."""
    row: dict[str, float | int] = {}
    for kind in CAPACITIES:
        if kind not in evaluation:
            continue
        domains = evaluation[kind]["domains"]
        scored = {"": evaluation[kind], **{f"domain/{name}/": own for name, own in domains.items()}}
        for prefix, losses in scored.items():
            for name in ("nats_per_token", "bits_per_byte")[: 1 + has_bits(losses)]:
                row[f"heldout/{kind}/{prefix}{name}"] = losses[name]
        if "buffer_overflow" in evaluation[kind]:
            row[f"heldout/{kind}/buffer_overflow"] = lost_choices(evaluation[kind])
    return row


def has_bits(losses: Mapping[str, float]) -> bool:
    """Whether targets encode bytes of text; assumed if the loss is not finite."""
    return math.isfinite(losses["bits_per_byte"]) or not math.isfinite(losses["nats_per_token"])


def lost_choices(losses: Mapping[str, Any]) -> int:
    """Choices lost to bounded buffers, in all layers."""
    return sum(losses.get("buffer_overflow", {}).values())


def evaluation_line(step: int, evaluation: Mapping[str, Any]) -> str:
    """An evaluation as one line of text."""
    cells = [f"held-out after step {step}:"]
    for kind in CAPACITIES:
        if kind in evaluation:
            loss = evaluation[kind]
            bits = f", {loss['bits_per_byte']:.4f} bits/byte"
            lost = f", {lost_choices(loss):,} choices lost" if "buffer_overflow" in loss else ""
            cells.append(
                f"{recorded_label(kind, loss).name} {loss['nats_per_token']:.4f} nats/token"
                f"{bits if has_bits(loss) else ''}{lost};"
            )
    return " ".join(cells).rstrip(";")
