"""Queues: the order in which choices get the slots of their experts (legend: `moe_jax.moe`)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.settings import Settings
from moe_jax.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class Queue(Settings):
    """The order in which the choices of a group get slots; it decides which are dropped."""

    family: ClassVar[str] = "queue"
    needs_rng: ClassVar[bool] = False

    def looks_ahead(self, *, num_choices: int) -> bool:
        """Whether a token's slots can depend on later tokens of its group, with K choices."""
        del num_choices
        return True

    def slots(
        self, routing: Routing, expert_index_GSK: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        """The slot of each choice in its expert if there were room for all: int32 [G, S, K].

        Args:
          routing: its probabilities and gates may rank tokens.
          expert_index_GSK: int32; index E (padding or not chosen) joins no queue.
          rng: key for a random order.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TokenMajor(Queue):
    """Token by token; within a token, the best choice first (MaxText)."""

    def looks_ahead(self, *, num_choices: int) -> bool:
        """See `Queue`."""
        return False

    def slots(
        self, routing: Routing, expert_index_GSK: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        """See `Queue`. Counts whole tokens, since the choices of a token are different experts."""
        num_experts = routing.probs_GSE.shape[-1]
        mask_GSE = jnp.sum(jax.nn.one_hot(expert_index_GSK, num_experts, dtype=jnp.int32), axis=2)
        before_GSE = jnp.cumsum(mask_GSE, axis=1) - mask_GSE
        index_GSK = jnp.minimum(expert_index_GSK, num_experts - 1)
        return jnp.take_along_axis(before_GSE, index_GSK, axis=-1)


@dataclasses.dataclass(frozen=True)
class OrderedQueue(Queue):
    """A queue that defines the order in which the choices of a group are served."""

    def order(
        self, routing: Routing, expert_index_GSK: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        """The choices (token * K + k) of each group in service order, int32 [G or 1, A]."""
        raise NotImplementedError

    def slots(
        self, routing: Routing, expert_index_GSK: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        """See `Queue`."""
        groups, num_experts = expert_index_GSK.shape[0], routing.probs_GSE.shape[-1]
        expert_GA = expert_index_GSK.reshape(groups, -1)
        order_GA = self.order(routing, expert_index_GSK, rng)
        order_GA = jnp.broadcast_to(order_GA, expert_GA.shape)
        queue_GA = jnp.take_along_axis(expert_GA, order_GA, axis=-1)
        mask_GAE = jax.nn.one_hot(queue_GA, num_experts, dtype=jnp.int32)
        before_GA = jnp.sum((jnp.cumsum(mask_GAE, axis=1) - mask_GAE) * mask_GAE, axis=-1)
        slot_GA = jnp.put_along_axis(
            jnp.zeros_like(expert_GA), order_GA, before_GA, axis=-1, inplace=False
        )
        return slot_GA.reshape(expert_index_GSK.shape)


@dataclasses.dataclass(frozen=True)
class ChoiceMajor(OrderedQueue):
    """All first choices, then all second choices, and so on (GShard, Switch, V-MoE).

    With K > 1 the first choice of a later token can displace the second choice of an earlier token.
    """

    def looks_ahead(self, *, num_choices: int) -> bool:
        """See `Queue`."""
        return num_choices > 1

    def order(
        self, routing: Routing, expert_index_GSK: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        """See `OrderedQueue`."""
        _, tokens, choices = expert_index_GSK.shape
        return jnp.arange(tokens * choices).reshape(tokens, choices).T.reshape(1, -1)


@dataclasses.dataclass(frozen=True)
class BatchPrioritized(OrderedQueue):
    """Choice-major; tokens by descending top probability among the experts that compute.

    Source: Riquelme et al. 2021, arXiv:2106.05974, sec. 4.1.
    """

    def order(
        self, routing: Routing, expert_index_GSK: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        """See `OrderedQueue`."""
        groups, tokens, choices = expert_index_GSK.shape
        by_worth_GS = jnp.argsort(-jnp.max(routing.probs_GSE, axis=-1), axis=-1, stable=True)
        order_GSK = jnp.arange(tokens * choices).reshape(tokens, choices)[by_worth_GS]
        return order_GSK.swapaxes(1, 2).reshape(groups, -1)


@dataclasses.dataclass(frozen=True)
class ByProbability(OrderedQueue):
    """By descending gate (Megatron "probs")."""

    def order(
        self, routing: Routing, expert_index_GSK: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        """See `OrderedQueue`."""
        gate_GA = routing.gate_GSK.reshape(expert_index_GSK.shape[0], -1)
        return jnp.argsort(-gate_GA, axis=-1, stable=True)


@dataclasses.dataclass(frozen=True)
class RandomOrder(OrderedQueue):
    """In random order (DeepSpeed's random token selection)."""

    needs_rng: ClassVar[bool] = True

    def order(
        self, routing: Routing, expert_index_GSK: jax.Array, rng: jax.Array | None
    ) -> jax.Array:
        """See `OrderedQueue`.

        Raises:
          ValueError: there is no random key.
        """
        if rng is None:
            raise ValueError(
                "queue='random' needs a random key: rng=None. Pass rng in the block's Call."
            )
        groups, tokens, choices = expert_index_GSK.shape
        return jnp.argsort(jax.random.uniform(rng, (groups, tokens * choices)), axis=-1)
