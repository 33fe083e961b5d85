"""Experts fixed in advance: by hash, at random, or in turn (legend: `moe_jax.moe`).

Nothing is learned, gates are scaling_factor / K, and all layers use the same table. All routers
here are causal: a choice depends on a token's id, the previous id, its position, and a random key.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.moe.routing import Options, Router, RouterInputs, Routing, routing_of, top_k
from moe_jax.part import Dims

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE

HASH_BY = ("token", "modulo", "table", "position", "bigram")


@dataclasses.dataclass(frozen=True)
class FixedRouter(Router):
    """A router that learns nothing; a subclass chooses the experts."""

    replays: ClassVar[bool] = True

    def looks_ahead(self, training: bool) -> bool:
        """See `Router`."""
        return False

    def expert_index(self, x_GSM: jax.Array, inputs: RouterInputs) -> jax.Array:
        """The chosen experts, integers [G, S, K]."""
        raise NotImplementedError

    def route(self, params: Any, x_GSM: jax.Array, inputs: RouterInputs) -> Routing:
        """Gates scaling_factor / K, probabilities 1 / K, logits 0; see `Router`."""
        options, replay = inputs.options, inputs.replay
        index_GSK = self.expert_index(x_GSM, inputs) if replay is None else replay.expert_index
        gate = self.scaling_factor / options.num_selected
        gate_GSK = jnp.full(index_GSK.shape, gate, self.dtype)
        routing = routing_of(index_GSK, options.num_options, gate_GSK)
        if replay is None:
            return routing
        gate_GSK = jnp.where(replay.chosen, gate_GSK, 0)
        return routing._replace(gate_GSK=gate_GSK, chosen_GSK=replay.chosen)


@dataclasses.dataclass(frozen=True)
class Hash(FixedRouter):
    """Experts by a hash of a token's id, position or bigram.

    Source: Roller et al. 2021, Hash layers, arXiv:2106.04426.
    """

    by: str = setting(
        "token", choices=HASH_BY
    )  # id at random, id modulo E, table, position, bigram
    seed: int = setting(0, at_least=0, below=2**32)  # each seed gives another random table
    table: tuple[int, ...] = setting(
        (), at_least=0
    )  # for by="table": the first expert of every id, see `balanced_table`

    def check(self) -> None:
        """See `Settings`."""
        require(
            (self.by == "table") == bool(self.table),
            "table and by='table' must be set together",
            f"by={self.by!r}, {len(self.table)} entries",
            "Set both or none",
        )
        require(
            self.seed == 0 or self.by not in ("modulo", "table"),
            "seed has no effect with by='modulo' or by='table'",
            f"seed={self.seed}, by={self.by!r}",
            "Drop it",
        )

    def check_block(self, moe: "MoE") -> None:
        """See `Router`."""
        super().check_block(moe)
        require(
            all(0 <= expert < moe.num_experts for expert in self.table),
            "router.table must hold experts in 0..num_experts - 1",
            f"num_experts={moe.num_experts}, table={self.table}",
            "Correct it",
        )

    def specs(self, dims: Dims, options: Options) -> dict[str, Any]:
        """No parameters; refuses a table that does not fit the vocabulary."""
        require(
            not self.table or not dims.vocab_size or len(self.table) == dims.vocab_size,
            "router.table must have one expert per token id",
            f"{len(self.table)} entries, vocab_size={dims.vocab_size}",
            "Make a new one, for example by moe.routing.fixed.balanced_table",
        )
        return {}

    def expert_index(self, x_GSM: jax.Array, inputs: RouterInputs) -> jax.Array:
        """See `FixedRouter`.

        Raises:
          ValueError: the block was not given the token ids.
        """
        if self.by == "position":
            return best_hashed((inputs.positions_GS,), inputs.options, self.seed)
        if inputs.tokens_GS is None:
            raise ValueError(
                "router='hash' needs the token ids: tokens_BL=None. Pass tokens_BL in the block's "
                "Call, or hash by 'position'."
            )
        if self.by == "token":
            return best_hashed((inputs.tokens_GS,), inputs.options, self.seed)
        if self.by == "bigram":
            assert inputs.previous_GS is not None, "comes with tokens_GS"
            return best_hashed((inputs.tokens_GS, inputs.previous_GS), inputs.options, self.seed)
        first_GS = inputs.tokens_GS
        if self.by == "table":
            first_GS = jnp.asarray(self.table, jnp.int32)[inputs.tokens_GS]
        return in_turn(first_GS, inputs.options)


@dataclasses.dataclass(frozen=True)
class Random(FixedRouter):
    """K random experts per token and call; without a random key, by a hash of its position."""

    seed: int = setting(0, at_least=0, below=2**32)  # in evaluation

    def expert_index(self, x_GSM: jax.Array, inputs: RouterInputs) -> jax.Array:
        """See `FixedRouter`."""
        shape = (*x_GSM.shape[:-1], inputs.options.num_experts)
        if inputs.rng is not None:
            scores_GSE = jax.random.uniform(inputs.rng, shape)
            return top_k(scores_GSE, inputs.options.num_selected)[1]
        return best_hashed((inputs.positions_GS,), inputs.options, self.seed)


@dataclasses.dataclass(frozen=True)
class Uniform(FixedRouter):
    """Experts in turn: position s uses experts s K, ..., s K + K - 1 modulo E. For benchmarks.

    Within a document, the loads of any two experts differ by at most one, whatever the tokens.
    """

    def expert_index(self, x_GSM: jax.Array, inputs: RouterInputs) -> jax.Array:
        """See `FixedRouter`."""
        return in_turn(inputs.positions_GS * inputs.options.num_selected, inputs.options)


def in_turn(first_GS: jax.Array, options: Options) -> jax.Array:
    """`first_GS` and the K - 1 experts that follow it, modulo E."""
    following_K = jnp.arange(options.num_selected)
    return (first_GS[..., None] + following_K) % options.num_experts


def best_hashed(keys: Sequence[jax.Array], options: Options, seed: int) -> jax.Array:
    """K distinct experts per key, all equally likely."""
    return top_k(hash_scores(keys, options.num_experts, seed), options.num_selected)[1]


def hash_scores(keys: Sequence[jax.Array], num_experts: int, seed: int) -> jax.Array:
    """A pseudo-random number for each key and expert: float32 [G, S, E] in [0, 1).

    The K largest give K distinct, equally likely experts, without a table.

    Args:
      keys: integers [G, S], one array per part of the key.
      num_experts: E.
      seed: each seed gives other numbers.
    """
    # Mixed before the keys: otherwise seed s at key k would equal seed 0 at key k ^ s.
    mixed = mix(jnp.uint32(seed))
    for key_GS in keys:
        mixed = mix(mixed ^ key_GS.astype(jnp.uint32))
    mixed_GSE = mix(mixed[..., None] + jnp.arange(num_experts, dtype=jnp.uint32))
    return (mixed_GSE >> 8).astype(jnp.float32) / 2**24


def mix(values: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit: the MurmurHash3 finalizer of an affine map.

    Without the added constant, 0 would stay 0.
    """
    values = values * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15)
    values = (values ^ (values >> 16)) * jnp.uint32(0x85EBCA6B)
    values = (values ^ (values >> 13)) * jnp.uint32(0xC2B2AE35)
    return values ^ (values >> 16)


def balanced_table(counts_V: Sequence[int], num_experts: int) -> tuple[int, ...]:
    """A `router.table` that gives experts nearly the same number of tokens.

    Args:
      counts_V: how often each token id occurs, >= 0.
      num_experts: E.

    Returns:
      The expert of every id. The most frequent id comes first, and each goes to the least loaded
      expert.

    Source: Roller et al. 2021, arXiv:2106.04426 (balanced assignment).
    """
    counts = np.asarray(counts_V)
    loads, table = np.zeros(num_experts, np.int64), np.zeros(len(counts), np.int64)
    for token in np.argsort(-counts, kind="stable"):
        table[token] = np.argmin(loads)
        # An id that never occurred counts a little, so that such ids are spread too.
        loads[table[token]] += len(counts) * counts[token] + 1
    return tuple(table.tolist())
