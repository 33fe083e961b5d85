"""The rest of a Transformer: attention, rotary positions, norms, the dense FFN.

Shapes follow the legend of `moe_jax.moe`.
"""
