"""Encoder-decoder models: a causal stack reads a bidirectional one (legend: `moe_jax.moe`)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.layers.attention import Attention
from moe_jax.layers.cross_attention import CrossAttention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.models.output import Encoded
from moe_jax.models.stack import StackLayout
from moe_jax.part import Aux, Call, Part

ENCODER_KEY = 2**30  # folded into the random key of the encoder; no layer has this index


@dataclasses.dataclass(frozen=True)
class EncoderDecoder(LanguageModel):
    """A Transformer of two stacks, with one table of parts.

    The encoder reads `Call.encoder`. Its normed output is the `Call.memory` that parts of the
    decoder read. Layer numbers run through both stacks, the encoder first.

    Source: Vaswani et al. 2017, arXiv:1706.03762; T5, Raffel et al. 2020, arXiv:1910.10683.
    """

    parts: tuple[tuple[str, Part], ...] | Mapping[str, Part] = (
        ("attention", Attention()),
        ("cross_attention", CrossAttention()),
        ("mlp", Mlp()),
    )  # by name, as sorted pairs; a part in both stacks has separate parameters in each
    encoder: StackLayout = StackLayout(unit=(("attention", "mlp"),), causal=False)  # its layers
    # The decoder's layers.
    stack: StackLayout = StackLayout(unit=(("attention", "cross_attention", "mlp"),))
    share_embeddings: bool = True  # the encoder reads the decoder's embedding

    def check(self) -> None:
        """See `Settings`."""
        require(
            not self.encoder.causal,
            "an encoder must see the tokens on both sides",
            f"encoder.causal={self.encoder.causal}",
            "Set encoder.causal=False",
        )
        super().check()
        parts = {name: stack.parts() for name, stack in self.stacks.items()}
        blind = [name for name, part in parts["encoder"].items() if part.reads_memory]
        require(
            not blind,
            "a part of the encoder cannot read the encoder's output",
            f"{blind} in encoder={self.encoder}",
            "Name it in the layers of stack",
        )
        require(
            any(part.reads_memory for part in parts["stack"].values()),
            "a part of the decoder must read the encoder's output",
            f"none of {sorted(parts['stack'])} in stack={self.stack} does",
            "Add one, such as 'cross_attention'",
        )
        twice = [
            name
            for name, part in parts["encoder"].items()
            if name in parts["stack"]
            and (part.routes or part.state_specs(self.dims) or type(part).loss is not Part.loss)
        ]
        require(
            not twice,
            "a part that routes tokens, has state or adds a loss belongs to one stack",
            f"{twice} in the layers of encoder and of stack",
            "Give each stack a part with a name of its own",
        )

    @property
    def layouts(self) -> dict[str, StackLayout]:
        """See `LanguageModel`."""
        return {"encoder": self.encoder, "stack": self.stack}

    def plain_specs(self) -> dict[str, Any]:
        """As `LanguageModel`, with `encoder`, `encoder_norm`, any `encoder_embedding` [V, M]."""
        specs = super().plain_specs() | {"encoder_norm": self.norm.specs(self.model_dim)}
        if not self.share_embeddings:
            specs["encoder_embedding"] = self.embedding_spec()
        return specs

    def encode(
        self,
        params: Any,
        call: Call,
        *,
        factor_BTM: jax.Array | float = 1.0,
        **trees: Any,
    ) -> tuple[Call, Encoded]:
        """Runs the encoder, unless the call has a memory.

        Args:
          params: of the model.
          call: with `encoder`.
          factor_BTM: multiplies the embedded tokens.
          trees: `state` and `replay` of `Stack.apply`.

        Returns:
          The call with its memory, and the encoder's reports.

        Raises:
          ValueError: the call has no text for the encoder.
        """
        if call.memory is not None:
            return call, Encoded()
        text = call.encoder
        require(
            text is not None,
            "an encoder-decoder model needs a text for its encoder",
            "the call has encoder=None",
            "Set Call.encoder, or encoder_inputs in the batch",
        )
        assert text is not None
        # A call of its own, with what both stacks share: no cache, prefix or memory of the decoder.
        own = Call(
            tokens_BL=text.tokens_BT,
            positions_BL=text.positions_BT,
            segments_BL=text.segments_BT,
            step=call.step,
            rng=None if call.rng is None else jax.random.fold_in(call.rng, ENCODER_KEY),
            contiguous=call.contiguous,
            capacity=call.capacity,
            record=call.record,
        )
        table = "embedding" if self.share_embeddings else "encoder_embedding"
        x_BTM = self.embed({"embedding": params[table]}, text.tokens_BT) * factor_BTM
        output = self.through("encoder", params, x_BTM, own, **trees)
        memory_BTM = self.norm.apply(params["encoder_norm"], output.x_BLM)
        segments_BT = text.segments_BT
        if segments_BT is None:
            segments_BT = jnp.ones(text.tokens_BT.shape, jnp.int32)
        call = dataclasses.replace(call, memory=memory_BTM, memory_segments_BT=segments_BT)
        return call, Encoded(output.aux, output.residual_XBLM)

    def loss(
        self,
        aux: Mapping[str, Aux],
        num_tokens: jax.Array,
        batch: Mapping[str, Any] | None,
        encoder_tokens: jax.Array | None = None,
        later_tokens_D: jax.Array | None = None,
    ) -> jax.Array | float:
        """See `LanguageModel`; losses of the encoder's parts are per token of the encoder."""
        del later_tokens_D  # a model with an encoder has no multi-token modules
        in_encoder = self.stacks["encoder"].parts()
        own, other = (
            {name: of for name, of in aux.items() if (name in in_encoder) is which}
            for which in (True, False)
        )
        assert encoder_tokens is not None, "batch_totals counts them"
        return super().loss(own, encoder_tokens, batch) + super().loss(other, num_tokens, batch)
