"""Layers: branches on the residual stream (legend: `moe_jax.moe`)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.costs import Bytes, Cost
from moe_jax.layers.norms import Norm, RMSNorm
from moe_jax.part import Call, Dims, Output, Own, Part, RunShape

PLACEMENTS = ("pre", "post", "sandwich")


@dataclasses.dataclass(frozen=True)
class Layer(Part):
    """Branches one after another, each added to the residual; other layers override `apply`.

    Attributes:
      branches: (name of the part, part), in order; a part may occur twice.
    """

    # (Name, part), in order.
    branches: tuple[tuple[str, Part], ...] = dataclasses.field(
        default=(), metadata={"ordered": True}
    )
    norm: Norm = RMSNorm()  # of each branch, with its own parameters
    placement: str = setting("pre", choices=PLACEMENTS)  # norms before branches, after, or both
    multiplier: float = setting(1.0, above=0)  # of a branch's output (Granite)
    dropout_rate: float = setting(0.0, at_least=0, below=1)  # on a branch's output

    def check(self) -> None:
        """See `Settings`."""
        layers = [name for name, part in self.branches if isinstance(part, Layer)]
        require(
            not layers,
            "a whole layer cannot be a branch of a layer, since it adds to the residual itself",
            f"{layers} of branches {[name for name, _ in self.branches]}",
            "Name it alone in the stack, or name its branches",
        )
        names = [name for name, _ in self.named]
        norms = [f"{name}{end}" for name in names for end in ("_norm", "_post_norm")]
        require(
            len({*names, *norms}) == 3 * len(names),
            "names of branches, numbered where one comes twice, must differ from each other and "
            "from those of their norms, NAME_norm and NAME_post_norm",
            f"branches {names}",
            "Rename one",
        )

    @property
    def named(self) -> list[tuple[str, Part]]:
        """Branches by unique names: the part's name, numbered if it occurs twice."""
        names = [name for name, _ in self.branches]
        return [
            (name if names.count(name) == 1 else f"{name}_{names[:i].count(name)}", part)
            for i, (name, part) in enumerate(self.branches)
        ]

    def specs(self, dims: Dims) -> dict[str, Any]:
        """Parameters by branch, and norms as NAME_norm and NAME_post_norm."""
        specs: dict[str, Any] = {}
        for name, part in self.named:
            specs[name] = part.specs(dims)
            if self.placement != "post":
                specs[f"{name}_norm"] = self.norm.specs(dims.model_dim)
            if self.placement != "pre":
                specs[f"{name}_post_norm"] = self.norm.specs(dims.model_dim)
        return specs

    def state_specs(self, dims: Dims) -> dict[str, Any]:
        """See `Part`; by branch, for branches with state."""
        return {name: specs for name, part in self.named if (specs := part.state_specs(dims))}

    def cache_specs(self, dims: Dims, batch: int, length: int) -> dict[str, Any]:
        """See `Part`; by branch, for branches with a cache."""
        caches = ((name, part.cache_specs(dims, batch, length)) for name, part in self.named)
        return {name: specs for name, specs in caches if specs}

    def looks_ahead(self, training: bool) -> bool:
        """See `Part`: whether a branch does. A layer without branches may override this."""
        return not self.branches or any(part.looks_ahead(training) for _, part in self.branches)

    def map_branches(self, change: Callable[[Part], Part]) -> Part:
        """See `Part`."""
        branches = tuple((name, change(part)) for name, part in self.branches)
        return dataclasses.replace(self, branches=branches)

    def check_run(self, dims: Dims, run: RunShape) -> None:
        """See `Part`."""
        for _, part in self.branches:
            part.check_run(dims, run)

    def costs(self, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
        """See `Part`: the branches, and per branch the residual and its normed copy."""
        if not self.branches:
            return super().costs(dims, length, dtype)
        stages = [part.costs(dims, length, dtype) for _, part in self.branches]
        stages[-1:] = [tuple(dataclasses.replace(cost, ends_layer=True) for cost in stages[-1])]
        numbers = 2 * dims.model_dim * len(stages)
        stages.append((Cost("other", saved=Bytes(numbers * jnp.dtype(dtype).itemsize)),))
        return tuple(cost for branch in stages for cost in branch)

    def decode_flops(self, dims: Dims, length: int, dtype: str) -> float:
        """See `Part`: the sum over branches."""
        if not self.branches:
            return super().decode_flops(dims, length, dtype)
        return sum(part.decode_flops(dims, length, dtype) for _, part in self.branches)

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """See `Part`; returns the residual stream, and aux and caches by branch."""
        branches = Branches(self, params, call, own)
        for name, part in self.named:
            normed_BLM = x_BLM
            if self.placement != "post":
                normed_BLM = self.norm.apply(params[f"{name}_norm"], x_BLM)
            x_BLM += branches.output(name, part, normed_BLM)
        return x_BLM, *branches.collected


class Branches:
    """Runs the branches of a layer and collects their aux and caches by name."""

    def __init__(self, layer: Layer, params: Any, call: Call, own: Own):
        self.layer, self.params, self.call, self.own = layer, params, call, own
        self.numbers = {name: number for number, (name, _) in enumerate(layer.named)}
        self.collected: tuple[dict[str, Any], dict[str, Any]] = ({}, {})

    def output(self, name: str, part: Part, x_BLM: jax.Array) -> jax.Array:
        """A branch's contribution to the residual: normed, multiplied, with dropout."""
        auxes, caches = self.collected
        own = self.own.of(name, self.numbers[name])
        with jax.named_scope(name):
            y_BLM, aux, cache = part.apply(self.params[name], x_BLM, self.call, own)
        if aux is not None:
            auxes[name] = aux
        if cache is not None:
            caches[name] = cache
        if self.layer.placement != "pre":
            y_BLM = self.layer.norm.apply(self.params[f"{name}_post_norm"], y_BLM)
        if self.layer.multiplier != 1:
            y_BLM *= self.layer.multiplier
        return dropout(y_BLM, self.layer.dropout_rate, own.key(self.call))


@dataclasses.dataclass(frozen=True)
class ParallelLayer(Layer):
    """All branches on one normed copy of the residual (GPT-J, PaLM)."""

    def specs(self, dims: Dims) -> dict[str, Any]:
        """Parameters by branch, and one `norm`."""
        specs = {name: part.specs(dims) for name, part in self.named}
        return {**specs, "norm": self.norm.specs(dims.model_dim)}

    def check(self) -> None:
        """See `Settings`."""
        super().check()
        require(
            self.placement == "pre",
            "a parallel layer needs placement='pre', since it has one norm before all branches",
            f"placement={self.placement!r}",
            "Leave it at 'pre'",
        )
        require(
            "norm" not in dict(self.named),
            "'norm' is the one norm of a parallel layer, and cannot name a branch",
            f"branches {[name for name, _ in self.named]}",
            "Rename the branch",
        )

    def costs(self, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
        """See `Layer`: there is one normed copy, and no branch waits for another."""
        *stages, kept = super().costs(dims, length, dtype)
        stages.append(dataclasses.replace(kept, saved=kept.saved.times(1 / len(self.branches))))
        return tuple(dataclasses.replace(cost, ends_layer=True) for cost in stages)

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """See `Layer`."""
        branches = Branches(self, params, call, own)
        normed_BLM = self.norm.apply(params["norm"], x_BLM)
        for name, part in self.named:
            x_BLM += branches.output(name, part, normed_BLM)
        return x_BLM, *branches.collected


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes numbers at random and scales up the rest; without a key, changes nothing."""
    if rate == 0 or key is None:
        return x
    # No part folds this number into its key.
    keep = jax.random.bernoulli(jax.random.fold_in(key, 2**31 - 1), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
