"""FLOPs of a model, counted from its config (legend: `moe_jax.moe`)."""

import dataclasses

from moe_jax.config import ModelConfig
from moe_jax.moe.dispatch import dispatcher_name
from moe_jax.planning.routing import (
    dispatched_copies,
    expert_rows,
    mean_experts,
    router_flops,
    slots_of_an_expert,
)


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """Forward FLOPs a token, a multiply-add being two; a training step costs three times as much.

    Attributes:
      attention: projections, scores and weighted values; the whole L x L square is counted, as it
        is computed.
      dense_ffn: FFNs of dense layers, and shared experts.
      experts: the experts that compute a token: K, or by `routing.mean_experts`.
      padding: expert FLOPs on slots that no token fills; below 0 where there are fewer slots than
        choices, so that some are sure to be dropped.
      dispatch: contractions with dispatch and combine tensors (0 for index dispatch).
      router: router logits, and what else a router computes by matrices; of Soft MoE also its
        contractions, which are no dispatch but the model itself.
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


def count_flops(config: ModelConfig, sequence_length: int) -> FlopCount:
    """Counts the forward FLOPs of a token, with the experts and slots of training.

    Args:
      config: the model.
      sequence_length: L.
    """
    c, moe = config, config.moe
    num_moe = len(c.moe_layers)
    num_dense = c.num_layers - num_moe
    heads, kv_heads = c.num_heads * c.head_dim, c.kv_heads * c.head_dim
    projections = 2 * c.model_dim * (2 * heads + 2 * kv_heads)
    scores = 2 * 2 * sequence_length * heads

    slots = slots_of_an_expert(moe, sequence_length)
    expert = 2 * c.model_dim * moe.expert_dim * (3 if moe.gated else 2)
    experts = mean_experts(moe, sequence_length)
    by_contraction = dispatcher_name(moe.dispatch) == "einsum" and not moe.has_soft_slots
    contractions = 2 * 2 * moe.num_experts * slots * c.model_dim
    router = router_flops(moe, c.model_dim) + contractions * moe.has_soft_slots
    shared = moe.num_shared_experts * expert
    dense = 2 * c.model_dim * c.ffn_dim * (3 if c.gated else 2)
    return FlopCount(
        attention=c.num_layers * (projections + scores),
        dense_ffn=num_dense * dense + num_moe * shared,
        experts=num_moe * experts * expert,
        padding=num_moe * (expert_rows(moe, sequence_length) - experts) * expert,
        dispatch=num_moe * contractions * by_contraction * dispatched_copies(moe),
        router=num_moe * router,
        head=2 * c.model_dim * c.vocab_size,
    )


KINDS = ("attention", "dense_ffn", "experts", "routing", "head")


def forward_flops(config: ModelConfig, sequence_length: int) -> dict[str, float]:
    """Computed forward FLOPs a token by `KINDS`: padding is with the experts."""
    count = count_flops(config, sequence_length)
    return {
        "attention": count.attention,
        "dense_ffn": count.dense_ffn,
        "experts": count.experts + count.padding,
        "routing": count.router + count.dispatch,
        "head": count.head,
    }


def training_flops(
    config: ModelConfig, sequence_length: int, num_microbatches: int = 1
) -> dict[str, float]:
    """Computed FLOPs a token of a training step by `KINDS`.

    Forward once; backward twice that (one product for the input's gradient, one for the weight's;
    only the first for the contraction with the dispatch tensor, which has no gradient); and what
    `model.remat` computes again: "full" every layer's forward pass, "dots" the products with a
    batch dim (attention scores and values, experts, dispatch). Several microbatches whose
    load-balance loss is that of the whole batch run the layers forward once more, to count loads.
    """
    forward, count = forward_flops(config, sequence_length), count_flops(config, sequence_length)
    again = dict.fromkeys(KINDS, 0.0)
    if config.remat == "full":
        again |= {name: value for name, value in forward.items() if name != "head"}
    elif config.remat == "dots":
        heads = config.num_heads * config.head_dim
        again["attention"] = config.num_layers * 4 * sequence_length * heads
        products = len(config.moe_layers) * router_flops(config.moe, config.model_dim)
        again["experts"], again["routing"] = forward["experts"], forward["routing"] - products
    if counts_loads_first(config, num_microbatches):
        again = {name: again[name] + forward[name] * (name != "head") for name in KINDS}
    again["routing"] -= count.dispatch / 2  # half of it is combined
    return {name: 3 * forward[name] + again[name] for name in KINDS}


def counts_loads_first(config: ModelConfig, num_microbatches: int) -> bool:
    """Whether a step runs the layers forward before it differentiates; `training.step` says why."""
    scope = config.moe.balance.load_balance_scope
    return bool(config.moe_layers) and num_microbatches > 1 and scope == "global"
