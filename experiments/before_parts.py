"""Reads results lines written before models had parts, as current experiments.

The lines of `future_leaks` and `switch_against_dense` keep the settings of that time. Only settings
that differ between these lines, or from the defaults of that time, are read; no such line is added
any more.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainingConfig, build
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.balance import RouterZ
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import BatchPrioritized, ChoiceMajor, TokenMajor
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.moe.routing.soft import Soft
from moe_jax.moe.routing.token_choice import TokenChoice

QUEUES = {
    "token_major": TokenMajor(),
    "choice_major": ChoiceMajor(),
    "batch_prioritized": BatchPrioritized(),
}


def experiment_of(config: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment of an old results line.

    Args:
      config: settings of the line.
    """
    return ExperimentConfig(
        name=config["name"],
        seed=config["seed"],
        model=model_of(config["model"]),
        data=build(DataConfig, config["data"], "config.data"),
        optimizer=build(OptimizerConfig, config["optimizer"], "config.optimizer"),
        training=build(TrainingConfig, config["training"], "config.training"),
    )


def model_of(model: Mapping[str, Any]) -> LanguageModel:
    """The model, with an MoE layer every `layer_period` layers from `layer_offset`."""
    moe = model["moe"]
    period, offset = moe["layer_period"], moe["layer_offset"]
    is_moe = [period > 0 and layer % period == offset for layer in range(model["num_layers"])]
    layout = StackLayout.of(
        [("attention", "moe" if routes else "mlp") for routes in is_moe],
        allow_lookahead=moe["allow_noncausal_routing"],
    )
    parts = {
        "attention": Attention(num_heads=model["num_heads"], head_dim=model["head_dim"]),
        "mlp": Mlp(dim=model["ffn_dim"]),
        "moe": moe_of(moe),
    }
    return LanguageModel(
        vocab_size=model["vocab_size"],
        model_dim=model["model_dim"],
        parts={name: part for name, part in parts.items() if name in layout.names},
        stack=layout,
        scan_layers=model["scan_layers"],
    )


def moe_of(moe: Mapping[str, Any]) -> MoE:
    """The MoE block."""
    router, capacity = moe["router"], moe["capacity"]
    routers = {
        "token_choice": TokenChoice(renormalize=router["renormalize"]),
        "expert_choice": ExpertChoice(predictor_loss_weight=router["predictor_loss_weight"]),
        "soft": Soft(),
    }
    return MoE(
        num_experts=moe["num_experts"],
        num_selected_experts=moe["num_selected_experts"],
        expert_dim=moe["expert_dim"],
        group_size=moe["group_size"],
        router=routers[router["kind"]],
        losses=(LoadBalance(weight=moe["balance"]["load_balance_weight"]), RouterZ()),
        capacity=Capacity(
            train_factor=capacity["train_factor"],
            eval_factor=capacity["eval_factor"],
            queue=QUEUES[capacity["queue_order"]],
        ),
        run_experts=moe["dispatch"],
    )
