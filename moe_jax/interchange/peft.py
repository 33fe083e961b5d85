"""Writes adapters in PEFT layout: `to_peft`.

PEFT adapts a module by A [R, in] and B [out, R]. In transformers 5 the experts of a layer are
parameters [E, out, in] of one module. Their A is [E * R, in], expert by expert; their B is
[out, R * E], with the experts of each rank side by side. A tensor that joins several of our
matrices, such as gate and up, has the ranks of all of them: B is zero for the ranks of others.
Source: huggingface/peft 0.21, `src/peft/tuners/lora/layer.py`.
"""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.config.json_text import json_text
from moe_jax.files import whole_or_absent
from moe_jax.interchange.family import FAMILIES, Family, family_of
from moe_jax.interchange.leaves import Leaf, leaves_of
from moe_jax.interchange.read import tensor_names
from moe_jax.interchange.rules import AS_IS, LINEAR, Rule
from moe_jax.interchange.tensor_files import ToWrite, write_shard
from moe_jax.models.model import LanguageModel
from moe_jax.models.trained import training_marks
from moe_jax.models.wrapping import plain_model
from moe_jax.weights.low_rank import ADAPTERS, LowRank

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OUTER = "base_model.model."  # prefix of the names of every model
MULTIMODAL = "language_model."  # prefix of the names of a multimodal class
# Families that store experts as [E, in, out] and whose class declares it (`is_transposed`).
TRANSPOSED = ("gpt_oss",)
# Matrices whose module the class does not call, so an adapter on it would have no effect.
NOT_CALLED = ("mamba/dt_proj",)
# Components that PEFT finds by parameter, not by module, in a model with experts. It mistakes
# modules named gate_proj, w1 and the like for experts of transformers before 5, and a router is no
# module with a matrix.
OF_NETWORKS = ("experts", "shared_experts", "dense_ffn", "router")


class Adapted(NamedTuple):
    """A tensor of the model, with its adapter in PEFT layout.

    Attributes:
      name: of the tensor.
      is_module: whether PEFT finds it by its module; else by the parameter itself.
      rank: of the adapter, per expert.
      lora_a: float32 [experts * rank, in].
      lora_b: float32 [out, rank * experts].
    """

    name: str
    is_module: bool
    rank: int
    lora_a: np.ndarray
    lora_b: np.ndarray

    @property
    def target(self) -> str:
        """The module or the parameter, as PEFT names it."""
        return self.name.removesuffix(".weight") if self.is_module else self.name

    @property
    def owner(self) -> str:
        """The module that contains the tensor."""
        return self.name.rpartition(".")[0]


def to_peft(
    config: ExperimentConfig,
    params: Any,
    path: str | pathlib.Path,
    *,
    family: str = "",
    base: str = "",
) -> None:
    """Writes the adapters of a model as a directory that `peft.PeftModel.from_pretrained` loads.

    Args:
      config: of the model with these parameters.
      params: with `LowRank` weights; a state under "state" is ignored.
      path: of the directory, which must be absent or empty.
      family: "model_type" of the base model; "": the one that `config.name` names, or else the
        first that can express the model.
      base: name or directory of the base model, which PEFT may load; "": not named.

    Raises:
      ValueError: there are no adapters, other parameters trained too, no family can express the
        model, or PEFT has no layout for an adapter; nothing is written then.
    """
    adapters = config.model.adapters
    require(
        adapters is not None,
        "--to-peft needs a run with adapters",
        f"model.adapters={adapters}",
        "Train one with model.adapters, or write the whole model: convert --to-hf",
    )
    assert adapters is not None
    check_nothing_else_trained(config)
    model = plain_model(config.model)
    chosen = family_of(model, family or (config.name if config.name in FAMILIES else ""))
    chosen.written(model)  # raises if the family cannot express it
    found = all_adapted(chosen, model, params)
    joined = {one.target: one.rank for one in found if one.rank != adapters.rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if model.has_encoder else "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [one.target for one in found if one.is_module],
        "target_parameters": [one.target for one in found if not one.is_module] or None,
        "rank_pattern": joined,
        "alpha_pattern": {
            name: adapters.alpha * rank / adapters.rank for name, rank in joined.items()
        },
    }
    with whole_or_absent(pathlib.Path(path)) as directory:
        write_shard(directory / TENSORS, tensors_of(found))
        with (directory / CONFIG).open("w") as file:
            file.write(json_text(settings, indent=2, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())


def check_nothing_else_trained(config: ExperimentConfig) -> None:
    """Refuses a run that trained anything except adapters."""
    specs = config.model.specs()
    marks = training_marks(config.optimizer, specs)
    others = {
        spec.component
        for spec, mark in zip(jax.tree.leaves(specs), jax.tree.leaves(marks), strict=True)
        if mark and spec.component != ADAPTERS
    }
    require(
        not others,
        "an adapter can say what a run learned only if nothing else trained",
        f"optimizer.trainable={config.optimizer.trainable} trained {sorted(others)} too",
        "Write the merged model: convert --to-hf",
    )


def all_adapted(family: Family, model: LanguageModel, params: Any) -> list[Adapted]:
    """Every tensor that has an adapter."""
    by_key: dict[str, list[Leaf]] = {}
    for leaf in leaves_of(model):
        by_key.setdefault(leaf.key, []).append(leaf)
    weights = {
        tuple(entry.key for entry in path): weight
        for path, weight in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_adapted)
        if is_adapted(weight)
    }
    adapted = {leaf.key for leaves in by_key.values() for leaf in leaves if leaf.path in weights}
    rules: dict[str, Rule] = {}
    for rule in family.rules(model):  # names in files come first, names in the class last
        if not rule.name.startswith(MULTIMODAL) and set(rule.parameters) <= set(by_key):
            rules |= dict.fromkeys(adapted & set(rule.parameters), rule)
    idle = sorted(adapted & set(NOT_CALLED))
    require(
        not idle,
        "PEFT adapts only matrices whose module transformers calls",
        f"{idle} are read without calling their module",
        "Leave them out of adapters.names, or write the merged model: convert --to-hf",
    )
    components = {leaf.spec.component for leaves in by_key.values() for leaf in leaves}
    by_parameter = OF_NETWORKS if "experts" in components else ()
    found = []
    for rule in dict.fromkeys(rules.values()):
        for leaves in zip(*(by_key[key] for key in rule.parameters), strict=True):
            if any(leaf.path in weights for leaf in leaves):
                is_module = leaves[0].spec.component not in by_parameter
                swaps = not is_module and takes_for_transposed(family, rule, leaves[0])
                found += of_rule(rule, leaves, weights, is_module, swaps)
    return found


