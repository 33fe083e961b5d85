"""Models written in the layout of Hugging Face: `to_hf`."""

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
from moe_jax.interchange.rules import Rule
from moe_jax.interchange.tensor_files import NAMES, SHARD_BYTES, ToWrite, write_tensors
from moe_jax.models.model import LanguageModel

LENGTHS = ("max_position_embeddings", "max_seq_len")  # of a context, by the families' names
# What a config.json says of the files beside it, and not of the model: Python modules, a dtype.
OF_FILES = ("auto_map", "dtype", "torch_dtype")
OTHERS = ""  # beside dtypes by the name of a tensor: that of all others


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
      config: whose model the parameters are of.
      params: as `from_hf` returns them: with the state, if the model has any, under "state".
      path: of the directory, which must not exist, or be empty.
      family: "model_type" to write, or "package.module:ATTRIBUTE" of a table of yours; "": the one
        that `config.name` names, or the first that can say all settings of the model.
      dtype: of the tensors, or of each by its name, where one without a name there has the most
        common one; None: of the parameters. Selection biases keep theirs if it is not by name.
      settings: for config.json besides those of the model, such as ids of special tokens.
      shard_bytes: the most bytes of a file.

    Raises:
      ValueError: no family can say the model, the parameters are not of it, or there is something
        at the path; nothing is written then.
    """
    model, path = config.model, pathlib.Path(path)
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
    """The content of a config.json: what the model says, and what else is given.

    The length of a context is the given one, since no output depends on it. Only where it sets
    frequencies (dynamic scaling) is it the model's.

    Args:
      of_model: as `Family.written` has it.
      given: settings besides.
    """
    rope = of_model.get("rope_parameters") or {}
    lengths = () if rope.get("rope_type") == "dynamic" else LENGTHS
    kept = {name: value for name, value in given.items() if name not in OF_FILES}
    return {**kept, **of_model, **{name: kept[name] for name in lengths if name in kept}}


def most_common(names: Iterable[str]) -> str:
    """The name that is there most often; of several the first in order."""
    counts = collections.Counter(names)
    return min(counts, key=lambda name: (-counts[name], name))


def values_of(params: Any, leaves: list[Leaf]) -> dict[tuple[str, ...], Any]:
    """The arrays of a tree by path, checked.

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
        "the parameters are those of the model, its state under 'state'",
        f"{sorted(names)[:5]} are in one of them alone",
        "Pass what `from_hf` returned, or the params of a state and its model_state",
    )
    for one, shape in wanted.items():
        require(
            tuple(found[one].shape) == shape,
            "the parameters have the sizes of the model",
            f"{'/'.join(one)} is {tuple(found[one].shape)}, in the model {shape}",
            "Pass the config that they are of",
        )
    return found


def tensors_of(
    family: Family,
    model: LanguageModel,
    leaves: list[Leaf],
    values: Mapping[tuple[str, ...], Any],
    dtype: str | Mapping[str, str] | None,
) -> list[ToWrite]:
    """Every tensor of the files, each made when it is written."""
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
    """The tensors that some parameters of the same layers are in."""
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
        f"a file holds tensors of {sorted(one.name for one in NAMES)}",
        f"{name} is {wanted}",
        "Pass another dtype",
    )
    return wanted
