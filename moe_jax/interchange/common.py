"""What most families' tables share: the names of Llama's tensors, and small readings."""

from typing import Any

from moe_jax.config.check import require
from moe_jax.config.kinds import load_kind
from moe_jax.interchange.family import Reader
from moe_jax.interchange.rules import LINEAR, Rule
from moe_jax.models.model import LanguageModel
from moe_jax.moe.experts import Activation

LAYER = "model.layers.{layer}."

OUTSIDE = (
    Rule("model.embed_tokens.weight", "embedding"),
    Rule("model.norm.weight", "final_norm/scale"),
    Rule("lm_head.weight", "head", LINEAR),
)


def attention_rules(part: str = "attention", module: str = "self_attn") -> tuple[Rule, ...]:
    """The projections, biases and norms of an attention part, as Llama's descendants name them."""
    prefix = f"{LAYER}{module}."
    rules = [Rule(f"{prefix}{one}_proj.weight", f"{part}/w{one}", LINEAR) for one in "qkvo"]
    rules += [Rule(f"{prefix}{one}_proj.bias", f"{part}/b{one}") for one in "qkvo"]
    rules += [Rule(f"{prefix}{one}_norm.weight", f"{part}/{one}_norm/scale") for one in "qk"]
    return tuple(rules)


def norm_rules(*branches: str, attention: str = "attention") -> tuple[Rule, ...]:
    """The two norms of a pre-norm layer: before attention, and before each kind of FFN."""
    return (
        Rule(f"{LAYER}input_layernorm.weight", f"{attention}_norm/scale"),
        *(Rule(f"{LAYER}post_attention_layernorm.weight", f"{one}_norm/scale") for one in branches),
    )


def gated_rules(prefix: str, part: str) -> tuple[Rule, ...]:
    """A SwiGLU network under Llama's names."""
    names = (("gate_proj", "wg"), ("up_proj", "wi"), ("down_proj", "wo"))
    return tuple(Rule(f"{prefix}{name}.weight", f"{part}/{key}", LINEAR) for name, key in names)


def fused_expert_rules(prefix: str, part: str = "moe") -> tuple[Rule, ...]:
    """Experts as transformers 5 holds them: [E, 2 H, M], gate before up, and [E, M, H]."""
    gate_up = (f"{part}/experts/wg", f"{part}/experts/wi")
    return (
        Rule(f"{prefix}experts.gate_up_proj", gate_up, LINEAR, axis=-2),
        Rule(f"{prefix}experts.down_proj", f"{part}/experts/wo", LINEAR),
    )


# "hidden_act" of a gated network.
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}


def gated_activation(config: Reader, name: str = "hidden_act") -> Activation:
    """The activation of a gated network.

    Raises:
      ValueError: there is no such activation.
    """
    value = config.get(name, "silu")
    require(
        value in GATED, f"{name} is one of {list(GATED)}", f"{name}={value!r}", "Add its activation"
    )
    activation = load_kind("activation", GATED[value])()
    assert isinstance(activation, Activation)
    return activation


def gated_name(activation: Activation) -> str:
    """The "hidden_act" of an activation; the inverse of `gated_activation`."""
    for name, kind in GATED.items():
        if type(activation) is load_kind("activation", kind):
            return name
    raise ValueError(f"an activation is one of {sorted(set(GATED.values()))}: {activation}")


def sizes(model: LanguageModel, **others: Any) -> dict[str, Any]:
    """The settings that every config.json has."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.model_dim,
        "num_hidden_layers": model.stack.num_layers,
        "tie_word_embeddings": model.tie_embeddings,
        "rms_norm_eps": model.norm.epsilon,
        **others,
    }
