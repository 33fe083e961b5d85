"""Transformer layers besides MoE: attention, rotary positions, norms, the dense FFN.

Shapes follow the legend of `moe_jax.moe`.
"""
