"""A model as one Flax module from token ids to logits: `moe_jax.build(config)`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from moe_jax.config import ExperimentConfig, from_config_dict
from moe_jax.config.check import require
from moe_jax.models.linen import parameters
from moe_jax.models.model import LanguageModel
from moe_jax.moe.routing import Choices
from moe_jax.part import Call, EncoderInputs

STATE = "state"  # in the parameters: arrays that parts update outside the optimizer


class Recorded(NamedTuple):
    """What a model computed on its way to the logits.

    Attributes:
      residual_XBLM: the residual stream after every layer, before the final norm.
      encoder_residual_XBTM: the encoder's residual stream, before its norm; None without one.
      router_logits: by part, [X, B, L, E]; X counts the layers of the part.
      choices: by part, [X, B, L, K].
    """

    residual_XBLM: jax.Array | None
    encoder_residual_XBTM: jax.Array | None
    router_logits: dict[str, jax.Array]
    choices: dict[str, Choices]


class Network(nn.Module):
    """A language model on token ids.

    `init(key, tokens)` draws the parameters. `apply({"params": params}, tokens)` is a deterministic
    evaluation. Each part uses its own evaluation capacity (`capacity.eval_factor`; 0 is dropless,
    as in models read from files). Selection biases and other state of parts are under "state" in
    the parameters.

    >>> import jax, jax.numpy as jnp, moe_jax
    >>> network = moe_jax.build(moe_jax.ExperimentConfig())
    >>> tokens_BL = jnp.zeros((1, 8), jnp.int32)
    >>> variables = network.init(jax.random.key(0), tokens_BL)
    >>> network.apply(variables, tokens_BL).shape
    (1, 8, 384)
    """

    model: LanguageModel

    @nn.compact
    def __call__(
        self,
        tokens_BL: jax.Array,
        *,
        mask_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        encoder_tokens_BT: jax.Array | None = None,
        encoder_mask_BT: jax.Array | None = None,
        record: bool = False,
    ) -> Any:
        """Predicts the next token at every position.

        Args:
          tokens_BL: int token ids.
          mask_BL: bool or 0 and 1, whether a token is not padding; None: no padding. Padding may be
            on the left or on the right. Its logits are meaningless.
          positions_BL: int, position of each token in its document; None: counted from 0 in each
            document, without padding.
          segments_BL: int, document of each token, 0 for padding; replaces `mask_BL`.
          encoder_tokens_BT: int token ids for the encoder, in addition to the decoder's.
          encoder_mask_BT: like `mask_BL`, for these tokens.
          record: whether to also return a `Recorded`.

        Returns:
          logits_BLV, float32; with `record`, also a `Recorded`.
        """
        params = parameters(self, self.model.specs())
        state_specs = self.model.state_specs()
        state = parameters(self, {STATE: state_specs})[STATE] if state_specs else None
        call = call_of(tokens_BL, mask_BL, positions_BL, segments_BL, record)
        if encoder_tokens_BT is not None:
            require(
                self.model.has_encoder,
                "encoder_tokens_BT need a model with an encoder",
                "this model has only a decoder",
                "Leave them out",
            )
            text = call_of(encoder_tokens_BT, encoder_mask_BT, None, None, record)
            assert text.tokens_BL is not None
            encoder = EncoderInputs(text.tokens_BL, text.positions_BL, text.segments_BL)
            contiguous = call.contiguous and text.positions_BL is None
            call = dataclasses.replace(call, encoder=encoder, contiguous=contiguous)
        output = self.model.run(params, call, state=state)
        if not record:
            return output.logits_BLV
        routed = {name: own for name, own in output.aux.items() if own.choices is not None}
        return output.logits_BLV, Recorded(
            residual_XBLM=output.residual_XBLM,
            encoder_residual_XBTM=output.encoder_residual_XBTM,
            router_logits={name: own.logits_BLE for name, own in routed.items()},
            choices={name: own.choices for name, own in routed.items()},
        )


def call_of(
    tokens_BL: jax.Array,
    mask_BL: jax.Array | None,
    positions_BL: jax.Array | None,
    segments_BL: jax.Array | None,
    record: bool,
) -> Call:
    """The call of a `Network`; arguments are those of its `__call__`."""
    if mask_BL is not None:
        if segments_BL is not None:
            raise ValueError("mask_BL and segments_BL both say what is padding: pass one of them.")
        segments_BL = jnp.asarray(mask_BL).astype(jnp.int32)
        if positions_BL is None:
            positions_BL = jnp.maximum(jnp.cumsum(segments_BL, axis=-1) - 1, 0)
    contiguous = segments_BL is not None and positions_BL is None
    if contiguous:
        positions_BL = counted(jnp.asarray(segments_BL, jnp.int32))
    tokens, positions, segments = (
        None if a is None else jnp.asarray(a, jnp.int32)
        for a in (tokens_BL, positions_BL, segments_BL)
    )
    return Call(positions, segments, tokens, contiguous=contiguous, record=record)


def counted(segments_BL: jax.Array) -> jax.Array:
    """int32 [B, L], distance of each place from the first place of its document."""
    places_BL = jnp.broadcast_to(jnp.arange(segments_BL.shape[1]), segments_BL.shape)
    is_first_BL = jnp.diff(segments_BL, axis=1, prepend=segments_BL[:, :1]) != 0
    return places_BL - jax.lax.cummax(jnp.where(is_first_BL, places_BL, 0), axis=1)


def build(config: ExperimentConfig | LanguageModel | Mapping[str, Any]) -> Network:
    """The network of a config, to `init` and `apply`.

    Args:
      config: an experiment config, as an object or a `ConfigDict`; or a model.

    Raises:
      ValueError: the settings break a rule.
    """
    if isinstance(config, LanguageModel):
        return Network(config)
    if isinstance(config, ml_collections.ConfigDict | Mapping):
        config = from_config_dict(config)
    return Network(config.model)
