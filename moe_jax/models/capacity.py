"""A model whose experts have room for every choice."""

import dataclasses

from moe_jax.models.model import LanguageModel
from moe_jax.moe.part import MoE
from moe_jax.part import Part


def without_capacity(model: LanguageModel) -> LanguageModel:
    """The model with dropless evaluation."""

    def unlimited(part: Part) -> Part:
        if not isinstance(part, MoE):  # a user's routing part may have no capacity
            return part
        return dataclasses.replace(
            part, capacity=dataclasses.replace(part.capacity, eval_factor=0.0)
        )

    return model.map_parts(unlimited)
