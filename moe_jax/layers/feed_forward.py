"""The dense feed-forward layer: one expert network for every token (legend: `moe_jax.moe`)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.settings import setting
from moe_jax.costs import Cost, ffn_cost
from moe_jax.moe.activations import Activation, Relu
from moe_jax.moe.experts import FeedForward
from moe_jax.parameters import SAME_WEIGHTS, ffn_specs
from moe_jax.part import Call, Dims, Output, Own, Part


@dataclasses.dataclass(frozen=True)
class Mlp(Part):
    """An MLP or a GLU."""

    pointwise: ClassVar[bool] = True

    dim: int = setting(512, at_least=1)  # H: hidden units
    activation: Activation = Relu()  # "relu", "gelu": two matrices; "swiglu", "geglu": three
    use_bias: bool = False  # biases in both matrices
    init_scale: float = setting(1.0, above=0)  # variance of weights x fan-in

    def specs(self, dims: Dims) -> dict[str, Any]:
        """`wi`, `wo`, `wg` if gated, and any biases; see `ffn_specs`."""
        return dict(
            ffn_specs(
                dims.model_dim, self.dim, "dense_ffn", gated=self.activation.gated,
                use_bias=self.use_bias, init_scale=self.init_scale,
            )
        )  # fmt: skip

    def looks_ahead(self, training: bool) -> bool:
        """See `Part`."""
        return False

    def costs(self, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
        """See `Part`: a trace would not split hidden units over `tensor`."""
        size = jnp.dtype(dtype).itemsize
        return (ffn_cost(dims.model_dim, self.dim, gated=self.activation.gated, itemsize=size),)

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """See `Part`."""
        return FeedForward(self.activation)(x_BLM, params, SAME_WEIGHTS), None, None
