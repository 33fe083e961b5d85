"""Tiny T5 and Switch models in our settings and those of transformers, with equal values.

Values depend on the name of a tensor, so a saved oracle need not contain them.
`python -m tests.t5_oracle` saves transformers' outputs for the Switch model; it needs the extra
`hf`.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers.attention import Attention
from moe_jax.layers.cross_attention import CrossAttention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.relative_positions import RelativePositions
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import GeGLUTanh
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.part import Call, EncoderInputs

SAVED = pathlib.Path(__file__).parent / "oracles" / "encoder_decoder.npz"
VOCAB, WIDTH, HEADS, HEAD_DIM, HIDDEN, EXPERTS, SLOTS = 24, 16, 2, 6, 20, 4, 2
SIZES = {
    "vocab_size": VOCAB, "d_model": WIDTH, "d_kv": HEAD_DIM, "num_heads": HEADS, "d_ff": HIDDEN,
    "num_layers": 4, "num_decoder_layers": 4, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
}  # fmt: skip


class Case(NamedTuple):
    """A model of a family.

    Attributes:
      architecture: its class in transformers.
      settings: settings of its config other than sizes.
      model: the model in our settings.
      ffn: the name of its dense layers in transformers.
    """

    architecture: str
    settings: Mapping[str, Any]
    model: EncoderDecoder
    ffn: str


PARTS: dict[str, Any] = {
    "position": RelativePositions(num_heads=HEADS, num_buckets=8, max_distance=6),
    "attention": Attention(
        num_heads=HEADS, head_dim=HEAD_DIM, rotary=None, scale=1.0, position_bias="position"
    ),
    "cross": CrossAttention(num_heads=HEADS, head_dim=HEAD_DIM, scale=1.0),
    "mlp": Mlp(dim=HIDDEN),
}
BLOCK = MoE(
    num_experts=EXPERTS, num_selected_experts=1, expert_dim=HIDDEN, capacity=Capacity(slots=SLOTS)
)


def model_of(parts: Mapping[str, Any], sparse: tuple[str, str] | None, **settings: Any) -> Any:
    """A T5 with four layers per stack. If `sparse` names FFNs, every second layer has them."""
    encoder_ffn, ffn = sparse or ("mlp", "mlp")
    return EncoderDecoder(
        vocab_size=VOCAB,
        model_dim=WIDTH,
        parts=parts,
        encoder=StackLayout(
            unit=(("attention", "mlp"), ("attention", encoder_ffn)),
            repeats=2, shared=("position",), causal=False,
        ),
        stack=StackLayout(
            unit=(("attention", "cross", "mlp"), ("attention", "cross", ffn)),
            repeats=2, shared=("position",),
        ),
        embedding_multiplier=1.0,
        **settings,
    )  # fmt: skip


CASES = {
    "switch": Case(
        "SwitchTransformersForConditionalGeneration",
        {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": EXPERTS,
         "expert_capacity": SLOTS},
        model_of(
            PARTS | {"encoder_moe": BLOCK, "moe": BLOCK}, ("encoder_moe", "moe"),
            logits_multiplier=WIDTH**-0.5,
        ),
        "mlp",
    ),
    "t5": Case(
        "T5ForConditionalGeneration", {}, model_of(PARTS, None, logits_multiplier=WIDTH**-0.5),
        "DenseReluDense",
    ),
    "t5 v1.1": Case(
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        model_of(
            PARTS | {"mlp": Mlp(dim=HIDDEN, activation=GeGLUTanh())}, None, tie_embeddings=False
        ),
        "DenseReluDense",
    ),
}  # fmt: skip


SHAPES = {
    "layer_norm": (WIDTH,), "shared": (VOCAB, WIDTH), "lm_head": (VOCAB, WIDTH),
    "q": (HEADS * HEAD_DIM, WIDTH), "k": (HEADS * HEAD_DIM, WIDTH), "v": (HEADS * HEAD_DIM, WIDTH),
    "o": (WIDTH, HEADS * HEAD_DIM), "relative_attention_bias": (8, HEADS),
    "wi": (HIDDEN, WIDTH), "wi_0": (HIDDEN, WIDTH), "wi_1": (HIDDEN, WIDTH),
    "wo": (WIDTH, HIDDEN), "classifier": (EXPERTS, WIDTH),
}  # fmt: skip


def values(name: str) -> np.ndarray:
    """Values of a tensor of transformers, away from neutral values."""
    shape = SHAPES[name.split(".")[-2].removeprefix("final_")]
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if len(shape) == 1:
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    scale = 1.0 if "shared" in name or "bias" in name else 1.2 * shape[-1] ** -0.5
    return random.normal(0, scale, shape).astype(np.float32)


def batch() -> dict[str, np.ndarray]:
    """Tokens of both sides, with masks that are 0 on the padding at the end of a row."""
    random = np.random.RandomState(3)
    encoder, decoder = (
        np.arange(n) < np.array(of)[:, None] for n, of in ((9, (9, 6)), (7, (5, 7)))
    )
    tokens = (random.randint(2, VOCAB, mask.shape) * mask for mask in (encoder, decoder))
    names = ("input_ids", "decoder_input_ids", "attention_mask", "decoder_attention_mask")
    arrays = (*tokens, encoder, decoder)
    return {name: value.astype(np.int32) for name, value in zip(names, arrays, strict=True)}


def call_of(arrays: Mapping[str, np.ndarray], **settings: Any) -> Call:
    """The call of a batch; positions count only unmasked tokens."""

    def side(tokens: str, mask: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        segments = jnp.asarray(arrays[mask])
        positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        return jnp.asarray(arrays[tokens]), positions, segments

    tokens, positions, segments = side("decoder_input_ids", "decoder_attention_mask")
    encoder = EncoderInputs(*side("input_ids", "attention_mask"))
    return Call(positions, segments, tokens, encoder=encoder, capacity=1.0, **settings)


def params_of(case: Case, get: Callable[[str], np.ndarray]) -> Any:
    """Our parameters from those of transformers, or their gradients.

    Args:
      case: the model.
      get: returns the tensor of a name.
    """

    def dense(at: str) -> dict[str, np.ndarray]:
        names = {"wi": "wi", "wo": "wo"}
        if case.model.part["mlp"].activation.gated:
            names = {"wg": "wi_0", "wi": "wi_1", "wo": "wo"}
        return {ours: get(f"{at}.{theirs}.weight").T for ours, theirs in names.items()}

    def branch(name: str, at: str) -> dict[str, Any]:
        if name in ("attention", "cross"):
            inner = "SelfAttention" if name == "attention" else "EncDecAttention"
            return {f"w{n}": get(f"{at}.{inner}.{n}.weight").T for n in "qkvo"}
        if not case.model.part[name].routes:
            return dense(f"{at}.{case.ffn}")
        experts = [dense(f"{at}.mlp.experts.expert_{e}") for e in range(EXPERTS)]
        router = {"weight": get(f"{at}.mlp.router.classifier.weight").T}
        return {"router": router, "experts": jax.tree.map(lambda *a: np.stack(a), *experts)}

    def layer(side: str, number: int, names: tuple[str, ...]) -> dict[str, Any]:
        at = f"{side}.block.{number}.layer"
        norms = {
            f"{name}_norm": {"scale": get(f"{at}.{j}.layer_norm.weight")}
            for j, name in enumerate(names)
        }
        return norms | {name: branch(name, f"{at}.{j}") for j, name in enumerate(names)}

    def stack(side: str, layout: StackLayout) -> dict[str, Any]:
        period = len(layout.unit)
        unit = {}
        for place, names in enumerate(layout.unit):
            layers = [layer(side, period * r + place, names) for r in range(layout.repeats)]
            unit[str(place)] = jax.tree.map(lambda *a: np.stack(a), *layers)
        table = get(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        return {"first": {}, "unit": unit, "last": {}, "shared": {"position": {"table": table}}}

    head = {} if case.model.tie_embeddings else {"head": get("lm_head.weight").T}
    return head | {
        "embedding": get("shared.weight"),
        "encoder": stack("encoder", case.model.encoder),
        "stack": stack("decoder", case.model.stack),
        "encoder_norm": {"scale": get("encoder.final_layer_norm.weight")},
        "final_norm": {"scale": get("decoder.final_layer_norm.weight")},
    }


def load_in_torch(case: Case) -> Any:
    """The model in transformers, in float32, without dropout."""
    import torch
    import transformers

    cls = getattr(transformers, case.architecture)
    settings = SIZES | dict(case.settings) | {"use_cache": False}
    model = cls(cls.config_class(**settings, attn_implementation="eager")).eval()
    if not case.model.tie_embeddings:  # a new T5 ties its head whatever its config says
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.from_numpy(values(name)))
    return model


class Said(NamedTuple):
    """The results of a model on a batch.

    Attributes:
      logits: float32 [B, L, V].
      experts: int, [B, T or L] of each router, in order, the encoder's first.
      kept: bool, in the same layout: whether the token has a slot.
    """

    logits: Any
    experts: list[Any]
    kept: list[Any]


def said_by_torch(model: Any, arrays: Mapping[str, np.ndarray]) -> Said:
    """Results of transformers, with the graph of gradients."""
    import torch

    found: list[tuple[np.ndarray, np.ndarray]] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        dispatched, _, logits = output
        found.append((logits.argmax(-1).numpy(), dispatched.sum(-1).bool().numpy()))

    hooks = [
        module.register_forward_hook(keep)
        for module in model.modules()
        if type(module).__name__.endswith("Router")
    ]
    logits = model(
        **{name: torch.from_numpy(value).long() for name, value in arrays.items()}
    ).logits
    for hook in hooks:
        hook.remove()
    return Said(logits, [index for index, _ in found], [kept for _, kept in found])


def said_by_us(model: EncoderDecoder, params: Any, arrays: Mapping[str, np.ndarray]) -> Said:
    """Results of our model."""
    run = jax.jit(dataclasses.replace(model, scan_layers=True).run)
    output = run(params, call_of(arrays, record=True))
    choices = [output.aux[name].choices for name in ("encoder_moe", "moe") if name in output.aux]
    return Said(
        output.logits_BLV,
        [index[..., 0] for one in choices for index in one.expert_index],
        [kept[..., 0] for one in choices for kept in one.kept],
    )


if __name__ == "__main__":
    said = said_by_torch(load_in_torch(CASES["switch"]), batch())
    sides = {
        f"{name}_{side}": np.stack(part)
        for name, all_of in (("experts", said.experts), ("kept", said.kept))
        for side, part in (("encoder", all_of[:2]), ("decoder", all_of[2:]))
    }
    np.savez_compressed(SAVED, logits=said.logits.detach().numpy(), **sides)
