"""Balanced assignment by auction: no expert gets more than its share of the tokens.

Tokens bid for places with experts. Legend: `moe_jax.moe`.
"""

import jax
import jax.numpy as jnp

# Steps of the bids, as fractions of the spread of affinities. Coarse steps find nearly right prices
# in few rounds; the last step sets the quality of the assignment.
STEPS = (0.25, 0.04, 0.006, 0.001)
# Per step. Normal affinities need tens of rounds, equal affinities of 64 experts hundreds.
MAX_ROUNDS = 2000


def balanced_assignment(affinity_SE: jax.Array, valid_S: jax.Array) -> jax.Array:
    """Maximises total affinity: one expert per token, at most ceil(tokens / E) tokens per expert.

    This is Bertsekas's auction with scaled steps. Persons are tokens; the places of an expert are
    identical objects. A token without a place bids for the expert with the largest affinity minus
    price. It bids until it would be indifferent to the second best, plus a step. An expert keeps
    its best bids. When it is full, its price is the lowest bid kept.

    Args:
      affinity_SE: float32; non-finite values count as 0.
      valid_S: bool, False for padding, which takes no place.

    Returns:
      int32 [S] in [0, E), 0 for padding. The sum of affinities is within tokens * spread / 1000 of
      the maximum, where the spread is the largest difference in a row. If `MAX_ROUNDS` is not
      enough, it may be lower, but loads are still balanced.

    Source: Bertsekas and Castanon 1989, The auction algorithm for the transportation problem. In
      the original BASE layers (fairseq's balanced_assignment.cpp) experts bid, with a step of a
      fiftieth of the spread.
    """
    tokens, num_experts = affinity_SE.shape
    num_valid = jnp.sum(valid_S)
    places = -(-num_valid // num_experts)
    # Adding a constant to a row does not change the assignment.
    affinity_SE = jnp.nan_to_num(affinity_SE, nan=0.0, posinf=0.0, neginf=0.0)
    affinity_SE -= jnp.max(affinity_SE, axis=-1, keepdims=True)
    affinity_SE = jnp.where(valid_S[:, None], affinity_SE, 0)
    spread = jnp.max(-affinity_SE)
    spread = jnp.where(spread > 0, spread, 1)
    # Spare bidders, indifferent between experts, take the leftover places. With every place taken,
    # prices may start from those of the coarser step.
    affinity_SE = jnp.pad(affinity_SE, ((0, num_experts - 1), (0, 0)))
    is_spare_S = jnp.arange(num_experts - 1) < places * num_experts - num_valid
    bidding_S = jnp.concatenate([valid_S, is_spare_S])

    price_E = jnp.zeros(num_experts, affinity_SE.dtype)
    expert_S = jnp.full(len(bidding_S), num_experts)
    for step in STEPS:
        expert_S, price_E = auction(affinity_SE, bidding_S, places, price_E, step * spread)
    return fill_places(expert_S, bidding_S, places, num_experts)[:tokens]


def auction(
    affinity_SE: jax.Array,
    bidding_S: jax.Array,
    places: jax.Array,
    price_E: jax.Array,
    step: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One auction: in each round every token without a place bids.

    Args:
      affinity_SE: value of an expert to a token, finite.
      bidding_S: bool, which tokens take part.
      places: int32 scalar, places per expert.
      price_E: initial prices.
      step: > 0, by how much a bid exceeds indifference.

    Returns:
      int32 [S], the expert of every token (E: none), and the prices [E].
    """
    num_bidders, num_experts = affinity_SE.shape
    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def someone_bids(state: State) -> jax.Array:
        expert_S, _, _, rounds = state
        return jnp.any(bidding_S & (expert_S == num_experts)) & (rounds < MAX_ROUNDS)

    def bid(state: State) -> State:
        expert_S, bid_S, price_E, rounds = state
        value_SE = affinity_SE - price_E
        value_S2, best_S2 = jax.lax.top_k(value_SE, 2)
        bids_S = bidding_S & (expert_S == num_experts)
        expert_S = jnp.where(bids_S, best_S2[:, 0], expert_S)
        offer_S = price_E[best_S2[:, 0]] + value_S2[:, 0] - value_S2[:, 1] + step
        bid_S = jnp.where(bids_S, offer_S, bid_S)

        # By expert, best bid first; tokens without an expert come last.
        order_S = jnp.lexsort((-bid_S, expert_S))
        count_E = jnp.bincount(expert_S, length=num_experts)
        start_E = jnp.cumsum(count_E) - count_E
        last_E = jnp.minimum(start_E + places, num_bidders) - 1
        price_E = jnp.where(count_E >= places, bid_S[order_S][last_E], price_E)
        rank_S = jnp.arange(num_bidders) - jnp.append(start_E, 0)[expert_S[order_S]]
        keeps_S = jnp.zeros_like(bidding_S).at[order_S].set(rank_S < places)
        return jnp.where(keeps_S, expert_S, num_experts), bid_S, price_E, rounds + 1

    nobody_S = jnp.full(num_bidders, num_experts)
    state = (nobody_S, jnp.zeros(num_bidders, affinity_SE.dtype), price_E, jnp.zeros((), jnp.int32))
    expert_S, _, price_E, _ = jax.lax.while_loop(someone_bids, bid, state)
    return expert_S, price_E


def fill_places(
    expert_S: jax.Array, bidding_S: jax.Array, places: jax.Array, num_experts: int
) -> jax.Array:
    """Gives free places to the tokens that a truncated auction left over; 0 for padding."""
    free_E = places - jnp.bincount(expert_S, length=num_experts)
    waits_S = bidding_S & (expert_S == num_experts)
    number_S = jnp.cumsum(waits_S)
    filled_S = jnp.searchsorted(jnp.cumsum(free_E), number_S)
    return jnp.where(bidding_S, jnp.where(waits_S, filled_S, expert_S), 0).astype(jnp.int32)
