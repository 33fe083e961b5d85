"""Language models made of `layers` and `moe`."""

from moe_jax.models.decoder import Decoder, DecoderOutput

__all__ = ["Decoder", "DecoderOutput"]
