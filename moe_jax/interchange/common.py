"""What most family tables share: the names of Llama's tensors, and small readers."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from moe_jax.config.check import require
from moe_jax.config.kinds import load_kind
from moe_jax.interchange.family import Reader
from moe_jax.interchange.rope import read_rotary, rope_settings
from moe_jax.interchange.rules import LINEAR, Rule
from moe_jax.layers.attention import Attention
from moe_jax.models.model import LanguageModel
from moe_jax.moe.activations import Activation
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice

LAYER = "model.layers.{layer}."
# Published models drop no choices at inference. Continued training here drops none either, even if
# their own training did: a capacity would change their outputs.
DROPLESS = Capacity(train_factor=0.0, eval_factor=0.0)


def token_choice(config: Reader, default: int | None = None, **settings: Any) -> TokenChoice:
    """The router of a config.json. With one expert per token, its gate may be constant at 1.

    Args:
      config: of the model.
      default: `num_experts_per_tok` if the file has none; None: the file must have it.
      **settings: of the router.
    """
    name = "num_experts_per_tok"
    count = config[name] if default is None else config.get(name, default)
    return TokenChoice(allow_constant_gate=count == 1, **settings)


OUTSIDE = (
    Rule("model.embed_tokens.weight", "embedding"),
    Rule("model.norm.weight", "final_norm/scale"),
    Rule("model.norm.bias", "final_norm/bias"),
    Rule("lm_head.weight", "head", LINEAR),
    Rule("lm_head.bias", "head_bias"),
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
    places = {attention: "input_layernorm"} | dict.fromkeys(branches, "post_attention_layernorm")
    keys = (("weight", "scale"), ("bias", "bias"))
    return tuple(
        Rule(f"{LAYER}{place}.{name}", f"{branch}_norm/{key}")
        for branch, place in places.items()
        for name, key in keys
    )


def gated_rules(prefix: str, part: str) -> tuple[Rule, ...]:
    """A SwiGLU network under Llama's names, and its biases."""
    names = (("gate_proj", "g"), ("up_proj", "i"), ("down_proj", "o"))
    return (
        *(Rule(f"{prefix}{name}.weight", f"{part}/w{key}", LINEAR) for name, key in names),
        *(Rule(f"{prefix}{name}.bias", f"{part}/b{key}") for name, key in names),
    )


def fused_expert_rules(prefix: str, part: str = "moe") -> tuple[Rule, ...]:
    """Experts as transformers 5 stores them: [E, 2 H, M], gate before up, and [E, M, H]."""
    gate_up = (f"{part}/experts/wg", f"{part}/experts/wi")
    return (
        Rule(f"{prefix}experts.gate_up_proj", gate_up, LINEAR, axis=-2),
        Rule(f"{prefix}experts.down_proj", f"{part}/experts/wo", LINEAR),
    )


def block_sparse_rules(part: str = "moe") -> tuple[Rule, ...]:
    """A router and experts as Mixtral names them, and as transformers 5 stores them."""
    block = f"{LAYER}block_sparse_moe."
    expert = f"{block}experts.{{expert}}."
    return (
        Rule(f"{block}gate.weight", f"{part}/router/weight", LINEAR),
        Rule(f"{expert}w1.weight", f"{part}/experts/wg", LINEAR),
        Rule(f"{expert}w3.weight", f"{part}/experts/wi", LINEAR),
        Rule(f"{expert}w2.weight", f"{part}/experts/wo", LINEAR),
        Rule(f"{LAYER}mlp.gate.weight", f"{part}/router/weight", LINEAR),
        *fused_expert_rules(f"{LAYER}mlp.", part),
    )


# Activations of gated networks by "hidden_act".
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}


