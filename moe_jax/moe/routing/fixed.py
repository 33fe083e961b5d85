"""Experts fixed beforehand: by hash, at random, in turn (legend: `moe_jax.moe`).

Nothing is learned, gates are 1 / K, the same table serves every layer. All are causal: a choice
depends on a token's id, the one before it, its place, and a key.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.moe.routing.selection import only
from moe_jax.moe.routing.token_choice import Replay, RouterInputs, Routing, top_k


def hash_routing(x_GSM: jax.Array, config: MoEConfig, inputs: RouterInputs) -> Routing:
    """The experts that a token's id, position or bigram stands for, whatever its content.

    Args:
      x_GSM: tokens; only their shape and number matter.
      config: the block's settings; `router.hash_by`: "token": K experts at random for each id;
        "position": for each position in the document; "bigram": for each pair of a token and the
        one before it; "modulo": id, id + 1, ... modulo E, which is balanced over the ids; "table":
        the same from the expert that `router.hash_table` gives, see `balanced_table`.
      inputs: `tokens_GS`, `previous_GS` or `positions_GS`.

    Returns:
      The `Routing`.

    Raises:
      ValueError: the block was not given the token ids.

    Source: Roller et al. 2021, Hash layers, arXiv:2106.04426.
    """
    router, num_experts = config.router, config.num_experts
    if router.hash_by == "position":
        return scored(hash_scores((inputs.positions_GS,), num_experts, router), config)
    if inputs.tokens_GS is None:
        raise ValueError(
            "router.kind='hash' needs the token ids: tokens_BL=None. Pass tokens_BL to the MoE "
            "block, or hash by 'position'."
        )
    if router.hash_by == "token":
        return scored(hash_scores((inputs.tokens_GS,), num_experts, router), config)
    if router.hash_by == "bigram":
        assert inputs.previous_GS is not None, "comes with tokens_GS"
        pair = (inputs.tokens_GS, inputs.previous_GS)
        return scored(hash_scores(pair, num_experts, router), config)
    first_GS = inputs.tokens_GS
    if router.hash_by == "table":
        first_GS = jnp.asarray(router.hash_table, jnp.int32)[inputs.tokens_GS]
    return in_turn(first_GS, config)


def random_routing(x_GSM: jax.Array, config: MoEConfig, inputs: RouterInputs) -> Routing:
    """K experts at random for every token anew; without a key, those of its place in the group."""
    shape = (*x_GSM.shape[:-1], config.num_experts)
    if inputs.rng is not None:
        return scored(jax.random.uniform(inputs.rng, shape), config)
    place_GS = jnp.broadcast_to(jnp.arange(shape[1]), shape[:2])
    return scored(hash_scores((place_GS,), config.num_experts, config.router), config)


def uniform_routing(x_GSM: jax.Array, config: MoEConfig, inputs: RouterInputs) -> Routing:
    """The experts in turn: token s takes s K, ..., s K + K - 1 modulo E. For benchmarks.

    Within a group no two experts differ by more than one in their load, whatever the tokens.
    """
    del inputs
    place_GS = jnp.broadcast_to(jnp.arange(x_GSM.shape[1]), x_GSM.shape[:2])
    return in_turn(place_GS * config.num_selected_experts, config)


def replayed_routing(replay: Replay, config: MoEConfig) -> Routing:
    """Experts fixed even before that, by a record."""
    routing = with_equal_gates(replay.expert_index_GSK, config)
    gate_GSK = only(replay.chosen_GSK, routing.gate_GSK, 0)
    return routing._replace(gate_GSK=gate_GSK, chosen_GSK=replay.chosen_GSK)


def scored(scores_GSE: jax.Array, config: MoEConfig) -> Routing:
    """The K experts of the largest scores."""
    return with_equal_gates(top_k(scores_GSE, config.num_selected_experts)[1], config)


def in_turn(first_GS: jax.Array, config: MoEConfig) -> Routing:
    """An expert, taken modulo E, and the K - 1 that follow it."""
    following_K = jnp.arange(config.num_selected_experts)
    return with_equal_gates((first_GS[..., None] + following_K) % config.num_experts, config)


def with_equal_gates(expert_index_GSK: jax.Array, config: MoEConfig) -> Routing:
    """Gates and probabilities 1 / K, logits 0."""
    dtype = jnp.dtype(config.router.dtype)
    share = 1 / config.num_selected_experts
    gate_GSK = jnp.full(expert_index_GSK.shape, share * config.router.scaling_factor, dtype)
    chosen_GSKE = jax.nn.one_hot(expert_index_GSK, config.num_experts, dtype=dtype)
    probs_GSE = share * jnp.sum(chosen_GSKE, axis=-2)
    expert_index_GSK = expert_index_GSK.astype(jnp.int32)
    return Routing(jnp.zeros_like(probs_GSE), probs_GSE, expert_index_GSK, gate_GSK)


def hash_scores(keys: Sequence[jax.Array], num_experts: int, config: RouterConfig) -> jax.Array:
    """A number for each key and expert that looks random: float32 [G, S, E] in [0, 1).

    The K largest are K different experts, each as likely as any other, without a table.

    Args:
      keys: integers [G, S]; all of them together are the key.
      num_experts: E.
      config: its `hash_seed`.
    """
    # Mixed before the keys: seed s at key k would else be seed 0 at key k ^ s, the same table.
    mixed = mix(jnp.uint32(config.hash_seed))
    for key_GS in keys:
        mixed = mix(mixed ^ key_GS.astype(jnp.uint32))
    mixed_GSE = mix(mixed[..., None] + jnp.arange(num_experts, dtype=jnp.uint32))
    return (mixed_GSE >> 8).astype(jnp.float32) / 2**24


def mix(values: jax.Array) -> jax.Array:
    """A bijection of uint32 that spreads every bit: the finalizer of MurmurHash3, shifted by one.

    Without the shift 0 would stay 0.
    """
    values = values * jnp.uint32(0x9E3779B1) + jnp.uint32(0x7F4A7C15)
    values = (values ^ (values >> 16)) * jnp.uint32(0x85EBCA6B)
    values = (values ^ (values >> 13)) * jnp.uint32(0xC2B2AE35)
    return values ^ (values >> 16)


def balanced_table(counts_V: Sequence[int], num_experts: int) -> tuple[int, ...]:
    """A `router.hash_table` under which experts get nearly the same number of tokens.

    Args:
      counts_V: how often each token id occurs, >= 0.
      num_experts: E.

    Returns:
      The expert of every id: the most frequent id first, always to the expert with the least load.

    Source: Roller et al. 2021, arXiv:2106.04426 (balanced assignment).
    """
    counts = np.asarray(counts_V)
    loads, table = np.zeros(num_experts, np.int64), np.zeros(len(counts), np.int64)
    for token in np.argsort(-counts, kind="stable"):
        table[token] = np.argmin(loads)
        # An id that never occurred counts a little, so that these are spread too.
        loads[table[token]] += len(counts) * counts[token] + 1
    return tuple(table.tolist())
