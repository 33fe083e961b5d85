"""Bytes that a training step moves between a device's memory and its cores.

By kind of layer they are the minimum for unfused matmuls: every product reads its two operands and
writes its result. Elementwise work is assumed to be fused with them. By scope they are those of a
compiled program. Legend of shapes: `moe_jax.moe`.
"""

import re
from collections import Counter

from moe_jax.costs import FLOAT32, KIND_OF_COMPONENT, Bytes, Cost
from moe_jax.models.model import LanguageModel
from moe_jax.planning.flops import KINDS, num_heads
from moe_jax.planning.hlo import Program
from moe_jax.planning.parameters import (
    gathered_size,
    local_size,
    plain_parameter_specs,
    training_parameters,
)
from moe_jax.planning.workload import Workload
from moe_jax.training.optimizers import moments_of

# `jax.named_scope`s of the library, in addition to one per branch of a layer, by its part's name.
SCOPES = (
    "embedding", "router", "run_experts", "experts", "shared_expert", "head", "loss", "optimizer",
)  # fmt: skip
OTHER = "other"


def traffic_by_scope(program: Program, model: LanguageModel) -> dict[str, int]:
    """Bytes of a program by scope, such as "moe/run_experts/experts"; the largest first.

    "other" is outside all scopes: norms, residuals, and copies that the compiler adds without a
    name.
    """
    names = {*model.part, *SCOPES}
    total: Counter[str] = Counter()
    for origin, size in program.traffic.items():
        inside = [name for name in re.split(r"[/();]", origin) if name in names]
        total["/".join(dict.fromkeys(inside)) or OTHER] += size
    return dict(total.most_common())


def hbm_traffic(work: Workload) -> dict[str, float]:
    """Bytes per step on one device, by `flops.KINDS`, "teacher" and "optimizer".

    In the forward pass, a product of rows [T, I] and weights [I, O] moves T I + I O + T O numbers
    in the compute dtype. The backward pass moves twice that (for the gradients of input and
    weight), and remat adds one more for what it computes again. The head adds its float32 logits,
    and runs once more for each multi-token module; in chunks, it reads its weights per chunk and
    computes logits twice. The optimizer reads gradient, parameter and
    moments of what trains and writes the last two. A teacher runs forward once.
    """
    model, mesh = work.model, work.mesh
    weights, num_microbatches = _gathered(work), work.config.training.num_microbatches

    def moved(cost: Cost) -> float:
        return work.products(cost.batched) * cost.traffic.on(mesh.tensor)

    total = {
        kind: num_microbatches
        * (
            work.tokens * work.total(moved, kind)
            + work.products(kind in ("experts", "routing")) * work.itemsize * weights[kind]
        )
        for kind in KINDS
    }
    chunks = work.config.training.logits_chunks
    numbers = work.decoder_tokens * model.model_dim + chunks * weights["head"]
    logits = Bytes(split=work.decoder_tokens * model.vocab_size * FLOAT32).on(mesh.tensor)
    if not work.learns:
        return total | {"head": num_microbatches * (work.itemsize * numbers + logits)}
    products = 3 + (chunks > 1)
    of_a_head = products * work.itemsize * numbers + (products + 1) * logits
    total["head"] = num_microbatches * num_heads(model) * of_a_head
    total["teacher"] = sum(sum(hbm_traffic(teacher).values()) for teacher in work.teachers)
    optimizer = work.config.optimizer
    passes_of_gradient = 2 if optimizer.name == "adafactor" else 1  # its statistics, then the step
    total["optimizer"] = FLOAT32 * sum(
        (passes_of_gradient + 2 + 2 * moments_of(optimizer, spec)) * local_size(spec, mesh)
        for spec in training_parameters(work.config)
    )
    return total


def _gathered(work: Workload) -> dict[str, float]:
    """Number of weights, by kind, that a device multiplies by in one pass, gathered over fsdp."""
    gathered = dict.fromkeys(KINDS, 0.0)
    # An input embedding is read by rows, and norms are not products.
    left_out = {"norms"} | ({"embedding"} if not work.model.tie_embeddings else set())
    for spec in plain_parameter_specs(work.model):
        if spec.component not in left_out:
            kind = KIND_OF_COMPONENT.get(spec.component, "other")
            gathered[kind] += gathered_size(spec, work.mesh)
    return gathered
