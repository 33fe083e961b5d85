"""Balanced assignment by auction: no expert gets more than its share of the tokens.

Tokens bid for places with experts. Legend: `moe_jax.moe`.
"""

import jax
import jax.numpy as jnp

# The step of the bids, as a part of the spread of the affinities: coarse steps find prices that are
# nearly right in few rounds, the last one sets how good the assignment is.
STEPS = (0.25, 0.04, 0.006, 0.001)
# Of a step; normal affinities need some tens, equal ones of 64 experts some hundreds.
MAX_ROUNDS = 2000


def balanced_assignment(affinity_SE: jax.Array, valid_S: jax.Array) -> jax.Array:
    """Gives every token an expert, none more than ceil(tokens / E), by the most affinity in all.

    The auction of Bertsekas with scaled steps, for persons (tokens) and objects of which many are
    alike (the places of an expert): a token without a place bids for the expert it gets most from,
    affinity less price, so much that it would be indifferent to the second best, and a step more.
    An expert keeps the best bids, and the last that it keeps is its price.

    Args:
      affinity_SE: float32; where it is not finite, 0 is taken.
      valid_S: bool, False for padding, which takes no place.

    Returns:
      int32 [S] in [0, E), 0 for padding. The sum of affinities is within tokens * spread / 1000 of
      the largest possible, where the spread is the largest difference in a row, unless
      `MAX_ROUNDS` was not enough; the loads are balanced all the same.

    Source: Bertsekas and Castanon 1989, The auction algorithm for the transportation problem. In
      BASE layers' own (fairseq's balanced_assignment.cpp) experts bid, by a fiftieth of the spread.
    """
    tokens, num_experts = affinity_SE.shape
    num_valid = jnp.sum(valid_S)
    places = -(-num_valid // num_experts)
    # What a row has in common decides nothing.
    affinity_SE = jnp.nan_to_num(affinity_SE, nan=0.0, posinf=0.0, neginf=0.0)
    affinity_SE -= jnp.max(affinity_SE, axis=-1, keepdims=True)
    affinity_SE = jnp.where(valid_S[:, None], affinity_SE, 0)
    spread = jnp.max(-affinity_SE)
    spread = jnp.where(spread > 0, spread, 1)
    # Bidders that like all experts take the places left over: with every place taken, prices may
    # start from those of the coarser step.
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
    """One auction, in rounds in which every token without a place bids.

    Args:
      affinity_SE: what a token gets from an expert, finite.
      bidding_S: bool, who takes part.
      places: int32 scalar, of each expert.
      price_E: prices at first.
      step: > 0, how much more than needed a bid is.

    Returns:
      int32 [S], the expert of every token, E for none, and the prices [E].
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

        # By expert, best bid first; those without an expert are last.
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
    """Gives free places to tokens left over by an auction cut short; 0 for padding."""
    free_E = places - jnp.bincount(expert_S, length=num_experts)
    waits_S = bidding_S & (expert_S == num_experts)
    number_S = jnp.cumsum(waits_S)
    filled_S = jnp.searchsorted(jnp.cumsum(free_E), number_S)
    return jnp.where(bidding_S, jnp.where(waits_S, filled_S, expert_S), 0).astype(jnp.int32)
