"""Makes dense models sparse: feed-forward networks become experts (legend: `moe_jax.moe`)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.finetune.expert_changes import OUTWARD, Copies, ExpertChange
from moe_jax.finetune.remodel import (
    Origin,
    Path,
    Remodel,
    specs_by_path,
    with_layers,
    with_model,
    with_parts,
)
from moe_jax.models.layout import LayerNames, StackLayout
from moe_jax.models.model import LanguageModel
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import RouterInputs
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.part import Dims, Part

COMPONENT = "dense_ffn"  # component of the parameters of a part that becomes sparse
PROBES = 16  # tokens routed to measure the gates of a router without preference


@dataclasses.dataclass(frozen=True)
class Upcycling(Settings):
    """How a dense model becomes sparse.

    Source: Komatsuzaki et al. 2022, arXiv:2212.05055.
    """

    # The block: the dense network sets its `expert_dim`, `activation`, `use_bias`, `init_scale`.
    moe: MoE = MoE(
        num_selected_experts=2,
        router=TokenChoice(renormalize=True),
        capacity=Capacity(train_factor=0, eval_factor=0),
    )
    changes: tuple[ExpertChange, ...] = ()  # changes to copies of the dense network, in this order
    every: int = setting(1, at_least=1)  # N: of each N layers of a stack, the last becomes sparse
    # These layers instead, numbered across all stacks; (): by `every`.
    layers: tuple[int, ...] = setting((), at_least=0)
    # Or stacks in which parts named by `sparse_name` replace dense ones.
    stacks: tuple[tuple[str, StackLayout], ...] = ()
    rescale: bool = True  # divide expert outputs by the sum of gates without a preference
    # Of the router's weights; None: as in a new model.
    router_stddev: float | None = setting(None, at_least=0)

    def check(self) -> None:
        """See `Settings`."""
        given = [name for name in ("layers", "stacks") if getattr(self, name)]
        require(
            len(given) + (self.every > 1) <= 1,
            "the layers that become sparse must be named only once: by every, layers or stacks",
            f"every={self.every}, layers={self.layers}, stacks={self.stacks}",
            "Leave out all but one",
        )
        require(
            self.moe.shared_expert_dim == 0,
            "only the change 'shared' can make a shared expert from the dense network",
            f"moe.shared_expert_dim={self.moe.shared_expert_dim}",
            "Leave it out of the block, and name the change shared:dim=N",
        )

    def chooses(self, place: int, number: int) -> bool:
        """Whether a layer becomes sparse; `place` is in its stack, `number` in the model."""
        if self.layers:
            return number in self.layers
        return place % self.every == self.every - 1


class Upcycled(Origin):
    """The origin of an MoE block: copies of a dense network, and a newly drawn router.

    Attributes:
      blocks: the block before each change, then the final block.
      changes: in order.
      factor: multiplies the outputs of experts.
      router_stddev: see `Upcycling`.
    """

    def __init__(self, dense: Part, upcycling: Upcycling, dims: Dims):
        start = dataclasses.replace(upcycling.moe, **settings_of(dense))
        self.changes = upcycling.changes
        self.blocks = [start]
        for change in self.changes:
            block = change.block(self.block)
            require(
                block.shared_expert_dim == self.block.shared_expert_dim
                or self.block.expert_dim == start.expert_dim,
                "a shared expert must be taken from the whole dense network",
                f"changes before leave {self.block.expert_dim} of {start.expert_dim} hidden units",
                "Name 'shared' before 'granular'",
            )
            self.blocks.append(block)
        self.spec_of = specs_by_path(self.block, dims)
        self.factor = 1 / gates_without_preference(self.block, dims) if upcycling.rescale else 1.0
        self.router_stddev = upcycling.router_stddev

    @property
    def block(self) -> MoE:
        """The block of the new model."""
        return self.blocks[-1]

    def needs(self, path: Path) -> tuple[Path, ...]:
        """See `Origin`."""
        return ((path[-1],),) if path[0] in ("experts", "shared") else ()

    def make(
        self, path: Path, old: Sequence[jax.Array], key: jax.Array, own: Any, moment: bool
    ) -> jax.Array:
        """See `Origin`."""
        if path[0] == "shared":
            (value,) = old
            return functools.reduce(
                lambda value, change: change.shared(path[-1], value), self.changes, value
            )
        if path[0] == "experts":
            return self.experts(path[-1], old[0], key, moment)
        return self.drawn(path, key)

    def experts(self, name: str, dense: jax.Array, key: jax.Array, moment: bool) -> jax.Array:
        """A weight of the experts, [E, ...], from that of the dense network."""
        value = jnp.broadcast_to(dense, (self.block.num_experts, *dense.shape))
        for place, (change, moe) in enumerate(zip(self.changes, self.blocks, strict=False)):
            own = jax.random.fold_in(key, place)
            value = change.experts(Copies(name, value, moment), moe, own)
        return value if moment or name not in OUTWARD else value * self.factor

    def drawn(self, path: Path, key: jax.Array) -> jax.Array:
        """A parameter that the dense model lacks: one of the router."""
        spec = self.spec_of[path]
        value = spec.init(jax.random.fold_in(key, len(self.changes)), spec.shape, spec.dtype)
        if path == ("router", "weight") and self.router_stddev is not None:
            value = value * (self.router_stddev / jnp.maximum(jnp.std(value), 1e-30))
        if spec.shape[-1] != self.block.num_options:
            return value
        pairs = zip(self.changes, self.blocks, strict=False)
        return functools.reduce(lambda value, one: one[0].router(value, one[1]), pairs, value)


def settings_of(dense: Part) -> dict[str, Any]:
    """The settings of a block that the dense network determines."""
    names = {"expert_dim": "dim"} | {n: n for n in ("activation", "use_bias", "init_scale")}
    require(
        all(hasattr(dense, name) for name in names.values()),
        f"a part that becomes sparse must have the settings {sorted(names.values())}",
        repr(dense),
        "Name other layers",
    )
    return {new: getattr(dense, old) for new, old in names.items()}


def gates_without_preference(moe: MoE, dims: Dims) -> float:
    """The sum of a token's gates if all router parameters are 0; 1 if there is no such sum.

    The sum is 1 with renormalised gates, K / E for a softmax over all experts, K / 2 for sigmoids,
    each times the router's scaling factor.
    """
    if moe.num_options == 1:
        return moe.router.scaling_factor
    options = moe.options(PROBES, training=False)
    specs = moe.router.specs(dims, options)

    def total() -> jax.Array:
        params = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)
        tokens_GS = jnp.arange(PROBES, dtype=jnp.int32)[None]
        valid_GS = jnp.ones(tokens_GS.shape, jnp.bool_)
        inputs = RouterInputs(options, valid_GS, tokens_GS, tokens_GS, tokens_GS)
        routing = moe.router.route(params, jnp.zeros((1, PROBES, dims.model_dim)), inputs)
        if routing.mixing is not None:
            return jnp.ones(())
        gate_GSK = jnp.where(routing.chosen_GSK, routing.gate_GSK, 0)
        return jnp.mean(jnp.sum(gate_GSK.astype(jnp.float32), axis=-1))

    found = float(jax.jit(total)())
    return found if 0 < found < float("inf") else 1.0


def dense_parts(model: LanguageModel, stack: str) -> list[str]:
    """The parts of a stack that are dense feed-forward networks."""
    found = []
    for name, part in model.stacks[stack].parts().items():
        specs = jax.tree.leaves(part.specs(model.dims))
        if specs and all(spec.component == COMPONENT for spec in specs):
            found.append(name)
    return sorted(found)


def sparse_name(model: LanguageModel, stack: str, dense: str) -> str:
    """The name of the block that replaces a dense part: "moe", "encoder_moe", or PART_moe."""
    name = "moe" if len(dense_parts(model, stack)) == 1 else f"{dense}_moe"
    name = name if stack == "stack" else f"{stack}_{name}"
    taken = set(model.part)
    return name if name not in taken else f"{dense}_{name}"


def sparse_layer(model: LanguageModel, stack: str, layer: LayerNames) -> LayerNames:
    """A layer with blocks in place of its dense parts; a part that is a whole layer stays."""
    if isinstance(layer, str):
        return layer
    dense = dense_parts(model, stack)
    return tuple(sparse_name(model, stack, name) if name in dense else name for name in layer)


def sparse_layouts(model: LanguageModel, upcycling: Upcycling) -> dict[str, StackLayout]:
    """The layouts of the new model's stacks.

    Raises:
      ValueError: a layer has no dense part or does not exist, or a given stack is not the model's
        stack with some layers made sparse.
    """
    given, layouts, start = dict(upcycling.stacks), {}, 0
    require(
        set(given) <= set(model.layouts),
        f"the stacks are {sorted(model.layouts)}",
        str(sorted(given)),
        "Correct the names",
    )
    for stack, layout in model.layouts.items():
        pairs = [(layer, sparse_layer(model, stack, layer)) for layer in layout.layers]
        if stack in given:
            check_given(given[stack], pairs, stack)
            layouts[stack] = given[stack]
            continue
        layers = [
            sparse if upcycling.chooses(place, start + place) else dense
            for place, (dense, sparse) in enumerate(pairs)
        ]
        named = [start + i for i, (dense, sparse) in enumerate(pairs) if dense == sparse]
        without = sorted(set(named) & set(upcycling.layers))
        require(
            not without,
            "a layer that becomes sparse must have a dense part, one of "
            f"{dense_parts(model, stack)}",
            f"layers {without} of {stack} have none",
            "Name other layers",
        )
        layouts[stack] = with_layers(layout, layers)
        start += layout.num_layers
    require(
        all(layer < start for layer in upcycling.layers),
        f"the layers of the model are 0 to {start - 1}",
        f"layers={upcycling.layers}",
        "Name others",
    )
    return layouts


def check_given(
    layout: StackLayout, pairs: Sequence[tuple[LayerNames, LayerNames]], stack: str
) -> None:
    """Checks a layout with some layers made sparse; `pairs` are (dense, sparse) layers.

    Raises:
      ValueError: with the first layer that is neither.
    """
    require(
        layout.num_layers == len(pairs),
        f"a new {stack} must have as many layers as the old one",
        f"{layout.num_layers}, not {len(pairs)}",
        "Correct it",
    )
    for place, (layer, pair) in enumerate(zip(layout.layers, pairs, strict=True)):
        require(
            layer in pair,
            f"a layer of a new {stack} must be the old one, or the old one made sparse",
            f"layer {place} is {layer!r}, neither {pair[0]!r} nor {pair[1]!r}",
            "Correct it",
        )


def upcycle(config: ExperimentConfig, upcycling: Upcycling) -> Remodel:
    """A dense model and the sparse one that it becomes.

    Args:
      config: of the dense model.
      upcycling: the settings.

    Returns:
      Both models; `remodel.remodelled` makes the parameters.

    Raises:
      ValueError: no part is dense, none becomes sparse, a dense part is tied, or the settings do
        not fit the model.
    """
    model = config.model
    require(
        any(dense_parts(model, stack) for stack in model.stacks),
        "upcycling must start from a model with dense feed-forward networks",
        f"the parts are {sorted(model.part)}",
        "Start from a dense model",
    )
    layouts = sparse_layouts(model, upcycling)
    parts: dict[str, Part] = dict(model.parts)
    origins: dict[tuple[str, str], Upcycled] = {}
    for stack, layout in layouts.items():
        for dense in dense_parts(model, stack):
            name = sparse_name(model, stack, dense)
            if name in layout.names and name not in model.part:
                origin = Upcycled(model.part[dense], upcycling, model.dims)
                origins[dense, name], parts[name] = origin, origin.block
        tied = sorted(set(layout.tied) & set(dense_parts(model, stack)))
        require(
            not tied,
            "layers that share one dense network must stay dense",
            f"tied={tied} of {stack}",
            "Start from a model without tied networks",
        )
    require(
        bool(origins),
        "a dense layer must become sparse",
        f"dense parts {[one for name in model.stacks for one in dense_parts(model, name)]} of "
        f"layers {[*model.stack.layers]}",
        "Lower --every, or name the layers",
    )
    new = with_model(config, with_parts(model, parts, layouts))
    return Remodel(config, new, origins)
