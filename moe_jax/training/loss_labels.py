"""The names of losses by how they were measured, and whether later tokens were seen.

Expert choice, Soft MoE, and queues that serve later tokens first can leak the predicted tokens into
their prediction. `LanguageModel.looks_ahead` detects this; here are the words that mark every
number of such a model.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moe_jax.models.capacity import without_capacity
from moe_jax.models.model import LanguageModel

SEES, SAW = "sees later tokens", "saw later tokens in training"
NOTES = {
    SEES: "Sees later tokens: such a loss is not that of a causal language model, and cannot be "
    "compared with one.",
    SAW: "Saw later tokens in training: such a held-out loss is that of a causal language model, "
    "the training loss is not.",
}
CAPACITIES = {"dropless": 0.0, "capacity_limited": None}  # requested capacity; None: parts' own


class LossLabel(NamedTuple):
    """How a loss is measured.

    Attributes:
      label: its name.
      mark: `SEES`, `SAW`, or "" for a model that is causal in training and here.
    """

    label: str
    mark: str

    @property
    def name(self) -> str:
        """The label and the mark."""
        return f"{self.label} ({self.mark})" if self.mark else self.label


def loss_labels(model: LanguageModel) -> dict[str, LossLabel]:
    """How the losses of a model are measured.

    Returns:
      Labels by metric name: "train", "dropless", and "capacity_limited" if experts have a capacity
      in evaluation. "dropless" requests no capacity. Experts that fill their slots then keep the
      slots of training, so its label is "slots of training". If a bounded buffer may lose
      choices, the labels mention it, and none is "dropless".
    """
    in_training = model.looks_ahead(training=True)
    models = {"dropless": without_capacity(model)}
    models |= {"capacity_limited": model} if model.has_capacity else {}
    fills = any(moe.capacity_factor(False, 0.0) > 0 for moe in model.moe_parts.values())
    texts = {
        "dropless": "slots of training" if fills else "dropless",
        "capacity_limited": "capacity-limited",
    }
    if any(moe.buffer_loses(training=False) for moe in model.moe_parts.values()):
        texts["capacity_limited"] += ", bounded buffer"
        texts["dropless"] = "slots of training, bounded buffer" if fills else "bounded buffer"
    labels = {"train": LossLabel("train", SEES if in_training else "")}
    for name, one in models.items():
        mark = SEES if one.looks_ahead(training=False) else SAW if in_training else ""
        labels[name] = LossLabel(texts[name], mark)
    return labels


def recorded_label(kind: str, recorded: Mapping[str, Any]) -> LossLabel:
    """How a recorded loss was measured; files of earlier versions get defaults."""
    return LossLabel(recorded.get("label", kind.replace("_", "-")), recorded.get("mark", ""))


def notes_of(marks: Iterable[str]) -> list[str]:
    """The meanings of the marks, one sentence each."""
    found = set(marks)
    return [note for mark, note in NOTES.items() if mark in found]
