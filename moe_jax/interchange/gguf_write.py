"""Writes models as GGUF files, which llama.cpp runs: `to_gguf`.

Tensors are computed, quantised and written one by one. The largest contains one kind of matrix for
all experts of a layer.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.interchange.family import load_family
from moe_jax.interchange.gguf_metadata import ARCHITECTURES, Architecture, metadata
from moe_jax.interchange.gguf_names import gguf_rules, latent_rules
from moe_jax.interchange.leaves import STATE, Leaf, leaves_of
from moe_jax.interchange.rules import Rule
from moe_jax.interchange.tensor_files import ToWrite
from moe_jax.interchange.write import of_rule, values_of
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.rotary_scaling import Llama3Scaling
from moe_jax.models.model import LanguageModel
from moe_jax.models.multi_token import NAME as MULTI_TOKEN
from moe_jax.moe.part import MoE

FORMATS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}  # "general.file_type" by name
BLOCK = 32  # numbers per scale, along a row
# Kept in float32 in every format: small vectors, and routers, whose rounding changes the choices.
EXACT = (".bias", "norm.weight", "sinks.weight", "ffn_gate_inp.weight", "shexp_inp.weight",
         "ffn_gate_inp_shexp.weight", "rope_freqs.weight")  # fmt: skip
VOCABULARY = ("token_embd.weight", "output.weight")


def to_gguf(
    config: ExperimentConfig,
    params: Any,
    path: str | pathlib.Path,
    vocabulary: Mapping[str, Any],
    *,
    family: str = "",
    format: str = "F32",
    context_length: int = 0,
) -> None:
    """Writes a model as one GGUF file.

    Args:
      config: of the model with these parameters.
      params: as `from_hf` returns them, with any state under "state".
      path: of the file, which must not exist.
      vocabulary: the "tokenizer.ggml." keys, as `gguf_vocabulary.vocabulary` returns them.
      family: "model_type" to write; "": the one that `config.name` names, or else the first that
        can express all settings of the model.
      format: of matrices, one of `FORMATS`. Vectors, biases and routers are always float32. In
        Q4_0 the embedding and the head are Q8_0. Rows that are not multiples of 32 are F16.
      context_length: the longest context in tokens; 0: the data's sequence length.

    Raises:
      ValueError: the package gguf is not installed, no architecture of llama.cpp computes the
        model, the parameters do not fit it, or the path is taken; nothing is written then.
    """
    path = pathlib.Path(path)
    gguf = check_target(path)
    require(
        format in FORMATS, f"a format must be one of {list(FORMATS)}", format, "Use one of them"
    )
    length = context_length or config.data.sequence_length
    architecture, keys = choose(config, family, length)
    tensors = tensors_of(config.model, architecture, params)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(str(partial), architecture.name)
    try:
        known = {"general.name": config.name, "general.file_type": FORMATS[format],
                 "general.quantization_version": gguf.GGML_QUANT_VERSION}  # fmt: skip
        add_keys(writer, {**known, **keys, **vocabulary})
        write_tensors(gguf, writer, tensors, format)
        os.fsync(writer.fout[0].fileno())
        writer.close()
        partial.rename(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def check_target(path: pathlib.Path) -> Any:
    """The package gguf, if the path is free.

    Raises:
      ValueError: the package is not installed, or there is something at the path.
    """
    require(
        not path.exists(), "a model must be written to a new file", f"{path} is there already",
        "Name another, or remove it",
    )  # fmt: skip
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "GGUF files are read and written by the package gguf: it is not installed. Run "
            "pip install 'moe_jax[gguf]'."
        ) from error
    return gguf


def choose(
    config: ExperimentConfig, family: str, context_length: int
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that computes the model, and its metadata.

    Raises:
      ValueError: there is none; gives the reason for the last family tried, the most general.
    """
    name = family or (config.name if config.name in ARCHITECTURES else "")
    require(
        not name or name in ARCHITECTURES,
        f"the families that llama.cpp has are {list(ARCHITECTURES)}",
        f"{name!r}",
        "Use one of them",
    )
    experts = any(isinstance(part, MoE) for part in config.model.part.values())
    names = [name] if name else [*ARCHITECTURES, "granitemoe" if experts else "llama"]
    for one in names:
        try:
            settings = load_family(one).written(config.model)
            return ARCHITECTURES[one], metadata(one, settings, context_length)
        except ValueError as error:
            reason = error
    raise ValueError(f"no architecture of llama.cpp computes this model: {reason}") from reason


