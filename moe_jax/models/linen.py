"""Linen shells, which own parameters and call the pure functions of parts."""

from typing import Any

import flax.linen as nn
import jax

from moe_jax.models.model import LanguageModel
from moe_jax.models.output import ModelOutput
from moe_jax.moe.block import moe_block
from moe_jax.moe.part import MoE
from moe_jax.parameters import init_parameters
from moe_jax.part import Aux, Call, Dims, Own


class LinenModel(nn.Module):
    """A `LanguageModel` as a Linen module.

    `init(key, call)` draws the parameters. `apply(variables, call)` calls `LanguageModel.run`.
    """

    model: LanguageModel

    @nn.compact
    def __call__(self, call: Call, **trees: Any) -> ModelOutput:
        """See `LanguageModel.run`."""
        return self.model.run(parameters(self, self.model.specs()), call, **trees)


class LinenMoE(nn.Module):
    """An MoE block as a Linen module.

    `init(key, x_BLM)` draws the parameters. `apply(variables, x_BLM, call)` calls `moe_block`.
    """

    moe: MoE

    @nn.compact
    def __call__(
        self, x_BLM: jax.Array, call: Call | None = None, own: Own | None = None
    ) -> tuple[jax.Array, Aux]:
        """See `moe_block`."""
        params = parameters(self, self.moe.specs(Dims(x_BLM.shape[-1])))
        return moe_block(params, x_BLM, self.moe, call, own)


def parameters(module: nn.Module, specs: Any) -> dict[str, Any]:
    """The module's parameters, in the tree of the specs; each subtree is one Linen parameter."""
    return {
        name: module.param(name, lambda key, own=own: init_parameters(key, own))
        for name, own in specs.items()
    }
