"""Writes models in Hugging Face layout: `to_hf`."""

import collections
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.config.json_text import json_text
from moe_jax.files import whole_or_absent
from moe_jax.interchange.family import FAMILIES, Family, family_of
from moe_jax.interchange.leaves import STATE, Leaf, leaves_of
from moe_jax.interchange.read import CONFIG, tensor_names
from moe_jax.interchange.rope import rope_of_transformers_4
from moe_jax.interchange.rules import Rule
from moe_jax.interchange.tensor_files import NAMES, SHARD_BYTES, ToWrite, write_tensors
from moe_jax.models.model import LanguageModel
from moe_jax.models.wrapping import require_plain

LENGTHS = ("max_position_embeddings", "max_seq_len")  # the families' names of the context length
# Settings that describe the files beside a config.json, not the model: Python modules, a dtype,
# the version that wrote them.
OF_FILES = ("auto_map", "dtype", "torch_dtype", "transformers_version")
OTHERS = ""  # among dtypes by tensor name: the key for all other tensors


def to_hf(
    config: ExperimentConfig,
    params: Any,
    path: str | pathlib.Path,
    *,
    family: str = "",
    dtype: str | Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model as a directory that transformers loads.

    Args:
      config: of the model with these parameters.
      params: as `from_hf` returns them, with any state under "state".
      path: of the directory, which must be absent or empty.
      family: "model_type" to write, or "package.module:ATTRIBUTE" of your own table; "": the one
        that `config.name` names, or else the first that can express all settings of the model.
      dtype: of all tensors, or by tensor name, where unnamed tensors get the most common dtype;
        None: as the parameters. Selection biases keep their dtype unless they are named.
      settings: more settings for config.json, such as ids of special tokens.
      shard_bytes: maximum bytes per file.

    Raises:
      ValueError: no family can express the model, it has adapters or quantised weights, the
        parameters do not fit it, or the path is taken; nothing is written then.
    """
    model, path = config.model, pathlib.Path(path)
    require_plain(model)
    chosen = family_of(model, family or (config.name if config.name in FAMILIES else ""))
    written = config_json(chosen.written(model), settings or {})
    leaves = leaves_of(model)
    values = values_of(params, leaves)
    if isinstance(dtype, Mapping) and dtype:
        dtype = {**dtype, OTHERS: most_common(dtype.values())}
    tensors = tensors_of(chosen, model, leaves, values, dtype)
    written["dtype"] = most_common(one.dtype.name for one in tensors)
    with whole_or_absent(path) as directory:
        write_tensors(directory, tensors, shard_bytes)
        with (directory / CONFIG).open("w") as file:
            file.write(json_text(written, indent=2, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())


def config_json(of_model: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json: the settings of the model, plus the given ones.

    A given context length replaces the model's, since no output depends on it. With dynamic scaling
    it sets frequencies, so there the model's is kept. Rotary positions are written in the forms of
    transformers 4 and 5: each ignores the other's without a warning.

    Args:
      of_model: as `Family.written` returns it.
      given: more settings.
    """
    rope = of_model.get("rope_parameters") or {}
    lengths = () if rope.get("rope_type") == "dynamic" else LENGTHS
    kept = {name: value for name, value in given.items() if name not in OF_FILES}
    length = {name: kept[name] for name in lengths if name in kept}
    return {**kept, **of_model, **rope_of_transformers_4(of_model), **length}


def most_common(names: Iterable[str]) -> str:
    """The most frequent name; ties go to the first in sorted order."""
    counts = collections.Counter(names)
    return min(counts, key=lambda name: (-counts[name], name))


def values_of(params: Any, leaves: list[Leaf]) -> dict[tuple[str, ...], Any]:
    """The arrays of a tree by path, checked against the model.

    Raises:
      ValueError: one is missing, unknown or of another shape.
    """
    found = {
        tuple(entry.key for entry in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(params)
    }
    wanted = {leaf.path: leaf.spec.shape for leaf in leaves}
    names = ["/".join(path) for path in set(found) ^ set(wanted)]
    require(
        not names,
        "the parameters must be those of the model, with its state under 'state'",
        f"{sorted(names)[:5]} are in only one of them",
        "Pass what `from_hf` returned, or the params of a state and its model_state",
    )
    for one, shape in wanted.items():
        require(
            tuple(found[one].shape) == shape,
            "the parameters must have the sizes of the model",
            f"{'/'.join(one)} is {tuple(found[one].shape)}, in the model {shape}",
            "Pass the config that they belong to",
        )
    return found


def tensors_of(
    family: Family,
    model: LanguageModel,
    leaves: list[Leaf],
    values: Mapping[tuple[str, ...], Any],
    dtype: str | Mapping[str, str] | None,
) -> list[ToWrite]:
    """Every tensor of the files, each computed when it is written."""
    by_key: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        by_key.setdefault(leaf.key, []).append(leaf)
    tensors, done = [], set()
    for rule in family.rules(model):
        keys = [key for key in rule.parameters if key in by_key and key not in done]
        if len(keys) < len(rule.parameters):
            continue
        done |= set(keys)
        for same_layers in zip(*(by_key[key] for key in keys), strict=True):
            tensors += of_rule(rule, same_layers, values, dtype)
    assert done == set(by_key), f"no rule for {set(by_key) - done}"
    by_name = {one.name: one for one in tensors}
    copies = family.copies(model).items()
    return tensors + [by_name[original]._replace(name=name) for name, original in copies]


def of_rule(
    rule: Rule,
    leaves: tuple[Leaf, ...],
    values: Mapping[tuple[str, ...], Any],
    dtype: str | Mapping[str, str] | None,
) -> list[ToWrite]:
    """The tensors that hold these parameters of the same layers."""
    first = leaves[0]
    experts = range(first.shape[0]) if rule.of_expert else (None,)
    places = [(layer, expert) for layer in range(len(first.layers) or 1) for expert in experts]
    shape = rule.shape([leaf.shape[1:] if rule.of_expert else leaf.shape for leaf in leaves])
    own = values[first.path].dtype
    if first.path[0] == STATE:  # small steps of a bias would be lost in bfloat16
        by_name = dtype if isinstance(dtype, Mapping) else {}
        dtype = {name: one for name, one in by_name.items() if name != OTHERS}

    def maker(layer: int, expert: int | None) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            own = []
            for leaf in leaves:
                index = ((layer,) if leaf.stacked else ()) + (() if expert is None else (expert,))
                own.append(np.asarray(values[leaf.path][index] if index else values[leaf.path]))
            return rule.write(own)

        return make

    return [
        ToWrite(name, file_dtype(name, dtype, own), shape, maker(layer, expert))
        for name, (layer, expert) in zip(tensor_names(rule, first), places, strict=True)
    ]


def file_dtype(name: str, dtype: str | Mapping[str, str] | None, own: Any) -> np.dtype[Any]:
    """The dtype of a tensor in the file.

    Raises:
      ValueError: a file cannot hold it.
    """
    dtypes = {OTHERS: dtype} if isinstance(dtype, str) else dtype or {}
    asked = dtypes.get(name) or dtypes.get(OTHERS)
    wanted = np.dtype(asked or own)
    require(
        wanted in NAMES,
        f"a file can hold only tensors of {sorted(one.name for one in NAMES)}",
        f"{name} is {wanted}",
        "Pass another dtype",
    )
    return wanted