def gated_activation(config: Reader, name: str = "hidden_act") -> Activation:
    """The activation of a gated network.

    Raises:
      ValueError: the activation is unknown.
    """
    value = config.get(name, "silu")
    require(
        value in GATED,
        f"{name} must be one of {list(GATED)}",
        f"{name}={value!r}",
        "Add its activation",
    )
    activation = load_kind("activation", GATED[value])()
    assert isinstance(activation, Activation)
    return activation


def gated_name(activation: Activation) -> str:
    """The "hidden_act" of an activation; the inverse of `gated_activation`."""
    for name, kind in GATED.items():
        if type(activation) is load_kind("activation", kind):
            return name
    raise ValueError(
        f"the activation must be one of {sorted(set(GATED.values()))}: it is {activation}. Train "
        "a model with one of them."
    )


def read_attention(
    config: Reader,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    theta: float = 10_000.0,
    interleaved: bool = False,
    biases: Iterable[str] = (),
    **others: Any,
) -> Attention:
    """Grouped-query attention with rotary positions, as Llama's descendants name its settings.

    Args:
      config: of the model.
      kv_heads: default if the file has none; None: the number of query heads.
      head_dim: default if the file has none; None: hidden_size / number of query heads.
      theta: default base of rotary positions.
      interleaved: whether the family pairs features (2j, 2j + 1).
      biases: the projections with a bias, of "qkvo".
      **others: settings of `Attention`.
    """
    heads = config["num_attention_heads"]
    dim = config.get("head_dim", head_dim) or config["hidden_size"] // heads
    return Attention(
        num_heads=heads,
        num_kv_heads=config.or_absent("num_key_value_heads", kv_heads) or heads,
        head_dim=dim,
        biases=tuple(biases),
        rotary=read_rotary(config, dim, theta=theta, interleaved=interleaved),
        **others,
    )


def attention_settings(attention: Attention) -> dict[str, Any]:
    """The config.json settings that `read_attention` reads, except biases."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        **rope_settings(attention.rotary, attention.head_dim),
    }


def by_window(
    attention: Attention, window: int | None, types: Sequence[str]
) -> tuple[dict[str, Attention], list[str]]:
    """The attention parts without and with a window, and the part name of each layer.

    They are "attention" and "sliding". If every layer has a window, "attention" has it.

    Args:
      attention: without a window.
      window: of the layers that have one.
      types: "layer_types" of a config.json, one per layer.

    Raises:
      ValueError: a layer type is unknown, or a layer that needs a window has none.
    """
    full, sliding = "full_attention", "sliding_attention"
    require(
        set(types) <= {full, sliding} and (window is not None or sliding not in types),
        f"layer_types must be {full!r}, or {sliding!r} with a sliding_window",
        f"layer_types={sorted(set(types))}, sliding_window={window}",
        "Correct one of them",
    )
    windowed = dataclasses.replace(attention, window=window)
    if full not in types:
        return {"attention": windowed}, ["attention"] * len(types)
    parts = {"attention": attention} | ({"sliding": windowed} if sliding in types else {})
    return parts, ["attention" if one == full else "sliding" for one in types]


def layer_types(model: LanguageModel) -> tuple[list[str], int | None]:
    """The "layer_types" of a config.json, and the window; the inverse of `by_window`."""
    windows = [getattr(model.part[layer[0]], "window", None) for layer in model.stack.layers]
    kinds = ["full_attention" if one is None else "sliding_attention" for one in windows]
    return kinds, next((one for one in windows if one is not None), None)


def first_attention(model: LanguageModel) -> Attention:
    """The attention of the first layer."""
    part = model.part[model.stack.layers[0][0]]
    assert isinstance(part, Attention), part
    return part


def aux_weight(moe: MoE) -> float:
    """The weight of transformers' balance loss; 0 without one."""
    return next((one.weight for one in moe.losses if isinstance(one, HuggingFaceLoadBalance)), 0.0)


def aux_loss_settings(moe: MoE) -> dict[str, Any]:
    """The weight of the balance loss, as most families name it."""
    return {"router_aux_loss_coef": aux_weight(moe)}


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
