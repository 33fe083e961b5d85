"""Weights made of several arrays: quantised and low-rank ones (see `moe_jax.parameters`)."""
