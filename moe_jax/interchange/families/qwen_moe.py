"""Sparse models with Qwen's tensor names: Qwen1.5-MoE and Qwen2-MoE, Qwen3-MoE, OLMoE.

They differ in norms of queries and keys, biases, shared experts, and which layers are sparse.

Sources: `modeling_qwen2_moe.py`, `modeling_qwen3_moe.py`, `modeling_olmoe.py` of transformers and
their configurations; Muennighoff et al. 2024, OLMoE, arXiv:2409.02060.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_jax.config.check import require
from moe_jax.interchange.common import (
    DROPLESS,
    LAYER,
    OUTSIDE,
    attention_rules,
    attention_settings,
    aux_loss_settings,
    by_window,
    first_attention,
    fused_expert_rules,
    gated_activation,
    gated_name,
    gated_rules,
    layer_types,
    norm_rules,
    read_attention,
    sizes,
    token_choice,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.rules import LINEAR, Rule
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice

FULL, SLIDING = "full_attention", "sliding_attention"
MLP = f"{LAYER}mlp."
RULES = (
    *OUTSIDE,
    *norm_rules("mlp", "moe"),
    *norm_rules(attention="sliding"),
    *attention_rules(),
    *attention_rules("sliding"),
    *gated_rules(MLP, "mlp"),
    Rule(f"{MLP}gate.weight", "moe/router/weight", LINEAR),
    *gated_rules(f"{MLP}experts.{{expert}}.", "moe/experts"),
    *fused_expert_rules(MLP),
    *gated_rules(f"{MLP}shared_expert.", "moe/shared"),
    Rule(f"{MLP}shared_expert_gate.weight", "moe/shared/gate", LINEAR),
)


def sparse(config: Reader, *, expert_dim: str, coefficient: float = 0.001, **others: Any) -> MoE:
    """The sparse block of a config.json.

    Args:
      config: of the model.
      expert_dim: the setting with the hidden size of experts.
      coefficient: of the balance loss, if the file has none.
      **others: settings of `MoE`.
    """
    return MoE(
        num_experts=config.get("num_experts") or config["num_local_experts"],
        num_selected_experts=config["num_experts_per_tok"],
        expert_dim=config[expert_dim],
        activation=gated_activation(config),
        router=token_choice(config, renormalize=config.get("norm_topk_prob", False)),
        losses=(HuggingFaceLoadBalance(weight=config.get("router_aux_loss_coef", coefficient)),),
        capacity=DROPLESS,
        **others,
    )


def decoder(
    config: Reader, parts: Mapping[str, Attention], names: Sequence[str], moe: MoE
) -> LanguageModel:
    """The model of a config.json, given the attention of each layer; FFNs are sparse or dense."""
    dense = set(config.get("mlp_only_layers", ()))
    step = config.get("decoder_sparse_step", 1)
    dense |= {layer for layer in range(len(names)) if (layer + 1) % step}
    layers = [(name, "mlp" if i in dense else "moe") for i, name in enumerate(names)]
    width = config.get("intermediate_size")
    used = {name for _, name in layers}
    networks: dict[str, Any] = {"moe": moe} if "moe" in used else {}
    if "mlp" in used:
        networks["mlp"] = Mlp(dim=width, activation=moe.activation)
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={**parts, **networks},
        stack=StackLayout.of(layers),
        norm=epsilon_of(config),
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=1.0,
    )


def epsilon_of(config: Reader, default: float = 1e-6) -> RMSNorm:
    """The norm of a config.json."""
    return RMSNorm(config.get("rms_norm_eps", default))


def window_of(config: Reader) -> int | None:
    """The window, if the file enables it."""
    window = config.or_absent("sliding_window", 4096)
    return window if config.get("use_sliding_window", False) else None


def qwen2_moe(config: Reader) -> LanguageModel:
    """Biases of queries, keys and values; a gated shared expert; windows in every second layer."""
    window, first = window_of(config), config.get("max_window_layers", 28)
    types = config.get("layer_types") or [
        SLIDING if window is not None and layer % 2 == 0 and layer < first else FULL
        for layer in range(config["num_hidden_layers"])
    ]
    biases = "qkv" if config.get("qkv_bias", True) else ""
    attention = read_attention(config, kv_heads=16, biases=biases)
    moe = sparse(
        config,
        expert_dim="moe_intermediate_size",
        shared_expert_dim=config["shared_expert_intermediate_size"],
        shared_expert_gate=True,
    )
    return decoder(config, *by_window(attention, window, types), moe)


def qwen3_moe(config: Reader) -> LanguageModel:
    """A norm of each head's query and key; a window in all layers, or in none."""
    window = window_of(config)
    types = [FULL if window is None else SLIDING] * config["num_hidden_layers"]
    biases = "qkvo" if config.get("attention_bias", False) else ""
    attention = read_attention(config, kv_heads=4, biases=biases, qk_norm=epsilon_of(config))
    moe = sparse(config, expert_dim="moe_intermediate_size")
    return decoder(config, *by_window(attention, window, types), moe)


