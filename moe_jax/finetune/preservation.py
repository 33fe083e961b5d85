"""Checks that a new model preserves the old one's logits on text (legend: `moe_jax.moe`)."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.data import heldout_batches
from moe_jax.models.model import LanguageModel
from moe_jax.parallel.batches import from_whole
from moe_jax.training.loss import call_of_batch
from moe_jax.training.placement import inference_rows
from moe_jax.training.saved import open_run_data

TOLERANCE = 1e-5  # of the largest logit of the old model
LENGTH = 256  # maximum number of tokens per compared sequence
ROWS = 2  # minimum number of sequences per batch
Batch = Mapping[str, jax.Array]


def heldout_text(
    workdir: pathlib.Path, config: ExperimentConfig, mesh: Mesh, num_batches: int = 1
) -> list[Batch]:
    """Batches of the held-out split of a run, on the mesh.

    Args:
      workdir: of the run.
      config: of the run.
      mesh: of the model.
      num_batches: at most.

    Raises:
      ValueError: the data cannot be opened, or is of another content.
    """
    in_groups = any(moe.group_size for moe in config.model.moe_parts.values())
    length = config.data.sequence_length
    length = length if in_groups else min(length, LENGTH)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, sequence_length=length)
    )
    rows = inference_rows(config, mesh, ROWS)
    data = open_run_data(workdir, config)
    require(
        data.tokenizer.vocab_size <= config.model.vocab_size,
        "a model can be compared only on text in tokens of its own",
        f"vocab_size={config.model.vocab_size}, the tokenizer {config.data.tokenizer!r} has "
        f"{data.tokenizer.vocab_size}",
        f"Write the path of the model's tokenizer into config.json of {workdir}",
    )
    found = heldout_batches(data, batch_size=rows, max_batches=num_batches)
    return [
        from_whole(
            {name: value for name, value in batch.items() if name != "domain"},
            mesh, ("batch", None),
        )
        for batch in found
    ]  # fmt: skip


@functools.partial(jax.jit, static_argnames="model")
def outputs_of(
    params: Any,
    model_state: Any,
    batch: Batch,
    step: jax.Array | None,
    *,
    model: LanguageModel,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits, float32 [B, L, V], and by part the choices per layer and expert, int32 [X, E]."""
    output = model.run(params, call_of_batch(batch, capacity=0.0, step=step), state=model_state)
    load = {
        part: jnp.sum(output.aux[part].sums["assigned_KE"], axis=1) for part in model.moe_layers
    }
    return output.logits_BLV, load


class Outputs:
    """The outputs of a model on some text: logits, and the load of experts.

    Attributes:
      logits: per batch, float32 [N, V] of its N tokens without padding.
      load: by part, choices per layer and expert, int64 [X, E]; dropless.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        params: Any,
        model_state: Any,
        batches: Sequence[Batch],
        mesh: Mesh,
        step: jax.Array | None = None,
    ):
        """Runs the model in float32, with matmuls at the highest precision."""
        model = dataclasses.replace(config.model, compute_dtype="float32")
        self.logits: list[np.ndarray] = []
        self.load: dict[str, np.ndarray] = {}
        for batch in batches:
            with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
                logits_BLV, load = outputs_of(params, model_state, batch, step, model=model)
            valid_BL = np.asarray(batch["segment_ids"]) > 0
            self.logits.append(np.asarray(logits_BLV)[valid_BL])
            for part, assigned_XE in load.items():
                known = self.load.get(part, 0)
                self.load[part] = known + np.asarray(assigned_XE).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """The number of compared tokens."""
        return sum(map(len, self.logits))


def difference(old: Outputs, new: Outputs) -> float:
    """The largest difference of two logits, divided by the old model's largest absolute logit.

    NaN if a logit is NaN.
    """
    pairs = list(zip(old.logits, new.logits, strict=True))
    largest = float(np.max([np.abs(before).max() for before, _ in pairs]))
    apart = float(np.max([np.abs(before - after).max() for before, after in pairs]))
    return apart / largest if largest else apart


def check_preserved(apart: float, allow_change: bool, fix: str) -> None:
    """Refuses a new model whose logits differ from the old one's.

    Args:
      apart: the result of `difference`.
      allow_change: whether to accept any finite difference.
      fix: advice on how to preserve the model.

    Raises:
      ValueError: with the difference.
    """
    require(
        apart <= TOLERANCE or (allow_change and np.isfinite(apart)),
        f"logits must stay the same to {TOLERANCE:g} of the largest one",
        f"they differ by {apart:.3g} of it",
        f"{fix}, or pass --allow_change",
    )
