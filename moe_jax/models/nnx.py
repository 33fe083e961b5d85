"""NNX shells, which own `nnx.Param`s and call the pure functions of parts."""

from typing import Any

import jax
from flax import nnx

from moe_jax.models.model import LanguageModel
from moe_jax.models.output import ModelOutput
from moe_jax.moe.block import moe_block
from moe_jax.moe.part import MoE
from moe_jax.parameters import init_parameters
from moe_jax.part import Aux, Call, Dims, Own


class NNXModel(nnx.Module):
    """A `LanguageModel` as an NNX module.

    `NNXModel(model, rngs=nnx.Rngs(0))` draws the parameters. A call runs `LanguageModel.run`.
    """

    def __init__(self, model: LanguageModel, *, rngs: nnx.Rngs):
        self.model = model
        self.params = parameters(model.specs(), rngs)

    def __call__(self, call: Call, **trees: Any) -> ModelOutput:
        """See `LanguageModel.run`."""
        return self.model.run(values(self.params), call, **trees)


class NNXMoE(nnx.Module):
    """An MoE block as an NNX module.

    `NNXMoE(moe, model_dim, rngs=nnx.Rngs(0))` draws the parameters. A call runs `moe_block`.
    """

    def __init__(self, moe: MoE, model_dim: int, *, rngs: nnx.Rngs):
        self.moe = moe
        self.params = parameters(moe.specs(Dims(model_dim)), rngs)

    def __call__(
        self, x_BLM: jax.Array, call: Call | None = None, own: Own | None = None
    ) -> tuple[jax.Array, Aux]:
        """See `moe_block`."""
        return moe_block(values(self.params), x_BLM, self.moe, call, own)


def parameters(specs: Any, rngs: nnx.Rngs) -> Any:
    """A tree of `nnx.Param`s, drawn by the specs."""
    return nnx.data(jax.tree.map(nnx.Param, init_parameters(rngs.params(), specs)))


def values(params: Any) -> Any:
    """The arrays of a tree of variables."""
    return jax.tree.map(
        lambda variable: variable[...], params, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
