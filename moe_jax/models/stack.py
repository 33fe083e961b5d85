"""Stacks: layers in order, with repeated layers compiled once (legend: `moe_jax.moe`).

Parameters and caches are trees by position: `first`, `unit` with a leading dim of repeats, `last`;
in each, layers by place; in each layer, branches by name. Scanning only changes execution, not the
tree. Outside a stack, trees are by part, with a leading dim of the layers that use the part.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.layers.attention_kernels import keeps_attention
from moe_jax.models.layer import Layer
from moe_jax.models.layout import SEGMENTS
from moe_jax.models.layout import StackLayout as StackLayout
from moe_jax.parallel.rules import constrain
from moe_jax.part import Call, Dims, Own, Part, RunShape

REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, keeps_attention
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
RESIDUAL = ""  # the key next to those of branches, which are not empty


class StackOutput(NamedTuple):
    """The output of a stack.

    Attributes:
      x_BLM: the residual stream after the last layer.
      aux: the `Aux` of the parts, by part, each with a leading dim of layers.
      cache: the new caches, by position.
      residual_XBLM: the residual stream after every layer, if `Call.record`; else None.
    """

    x_BLM: jax.Array
    aux: dict[str, Any]
    cache: Any
    residual_XBLM: jax.Array | None = None


class Place(NamedTuple):
    """The place of a branch in a tree by position."""

    segment: str
    layer: str
    branch: str


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers that run one after another on the residual stream.

    Attributes:
      first: layers before the repeated unit.
      unit: layers that are repeated together.
      repeats: number of repeats of the unit.
      last: layers after the repeated unit.
      shared: (name, part) of parts that run once before the layers.
      tied: branches of the unit whose layers share one copy of parameters.
      causal: whether no token sees later ones.
      scan: whether the repeated layers are compiled once.
      remat: what the backward pass recomputes: a key of `REMAT`.
    """

    first: tuple[Layer, ...] = ()
    unit: tuple[Layer, ...] = ()
    repeats: int = 0
    last: tuple[Layer, ...] = ()
    shared: tuple[tuple[str, Part], ...] = ()
    tied: tuple[str, ...] = ()
    causal: bool = True
    scan: bool = True
    remat: str = "none"

    @property
    def num_layers(self) -> int:
        """Number of layers; also the number folded into the key of the embedding's dropout."""
        return len(self.first) + len(self.unit) * self.repeats + len(self.last)

    def segments(self) -> Iterator[tuple[str, tuple[Layer, ...]]]:
        """`first`, `unit` and `last` with their layers."""
        yield from ((name, getattr(self, name)) for name in SEGMENTS)

    def check_causality(self) -> None:
        """Checks that no part of a causal stack looks at later tokens.

        Raises:
          ValueError: with the part, and whether it looks ahead in training or in evaluation.
        """
        # A layer may look ahead although none of its branches does.
        layers = [(type(one).__name__, one) for _, layers in self.segments() for one in layers]
        for name, part in (*self.named_parts(), *self.shared, *layers):
            modes = [
                mode
                for mode, training in (("training", True), ("evaluation", False))
                if self.causal and part.looks_ahead(training)
            ]
            require(
                not modes,
                "in a causal stack a token's output must not depend on later tokens",
                f"the part {name!r} looks at them in {' and '.join(modes)}: {part}",
                "Use a causal router ('token_choice') and queue ('token_major'), or go dropless; "
                "set buffer_factor=0 or stop_at_overflow=True; override looks_ahead in a part of "
                "yours that sees no later token; or accept the leak with "
                "stack.allow_lookahead=True",
            )

    def named_parts(self) -> list[tuple[str, Part]]:
        """The name and the part of every branch, with the unit once."""
        return [
            branch for _, layers in self.segments() for layer in layers for branch in layer.branches
        ]

    def parts(self) -> dict[str, Part]:
        """The part of every branch, by name."""
        return dict(self.named_parts())

    def trees(self, of: Callable[[Layer], dict[str, Any]]) -> dict[str, Any]:
        """A tree of specs by position, from the specs of each layer."""
        tree = {
            segment: {str(i): of(layer) for i, layer in enumerate(layers)}
            for segment, layers in self.segments()
        }
        tree["unit"] = jax.tree.map(lambda spec: spec.stack(self.repeats), tree["unit"])
        return tree

    def specs(self, dims: Dims) -> dict[str, Any]:
        """Parameters by position, with any `tied` and `shared` parameters."""
        specs = self.trees(
            lambda layer: {k: v for k, v in layer.specs(dims).items() if k not in self.tied}
        )
        tied = {
            name: part.specs(dims)
            for layer in self.unit
            for name, part in layer.named
            if name in self.tied
        }
        shared = {name: part.specs(dims) for name, part in self.shared}
        specs |= {"tied": tied} if tied else {}
        return specs | ({"shared": shared} if shared else {})

    def state_specs(self, dims: Dims) -> dict[str, Any]:
        """State by part, with a leading dim of layers."""
        counts = {part: len(layers) for part, layers in self.layer_indices().items()}
        specs = {name: part.state_specs(dims) for name, part in self.parts().items()}
        return {
            name: jax.tree.map(lambda spec, n=counts[name]: spec.stack(n), own)
            for name, own in specs.items()
            if own
        }

    def cache_specs(self, dims: Dims, batch: int, length: int) -> dict[str, Any]:
        """Caches by position; see `Part.cache_specs`."""
        return self.trees(lambda layer: layer.cache_specs(dims, batch, length))

    def without_cache(self, dims: Dims) -> list[str]:
        """Parts that cannot decode, because they may read other tokens but cache nothing."""
        layers = [(type(one).__name__, one) for _, layers in self.segments() for one in layers]
        alone = [(name, one) for name, one in layers if not one.branches]
        return sorted(
            {
                name
                for name, part in (*self.named_parts(), *self.shared, *alone)
                if not part.pointwise and not part.cache_specs(dims, 1, 1)
            }
        )

    def places(self) -> dict[str, list[Place]]:
        """The places of each part, in order within `first`, one `unit` and `last`."""
        found: dict[str, list[Place]] = {}
        for segment, layers in self.segments():
            for i, layer in enumerate(layers):
                for (branch, _), (part, _) in zip(layer.named, layer.branches, strict=True):
                    found.setdefault(part, []).append(Place(segment, str(i), branch))
        return found

    def layer_indices(self) -> dict[str, tuple[int, ...]]:
        """The layers that use each part, in order; a layer that uses it twice is listed twice."""
        start = {"first": 0, "unit": len(self.first)}
        start["last"] = start["unit"] + len(self.unit) * self.repeats
        indices: dict[str, list[int]] = {}
        for part, places in self.places().items():
            for place in places:
                rounds = range(self.repeats if place.segment == "unit" else 1)
                at = start[place.segment] + int(place.layer)
                indices.setdefault(part, []).extend(at + r * len(self.unit) for r in rounds)
        return {part: tuple(sorted(found)) for part, found in indices.items()}

    def by_part(self, tree: Any) -> dict[str, Any]:
        """Converts a tree by position to a tree by part, with a leading dim of layers in order."""
        parts: dict[str, Any] = {}
        for part, places in self.places().items():
            pieces = []
            for segment in SEGMENTS:
                found = [tree[segment].get(p.layer, {}) for p in places if p.segment == segment]
                branches = [p.branch for p in places if p.segment == segment]
                values = [v[b] for v, b in zip(found, branches, strict=True) if b in v]
                if not values:
                    continue
                axis = 1 if segment == "unit" else 0
                piece = jax.tree.map(lambda *a, axis=axis: jnp.stack(a, axis), *values)
                if segment == "unit":
                    piece = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), piece)
                pieces.append(piece)
            if pieces:
                parts[part] = jax.tree.map(lambda *a: jnp.concatenate(a), *pieces)
        return parts

    def by_position(self, parts: Mapping[str, Any] | None) -> dict[str, Any]:
        """The inverse of `by_part`; missing parts are missing in the tree."""
        tree: dict[str, Any] = {segment: {} for segment in SEGMENTS}
        for part, places in self.places().items():
            if part not in (parts or {}):
                continue
            value, row = (parts or {})[part], 0
            for segment in SEGMENTS:
                own = [place for place in places if place.segment == segment]
                rounds = self.repeats if segment == "unit" else 1
                for j, place in enumerate(own):
                    rows = slice(row + j, row + rounds * len(own), len(own))
                    taken = jax.tree.map(lambda a, rows=rows: a[rows], value)
                    if segment != "unit":
                        taken = jax.tree.map(lambda a: a[0], taken)
                    tree[segment].setdefault(place.layer, {})[place.branch] = taken
                row += rounds * len(own)
        return tree

    def apply(
        self,
        params: Any,
        x_BLM: jax.Array,
        call: Call,
        *,
        state: Mapping[str, Any] | None = None,
        replay: Mapping[str, Any] | None = None,
        cache: Any = None,
    ) -> StackOutput:
        """Runs all layers.

        Args:
          params: in the tree that `specs` declares.
          x_BLM: the residual stream.
          call: with positions and segments as arrays.
          state: by part, as `state_specs` declares it, or None.
          replay: choices by part, with a leading dim of layers, or None.
          cache: by position, or None.
        """
        call = dataclasses.replace(call, causal=self.causal)
        shared = {
            name: part.apply(params["shared"][name], x_BLM, call, Own(jnp.int32(place)))[0]
            for place, (name, part) in enumerate(self.shared, self.num_layers + 1)
        }
        call = dataclasses.replace(call, shared=shared)
        run = functools.partial(self._run, call=call, tied=params.get("tied", {}))
        empty: dict[str, Any] = {segment: {} for segment in SEGMENTS}
        trees = (self.by_position(state), cache or empty, self.by_position(replay))
        auxes: dict[str, Any] = {}
        caches: dict[str, Any] = {}
        x_BLM = constrain(x_BLM, "batch", None, None)
        start = 0
        for segment, layers in self.segments():
            own = [tree[segment] for tree in trees]
            how = functools.partial(self._repeat, run) if segment == "unit" else run
            outcome = how(layers, params[segment], x_BLM, start, own)
            x_BLM, auxes[segment], caches[segment] = outcome
            start += len(layers) * (self.repeats if segment == "unit" else 1)
        residual_XBLM = self.residuals(auxes) if call.record else None
        return StackOutput(x_BLM, self.by_part(auxes), caches, residual_XBLM)

    def residuals(self, tree: Any) -> jax.Array:
        """The residual stream after every layer, in order, from `_run`'s records by position."""
        rounds = {"first": 1, "unit": self.repeats, "last": 1}
        pieces = []
        for segment, layers in self.segments():
            if not layers or not rounds[segment]:
                continue
            axis = 1 if segment == "unit" else 0
            found = [tree[segment][str(i)][RESIDUAL] for i in range(len(layers))]
            piece = jnp.stack(found, axis)
            pieces.append(piece.reshape(-1, *piece.shape[axis + 1 :]))
        return jnp.concatenate(pieces)

    def _run(
        self,
        layers: tuple[Layer, ...],
        params: Any,
        x_BLM: jax.Array,
        start: int | jax.Array,
        own: list[Any],
        *,
        call: Call,
        tied: Any,
    ) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
        """Runs some layers one after another; `own` is their state, caches and replay."""
        auxes, caches = {}, {}
        for i, layer in enumerate(layers):
            place = str(i)
            index = jnp.asarray(start + i, jnp.int32)
            mine = Own(index, *(tree.get(place) for tree in own))
            apply = layer.apply
            if self.remat != "none":
                apply = jax.checkpoint(layer.apply, policy=REMAT[self.remat])
            x_BLM, auxes[place], caches[place] = apply({**tied, **params[place]}, x_BLM, call, mine)
            x_BLM = constrain(x_BLM, "batch", None, None)
            if call.record:
                auxes[place] = {**auxes[place], RESIDUAL: x_BLM}
        return x_BLM, auxes, caches

    def _repeat(
        self,
        run: Callable[..., Any],
        layers: tuple[Layer, ...],
        params: Any,
        x_BLM: jax.Array,
        start: int,
        own: list[Any],
    ) -> tuple[jax.Array, Any, Any]:
        """Runs the unit `repeats` times: in a scan, or one after another.

        A given cache is part of the carry, where it is updated in place. A new cache is returned
        with the outputs.
        """
        if self.repeats == 0:
            return x_BLM, {}, {}
        state, cache, replay = own
        has_cache = bool(jax.tree.leaves(cache))

        def body(carry: Any, inputs: Any) -> Any:
            x_BLM, cache = carry
            repeat, params, state, replay = inputs
            here = jax.tree.map(
                lambda a: jax.lax.dynamic_index_in_dim(a, repeat, 0, keepdims=False), cache
            )
            index = start + repeat * len(layers)
            x_BLM, auxes, new = run(layers, params, x_BLM, index, [state, here, replay])
            if not has_cache:
                return (x_BLM, cache), (auxes, new)
            cache = jax.tree.map(
                lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, repeat, 0), cache, new
            )
            return (x_BLM, cache), (auxes, {})

        inputs = (jnp.arange(self.repeats), params, state, replay)
        if self.scan:
            (x_BLM, cache), (auxes, caches) = jax.lax.scan(body, (x_BLM, cache), inputs)
        else:
            carry, outputs = (x_BLM, cache), []
            for one in unstacked(inputs, self.repeats):
                carry, output = body(carry, one)
                outputs.append(output)
            x_BLM, cache = carry
            auxes, caches = jax.tree.map(lambda *a: jnp.stack(a), *outputs)
        return x_BLM, auxes, cache if has_cache else caches

    def check_run(self, dims: Dims, run: RunShape) -> None:
        """Checks that the mesh can split the batch and every part; see `Part`."""
        for name, part in (*self.parts().items(), *self.shared):
            try:
                part.check_run(dims, run)
            except ValueError as error:
                raise ValueError(f"part {name!r}: {error}") from error


def unstacked(tree: Any, count: int) -> list[Any]:
    """The entries of a tree of stacked arrays, split so that their gradients are concatenated."""
    leaves, structure = jax.tree.flatten(tree)
    cut = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [pieces[i].squeeze(0) for pieces in cut])
        for i in range(count)
    ]
