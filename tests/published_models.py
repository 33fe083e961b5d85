"""The models of the field as published: how many parameters, and what their config.json says."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
      total: parameters, with selection biases where there are any.
      active: of a token, with both embeddings, without the input embedding, without embeddings.
      settings: the config.json of the released weights, without what no output depends on; None
        where there is none.
    """

    total: int
    active: tuple[int, int, int]
    settings: Mapping[str, Any] | None = None


MIXTRAL = {
    "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 32000,
}  # fmt: skip
MIXTRAL_8X22B = {
    **MIXTRAL, "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
    "num_attention_heads": 48, "num_hidden_layers": 56, "router_aux_loss_coef": 0.001,
    "vocab_size": 32768,
}  # fmt: skip

# By config file and preset.
MODELS = {
    "mixtral": Published(46_702_792_704, (12_879_925_248, 12_748_853_248, 12_617_781_248), MIXTRAL),
    "mixtral:8x22b": Published(
        140_630_071_296, (39_161_468_928, 38_960_142_336, 38_758_815_744), MIXTRAL_8X22B
    ),
}
