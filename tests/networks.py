"""Experts of any function, for tests of how rows get there and back."""

import dataclasses
from collections.abc import Callable

from moe_jax.moe.activations import Activation, Relu
from moe_jax.moe.experts import Experts, gated


@dataclasses.dataclass(frozen=True)
class Network(Experts):
    """`compute(rows, weights, layout)` gives the outputs of rows."""

    activation: Activation = Relu()
    compute: Callable | None = None

    def __call__(self, x, weights, layout, gate=None):
        return gated(self.compute(x, weights, layout), gate)
