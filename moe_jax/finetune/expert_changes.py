"""How experts start from a dense feed-forward network; changes compose (legend: `moe_jax.moe`).

Every expert starts as a copy of the dense network: `wi`, `wg` [M, H], `wo` [H, M], biases `bi`,
`bg` [H] and `bo` [M]. Changes follow one another. Your own derives from `ExpertChange`
and is named by its import path.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.moe.part import MoE

HIDDEN_DIM = {"wi": -1, "wg": -1, "bi": -1, "bg": -1, "wo": -2}  # which dim of a weight is H
OUTWARD = ("wo", "bo")  # the weights that a factor on the output of an expert multiplies


class Copies(NamedTuple):
    """One weight of the experts of one layer.

    Attributes:
      name: "wi", "wg", "wo", "bi", "bg" or "bo".
      value: float32, with a leading E.
      moment: whether it contains optimizer moments in place of weights.
    """

    name: str
    value: jax.Array
    moment: bool = False

    def of_units(self, units_EH: jax.Array) -> jax.Array:
        """An array over hidden units in a shape that broadcasts with the value."""
        if self.value.ndim == 2:
            return units_EH
        return units_EH[:, :, None] if HIDDEN_DIM[self.name] == -2 else units_EH[:, None, :]


@dataclasses.dataclass(frozen=True)
class ExpertChange(Settings):
    """A change to experts that are copies of a dense network."""

    family: ClassVar[str] = "upcycling"

    def block(self, moe: MoE) -> MoE:
        """The settings of the block that the experts are for.

        Args:
          moe: the block before this change; its `expert_dim` is that of the incoming experts.

        Raises:
          ValueError: the change does not fit the block.
        """
        return moe

    def experts(self, copies: Copies, moe: MoE, key: jax.Array) -> jax.Array:
        """A weight of all experts of a layer, [E, ...]; a pure function.

        Args:
          copies: the weight after the earlier changes.
          moe: the block before this change.
          key: of the layer and the change, the same for every weight.
        """
        del moe, key
        return copies.value

    def shared(self, name: str, value: jax.Array) -> jax.Array:
        """A weight of the shared expert, from the dense network's weight after earlier changes."""
        del name
        return value

    def router(self, value: jax.Array, moe: MoE) -> jax.Array:
        """A parameter of the router whose last dim is the options, such as `weight` [M, E]."""
        del moe
        return value


@dataclasses.dataclass(frozen=True)
class Noise(ExpertChange):
    """Gaussian noise on some hidden units of each expert, drawn independently per expert.

    Source: Komatsuzaki et al. 2022, arXiv:2212.05055, App. B (noise does not help); half of the
      units and 0.02 are those of noise upcycling in Nakamura et al. 2025, arXiv:2502.19261.
    """

    stddev: float = setting(0.02, above=0)  # of the noise
    ratio: float = setting(0.5, above=0, at_most=1)  # share of hidden units with noise

    def experts(self, copies: Copies, moe: MoE, key: jax.Array) -> jax.Array:
        """See `ExpertChange`; moments and `bo`, which belongs to no hidden unit, stay the same."""
        if copies.moment or copies.name not in HIDDEN_DIM:
            return copies.value
        drawn_EH = drawn_units(key, self.ratio, moe)
        noise = self.stddev * jax.random.normal(key_of(key, copies.name), copies.value.shape)
        return copies.value + jnp.where(copies.of_units(drawn_EH), noise, 0)


@dataclasses.dataclass(frozen=True)
class Drop(ExpertChange):
    """Draws some hidden units of each expert anew, with the mean and deviation of their old values.

    The redrawn units of an expert are the same in all of its matrices. Each matrix uses its own
    statistics, over all weights of its redrawn units. Their optimizer moments start at 0.

    Source: Drop-Upcycling, Nakamura et al. 2025, arXiv:2502.19261, sec. 3, and `drop_upcycling.py`
      of Taishi-N324/Drop-Upcycling.
    """

    ratio: float = setting(0.5, above=0, at_most=1)  # share of hidden units to redraw

    def experts(self, copies: Copies, moe: MoE, key: jax.Array) -> jax.Array:
        """See `ExpertChange`; `bo`, which belongs to no hidden unit, stays the same."""
        if copies.name not in HIDDEN_DIM:
            return copies.value
        value, drawn = copies.value, copies.of_units(drawn_units(key, self.ratio, moe))
        if copies.moment:
            return jnp.where(drawn, 0, value)
        drawn = jnp.broadcast_to(drawn, value.shape)
        dims = tuple(range(1, value.ndim))
        mean = jnp.mean(value, axis=dims, where=drawn, keepdims=True)
        stddev = jnp.std(value, axis=dims, where=drawn, keepdims=True)
        anew = mean + stddev * jax.random.normal(key_of(key, copies.name), value.shape)
        return jnp.where(drawn, anew, value)


