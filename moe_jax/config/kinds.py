"""The kinds of every family: a table of short names, open to classes of the user.

A kind is a short name in its family's table, or "package.module:Class" for a class of the user.
Nothing else in the library lists kinds. Classes are imported on first use.
"""

import functools
import hashlib
import importlib
import inspect
import pathlib
import sys
from collections.abc import Iterable
from typing import TypeVar

from moe_jax.config.check import require
from moe_jax.config.settings import Settings

Part = TypeVar("Part", bound=Settings)

KINDS: dict[str, dict[str, str]] = {
    "model": {
        "language_model": "moe_jax.models.model:LanguageModel",
        "encoder_decoder": "moe_jax.models.encoder_decoder:EncoderDecoder",
    },
    "objective": {
        "causal_lm": "moe_jax.data.objectives.causal_lm:CausalLM",
        "prefix_lm": "moe_jax.data.objectives.prefix_lm:PrefixLM",
        "span_corruption": "moe_jax.data.objectives.span_corruption:SpanCorruption",
        "encoder_prefix_lm": "moe_jax.data.objectives.pairs:EncoderPrefixLM",
        "supervised": "moe_jax.data.objectives.supervised:Supervised",
        "encoder_supervised": "moe_jax.data.objectives.supervised:EncoderSupervised",
    },
    "loss": {
        "cross_entropy": "moe_jax.training.loss:CrossEntropy",
        "cross_entropy_z": "moe_jax.training.loss:CrossEntropyZ",
        "distil": "moe_jax.finetune.distil:Distil",
    },
    "part": {
        "layer": "moe_jax.models.layer:Layer",
        "parallel_layer": "moe_jax.models.layer:ParallelLayer",
        "attention": "moe_jax.layers.attention:Attention",
        "latent_attention": "moe_jax.layers.latent_attention:LatentAttention",
        "relative_positions": "moe_jax.layers.relative_positions:RelativePositions",
        "cross_attention": "moe_jax.layers.cross_attention:CrossAttention",
        "mlp": "moe_jax.layers.feed_forward:Mlp",
        "mamba": "moe_jax.layers.mamba:Mamba",
        "moe": "moe_jax.moe.part:MoE",
    },
    "norm": {
        "rmsnorm": "moe_jax.layers.norms:RMSNorm",
        "layernorm": "moe_jax.layers.norms:LayerNorm",
    },
    "rotary": {"rotary": "moe_jax.layers.rotary:Rotary"},
    "rotary_scaling": {
        "linear": "moe_jax.layers.rotary_scaling:LinearScaling",
        "dynamic": "moe_jax.layers.rotary_scaling:DynamicScaling",
        "llama3": "moe_jax.layers.rotary_scaling:Llama3Scaling",
        "yarn": "moe_jax.layers.rotary_scaling:Yarn",
        "longrope": "moe_jax.layers.rotary_scaling:LongRope",
    },
    "activation": {
        "relu": "moe_jax.moe.activations:Relu",
        "gelu": "moe_jax.moe.activations:Gelu",
        "gelu_tanh": "moe_jax.moe.activations:GeluTanh",
        "silu": "moe_jax.moe.activations:Silu",
        "swiglu": "moe_jax.moe.activations:SwiGLU",
        "geglu": "moe_jax.moe.activations:GeGLU",
        "geglu_tanh": "moe_jax.moe.activations:GeGLUTanh",
        "clamped_swiglu": "moe_jax.moe.activations:ClampedSwiGLU",
    },
    "router": {
        "token_choice": "moe_jax.moe.routing.token_choice:TokenChoice",
        "sparse_mixer": "moe_jax.moe.routing.sparse_mixer:SparseMixer",
        "expert_choice": "moe_jax.moe.routing.expert_choice:ExpertChoice",
        "soft": "moe_jax.moe.routing.soft:Soft",
        "sinkhorn": "moe_jax.moe.routing.assignment:Sinkhorn",
        "base": "moe_jax.moe.routing.assignment:Base",
        "hash": "moe_jax.moe.routing.fixed:Hash",
        "random": "moe_jax.moe.routing.fixed:Random",
        "uniform": "moe_jax.moe.routing.fixed:Uniform",
    },
    "projection": {
        "linear": "moe_jax.moe.routing.logits:Linear",
        "cosine": "moe_jax.moe.routing.cosine:Cosine",
    },
    "noise": {
        "jitter": "moe_jax.moe.routing.noise:Jitter",
        "gaussian": "moe_jax.moe.routing.noise:Gaussian",
        "learned": "moe_jax.moe.routing.noise:Learned",
    },
    "score": {
        "softmax": "moe_jax.moe.routing.logits:Softmax",
        "softmax_over_selected": "moe_jax.moe.routing.logits:SoftmaxOverSelected",
        "sigmoid": "moe_jax.moe.routing.logits:Sigmoid",
    },
    "selection": {
        "sampled": "moe_jax.moe.routing.selection:Sampled",
        "sampled_rest": "moe_jax.moe.routing.selection:SampledRest",
    },
    "choice_policy": {
        "first": "moe_jax.moe.routing.selection:FirstChoice",
        "threshold": "moe_jax.moe.routing.selection:Threshold",
        "random": "moe_jax.moe.routing.selection:RandomChoices",
    },
    "queue": {
        "token_major": "moe_jax.moe.queues:TokenMajor",
        "choice_major": "moe_jax.moe.queues:ChoiceMajor",
        "batch_prioritized": "moe_jax.moe.queues:BatchPrioritized",
        "probability": "moe_jax.moe.queues:ByProbability",
        "random": "moe_jax.moe.queues:RandomOrder",
    },
    "balance_loss": {
        "load_balance": "moe_jax.moe.load_balance:LoadBalance",
        "switch_load_balance": "moe_jax.moe.load_balance:SwitchLoadBalance",
        "flaxformer_load_balance": "moe_jax.moe.load_balance:FlaxformerLoadBalance",
        "huggingface_load_balance": "moe_jax.moe.load_balance:HuggingFaceLoadBalance",
        "huggingface_switch_load_balance": "moe_jax.moe.load_balance:HuggingFaceSwitchLoadBalance",
        "router_z": "moe_jax.moe.balance:RouterZ",
        "importance": "moe_jax.moe.balance:Importance",
        "load": "moe_jax.moe.balance:Load",
        "token_entropy": "moe_jax.moe.balance:TokenEntropy",
        "batch_entropy": "moe_jax.moe.balance:BatchEntropy",
    },
    "upcycling": {
        "noise": "moe_jax.finetune.expert_changes:Noise",
        "drop": "moe_jax.finetune.expert_changes:Drop",
        "granular": "moe_jax.finetune.expert_changes:Granular",
        "shared": "moe_jax.finetune.expert_changes:Shared",
    },
    "bias_update": {
        "sign": "moe_jax.moe.bias:SignUpdate",
        "error": "moe_jax.moe.bias:ErrorUpdate",
        "quantile": "moe_jax.moe.bias:QuantileUpdate",
    },
}


