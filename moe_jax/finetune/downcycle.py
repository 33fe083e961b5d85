"""Makes sparse models dense, or drops experts (legend: `moe_jax.moe`; X layers of a part)."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.finetune.expert_changes import HIDDEN_DIM, OUTWARD
from moe_jax.finetune.remodel import (
    Origin,
    Path,
    Remodel,
    specs_by_path,
    with_layers,
    with_model,
    with_parts,
)
from moe_jax.finetune.upcycle import gates_without_preference
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.part import Dims, Part

Load = Mapping[str, np.ndarray]  # by part: choices per expert and layer, [X, E]


class Merged(Origin):
    """The origin of a dense network: the weighted mean of experts, plus the shared expert.

    Exact if experts are copies of each other and a token's gates have the sum that a router without
    preference gives. Optimizer moments become the same mean.
    """

    def __init__(self, moe: Any, dims: Dims, weights: Mapping[int, np.ndarray]):
        """`weights` contains, by layer, the weight of each expert, float32 [E], with sum 1."""
        self.dense = Mlp(
            dim=moe.expert_dim + moe.shared_expert_dim,
            activation=moe.activation,
            use_bias=moe.use_bias,
            init_scale=moe.init_scale,
        )
        self.sources = ("experts", "shared") if moe.shared_expert_dim else ("experts",)
        self.factor = gates_without_preference(moe, dims)
        self.spec_of = specs_by_path(self.dense, dims)
        self.per_layer = weights

    def needs(self, path: Path) -> tuple[Path, ...]:
        """See `Origin`."""
        return tuple((source, *path) for source in self.sources)

    def make(
        self, path: Path, old: Sequence[jax.Array], key: jax.Array, own: Any, moment: bool
    ) -> jax.Array:
        """See `Origin`."""
        (name,), (experts, *shared) = path, old
        mean = jnp.tensordot(own, experts, axes=1, precision=jax.lax.Precision.HIGHEST)
        if name in OUTWARD and not moment:
            mean = mean * self.factor
        if not shared:
            return mean
        if name not in HIDDEN_DIM:
            return shared[0] if moment else mean + shared[0]  # both have the gradient of the sum
        return jnp.concatenate([shared[0], mean], axis=HIDDEN_DIM[name])

    def make_other(self, path: Path, old: jax.Array, own: Any, shape: tuple[int, ...]) -> jax.Array:
        """See `Origin`: the mean over the experts.

        A shared expert makes the hidden dim longer: arrays kept along it are refused.
        """
        if jnp.issubdtype(old.dtype, jnp.integer):
            return jnp.max(old, axis=0)  # step counts, which the experts share
        if old.shape == (len(own), *shape):
            return jnp.tensordot(own, old, axes=1, precision=jax.lax.Precision.HIGHEST)
        return super().make_other(path, old, own, shape)


def merge_experts(config: ExperimentConfig, load: Load | None = None) -> Remodel:
    """A sparse model and the dense one that the mean of its experts makes.

    Args:
      config: of the sparse model.
      load: weighs the experts of each layer; an expert that no token chose has weight 0. None:
        equal weights.

    Raises:
      ValueError: there is nothing to merge, or a dense network cannot express a block.
    """
    model = config.model
    parts: dict[str, Part] = dict(model.parts)
    origins: dict[tuple[str, str], Merged] = {}
    names: dict[str, str] = {}
    for name, moe in routed_parts(model).items():
        require(
            moe.num_options == moe.num_experts and not moe.shared_expert_gate,
            "a block can become dense only if all of its options compute, and the shared expert "
            "has no gate",
            f"part {name!r}: num_zero_experts={moe.num_zero_experts}, num_copy_experts="
            f"{moe.num_copy_experts}, shared_expert_gate={moe.shared_expert_gate}",
            "Keep it sparse",
        )
        origin = Merged(moe, model.dims, weights_of(model, name, load))
        # Prefer the name of an equal part, such as the dense layers between sparse ones.
        wanted = ("mlp", f"{name}_mlp")
        free = (one for one in wanted if parts.get(one, origin.dense) == origin.dense)
        names[name] = next(free, f"{name}_dense")
        origins[name, names[name]] = origin
        parts[names[name]] = origin.dense
    layouts = {
        stack: with_layers(
            layout,
            [
                layer if isinstance(layer, str) else tuple(names.get(one, one) for one in layer)
                for layer in layout.layers
            ],
        )
        for stack, layout in model.layouts.items()
    }
    new = with_model(config, with_parts(model, parts, layouts))
    return Remodel(config, new, origins)


def routed_parts(model: LanguageModel) -> dict[str, Any]:
    """The MoE blocks among the parts of a model, by name; not those of multi-token modules alone.

    Raises:
      ValueError: there is none.
    """
    found = {name: part for name, part in model.moe_parts.items() if name in dict(model.parts)}
    require(
        bool(found),
        "the model must have parts that route tokens to experts",
        f"parts {sorted(dict(model.parts))}",
        "Name the run of a sparse model",
    )
    return found


def weights_of(model: LanguageModel, part: str, load: Load | None) -> dict[int, np.ndarray]:
    """The weights of the experts by layer, float32 [E], with sum 1."""
    moe: Any = model.part[part]  # `routed_parts` found it
    layers, num_experts = model.layers_of[part], moe.num_experts
    counts_XE = np.ones((len(layers), num_experts))
    if load is not None:
        counts_XE = np.where(load[part].sum(axis=-1, keepdims=True) > 0, load[part], counts_XE)
    weights_XE = counts_XE / counts_XE.sum(axis=-1, keepdims=True)
    return dict(zip(layers, weights_XE.astype(np.float32), strict=True))


class Pruned(Origin):
    """The origin of a block with fewer experts.

    Attributes:
      block: the new block.
      num_experts: of the old block.
      kept: by layer, the router options that stay, int32: experts, then zero and copy experts.
    """

    def __init__(self, moe: Any, dims: Dims, kept: Mapping[int, Sequence[int]]):
        """`kept` contains, by layer, the numbers of the experts that stay."""
        (count,) = {len(one) for one in kept.values()}
        self.num_experts = moe.num_experts
        self.block = dataclasses.replace(moe, num_experts=count)
        self.spec_of = specs_by_path(self.block, dims)
        zero_computation = tuple(range(moe.num_experts, moe.num_options))
        self.kept = {
            layer: np.array((*one, *zero_computation), np.int32) for layer, one in kept.items()
        }
        self.per_layer = self.kept

    def needs(self, path: Path) -> tuple[Path, ...]:
        """See `Origin`."""
        return (path,)

    def make(
        self, path: Path, old: Sequence[jax.Array], key: jax.Array, own: Any, moment: bool
    ) -> jax.Array:
        """See `Origin`: selects along the dim that shrinks."""
        return self._rows(old[0], own, self.spec_of[path].shape)

    def make_other(self, path: Path, old: jax.Array, own: Any, shape: tuple[int, ...]) -> jax.Array:
        """See `Origin`: selects the rows of the kept experts."""
        if old.ndim == len(shape) and old.shape[:1] == (self.num_experts,):
            return self._rows(old, own, shape)
        return super().make_other(path, old, own, shape)

    @staticmethod
    def _rows(old: jax.Array, own: Any, shape: tuple[int, ...]) -> jax.Array:
        for dim, (before, after) in enumerate(zip(old.shape, shape, strict=True)):
            if before != after:
                old = jnp.take(old, own[:after], axis=dim)
        return old

    def state(self, start: Any, old: Any, layers: Sequence[int]) -> Any:
        """See `Origin`: takes entries of the kept options, such as biases; other arrays whole."""
        kept_XE = jnp.stack([jnp.asarray(self.kept[layer]) for layer in layers])

        def own(new: jax.Array, old: jax.Array) -> jax.Array:
            return old if new.shape == old.shape else jnp.take_along_axis(old, kept_XE, axis=-1)

        return jax.tree.map(own, start, old)


def prune_experts(config: ExperimentConfig, kept: Mapping[str, np.ndarray]) -> Remodel:
    """A sparse model and the one with only some of its experts.

    Args:
      config: of the model.
      kept: by part, the numbers of the experts that each layer keeps, [X, E'].

    Raises:
      ValueError: a token would select more experts than are left, groups of experts would keep
        different numbers, a multi-token module uses the part too, or the router mixes tokens into
        slots.
    """
    model = config.model
    parts: dict[str, Part] = dict(model.parts)
    origins: dict[tuple[str, str], Pruned] = {}
    for name, kept_XE in kept.items():
        modules = model.multi_token
        require(
            modules is None or name not in modules.layer,
            "experts can be dropped only from a part that no multi-token module has",
            f"{name!r} in multi_token.layer={modules.layer if modules else ()}",
            "Start a run with --config.model.multi_token=None from this one, and prune that",
        )
        moe: Any = model.part[name]
        require(
            not moe.router.mixes,
            "experts can be dropped only if tokens choose among them; the slots of Soft MoE depend "
            "on the number of experts",
            f"part {name!r} has router={moe.router}",
            "Leave it whole",
        )
        selected = max(moe.num_selected(training) for training in (True, False))
        require(
            kept_XE.shape[1] >= selected,
            "a layer must keep at least as many experts as a token selects",
            f"part {name!r} keeps {kept_XE.shape[1]}, a token selects {selected}",
            "Raise --keep, or drop fewer",
        )
        groups = num_groups(moe)
        kept_XN = np.stack([np.bincount(own, minlength=groups)
                            for own in kept_XE // (moe.num_experts // groups)])  # fmt: skip
        require(
            bool((kept_XN == kept_XN[:, :1]).all()),
            "a layer must keep as many experts of every group, so that each stays in its group",
            f"part {name!r} keeps, of each of {groups} groups, {kept_XN.tolist()} by layer",
            "Drop as many of each, or use --keep",
        )
        by_layer = dict(zip(model.layers_of[name], kept_XE.tolist(), strict=True))
        origins[name, name] = origin = Pruned(moe, model.dims, by_layer)
        parts[name] = origin.block
    new = with_model(config, with_parts(model, parts, model.layouts))
    return Remodel(config, new, origins)


def num_groups(moe: Any) -> int:
    """Groups of experts among which tokens select; 1 without groups."""
    groups = getattr(moe.router, "groups", None)
    return 1 if groups is None else groups.num_groups


def used_experts(
    load: Load,
    at_least: Mapping[str, int],
    keep: int | None = None,
    groups: Mapping[str, int] = types.MappingProxyType({}),
) -> Load:
    """The experts that a text uses, by part [X, E'].

    All layers of a part keep the same number: the most used in any layer. Each keeps its most
    loaded experts. With groups of experts, this holds for each group.

    Args:
      load: of the text.
      at_least: by part, the minimum per layer: the number that a token selects.
      keep: number per layer to keep instead, rounded down to as many of every group.
      groups: by part, the number of groups of experts; 1 if absent.
    """
    kept = {}
    for part, load_XE in load.items():
        num = groups.get(part, 1)
        load_XNE = load_XE.reshape(len(load_XE), num, -1)
        used = int((load_XNE > 0).sum(axis=-1).max())
        count = max(keep // num, 1) if keep else max(used, -(-at_least[part] // num))
        most_XNE = np.sort(np.argsort(-load_XNE, axis=-1, kind="stable")[..., :count], axis=-1)
        first_N1 = np.arange(num)[:, None] * load_XNE.shape[-1]
        kept[part] = (first_N1 + most_XNE).reshape(len(load_XE), -1)
    return kept


def without_experts(model: LanguageModel, dropped: Sequence[int]) -> Load:
    """All experts except `dropped`, by part [X, E'].

    Raises:
      ValueError: a part has no expert with such a number.
    """
    kept = {}
    for name, moe in routed_parts(model).items():
        unknown = [one for one in dropped if not 0 <= one < moe.num_experts]
        require(
            not unknown,
            f"experts of {name} are 0 to {moe.num_experts - 1}",
            f"drop {unknown}",
            "Name others",
        )
        left = [one for one in range(moe.num_experts) if one not in dropped]
        kept[name] = np.tile(np.array(left, np.int64), (len(model.layers_of[name]), 1))
    return kept
