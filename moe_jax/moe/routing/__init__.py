"""Routers: which experts take which token."""

from moe_jax.moe.routing.token_choice import Routing, route, single_expert

__all__ = ["Routing", "route", "single_expert"]
