"""Reads Hugging Face models, tensor by tensor, straight onto their devices: `from_hf`."""

import json
import logging
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import DataConfig, ExperimentConfig
from moe_jax.config.kinds import load_kind
from moe_jax.interchange.family import Family, load_family, named_family
from moe_jax.interchange.leaves import STATE, Leaf, all_specs, leaves_of
from moe_jax.interchange.rules import Rule
from moe_jax.interchange.tensor_files import FLOATS, Files, TensorFiles
from moe_jax.models.model import LanguageModel
from moe_jax.parallel.rules import RULES, named_sharding, num_shards
from moe_jax.part import RunShape, check_divides

logger = logging.getLogger(__name__)

CONFIG = "config.json"
ALIGNMENT = 64  # bytes; a buffer of this alignment becomes a CPU array without a copy


class Source(NamedTuple):
    """Where a parameter is in the files.

    Attributes:
      rule: that finds the parameter.
      which: its place among the rule's parameters.
      shapes: of all the rule's parameters, for one layer and expert.
    """

    rule: Rule
    which: int
    shapes: Sequence[tuple[int, ...]]


def from_hf(
    path: str | pathlib.Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    family: str = "",
) -> tuple[ExperimentConfig, Any]:
    """Reads a model in the layout of Hugging Face.

    Args:
      path: a directory with `config.json` and safetensors files.
      dtype: of the parameters; None: as stored.
      mesh: the devices that the parameters are sharded over; None: one device.
      family: the "model_type" to read it as, or "package.module:ATTRIBUTE" of your own table; "":
        as in `config.json`.

    Returns:
      The config and the parameters: the tree of `model.specs()`, plus that of `model.state_specs()`
      under "state" if the model has any. `moe_jax.build(config)` applies them.

    Raises:
      ValueError: the architecture is unknown, a setting has no counterpart, a tensor is missing,
        unknown, or has another shape or dtype, or a file is damaged; names it.
    """
    path = pathlib.Path(path)
    settings = read_settings(path)
    table = named_family(family) if family else load_family(str(settings.get("model_type")))
    files = table.opened(TensorFiles(path))
    try:
        model = table.read(settings, files.tensors)
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"{path / CONFIG} has a setting of a type that {table.name} does not have: {error}. "
            "Correct it, or download the file again."
        ) from error
    params = read_parameters(files, table, model, dtype, mesh)
    length = min(int(settings.get("max_position_embeddings") or 2048), 2048)
    objective = load_kind("objective", "span_corruption" if model.has_encoder else "causal_lm")()
    data = DataConfig(sequence_length=length, objective=objective)
    config = ExperimentConfig(name=table.name, model=model, data=data)
    return config, params


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """The content of a model's config.json.

    Raises:
      ValueError: the file is missing, or is no JSON object.
    """
    file = path / CONFIG
    if not file.is_file():
        raise ValueError(f"a model's directory must have a {CONFIG}: there is none in {path}.")
    try:
        settings = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must be an object of settings: it is {type(settings).__name__}.")
    return settings


