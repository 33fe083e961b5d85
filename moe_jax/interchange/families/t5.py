"""T5 and Switch Transformer: two stacks, relative positions, unscaled attention scores.

Source: Raffel et al. 2020, arXiv:1910.10683; Fedus et al. 2021, arXiv:2101.03961; `modeling_t5.py`
and `modeling_switch_transformers.py` of transformers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from moe_jax.config.check import require
from moe_jax.interchange.family import Family, Reader
from moe_jax.interchange.rules import LINEAR, Rule
from moe_jax.layers.attention import Attention
from moe_jax.layers.cross_attention import CrossAttention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.relative_positions import RelativePositions
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import Activation, GeGLU, GeGLUTanh, Gelu, GeluTanh, Relu, Silu, SwiGLU
from moe_jax.moe.balance import RouterZ
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import HuggingFaceSwitchLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import ChoiceMajor, TokenMajor
from moe_jax.moe.routing.logits import Linear
from moe_jax.moe.routing.token_choice import TokenChoice

# Activations by "dense_act_fn"; of several names the first is written.
PLAIN: dict[str, type[Activation]] = {
    "relu": Relu, "gelu": Gelu, "gelu_new": GeluTanh, "silu": Silu, "swish": Silu,
}  # fmt: skip
GATED: dict[str, type[Activation]] = {
    "gelu": GeGLU, "gelu_new": GeGLUTanh, "silu": SwiGLU, "swish": SwiGLU,
}  # fmt: skip
# Tables of older files that no layer reads, and the embedding in addition to both stacks' own.
IGNORED = (r".*\.EncDecAttention\.relative_attention_bias\.weight", r"shared\.weight")
CAPACITY = 64  # slots per expert, if a Switch config.json has none
NO_CAPACITY = 2**31 - 1  # slots that no text fills: transformers has no dropless Switch


def stack_rules(side: str, prefix: str, ffn: str, gated: bool, moe: str) -> tuple[Rule, ...]:
    """The tensors of a stack.

    Args:
      side: "encoder" or "decoder".
      prefix: of its keys.
      ffn: the module of a dense FFN.
      gated: whether it is gated, as in version 1.1.
      moe: the part with the experts.
    """
    block = f"{side}.block.{{layer}}.layer."
    branches = {"attention": "SelfAttention"}
    if side == "decoder":
        branches["cross_attention"] = "EncDecAttention"
    last = len(branches)
    network, sparse = f"{block}{last}.{ffn}.", f"{block}{last}.mlp."
    names = (
        (("wi_0", "wg"), ("wi_1", "wi"), ("wo", "wo")) if gated else (("wi", "wi"), ("wo", "wo"))
    )
    rules = [
        Rule(f"{block}{place}.{module}.{one}.weight", f"{prefix}{part}/w{one}", LINEAR)
        for place, (part, module) in enumerate(branches.items())
        for one in "qkvo"
    ]
    places = {part: place for place, part in enumerate(branches)} | {"mlp": last, moe: last}
    return (
        *rules,
        *(
            Rule(f"{block}{place}.layer_norm.weight", f"{prefix}{part}_norm/scale")
            for part, place in places.items()
        ),
        *(Rule(f"{network}{a}.weight", f"{prefix}mlp/{b}", LINEAR) for a, b in names),
        Rule(f"{sparse}router.classifier.weight", f"{prefix}{moe}/router/weight", LINEAR),
        Rule(f"{sparse}router.classifier.bias", f"{prefix}{moe}/router/bias"),
        Rule(f"{sparse}experts.expert_{{expert}}.wi.weight", f"{prefix}{moe}/experts/wi", LINEAR),
        Rule(f"{sparse}experts.expert_{{expert}}.wo.weight", f"{prefix}{moe}/experts/wo", LINEAR),
        Rule(
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            f"{prefix}shared/position/table",
        ),
    )


SHARED = Rule("shared.weight", "embedding")
# If the head of a Switch is not tied, transformers 5 ties no embedding either.
UNTIED = (
    Rule("decoder.embed_tokens.weight", "embedding"),
    Rule("shared.weight", "embedding"),
    Rule("encoder.embed_tokens.weight", "encoder_embedding"),
    Rule("shared.weight", "encoder_embedding"),
)
OUTSIDE = (
    Rule("encoder.final_layer_norm.weight", "encoder_norm/scale"),
    Rule("decoder.final_layer_norm.weight", "final_norm/scale"),
    Rule("lm_head.weight", "head", LINEAR),
)


def rules(model: LanguageModel, ffn: str) -> tuple[Rule, ...]:
    """The tensors of a model whose dense FFNs have this name."""
    assert isinstance(model, EncoderDecoder)
    parts: Mapping[str, Any] = model.part
    gated = "mlp" in parts and parts["mlp"].activation.gated
    return (
        *((SHARED,) if model.share_embeddings else UNTIED),
        *OUTSIDE,
        *stack_rules("encoder", "encoder/", ffn, gated, "encoder_moe"),
        *stack_rules("decoder", "", ffn, gated, "moe"),
    )


def repeats(model: LanguageModel) -> dict[str, str]:
    """The embeddings of both stacks and a tied head, which older files repeat."""
    assert isinstance(model, EncoderDecoder)
    if not model.share_embeddings:
        return {}
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    names += ["lm_head.weight"] if model.tie_embeddings else []
    return dict.fromkeys(names, "shared.weight")


def is_sparse(layer: int, step: int) -> bool:
    """Whether a layer is sparse: layers 1, 1 + step, ...; all with a step of 1, none with 0."""
    return step == 1 or (step > 1 and layer % step == 1)


def read_model(
    config: Reader,
    depths: tuple[int, int],
    activation: Activation,
    experts: MoE | None = None,
    steps: tuple[int, int] = (0, 0),
) -> LanguageModel:
    """The model of a config.json, with separate embeddings unless the head is tied.

    Args:
      config: of either family.
      depths: numbers of layers of the encoder and the decoder.
      activation: of its FFNs.
      experts: the sparse FFN, if there is any.
      steps: distances between sparse layers in the encoder and the decoder; see `is_sparse`.
    """
    heads = {
        "num_heads": config.get("num_heads", 12 if experts else 8),
        "head_dim": config.get("d_kv", 64),
        "scale": 1.0,
    }
    width = config.get("d_model", 768 if experts else 512)
    tied = config.get("tie_word_embeddings", True)
    ffns = [
        [moe if is_sparse(i, step) else "mlp" for i in range(count)]
        for moe, step, count in zip(("encoder_moe", "moe"), steps, depths, strict=True)
    ]
    layers = (
        [("attention", one) for one in ffns[0]],
        [("attention", "cross_attention", one) for one in ffns[1]],
    )
    used = {name for names in layers for layer in names for name in layer} | {"position"}
    parts: dict[str, Any] = {
        "position": RelativePositions(
            num_heads=heads["num_heads"],
            num_buckets=config.get("relative_attention_num_buckets", 32),
            max_distance=config.get("relative_attention_max_distance", 128),
        ),
        "attention": Attention(rotary=None, position_bias="position", **heads),
        "cross_attention": CrossAttention(**heads),
        "mlp": Mlp(dim=config.get("d_ff", 2048), activation=activation),
        "encoder_moe": experts,
        "moe": experts,
    }
    shared = ("position",)
    return EncoderDecoder(
        vocab_size=config.get("vocab_size", 32_128),
        model_dim=width,
        parts={name: part for name, part in parts.items() if name in used},
        encoder=StackLayout.of(layers[0], shared=shared, causal=False),
        stack=StackLayout.of(layers[1], shared=shared),
        norm=RMSNorm(config.get("layer_norm_epsilon", 1e-6)),
        tie_embeddings=tied,
        share_embeddings=tied,
        embedding_multiplier=1.0,
        logits_multiplier=width**-0.5 if tied else 1.0,
    )


def settings_of(model: LanguageModel) -> dict[str, Any]:
    """The config.json settings that both families have."""
    attention: Any = model.part["attention"]
    position: Any = model.part["position"]
    return {
        "vocab_size": model.vocab_size,
        "d_model": model.model_dim,
        "d_kv": attention.head_dim,
        "num_heads": attention.num_heads,
        "num_layers": model.layouts["encoder"].num_layers,
        "num_decoder_layers": model.stack.num_layers,
        "relative_attention_num_buckets": position.num_buckets,
        "relative_attention_max_distance": position.max_distance,
        "layer_norm_epsilon": model.norm.epsilon,
        "is_encoder_decoder": True,
    }


def t5_model(config: Reader) -> LanguageModel:
    """The T5 of a config.json.

    An unscaled head (version 1.1) is tied if the files have no head. If the files are unknown, it
    is tied if the settings have "scale_decoder_outputs", which transformers 5 writes.
    """
    depth = config.get("num_layers", 6)
    depths = (depth, config.get("num_decoder_layers", depth))
    model = read_model(config, depths, t5_activation(config))
    scaled = config.get("scale_decoder_outputs", model.tie_embeddings)
    tied = scaled or "scale_decoder_outputs" in config.settings
    if not scaled and config.tensors is not None:
        tied = "lm_head.weight" not in config.tensors
    changes: dict[str, Any] = {"share_embeddings": True, "tie_embeddings": tied}
    multiplier = model.model_dim**-0.5 if scaled else 1.0
    return dataclasses.replace(model, logits_multiplier=multiplier, **changes)


def t5_activation(config: Reader) -> Activation:
    """The activation of a T5: "dense_act_fn", or what "feed_forward_proj" implies.

    "gated-gelu" implies the tanh approximation.

    Raises:
      ValueError: the activation is unknown.
    """
    network = config.get("feed_forward_proj", "relu")
    known = GATED if network.startswith("gated-") else PLAIN
    implied = "gelu_new" if network == "gated-gelu" else network.removeprefix("gated-")
    function = config.get("dense_act_fn", implied)
    require(
        function in known,
        f"the activation of feed_forward_proj={network!r} must be one of {list(known)}",
        f"{function!r}",
        "Add it",
    )
    return known[function]()


def t5_settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a T5. In transformers, `tie_word_embeddings` scales the head."""
    mlp: Any = model.part["mlp"]
    gated = mlp.activation.gated
    function = name_of(mlp.activation, GATED if gated else PLAIN)
    network = "gelu" if gated and function == "gelu_new" else function
    scaled = model.logits_multiplier != 1
    return {
        **settings_of(model),
        "d_ff": mlp.dim,
        "feed_forward_proj": f"gated-{network}" if gated else network,
        "dense_act_fn": function,
        "tie_word_embeddings": scaled,
        **({"scale_decoder_outputs": False} if model.tie_embeddings and not scaled else {}),
    }


