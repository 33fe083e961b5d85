"""Soft MoE: slots hold mixtures of tokens, tokens get mixtures of slots (legend: `moe_jax.moe`).

Nothing is chosen, dropped or queued. Not causal: every slot mixes all tokens of its group,
including later ones.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.moe.routing import Mixing, Options, Router, RouterInputs, Routing
from moe_jax.moe.routing.cosine import unit
from moe_jax.moe.routing.logits import project, router_matrix
from moe_jax.parameters import ParameterSpec, dense, ones
from moe_jax.part import Dims, RunShape

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE


@dataclasses.dataclass(frozen=True)
class Soft(Router):
    """Softmax of the same logits over tokens, to fill slots, and over slots, to read them.

    Source: Puigcerver et al. 2023, From sparse to soft mixtures of experts, arXiv:2308.00951: the
      logits are x . phi, both of length 1, times a learned scale that starts from 1, as in V-MoE's
      projects/soft_moe/router.py.
    """

    mixes: ClassVar[bool] = True

    init_stddev: float = setting(0.02, above=0)  # of slot vectors: truncated normal

    def fills_slots(self, training: bool) -> bool:
        """See `Router`: always, with the slots of training."""
        return True

    def num_choices(self, options: Options) -> int:
        """See `Router`: one, for statistics: the expert with the largest combine weight."""
        return 1

    def mean_experts(self, options: Options, group_size: int) -> float:
        """See `Router`: every slot is filled."""
        return options.num_experts * options.slots / group_size

    def check_block(self, moe: "MoE") -> None:
        """See `Router`."""
        require(
            moe.num_experts > 1,
            "Soft MoE needs two experts or more: a block with one runs no router",
            f"num_experts={moe.num_experts}",
            "Raise num_experts, or use a dense feed-forward network",
        )
        require(
            moe.group_size > 0 and moe.capacity.train_factor > 0,
            "Soft MoE needs group_size and capacity.train_factor above 0, since an expert learns "
            "num_selected_experts * group_size * train_factor / num_experts slots",
            f"group_size={moe.group_size}, capacity.train_factor={moe.capacity.train_factor}",
            "Set both above 0; group_size to data.sequence_length, or to a divisor of it",
        )
        require(
            moe.run_experts == "auto" and moe.exchange == "auto" and not moe.gate_on_input,
            "Soft MoE has one way to run its experts, and no gates on their input",
            f"run_experts={moe.run_experts!r}, exchange={moe.exchange!r}, "
            f"gate_on_input={moe.gate_on_input}",
            "Leave them at 'auto', 'auto' and False",
        )
        require(
            moe.capacity.queue == type(moe.capacity)().queue,
            "Soft MoE has no queue",
            f"capacity.queue={moe.capacity.queue}",
            "Leave it at 'token_major'",
        )
        require(
            moe.eval_num_selected_experts == 0,
            "Soft MoE must have the same slots in training and in evaluation",
            f"eval_num_selected_experts={moe.eval_num_selected_experts}",
            "Set it to 0",
        )

    def check_run(self, moe: "MoE", run: RunShape) -> None:
        """See `Router`."""
        require(
            run.length % moe.group_size == 0,
            "group_size of Soft MoE must divide data.sequence_length, since generation runs one "
            "text at a time",
            f"group_size={moe.group_size}, sequence_length={run.length}",
            f"Set group_size to {run.length}, or to a divisor of it",
        )

    def specs(self, dims: Dims, options: Options) -> dict[str, Any]:
        """`weight` [M, P], one vector per slot, grouped by expert; `scale` [1]."""
        slots = options.num_experts * options.slots
        scale = ParameterSpec((1,), (None,), ones, "router", decays=False)
        return {"weight": router_matrix(dims.model_dim, slots, self.init_stddev), "scale": scale}

    def route(self, params: Any, x_GSM: jax.Array, inputs: RouterInputs) -> Routing:
        """Mixes tokens; see `Router`.

        Probabilities are a token's combine weights summed by expert, without gradient: there is no
        load to balance. A group of only padding fills its slots with zeros.
        """
        dtype = jnp.dtype(self.dtype)
        slots_MP = unit(dense(params["weight"]).astype(dtype), axis=0)
        slots_MP *= dense(params["scale"]).astype(dtype)
        logits_GSP = project(unit(x_GSM.astype(dtype), axis=-1), slots_MP)

        valid_GS1 = inputs.valid_GS[..., None]
        of_tokens_GSP = jnp.where(valid_GS1, logits_GSP, jnp.finfo(dtype).min)
        dispatch_GSP = jnp.where(valid_GS1, jax.nn.softmax(of_tokens_GSP, axis=1), 0)
        combine_GSP = jnp.where(valid_GS1, jax.nn.softmax(logits_GSP, axis=-1), 0)
        by_expert = (*logits_GSP.shape[:2], inputs.options.num_experts, -1)
        dispatch_GSEC, combine_GSEC = (
            mix_GSP.reshape(by_expert) for mix_GSP in (dispatch_GSP, combine_GSP)
        )
        probs_GSE = jax.lax.stop_gradient(jnp.sum(combine_GSEC, axis=-1))
        best_GS1 = jnp.argmax(probs_GSE, axis=-1, keepdims=True).astype(jnp.int32)
        gate_GS1 = jnp.max(probs_GSE, axis=-1, keepdims=True)
        mixing = Mixing(dispatch_GSEC, combine_GSEC * self.scaling_factor)
        chosen_GS1 = jnp.ones(best_GS1.shape, jnp.bool_)
        return Routing(logits_GSP, probs_GSE, best_GS1, gate_GS1, chosen_GS1, mixing=mixing)
