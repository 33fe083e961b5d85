"""Mixture-of-experts language models in JAX and Flax, for research on TPUs and GPUs.

Public names are imported on first use, so that `import moe_jax` is fast.

>>> import moe_jax
>>> moe_jax.MoE(num_experts=4).num_experts
4
"""

import importlib
from typing import TYPE_CHECKING, Any

from moe_jax import interrupts

if TYPE_CHECKING:
    from moe_jax.config import ExperimentConfig as ExperimentConfig
    from moe_jax.config import config_dict as config_dict
    from moe_jax.config import from_config_dict as from_config_dict
    from moe_jax.interchange.read import from_hf as from_hf
    from moe_jax.interchange.write import to_hf as to_hf
    from moe_jax.layers.attention import Attention as Attention
    from moe_jax.layers.cross_attention import CrossAttention as CrossAttention
    from moe_jax.layers.feed_forward import Mlp as Mlp
    from moe_jax.models.encoder_decoder import EncoderDecoder as EncoderDecoder
    from moe_jax.models.linen import LinenModel as LinenModel
    from moe_jax.models.linen import LinenMoE as LinenMoE
    from moe_jax.models.model import LanguageModel as LanguageModel
    from moe_jax.models.network import build as build
    from moe_jax.models.nnx import NNXModel as NNXModel
    from moe_jax.models.nnx import NNXMoE as NNXMoE
    from moe_jax.models.stack import StackLayout as StackLayout
    from moe_jax.moe.activations import Activation as Activation
    from moe_jax.moe.balance import BalanceLoss as BalanceLoss
    from moe_jax.moe.block import block_loss_and_metrics as block_loss_and_metrics
    from moe_jax.moe.block import moe_block as moe_block
    from moe_jax.moe.part import MoE as MoE
    from moe_jax.moe.routing import Options as Options
    from moe_jax.moe.routing import Router as Router
    from moe_jax.moe.routing import RouterInputs as RouterInputs
    from moe_jax.moe.routing import Routing as Routing
    from moe_jax.parameters import ParameterSpec as ParameterSpec
    from moe_jax.parameters import init_parameters as init_parameters
    from moe_jax.part import Aux as Aux
    from moe_jax.part import Call as Call
    from moe_jax.part import Dims as Dims
    from moe_jax.part import EncoderInputs as EncoderInputs
    from moe_jax.part import Own as Own
    from moe_jax.part import Part as Part
    from moe_jax.training.loss import TrainingLoss as TrainingLoss

__version__ = "0.1.0"

interrupts.catch_in_command()
interrupts.end_with_parent()

MODULES = {
    "moe_jax.config": ("ExperimentConfig", "config_dict", "from_config_dict"),
    "moe_jax.interchange.read": ("from_hf",),
    "moe_jax.interchange.write": ("to_hf",),
    "moe_jax.layers.attention": ("Attention",),
    "moe_jax.layers.cross_attention": ("CrossAttention",),
    "moe_jax.layers.feed_forward": ("Mlp",),
    "moe_jax.models.encoder_decoder": ("EncoderDecoder",),
    "moe_jax.models.linen": ("LinenModel", "LinenMoE"),
    "moe_jax.models.model": ("LanguageModel",),
    "moe_jax.models.network": ("build",),
    "moe_jax.models.nnx": ("NNXModel", "NNXMoE"),
    "moe_jax.models.stack": ("StackLayout",),
    "moe_jax.moe.activations": ("Activation",),
    "moe_jax.moe.balance": ("BalanceLoss",),
    "moe_jax.moe.block": ("block_loss_and_metrics", "moe_block"),
    "moe_jax.moe.part": ("MoE",),
    "moe_jax.moe.routing": ("Options", "Router", "RouterInputs", "Routing"),
    "moe_jax.parameters": ("ParameterSpec", "init_parameters"),
    "moe_jax.part": ("Aux", "Call", "Dims", "EncoderInputs", "Own", "Part"),
    "moe_jax.training.loss": ("TrainingLoss",),
}
MODULE_OF = {name: module for module, names in MODULES.items() for name in names}
__all__ = sorted([*MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    """Imports a public name."""
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
