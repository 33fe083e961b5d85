"""Switch Transformer, Base: T5-Base with one of many experts in every second layer.

Each stack has twelve layers; layers 2, 4, ..., 12 are sparse. An expert is an FFN like the dense
ones, two matrices with ReLU between. Capacity is per group, without a factor K. We assume groups of
eight sequences; flaxformer's have 8,192 tokens.
Source: Fedus et al. 2021, arXiv:2101.03961; config.json of google/switch-base-8.

    python -m moe_jax.train --config=configs/switch_base.py:tiny --workdir=runs/switch_base_tiny
    python -m moe_jax.plan --config=configs/switch_base.py --topology=h100:8

| preset | experts | total | active |
| --- | --- | --- | --- |
| (none) | 8 | 619,339,008 | 222,977,280 |
| e16 | 16 | 1,072,397,568 | 223,051,008 |
| e32 | 32 | 1,978,514,688 | 223,198,464 |
| e64 | 64 | 3,790,748,928 | 223,493,376 |
| e128 | 128 | 7,415,217,408 | 224,083,200 |
| e256 | 256 | 14,664,154,368 | 225,262,848 |
| dense | T5-Base | 222,903,552 | 222,903,552 |

`dense` is the twin of equal FLOPs, `finetune` the training on a task afterwards. Table 9 of the
paper prints GEGLU of 2,048 hidden units, which has equally many parameters; the released models use
ReLU of 3,072. The initialisation scale of 0.1 multiplies the variance of the weights, also of an
untied head (flaxformer: moe.gin, tokens_choose_base.gin). The balance losses of the layers are
summed. Initial queries are divided by the root of head_dim, since scores are not (Mesh TensorFlow,
T5). Dropout applies to the output of a branch, and in fine-tuning also to the hidden units of
experts, but not to attention weights.
"""

import ml_collections

from configs.base import make_smaller, parse_presets
from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    config_dict,
)
from moe_jax.data.objectives.span_corruption import SpanCorruption
from moe_jax.layers.attention import Attention
from moe_jax.layers.cross_attention import CrossAttention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.relative_positions import RelativePositions
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import Activation, Relu
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import SwitchLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.noise import Jitter
from moe_jax.moe.routing.token_choice import TokenChoice

INIT_SCALE = 0.1
RELU = Relu()
SEQUENCES = 8  # per group, in encoder and decoder; assumed
ENCODER_LENGTH, DECODER_LENGTH = 512, 114  # tokens per sequence
EXPERTS = {"e16": 16, "e32": 32, "e64": 64, "e128": 128, "e256": 256}


def t5_parts(num_heads: int, head_dim: int, dim: int, activation: Activation) -> dict:
    """The parts of T5, which does not scale attention scores."""
    heads = {"num_heads": num_heads, "head_dim": head_dim, "scale": 1.0, "init_scale": INIT_SCALE,
             "query_init_scale": INIT_SCALE / head_dim}  # fmt: skip
    return {
        "position": RelativePositions(num_heads=num_heads, num_buckets=32, max_distance=128),
        "attention": Attention(rotary=None, position_bias="position", **heads),
        "cross_attention": CrossAttention(**heads),
        "mlp": Mlp(dim=dim, activation=activation, init_scale=INIT_SCALE),
    }


def switch_experts(num_experts: int, dim: int, activation: Activation, length: int) -> MoE:
    """The experts of a sparse layer; `length` is tokens per sequence in its stack."""
    return MoE(
        num_experts=num_experts,
        num_selected_experts=1,
        expert_dim=dim,
        activation=activation,
        init_scale=INIT_SCALE,
        group_size=SEQUENCES * length,
        router=TokenChoice(noise=(Jitter(0.01),)),
        losses=(SwitchLoadBalance(weight=0.01, over_layers="sum", scope="group"),),
        capacity=Capacity(preset="mesh_tensorflow", train_factor=1.25, eval_factor=2.0),
    )


def switch_model(
    *,
    model_dim: int,
    num_heads: int,
    head_dim: int,
    dim: int,
    num_experts: int,
    layers: tuple[tuple[str, ...], ...] = (("mlp",), ("moe",)),
    repeats: int,
    activation: Activation = RELU,
    tie_embeddings: bool = True,
) -> EncoderDecoder:
    """A Switch Transformer; `layers` names the FFNs of a unit, each after its attention."""
    sizes = (num_experts, dim, activation)
    parts = t5_parts(num_heads, head_dim, dim, activation)
    if ("mlp",) not in layers:
        del parts["mlp"]
    names = {"mlp": "mlp", "moe": "encoder_moe"}
    return EncoderDecoder(
        vocab_size=32_128,
        model_dim=model_dim,
        parts={
            **parts,
            "encoder_moe": switch_experts(*sizes, ENCODER_LENGTH),
            "moe": switch_experts(*sizes, DECODER_LENGTH),
        },
        encoder=StackLayout(
            unit=tuple(("attention", *(names[one] for one in ffn)) for ffn in layers),
            repeats=repeats, shared=("position",), causal=False,
        ),
        stack=StackLayout(
            unit=tuple(("attention", "cross_attention", *ffn) for ffn in layers),
            repeats=repeats, shared=("position",),
        ),
        tie_embeddings=tie_embeddings,
        head_init_scale=1.0 if tie_embeddings else INIT_SCALE,
        embedding_multiplier=1.0,
        embedding_stddev=1.0,
        logits_multiplier=model_dim**-0.5 if tie_embeddings else 1.0,
        compute_dtype="bfloat16",
        remat="full",
    )  # fmt: skip