def read_parameters(
    files: Files,
    family: Family,
    model: LanguageModel,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Reads the parameters of a model from its files; arguments and errors as in `from_hf`.

    One parameter is read at a time. Every tensor is checked before the first is read.
    """
    if mesh is not None:
        shards = {name: num_shards(name, mesh) for name in RULES}
        check_divides(all_specs(model), RunShape(0, 0, shards))
    leaves = leaves_of(model)
    rules = tuple(family.rules(model))
    sources = find_sources(files, rules, leaves)
    tied = tied_heads(model, rules, sources)
    copies = {**tied, **family.copies(model), **family.repeats(model)}
    check_unknown(files, family, sources, leaves, copies)
    check_copies(files, copies)
    structure = jax.tree.structure(all_specs(model))
    arrays = [read_leaf(files, leaf, sources[leaf.key], dtype, mesh) for leaf in leaves]
    return jax.tree.unflatten(structure, arrays)


def find_sources(files: Files, rules: Sequence[Rule], leaves: Sequence[Leaf]) -> dict[str, Source]:
    """Where each parameter is, by its key; checks shapes and dtypes.

    Raises:
      ValueError: a tensor is missing, or of another shape or dtype.
    """
    shapes = {leaf.key: leaf.shape for leaf in leaves}
    sources: dict[str, Source] = {}
    for leaf in leaves:
        mine = [rule for rule in rules if leaf.key in rule.parameters]
        assert mine, f"no rule for {leaf.key}"
        if leaf.key not in sources:
            there = [rule for rule in mine if tensor_names(rule, leaf)[0] in files]
            rule = (there or mine)[0]
            own = [shapes[key][1:] if rule.of_expert else shapes[key] for key in rule.parameters]
            sources[leaf.key] = Source(rule, rule.parameters.index(leaf.key), own)
        source = sources[leaf.key]
        wanted = source.rule.shape(source.shapes)
        for name in tensor_names(source.rule, leaf):
            if name not in files:
                raise ValueError(
                    f"the files must have every tensor of the model: {name}, of {wanted}, is "
                    f"missing in {files.path}. Check config.json, or download the files again."
                )
            found = files.tensors[name]
            if found.shape != wanted:
                raise ValueError(
                    f"the tensors must have the sizes of config.json: {name} is {found.shape} in "
                    f"{found.path}, and {wanted} by config.json. Correct one of them."
                )
            if found.dtype.name not in FLOATS:
                raise ValueError(
                    f"a parameter must be one of {FLOATS}: {name} is {found.dtype.name} in "
                    f"{found.path}. Dequantise the model first."
                )
    return sources


def tensor_names(rule: Rule, leaf: Leaf) -> list[str]:
    """The tensors of a parameter, in the order of its layers and experts."""
    experts = range(leaf.shape[0]) if rule.of_expert else (None,)
    return [rule.name_at(layer, expert) for layer in leaf.layers or (None,) for expert in experts]


def check_unknown(
    files: Files,
    family: Family,
    sources: Mapping[str, Source],
    leaves: Sequence[Leaf],
    copies: Iterable[str],
) -> None:
    """Refuses files with tensors that belong to no parameter.

    Raises:
      ValueError: with their names.
    """
    read = {name for leaf in leaves for name in tensor_names(sources[leaf.key].rule, leaf)}
    read |= set(copies)
    left = [
        name
        for name in files.tensors
        if name not in read and not any(re.fullmatch(one, name) for one in family.ignored)
    ]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise ValueError(
            f"every tensor in the files must be a parameter of the model: {', '.join(left[:5])}"
            f"{more} in {files.path} are not, by its config.json. Correct config.json, or remove "
            "them."
        )


def tied_heads(
    model: LanguageModel, rules: Sequence[Rule], sources: Mapping[str, Source]
) -> dict[str, str]:
    """The name of a tied head's tensor, which some files repeat, mapped to the embedding's."""
    if not model.tie_embeddings:
        return {}
    embedding = sources["embedding"].rule.name
    return {rule.name: embedding for rule in rules if rule.parameters == ("head",)}


def check_copies(files: Files, copies: Mapping[str, str]) -> None:
    """Refuses a copy that differs from its original; a copy may be absent.

    Raises:
      ValueError: with both names.
    """
    for name, original in copies.items():
        if name not in files:
            continue
        shape = files.tensors[name].shape
        same = shape == files.tensors[original].shape and all(
            np.array_equal(files.read(name, row), files.read(original, row))
            for row in range(shape[0])
        )
        if not same:
            raise ValueError(
                f"{name} must repeat {original}: they differ in {files.path}. Remove one of them."
            )


def read_leaf(
    files: Files, leaf: Leaf, source: Source, dtype: str | None, mesh: Mesh | None
) -> jax.Array:
    """A parameter in all its layers; on a mesh each device gets its own part."""
    names = tensor_names(source.rule, leaf)
    types = {files.tensors[name].dtype for name in names}
    if leaf.path[0] == STATE:
        dtype = leaf.spec.dtype  # small steps of a bias would be lost in bfloat16
    wanted = np.dtype(dtype) if dtype else np.result_type(*types)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return read_part(files, leaf, source, index, wanted)

    if mesh is None:
        return jax.device_put(part((slice(None),) * len(leaf.spec.shape)))
    sharding = named_sharding(leaf.spec.axes, mesh)
    return jax.make_array_from_callback(leaf.spec.shape, sharding, part)


def read_part(
    files: Files,
    leaf: Leaf,
    source: Source,
    index: tuple[slice, ...],
    dtype: np.dtype[Any],
) -> np.ndarray:
    """A slice of a parameter, read one matrix at a time."""
    shape = leaf.spec.shape
    ranges = [range(*one.indices(size)) for one, size in zip(index, shape, strict=True)]
    out = aligned_empty(tuple(map(len, ranges)), dtype)
    of_layers = out if leaf.stacked else out[None]
    inner = index[1:] if leaf.stacked else index
    rows = ranges[0] if leaf.stacked else range(1)
    for i, row in enumerate(rows):
        layer = leaf.layers[row] if leaf.layers else None
        fill_layer(files, leaf, source, layer, inner, of_layers[i])
    return out


def fill_layer(
    files: Files,
    leaf: Leaf,
    source: Source,
    layer: int | None,
    index: tuple[slice, ...],
    out: np.ndarray,
) -> None:
    """Reads a slice of one layer of a parameter into an array."""
    rule, shapes = source.rule, source.shapes
    if rule.of_expert:
        for i, expert in enumerate(range(*index[0].indices(leaf.shape[0]))):
            tensor = files.read(rule.name_at(layer, expert))
            out[i] = rule.read(tensor, shapes, source.which)[index[1:]]
        return
    name = rule.name_at(layer)
    by_row = len(leaf.shape) == 3 and len(files.tensors[name].shape) == 3
    if not by_row:
        out[...] = rule.read(files.read(name), shapes, source.which)[index]
        return
    # Stacked experts: one row is one expert's matrix.
    for i, expert in enumerate(range(*index[0].indices(leaf.shape[0]))):
        row = files.read(name, expert)[None]
        one = [(1, *shape[1:]) for shape in shapes]
        out[i] = rule.read(row, one, source.which)[0][index[1:]]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised array whose memory a CPU device can take over."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
