"""Which dims of the model's parameters are split over the mesh."""

from typing import Any

import jax

from moe_jax.config import ModelConfig
from moe_jax.layers.attention import attention_specs
from moe_jax.layers.feed_forward import feed_forward_specs
from moe_jax.models.decoder import embedding_specs
from moe_jax.moe.parameters import ParameterSpec, moe_specs


def parameter_axes(path: tuple[str, ...], config: ModelConfig) -> tuple[str | None, ...]:
    """The names, in `parallel.rules`, of the dims of a parameter.

    Args:
      path: its place in the parameters of `Decoder`, such as
        ("repeated", "layer_0", "moe", "wi").
      config: of the model.
    """
    specs = _specs_of_module(path[-2] if len(path) > 1 else "", config)
    axes: tuple[str | None, ...] = specs[path[-1]].axes if specs else (None,)
    # Scanned layers are stacked in a leading dim.
    return (None, *axes) if "repeated" in path else axes


def _specs_of_module(name: str, config: ModelConfig) -> dict[str, ParameterSpec]:
    """What a module declares of its parameters; nothing for norms, which are never split."""
    if name == "moe":
        return moe_specs(config.moe, config.model_dim)
    if name == "attention":
        return attention_specs(config)
    if name == "ffn":
        return feed_forward_specs(config)
    return {} if name else embedding_specs(config)


def key_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The dict keys along a path of `jax.tree_util`; what is not in a dict is left out."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