@functools.cache
def load_kind(family: str, kind: str) -> type[Settings]:
    """The class of a kind.

    Args:
      family: a key of `KINDS`.
      kind: a name in its table, or "package.module:Class".

    Raises:
      ValueError: the name is unknown, the module cannot be imported, or the class belongs to
        another family.
    """
    table = KINDS[family]
    require(
        kind in table or ":" in kind,
        f"a kind of {family} is one of {sorted(table)}, or 'package.module:Class'",
        f"kind={kind!r}",
        "Use a known name, or the import path of your class",
    )
    path = table.get(kind, kind)
    module_name, _, name = path.partition(":")
    require(
        bool(module_name and name),
        "a kind must be named 'package.module:Class'",
        f"kind={kind!r}",
        "Write both halves",
    )
    require(
        module_name != "__main__",
        "every process that uses a kind must be able to import it, which '__main__' does not allow",
        f"kind={kind!r}",
        "Move the class to a module",
    )
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"a kind 'package.module:Class' must be importable: kind={kind!r} gives {error!r}. "
            "Correct the path, or put its folder on PYTHONPATH."
        ) from error
    require(
        isinstance(cls, type) and issubclass(cls, Settings) and cls.family == family,
        f"a kind of {family} must be a class derived from the base class of that family",
        f"kind={kind!r} is {cls!r}",
        "Name another class",
    )
    return cls


def kind_of(value: Settings | type[Settings]) -> str:
    """The name with which `load_kind` finds the class of an object; the short one if it exists."""
    cls = value if isinstance(value, type) else type(value)
    path = f"{cls.__module__}:{cls.__qualname__}"
    short = (name for name, known in KINDS.get(cls.family, {}).items() if known == path)
    return next(short, path)


def by_kind(parts: Iterable[Part]) -> dict[str, Part]:
    """Parts of one family by kind or class name; repeated names are numbered, as in "moe__2"."""
    named: dict[str, Part] = {}
    for part in parts:
        kind = kind_of(part)
        name = kind.partition(":")[2] or kind
        while name in named:
            stem, _, number = name.partition("__")
            name = f"{stem}__{int(number or 1) + 1}"
        named[name] = part
    return named


def is_foreign(kind: str) -> bool:
    """Whether a kind is an import path outside this library."""
    return ":" in kind and kind.partition(".")[0] != "moe_jax"


@functools.cache
def source_hash(kind: str) -> str:
    """SHA-256 of the source files of a foreign kind, which runs and processes must agree on.

    It covers the file of the class and those of its base classes outside this library, in that
    order. It does not cover other imports.
    """
    module_name, _, name = kind.partition(":")
    cls = getattr(importlib.import_module(module_name), name)
    known = {"moe_jax", *sys.stdlib_module_names}
    modules = dict.fromkeys((module_name, *(base.__module__ for base in cls.__mro__)))
    paths = [
        path
        for one in modules
        if one.partition(".")[0] not in known
        and (path := inspect.getsourcefile(importlib.import_module(one)))
    ]
    sources = b"".join(pathlib.Path(path).read_bytes() for path in paths)
    return hashlib.sha256(sources).hexdigest() if paths else ""