def name_of(activation: Activation, known: Mapping[str, type[Activation]]) -> str:
    """The first name of an activation.

    Raises:
      ValueError: it has none.
    """
    for name, kind in known.items():
        if type(activation) is kind:
            return name
    raise ValueError(
        f"the activation must be one of {list(known)}: it is {activation}. Train a model with one "
        "of them."
    )


def switch_model(config: Reader) -> LanguageModel:
    """The Switch Transformer of a config.json."""
    config.require("dense_act_fn", *PLAIN)
    config.require("router_dtype", "float32")
    config.require("num_selected_experts", 1)  # only in older files
    depth = config.get("num_layers", 12)
    depths = (depth, config.or_absent("num_decoder_layers", 12) or depth)
    sparse = [config.get(f"num_sparse_{side}_layers", 3) for side in ("encoder", "decoder")]
    activation = PLAIN[config.get("dense_act_fn", "relu")]()
    moe = MoE(
        num_experts=config.get("num_experts", 8),
        num_selected_experts=1,
        expert_dim=config.get("d_ff", 2048),
        activation=activation,
        router=TokenChoice(projection=Linear(use_bias=config.get("router_bias", False))),
        losses=(
            HuggingFaceSwitchLoadBalance(weight=config.get("router_aux_loss_coef", 0.001)),
            RouterZ(weight=config.get("router_z_loss_coef", 0.001)),
        ),
        capacity=Capacity(slots=config.get("expert_capacity", CAPACITY)),
    )
    steps = [count // own if own else count for count, own in zip(depths, sparse, strict=True)]
    encoder_step = config.get("encoder_sparse_step", steps[0])
    decoder_step = config.get("decoder_sparse_step", steps[1])
    return read_model(config, depths, activation, moe, (encoder_step, decoder_step))


def switch_settings(model: LanguageModel) -> dict[str, Any]:
    """The config.json of a Switch Transformer."""
    names = [name for name in ("moe", "encoder_moe") if name in model.part] or ["moe"]
    blocks: list[Any] = [model.part[name] for name in names]
    moe, slots = blocks[0], [block.capacity.slots for block in blocks]
    require(
        len(set(slots)) == 1,
        "both stacks of a Switch Transformer have the same number of slots",
        f"capacity.slots of decoder and encoder: {slots}",
        "Set one number, or 0",
    )
    queues = [block.capacity.queue for block in blocks]
    require(
        slots[0] == 0
        or (
            all(isinstance(queue, TokenMajor | ChoiceMajor) for queue in queues)
            and not any(block.group_size for block in blocks)
        ),
        "slots are those of a sequence, in the order of its tokens",
        f"capacity.slots={slots[0]}, capacity.queue={queues}, "
        f"group_size={[block.group_size for block in blocks]}",
        "Set group_size=0 and the queue 'token_major', or slots=0, which is written as dropless",
    )
    return {
        **settings_of(model),
        "d_ff": moe.expert_dim,
        "num_experts": moe.num_experts,
        "expert_capacity": slots[0] or NO_CAPACITY,
        **router_loss_settings(moe),
        "num_sparse_encoder_layers": num_sparse(model.layouts["encoder"], "encoder_moe"),
        "num_sparse_decoder_layers": num_sparse(model.stack, "moe"),
        "dense_act_fn": name_of(moe.activation, PLAIN),
        "router_bias": moe.router.projection.use_bias,
        "tie_word_embeddings": model.tie_embeddings,
    }


def num_sparse(stack: StackLayout, moe: str) -> int:
    """The number of sparse layers in a config.json; for none, more than there are layers.

    transformers reads 0 as one sparse layer, the second. It divides the depth by this number and
    rounds down to get their distance: with 3 of 11 layers, layers 1, 4, 7 and 10 are sparse.
    """
    places = [place for place, layer in enumerate(stack.layers) if moe in layer]
    if not places:
        return stack.num_layers + 1
    step = places[1] - places[0] if len(places) > 1 else stack.num_layers
    return stack.num_layers // step


def router_loss_settings(moe: MoE) -> dict[str, float]:
    """The weights of the router's losses."""
    kinds = {HuggingFaceSwitchLoadBalance: "router_aux_loss_coef", RouterZ: "router_z_loss_coef"}
    weights = {type(loss): loss.weight for loss in moe.losses}
    return {name: weights.get(kind, 0.0) for kind, name in kinds.items()}


T5 = Family(
    "t5", "T5ForConditionalGeneration", t5_model, t5_settings,
    functools.partial(rules, ffn="DenseReluDense"), repeats=repeats, ignored=IGNORED,
)  # fmt: skip
SWITCH = Family(
    "switch_transformers", "SwitchTransformersForConditionalGeneration",
    switch_model, switch_settings, functools.partial(rules, ffn="mlp"), repeats=repeats,
    ignored=IGNORED,
)  # fmt: skip