def olmoe(config: Reader) -> LanguageModel:
    """One norm over all queries and one over all keys, then clipping; every layer is sparse."""
    norm = epsilon_of(config, 1e-5)
    attention = read_attention(
        config,
        biases="qkvo" if config.get("attention_bias", False) else "",
        qk_norm=norm,
        qk_norm_at="projection",
        clip_qkv=config.get("clip_qkv"),
    )
    moe = sparse(config, expert_dim="intermediate_size", coefficient=0.01)
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={"attention": attention, "moe": moe},
        stack=StackLayout(repeats=config["num_hidden_layers"]),
        norm=norm,
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=1.0,
    )


def settings(model: LanguageModel, family: str) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
      ValueError: transformers would refuse the file.
    """
    attention, moe = first_attention(model), model.part["moe"]
    assert isinstance(moe, MoE) and isinstance(moe.router, TokenChoice), moe
    if family == "olmoe":
        require(
            attention.num_heads * attention.head_dim == model.model_dim,
            "transformers loads an OLMoE only if its heads together are as wide as the model",
            f"{attention.num_heads} of {attention.head_dim} for {model.model_dim}",
            "Write it as qwen3_moe, if it has norms for each head",
        )
        own: dict[str, Any] = {"intermediate_size": moe.expert_dim, "clip_qkv": attention.clip_qkv}
    else:
        own = {"moe_intermediate_size": moe.expert_dim, **qwen_settings(model)}
    if family == "qwen2_moe":
        own |= {"qkv_bias": "q" in attention.biases, "layer_types": layer_types(model)[0]}
        own["shared_expert_intermediate_size"] = moe.shared_expert_dim
    else:
        own["attention_bias"] = "o" in attention.biases
    return sizes(
        model,
        **attention_settings(attention),
        **own,
        hidden_act=gated_name(moe.activation),
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.num_selected_experts,
        norm_topk_prob=moe.router.renormalize,
        **aux_loss_settings(moe),
    )


def qwen_settings(model: LanguageModel) -> dict[str, Any]:
    """The settings for dense layers and for windows."""
    window = layer_types(model)[1]
    layers = model.stack.layers
    dense = [layer for layer, names in enumerate(layers) if "mlp" in names]
    found: dict[str, Any] = {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    found |= {"use_sliding_window": window is not None, "sliding_window": window}
    mlp = model.part.get("mlp")
    return found | ({"intermediate_size": mlp.dim} if isinstance(mlp, Mlp) else {})


def family(name: str, architecture: str, model: Callable[[Reader], LanguageModel]) -> Family:
    """A family with these tensors."""
    own = functools.partial(settings, family=name)
    return Family(name, architecture, model, own, lambda model: RULES)


QWEN2_MOE = family("qwen2_moe", "Qwen2MoeForCausalLM", qwen2_moe)
QWEN3_MOE = family("qwen3_moe", "Qwen3MoeForCausalLM", qwen3_moe)
OLMOE = family("olmoe", "OlmoeForCausalLM", olmoe)
