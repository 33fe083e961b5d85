"""Parameters of a model by component, and the share of each device on a mesh."""

import collections
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import ExperimentConfig, Lengths, MeshConfig
from moe_jax.models.layer import Layer
from moe_jax.models.model import LanguageModel
from moe_jax.models.multi_token import NAME
from moe_jax.models.trained import training_specs
from moe_jax.parallel.rules import num_shards
from moe_jax.parameters import ParameterSpec
from moe_jax.planning.flops import Placed, different_layers

COMPONENTS = (
    "embedding", "head", "attention", "mamba", "dense_ffn", "experts", "shared_experts", "router",
    "norms", "other",
)  # fmt: skip
CONVENTIONS = ("with both embeddings", "without the input embedding", "without embeddings")


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters by component.

    Attributes:
      embedding: the input embedding, which is also the head if they are tied.
      head: the output head, 0 if tied.
      attention: projections, their biases and QK-norms; in latent attention also inner norms.
      mamba: all of Mamba's layers except the norms of the residual stream.
      dense_ffn: FFNs of dense layers.
      experts: routed experts, all E of every layer.
      active_experts: routed experts that a token uses on average.
      shared_experts: shared experts and their gates.
      router: routers.
      norms: the norms of the residual stream.
      other: components that the library does not know.
      multi_token: the multi-token modules, which no other field includes.
    """

    embedding: int
    head: int
    attention: int
    mamba: int
    dense_ffn: int
    experts: int
    active_experts: int
    shared_experts: int
    router: int
    norms: int
    other: int
    multi_token: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return self._outside_experts + self.experts + self.multi_token

    @property
    def active(self) -> int:
        """Parameters that a token uses, with both embeddings and without multi-token modules."""
        return self._outside_experts + self.active_experts

    def by_convention(self) -> dict[str, tuple[int, int]]:
        """Total and active parameters under the three conventions in use.

        None of them counts multi-token modules, which only training runs (DeepSeek-V3's 671B). A
        tied embedding is the head, which every convention except the last counts: then "without the
        input embedding" leaves out nothing.
        """
        first = self.embedding if self.head else 0
        left_out = (0, first, self.embedding + self.head)
        return {
            name: (self.total - self.multi_token - less, self.active - less)
            for name, less in zip(CONVENTIONS, left_out, strict=True)
        }

    @property
    def _outside_experts(self) -> int:
        return (
            self.embedding + self.head + self.attention + self.mamba + self.dense_ffn
            + self.shared_experts + self.router + self.norms + self.other
        )  # fmt: skip


def num_parts(spec: ParameterSpec, mesh: MeshConfig) -> int:
    """Number of parts that the mesh splits an array into, not counting copies."""
    return math.prod(shards_of(axis, mesh) for axis in spec.axes)


def local_size(spec: ParameterSpec, mesh: MeshConfig) -> int:
    """Elements of an array that a device holds; a dim that does not divide is rounded up."""
    parts = (shards_of(axis, mesh) for axis in spec.axes)
    return math.prod(-(-size // part) for size, part in zip(spec.shape, parts, strict=True))


def local_bytes(specs: Any, mesh: MeshConfig) -> float:
    """Bytes of a tree of arrays, each in its own dtype, that a device holds."""
    leaves: list[ParameterSpec] = jax.tree.leaves(specs)
    return float(sum(local_size(one, mesh) * jnp.dtype(one.dtype).itemsize for one in leaves))


def gathered_size(spec: ParameterSpec, mesh: MeshConfig) -> int:
    """Elements of an array that a device holds once it is gathered over fsdp."""
    return local_size(spec, mesh) * (mesh.fsdp if "model" in spec.axes else 1)


def abstract_mesh(
    mesh: MeshConfig, device: jax.sharding.AbstractDevice | None = None
) -> jax.sharding.AbstractMesh:
    """The axes of a mesh without its devices; no size may be -1."""
    outer = "expert_slice" if mesh.experts_span_slices else "slice"
    names = (outer, "data", "fsdp", "expert", "tensor")
    return jax.sharding.AbstractMesh((mesh.slices, *mesh.sizes), names, abstract_device=device)


@functools.lru_cache(maxsize=4096)
def shards_of(axis: str | None, mesh: MeshConfig) -> int:
    """Number of parts that the mesh splits a dim into, by its name in `parallel.rules`."""
    return 1 if axis is None else num_shards(axis, abstract_mesh(mesh))


@functools.lru_cache(maxsize=64)
def plain_parameter_specs(model: LanguageModel) -> tuple[ParameterSpec, ...]:
    """Specs of the float32 model: without adapters and quantisation; layers of a scan stacked."""
    return tuple(jax.tree.leaves(model.plain_specs()))


def training_parameters(config: ExperimentConfig) -> tuple[ParameterSpec, ...]:
    """The specs of the trained parameters, which have gradients and moments."""
    return tuple(jax.tree.leaves(training_specs(config.optimizer, config.model.specs())))


def component(spec: ParameterSpec) -> str:
    """The component that an array counts as: one of `COMPONENTS`."""
    return spec.component if spec.component in COMPONENTS else "other"


def count_parameters(model: LanguageModel, sequence_length: int | Lengths) -> ParameterCount:
    """Counts the parameters of a model.

    Args:
      model: the model.
      sequence_length: L, or L and T of a model with an encoder; it decides how many tokens an
        expert chooses.
    """
    counts = dict.fromkeys((*COMPONENTS, NAME), 0)
    for name, own in model.plain_specs().items():
        for spec in jax.tree.leaves(own):
            counts[NAME if name == NAME else component(spec)] += spec.size
    inactive = inactive_parameters(model, sequence_length)
    return ParameterCount(active_experts=round(counts["experts"] - inactive), **counts)


def inactive_parameters(model: LanguageModel, sequence_length: int | Lengths) -> float:
    """Parameters that a token does not use; tied branches count once, as they are stored."""
    tied: dict[tuple[str, str], Placed] = {}
    uses = collections.Counter[tuple[str, str]]()
    inactive = 0.0
    for placed in different_layers(model, sequence_length):
        layer, within = placed.part, placed.within
        assert isinstance(layer, Layer)
        inactive += placed.times * sum(cost.inactive for cost in placed.costs(model))
        for name, part in layer.named:
            if name in within.stack.tied:
                tied[within.name, name] = Placed(part, 1, within)
                uses[within.name, name] += placed.times
    again = sum(
        (uses[key] - 1) * cost.inactive
        for key, placed in tied.items()
        for cost in placed.costs(model)
    )
    return inactive - again