def tensors_of(model: LanguageModel, architecture: Architecture, params: Any) -> list[ToWrite]:
    """Every tensor of the file, each computed when it is written.

    Multi-token modules are left out: llama.cpp predicts without them.
    """
    leaves = leaves_of(model)
    values = values_of(params, leaves)
    by_key: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        if not of_module(leaf):
            by_key.setdefault(leaf.key, []).append(leaf)
    rules = rules_of(model, architecture)
    unknown = set(by_key) - {rule.keys for rule in rules}
    assert not unknown, f"no rule for {unknown}"
    tensors = [
        one
        for rule in rules
        for leaf in by_key.get(str(rule.keys), ())
        for one in of_rule(rule, (leaf,), values, "float32")
    ]
    by_name = {one.name: one for one in tensors}
    if architecture.untied and "output.weight" not in by_name:
        tensors.append(by_name["token_embd.weight"]._replace(name="output.weight"))
    factors = rope_factors(model)
    if factors is not None:
        dtype = np.dtype(np.float32)
        tensors.append(ToWrite("rope_freqs.weight", dtype, factors.shape, lambda: factors))
    return tensors


def of_module(leaf: Leaf) -> bool:
    """Whether a parameter, or an array of the state, belongs to a multi-token module."""
    module = leaf.path[1] if leaf.path[0] == STATE else leaf.path[0]
    return module.startswith(MULTI_TOKEN)


def rules_of(model: LanguageModel, architecture: Architecture) -> tuple[Rule, ...]:
    """The rules of the model's tensors."""
    attention: Any = model.part[model.stack.layers[0][0]]
    if isinstance(attention, LatentAttention):
        return latent_rules(attention.num_heads, attention.nope_dim, attention.value_dim)
    return gguf_rules(
        attention.num_heads,
        attention.kv_heads,
        paired=architecture.paired,
        second_norm=architecture.second_norm,
    )


def rope_factors(model: LanguageModel) -> np.ndarray | None:
    """Llama 3's divisor of each frequency, float32 [head_dim / 2]; None without its scaling."""
    attention: Any = model.part[model.stack.layers[0][0]]
    rotary = attention.rotary
    if rotary is None or not isinstance(rotary.scaling, Llama3Scaling):
        return None
    half = attention.head_dim // 2
    frequency_H = rotary.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaled_H = rotary.scaling.scaled(frequency_H, rotary.base, None)
    return np.asarray(frequency_H / scaled_H, np.float32)


def add_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    """Adds metadata; the type of a value sets its type in the file."""
    add: Mapping[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        add[type(value)](key, value)


def write_tensors(gguf: Any, writer: Any, tensors: list[ToWrite], format: str) -> None:
    """Writes the header and every tensor."""
    types = {one.name: getattr(gguf.GGMLQuantizationType, type_of(one, format)) for one in tensors}
    for one in tensors:
        kind = types[one.name]
        shape = gguf.quant_shape_to_byte_shape(one.shape, kind)
        nbytes = int(np.prod(shape, dtype=np.int64))
        writer.add_tensor_info(one.name, shape, np.dtype(np.uint8), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for one in tensors:
        values = np.ascontiguousarray(one.make(), np.float32)
        assert values.shape == one.shape, (one.name, values.shape, one.shape)
        writer.write_tensor_data(gguf.quants.quantize(values, types[one.name]))


def type_of(tensor: ToWrite, format: str) -> str:
    """The format of one tensor."""
    if len(tensor.shape) == 1 or tensor.name.endswith(EXACT):
        return "F32"
    if format in ("F32", "F16"):
        return format
    if tensor.shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if tensor.name in VOCABULARY else format