def drawn_units(key: jax.Array, ratio: float, moe: MoE) -> jax.Array:
    """The hidden units that each expert draws: bool [E, H], max(1, round(ratio H)) per row."""
    count = max(1, round(ratio * moe.expert_dim))
    rank_EH = jax.random.uniform(key, (moe.num_experts, moe.expert_dim))
    order_EH = jnp.argsort(jnp.argsort(rank_EH, axis=-1), axis=-1)
    return order_EH < count


def key_of(key: jax.Array, name: str) -> jax.Array:
    """The random key of one weight."""
    return jax.random.fold_in(key, 1 + sorted((*HIDDEN_DIM, *OUTWARD)).index(name))


@dataclasses.dataclass(frozen=True)
class Granular(ExpertChange):
    """Smaller experts: cuts each network into shards of its hidden units.

    Expert e gets shard e % G, so that G neighbours, a virtual group, are one whole network. Their
    router columns start equal, so that a token selects whole groups. The output of a shard is
    multiplied by G: the gates of K experts sum to 1, but only K / G of these have the same shard.

    Source: He et al. 2024, arXiv:2410.07524, "virtual group" initialization.
    """

    shards: int = setting(2, at_least=2)  # G; divides the hidden units, the experts and top-K

    def block(self, moe: MoE) -> MoE:
        """See `ExpertChange`."""
        require(
            moe.expert_dim % self.shards == 0 and moe.num_experts % self.shards == 0,
            "the shards of granular experts must divide their hidden units and their number",
            f"shards={self.shards}, hidden units {moe.expert_dim}, experts {moe.num_experts}",
            "Change --experts or the shards",
        )
        return dataclasses.replace(moe, expert_dim=moe.expert_dim // self.shards)

    def experts(self, copies: Copies, moe: MoE, key: jax.Array) -> jax.Array:
        """See `ExpertChange`."""
        if copies.name not in HIDDEN_DIM:
            return copies.value
        dim, size = HIDDEN_DIM[copies.name], moe.expert_dim // self.shards
        start_E = size * (jnp.arange(moe.num_experts) % self.shards)

        def shard(weight: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(weight, start, size, dim % weight.ndim)

        value = jax.vmap(shard)(copies.value, start_E)
        return value * self.shards if copies.name == "wo" and not copies.moment else value

    def router(self, value: jax.Array, moe: MoE) -> jax.Array:
        """See `ExpertChange`: all experts of a group have the values of its first expert."""
        first_E = jnp.arange(moe.num_experts) // self.shards * self.shards
        return value[..., first_E]


@dataclasses.dataclass(frozen=True)
class Shared(ExpertChange):
    """A shared expert that every token uses, in addition to the routed experts.

    It has the first `dim` hidden units of the dense network; routed experts are copies of the other
    units. With `dim=0` it is the whole network, and routed experts start with an output of 0:
    copies whose `wo` is 0. That preserves the network with any gates.

    Source: DeepSeekMoE, arXiv:2401.06066 (shared expert isolation).
    """

    dim: int = setting(0, at_least=0)  # hidden units of the shared expert; 0: all of the network's

    def block(self, moe: MoE) -> MoE:
        """See `ExpertChange`."""
        require(
            self.dim < moe.expert_dim and moe.shared_expert_dim == 0,
            "one shared expert must have some of the hidden units of the dense network, or all "
            "with dim=0",
            f"dim={self.dim}, hidden units {moe.expert_dim}, a shared expert of "
            f"{moe.shared_expert_dim} before",
            "Lower dim, and name 'shared' once, before 'granular'",
        )
        return dataclasses.replace(
            moe,
            shared_expert_dim=self.dim or moe.expert_dim,
            expert_dim=moe.expert_dim - self.dim,
        )

    def experts(self, copies: Copies, moe: MoE, key: jax.Array) -> jax.Array:
        """See `ExpertChange`."""
        value, dim = copies.value, HIDDEN_DIM.get(copies.name)
        if dim is None or (self.dim == 0 and copies.name == "wo"):
            return jnp.zeros_like(value)
        return jax.lax.slice_in_dim(value, self.dim, None, axis=dim % value.ndim)

    def shared(self, name: str, value: jax.Array) -> jax.Array:
        """See `ExpertChange`."""
        dim = HIDDEN_DIM.get(name)
        if dim is None or self.dim == 0:
            return value
        return jax.lax.slice_in_dim(value, 0, self.dim, axis=dim % value.ndim)
