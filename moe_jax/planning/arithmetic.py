"""Parameters and FLOPs of a model, counted from its config (legend: `moe_jax.moe`)."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.models import Decoder
from moe_jax.moe.block import dispatcher_name
from moe_jax.moe.capacity import num_slots


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters by component.

    Attributes:
      embedding: the input embedding, which is the head too if they are tied.
      head: the output head, 0 if tied.
      attention: projections, their biases and QK-norms.
      dense_ffn: FFNs of dense layers.
      experts: routed experts, all E of every layer.
      active_experts: routed experts that a token uses, K of every layer.
      shared_experts: shared experts and their gates.
      router: routers.
      norms: the norms of the residual stream.
    """

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    experts: int
    active_experts: int
    shared_experts: int
    router: int
    norms: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self._outside_experts + self.experts

    @property
    def active(self) -> int:
        """Parameters a token uses, both embeddings counted."""
        return self._outside_experts + self.active_experts

    @property
    def _outside_experts(self) -> int:
        return (
            self.embedding + self.head + self.attention + self.dense_ffn
            + self.shared_experts + self.router + self.norms
        )  # fmt: skip


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the leaves of the real model, abstractly: no memory is used."""
    tokens = jax.ShapeDtypeStruct((1, max(config.moe.group_size, 2)), jnp.int32)
    abstract = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens, tokens, tokens)
    counts = dict.fromkeys(
        (
            "embedding", "head", "attention", "dense_ffn", "experts", "shared_experts", "router",
            "norms",
        ),
        0,
    )  # fmt: skip
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract["params"]):
        counts[_component([entry.key for entry in path])] += leaf.size
    moe = config.moe
    active = counts["experts"] * moe.num_selected_experts // moe.num_experts
    return ParameterCount(active_experts=active, **counts)


def _component(path: list[str]) -> str:
    """The component that a parameter belongs to, from its path in the model."""
    name = path[-1]
    if name in ("embedding", "head", "router"):
        return name
    if "attention" in path:
        return "attention"
    if "moe" in path:
        return "shared_experts" if name.startswith("shared_") else "experts"
    return "dense_ffn" if "ffn" in path else "norms"


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs a token, a multiply-add being two; a training step costs three times as much.

    Attributes:
      attention: projections, scores and weighted values; the whole L x L square is counted, as it
        is computed.
      dense_ffn: FFNs of dense layers, and shared experts.
      experts: the K experts that a token selects.
      padding: expert FLOPs on slots that no token fills, beyond `experts`.
      dispatch: contractions with dispatch and combine tensors (0 for index dispatch).
      router: router logits.
      head: output logits.
    """

    attention: float
    dense_ffn: float
    experts: float
    padding: float
    dispatch: float
    router: float
    head: float

    @property
    def model(self) -> float:
        """What the mathematics of the model needs: no padding, no dispatch. MFU counts these."""
        return self.attention + self.dense_ffn + self.experts + self.router + self.head

    @property
    def computed(self) -> float:
        """What is computed: with padded slots and dispatch contractions."""
        return self.model + self.padding + self.dispatch


def count_flops(
    config: ModelConfig, sequence_length: int, capacity_factor: float | None = None
) -> FlopCount:
    """Counts the forward FLOPs of a token.

    Args:
      config: the model.
      sequence_length: L.
      capacity_factor: of the MoE layers; None: the training one.
    """
    c, moe = config, config.moe
    if capacity_factor is None:
        capacity_factor = moe.capacity.train_factor
    num_moe = len(c.moe_layers)
    num_dense = c.num_layers - num_moe
    heads, kv_heads = c.num_heads * c.head_dim, c.kv_heads * c.head_dim
    projections = 2 * c.model_dim * (2 * heads + 2 * kv_heads)
    scores = 2 * 2 * sequence_length * heads

    group = moe.group_size or sequence_length
    slots = num_slots(
        group, moe.num_experts, moe.num_selected_experts, capacity_factor, moe.capacity
    )
    expert = 2 * c.model_dim * moe.expert_dim * (3 if moe.gated else 2)
    slots_per_token = moe.num_experts * slots / group
    padded = dispatcher_name(moe.dispatch) != "ragged"
    by_contraction = dispatcher_name(moe.dispatch) == "einsum"
    shared = moe.num_shared_experts * expert
    dense = 2 * c.model_dim * c.ffn_dim * (3 if c.gated else 2)
    return FlopCount(
        attention=c.num_layers * (projections + scores),
        dense_ffn=num_dense * dense + num_moe * shared,
        experts=num_moe * moe.num_selected_experts * expert,
        padding=num_moe * max(slots_per_token - moe.num_selected_experts, 0) * expert * padded,
        dispatch=num_moe * 2 * 2 * moe.num_experts * slots * c.model_dim * by_contraction,
        router=num_moe * 2 * c.model_dim * moe.num_experts * (moe.num_experts > 1),
        head=2 * c.model_dim * c.vocab_size,
    )


def summary(config: ModelConfig, sequence_length: int) -> str:
    """Parameters and FLOPs of a model as a table of text."""
    parameters = dataclasses.asdict(count_parameters(config))
    flops = dataclasses.asdict(count_flops(config, sequence_length))
    totals: Mapping[str, Mapping[str, float]] = {
        "parameters": {
            "total": count_parameters(config).total,
            "active": count_parameters(config).active,
        },
        "forward FLOPs a token": {
            "model": count_flops(config, sequence_length).model,
            "computed": count_flops(config, sequence_length).computed,
        },
    }
    lines = []
    for title, parts in (("parameters", parameters), ("forward FLOPs a token", flops)):
        cells = [f"{k} {v:,.0f}" for k, v in totals[title].items()]
        cells += [f"{k} {v:,.0f}" for k, v in parts.items() if v]
        lines.append(f"{title}: " + ", ".join(cells))
    return "\n".join(lines)
