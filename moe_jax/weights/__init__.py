"""Weights of several arrays: quantised ones (see `moe_jax.parameters`)."""
