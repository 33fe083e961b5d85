"""Dense models with Llama's layers: Llama, Mistral, Qwen2 and Qwen3, twins of the sparse ones.

Sources: `modeling_llama.py`, `modeling_mistral.py`, `modeling_qwen2.py`, `modeling_qwen3.py` of
transformers.
"""

import functools
from collections.abc import Callable
from typing import Any

from moe_jax.config.check import require
from moe_jax.interchange.common import (
    LAYER,
    OUTSIDE,
    attention_rules,
    attention_settings,
    by_window,
    first_attention,
    gated_activation,
    gated_name,
    gated_rules,
    layer_types,
    norm_rules,
    read_attention,
    sizes,
)
from moe_jax.interchange.family import Family, Reader
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout

RULES = (
    *OUTSIDE,
    *norm_rules("mlp"),
    *norm_rules(attention="sliding"),
    *attention_rules(),
    *attention_rules("sliding"),
    *gated_rules(f"{LAYER}mlp.", "mlp"),
)


def decoder(
    config: Reader, attention: Attention, types: list[str], window: int | None
) -> LanguageModel:
    """The model of a config.json, given its attention."""
    parts, names = by_window(attention, window, types)
    mlp = Mlp(
        dim=config["intermediate_size"],
        activation=gated_activation(config),
        use_bias=config.get("mlp_bias", False),
    )
    return LanguageModel(
        vocab_size=config["vocab_size"],
        model_dim=config["hidden_size"],
        parts={**parts, "mlp": mlp},
        stack=StackLayout.of([(name, "mlp") for name in names]),
        norm=RMSNorm(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=config.get("tie_word_embeddings", False),
        embedding_multiplier=1.0,
    )


def llama(config: Reader) -> LanguageModel:
    """Llama: all attention biases, or none."""
    attention = read_attention(config, biases="qkvo" if config.get("attention_bias") else "")
    return decoder(config, attention, ["full_attention"] * config["num_hidden_layers"], None)


def mistral(config: Reader) -> LanguageModel:
    """Mistral: a window in all layers or none; absent means 4,096, null means none."""
    window = config.or_absent("sliding_window", 4096)
    kind = "full_attention" if window is None else "sliding_attention"
    attention = read_attention(config, kv_heads=8)
    return decoder(config, attention, [kind] * config["num_hidden_layers"], window)


def qwen(config: Reader, attention: Attention) -> LanguageModel:
    """Qwen: with `use_sliding_window`, windows in the last layers, or as in `layer_types`."""
    first = config.get("max_window_layers", 28)
    window = config.or_absent("sliding_window", 4096)
    window = window if config.get("use_sliding_window", False) else None
    types = config.get("layer_types") or [
        "full_attention" if window is None or layer < first else "sliding_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    return decoder(config, attention, types, window)


def qwen2(config: Reader) -> LanguageModel:
    """Qwen2: biases of queries, keys and values."""
    return qwen(config, read_attention(config, kv_heads=32, biases="qkv"))


def qwen3(config: Reader) -> LanguageModel:
    """Qwen3: a norm of each head's query and key."""
    biases = "qkvo" if config.get("attention_bias") else ""
    norm = RMSNorm(config.get("rms_norm_eps", 1e-6))
    return qwen(
        config, read_attention(config, kv_heads=32, head_dim=128, biases=biases, qk_norm=norm)
    )


def settings(model: LanguageModel, family: str) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
      ValueError: transformers would refuse the file.
    """
    mlp: Any = model.part["mlp"]
    types, window = layer_types(model)
    own: dict[str, Any] = {}
    if family == "llama":
        heads = first_attention(model).num_heads
        require(
            model.model_dim % heads == 0,
            "transformers loads a Llama only if hidden_size is a multiple of num_attention_heads",
            f"{model.model_dim} is not a multiple of {heads}",
            "Write it as mistral",
        )
        own = {"attention_bias": "o" in first_attention(model).biases, "mlp_bias": mlp.use_bias}
    elif family == "mistral":
        own = {"sliding_window": window}
    else:
        own = {"use_sliding_window": window is not None, "sliding_window": window}
        own |= {"layer_types": types}
        own |= {"attention_bias": "o" in first_attention(model).biases} if family == "qwen3" else {}
    return sizes(
        model,
        **attention_settings(first_attention(model)),
        **own,
        hidden_act=gated_name(mlp.activation),
        intermediate_size=mlp.dim,
    )


def family(name: str, architecture: str, model: Callable[[Reader], LanguageModel]) -> Family:
    """A family with these tensors."""
    own = functools.partial(settings, family=name)
    return Family(name, architecture, model, own, lambda model: RULES)


LLAMA = family("llama", "LlamaForCausalLM", llama)
MISTRAL = family("mistral", "MistralForCausalLM", mistral)
QWEN2 = family("qwen2", "Qwen2ForCausalLM", qwen2)
QWEN3 = family("qwen3", "Qwen3ForCausalLM", qwen3)