def is_adapted(leaf: Any) -> bool:
    """Whether a weight has an adapter."""
    return isinstance(leaf, LowRank)


def takes_for_transposed(family: Family, rule: Rule, leaf: Leaf) -> bool:
    """Whether PEFT takes a tensor [E, in, out] for [E, out, in], so that A and B swap roles."""
    return rule.layout == AS_IS and len(leaf.shape) == 3 and family.name not in TRANSPOSED


def of_rule(
    rule: Rule,
    leaves: tuple[Leaf, ...],
    weights: Mapping[tuple[str, ...], LowRank],
    is_module: bool,
    swaps: bool,
) -> list[Adapted]:
    """The adapters of the tensors that hold these parameters of the same layers."""
    require(
        rule.layout in (AS_IS, LINEAR),
        "PEFT has adapters only of matrices, and of the experts of a layer as [E, out, in]",
        f"{rule.name} has another layout",
        "Leave it out of adapters.names, or write the merged model: convert --to-hf",
    )
    factors = [factors_of(leaf, weights.get(leaf.path)) for leaf in leaves]
    names = iter(tensor_names(rule, leaves[0]))
    found = []
    for layer in range(len(leaves[0].layers) or 1):
        own = [each and Factors(*(one[layer] for one in each)) for each in factors]
        a, b = joined_factors(rule, own, [leaf.shape[-1] for leaf in leaves])
        if rule.of_expert:
            rank = a.shape[-2]
            found += [Adapted(next(names), False, rank, *one) for one in zip(a, b, strict=True)]
            continue
        if swaps:
            a, b = np.swapaxes(b, -1, -2), np.swapaxes(a, -1, -2)
        rank = a.shape[-2]
        if a.ndim == 3:
            a = a.reshape(-1, a.shape[-1])
            b = np.moveaxis(b, 0, -1).reshape(b.shape[1], -1)
        found.append(Adapted(next(names), is_module, rank, a, b))
    return found


class Factors(NamedTuple):
    """a [..., in, r] and b [..., r, out] of a matrix."""

    a: np.ndarray
    b: np.ndarray


def factors_of(leaf: Leaf, weight: LowRank | None) -> Factors | None:
    """The factors of a parameter, with layers as the first dim; None without an adapter."""
    if weight is None:
        return None
    factors = [np.asarray(weight.a), np.asarray(weight.b)]
    if weight.shared:
        factors = [np.stack([one] * leaf.shape[0], -3) for one in factors]
    return Factors(*(one if leaf.stacked else one[None] for one in factors))


def joined_factors(
    rule: Rule, factors: list[Factors | None], outputs: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A [..., R, in] and B [..., out, R] of a tensor.

    Args:
      rule: of the tensor.
      factors: of each matrix in it.
      outputs: output size of each.
    """
    a = np.concatenate([each.a for each in factors if each is not None], -1)
    leading, ranks, start = a.shape[:-2], a.shape[-1], 0
    parts = []
    for each, size in zip(factors, outputs, strict=True):
        part = np.zeros((*leading, ranks, size), np.float32)
        if each is not None:
            end = start + each.b.shape[-2]
            part[..., start:end, :] = each.b
            start = end
        parts.append(part)
    written = rule.write(parts)
    if rule.layout == AS_IS:
        written = np.swapaxes(written, -1, -2)
    return np.swapaxes(a, -1, -2), written


def tensors_of(found: list[Adapted]) -> list[ToWrite]:
    """Two tensors per adapter.

    PEFT nests the adapters of several parameters of one module; the last is outermost.
    """
    tensors = []
    for i, one in enumerate(found):
        outer = sum(later.owner == one.owner for later in found[i + 1 :])
        for name, values in (("lora_A", one.lora_a), ("lora_B", one.lora_b)):
            full = f"{OUTER}{one.owner}{'.base_layer' * outer}.{name}.weight"
            make = functools.partial(np.asarray, values)
            tensors.append(ToWrite(full, np.dtype(np.float32), values.shape, make))
    return sorted(tensors, key=lambda tensor: tensor.name)