def experiment(name: str, model: EncoderDecoder) -> ExperimentConfig:
    """The training of T5 and its sparse successors: 2**20 encoder tokens per step."""
    return ExperimentConfig(
        name=name,
        model=model,
        data=DataConfig(sequence_length=ENCODER_LENGTH, objective=SpanCorruption()),
        optimizer=OptimizerConfig(
            name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000,
            warmup="constant", weight_decay=0.0, clip_norm=0.0,
        ),
        training=TrainingConfig(num_steps=500_000, batch_size=2048, sample_prompt=""),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8),
    )  # fmt: skip


def make_dense(config: ml_collections.ConfigDict) -> None:
    """Replaces the experts by an FFN with the hidden units that a token uses: equal FLOPs.

    Capacity counts tokens, not choices: a factor of 1.25 serves 1.25 of two choices in training.
    """
    config.name += "_dense"
    model, parts = config.model, config.model.parts
    served = min(parts.moe.num_selected_experts, parts.moe.capacity.train_factor)
    dim = int(served * parts.moe.expert_dim)
    new = "mlp" if dim == parts.mlp.dim else "wide_mlp"
    with parts.unlocked():
        parts[new] = ml_collections.ConfigDict({**parts.mlp.to_dict(), "dim": dim})
        del parts["moe"], parts["encoder_moe"]
    for stack in (model.encoder, model.stack):
        unit = (
            tuple(new if one in ("moe", "encoder_moe") else one for one in layer)
            for layer in stack.unit
        )
        stack.unit = tuple(unit)
    if len(set(model.stack.unit)) == 1:
        for stack in (model.encoder, model.stack):
            stack.unit, stack.repeats = stack.unit[:1], stack.repeats * len(stack.unit)
    config.mesh.expert = 1


def make_finetune(config: ml_collections.ConfigDict, is_small: bool) -> None:
    """Sets dropout to 0.1, expert dropout to 0.4, and a constant learning rate.

    A small model keeps its steps and its learning rate.
    """
    config.name += "_finetune"
    config.model.dropout_rate = 0.1
    for name in {"moe", "encoder_moe"} & set(config.model.parts):
        config.model.parts[name].expert_dropout_rate = 0.4
    config.optimizer.schedule, config.optimizer.warmup_steps = "constant", 0
    if not is_small:
        config.optimizer.learning_rate, config.training.num_steps = 1e-3, 16_000


def finish(config: ml_collections.ConfigDict, presets: set[str]) -> None:
    """Applies the presets shared by all descendants of T5.

    Small models keep the sequences per group, the ratio of FFN to model width, and the spread of
    the initial router logits, which grows with the square root of the width.
    """
    parts = config.model.parts
    published_dim, published_hidden = config.model.model_dim, parts.moe.expert_dim
    sequences = parts.moe.group_size // DECODER_LENGTH
    make_smaller(config, presets)
    if "smoke" in presets:
        config.optimizer.learning_rate, config.optimizer.warmup_steps = 0.05, 20
    elif "tiny" in presets:
        training, config.data.sequence_length = config.training, 48
        config.optimizer.learning_rate, config.optimizer.warmup_steps = 0.02, 1000
        training.num_steps, training.batch_size = 4000, 64
        training.evaluate_every = training.checkpoint_every = 500
    loss = {"kind": "cross_entropy_z", "z_loss": 1e-4}  # Mesh TensorFlow, flaxformer
    with config.training.ignore_type():
        config.training.loss = ml_collections.ConfigDict(loss)
    if presets & {"tiny", "smoke"}:
        lengths = SpanCorruption().lengths(config.data.sequence_length)
        narrower = published_dim / config.model.model_dim
        hidden = int(published_hidden / narrower)
        for name, length in (("encoder_moe", lengths.encoder), ("moe", lengths.decoder)):
            parts[name].group_size, parts[name].expert_dim = sequences * length, hidden
            parts[name].router.init_stddev *= narrower**0.5
        if "mlp" in parts:
            parts.mlp.dim = hidden
        for name in ("attention", "cross_attention"):
            parts[name].query_init_scale = INIT_SCALE / parts[name].head_dim
        if config.model.tie_embeddings:
            config.model.logits_multiplier = config.model.model_dim**-0.5
    if "dense" in presets:
        make_dense(config)
    if "finetune" in presets:
        make_finetune(config, is_small=bool(presets & {"tiny", "smoke"}))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Switch-Base-8; presets: e16, e32, e64, e128, e256, dense, finetune, tiny, smoke."""
    presets = parse_presets(arg, {*EXPERTS, "dense", "finetune", "tiny"})
    num_experts = max([8, *(EXPERTS[one] for one in presets & set(EXPERTS))])
    model = switch_model(
        model_dim=768, num_heads=12, head_dim=64, dim=3072, num_experts=num_experts, repeats=6
    )
    name = "switch_base" if num_experts == 8 else f"switch_base_{num_experts}"
    config = config_dict(experiment(name, model))
    finish(config, presets)
    return config
