"""Settings of the decoder language model."""

import dataclasses

from moe_jax.config.check import (
    require,
    require_at_least,
    require_choice,
    require_fraction,
    require_positive,
)
from moe_jax.config.moe import ACTIVATIONS, GATED_ACTIVATIONS, MoEConfig
from moe_jax.config.router import DTYPES

REMAT_POLICIES = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer with dense or MoE feed-forward layers."""

    vocab_size: int = 384  # at least the tokenizer's; 384 for bytes
    num_layers: int = 4
    model_dim: int = 128  # M
    num_heads: int = 4  # N: query heads
    num_kv_heads: int = 0  # key and value heads (GQA); 0: as many as query heads
    head_dim: int = 32  # D; num_heads * head_dim need not be model_dim
    ffn_dim: int = 512  # hidden dim of the dense FFN
    activation: str = "relu"  # of the dense FFN: "relu", "gelu", "swiglu", "geglu"
    ffn_bias: bool = False  # biases in the dense FFN
    attention_bias: bool = False  # biases on queries, keys, values and output
    qk_norm: bool = False  # RMSNorm of queries and keys, per head
    norm: str = "rmsnorm"  # "rmsnorm" or "layernorm"
    norm_epsilon: float = 1e-6
    rope_base: float = 10_000.0  # base of the rotary frequencies
    tie_embeddings: bool = True  # the output head is the input embedding, transposed
    dropout_rate: float = 0.0  # on embeddings and on the output of every sub-layer
    init_scale: float = 1.0  # variance scale of dense and attention weights over fan-in
    compute_dtype: str = "float32"  # of activations and matmuls; parameters stay float32
    scan_layers: bool = True  # compile the repeated layers once
    remat: str = "none"  # recompute in the backward pass: "none", all but the "dots", "full"
    moe: MoEConfig = MoEConfig()

    def __post_init__(self) -> None:
        """Checks fields against each other."""
        for name in ("vocab_size", "num_layers", "model_dim", "num_heads", "ffn_dim"):
            require_at_least(f"model.{name}", getattr(self, name), 1)
        require_at_least("model.head_dim", self.head_dim, 2)
        require_choice("model.activation", self.activation, ACTIVATIONS)
        require_choice("model.norm", self.norm, ("rmsnorm", "layernorm"))
        require_choice("model.compute_dtype", self.compute_dtype, DTYPES)
        require_choice("model.remat", self.remat, REMAT_POLICIES)
        require_fraction("model.dropout_rate", self.dropout_rate)
        for name in ("init_scale", "norm_epsilon", "rope_base"):
            require_positive(f"model.{name}", getattr(self, name))
        require(
            self.head_dim % 2 == 0,
            "rotary positions need an even model.head_dim",
            f"head_dim={self.head_dim}",
            "Change head_dim",
        )
        require(
            0 <= self.num_kv_heads <= self.num_heads and self.num_heads % self.kv_heads == 0,
            "model.num_kv_heads divides model.num_heads",
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}",
            "Use a divisor",
        )
        require(
            bool(self.moe_layers) or self.moe.layer_period == 0,
            "some layer is MoE unless moe.layer_period is 0",
            f"num_layers={self.num_layers}, moe.num_dense_first={self.moe.num_dense_first}, "
            f"moe.layer_period={self.moe.layer_period}, moe.layer_offset={self.moe.layer_offset}",
            "Lower num_dense_first or layer_offset, or set layer_period=0 for a dense model",
        )
        bad = [i for i in self.moe_layers if not 0 <= i < self.num_layers]
        require(
            not bad and tuple(sorted(set(self.moe_layers))) == self.moe_layers,
            "moe.layers are increasing layer indices below model.num_layers",
            f"moe.layers={self.moe_layers}, num_layers={self.num_layers}",
            "Correct moe.layers",
        )

        table = self.moe.router.hash_table
        require(
            not table or len(table) == self.vocab_size,
            "moe.router.hash_table has the expert of every token id",
            f"{len(table)} entries, vocab_size={self.vocab_size}",
            "Make it anew, say by moe.routing.fixed.balanced_table",
        )

    @property
    def kv_heads(self) -> int:
        """The number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The indices of the MoE layers, in order."""
        return self.moe.moe_layers(self.num_layers)

    @property
    def gated(self) -> bool:
        """Whether the dense FFN is a GLU of three matrices."""
        return self.activation in GATED_ACTIVATIONS
