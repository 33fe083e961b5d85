"""Tiny models of every family: their config.json settings, and values for every tensor.

Values depend on the name of a tensor, so saved oracles need not contain them.
`python -m tests.save_oracles` computes the oracles with transformers.
"""

import dataclasses
import json
import pathlib
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.interchange.family import Family, Reader, load_family
from moe_jax.interchange.leaves import leaves_of
from moe_jax.interchange.read import CONFIG
from moe_jax.interchange.tensor_files import ToWrite, write_tensors
from moe_jax.interchange.write import tensors_of
from tests.hf_deepseek import DEEPSEEK
from tests.hf_others import OTHERS, QUICK
from tests.hf_softmax import SOFTMAX
from tests.hf_t5 import ENCODER_DECODERS

ORACLES = pathlib.Path(__file__).parent / "oracles"
VOCAB = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model of a family.

    Attributes:
      settings: the model's config.json.
      batch: number of sequences.
      length: tokens per sequence.
      scale: standard deviation of matrices, in units of fan_in^-0.5.
      quick: whether the quick tests include it; each family has at least one such case.
    """

    settings: Mapping[str, Any]
    batch: int = 2
    length: int = 20
    scale: float = 1.5
    quick: bool = True

    @property
    def family(self) -> Family:
        """The family's table."""
        return load_family(self.settings["model_type"])

    @property
    def has_encoder(self) -> bool:
        """Whether the model has an encoder, which reads its own text."""
        return bool(self.settings.get("is_encoder_decoder"))

    def tokens(self) -> np.ndarray:
        """int32 token ids [batch, length] for the model, or for its decoder."""
        return np.random.RandomState(7).randint(3, VOCAB, (self.batch, self.length), np.int32)

    def encoder_tokens(self) -> dict[str, np.ndarray]:
        """The encoder's token ids for `Network`, as many as the decoder's; else {}."""
        tokens = np.random.RandomState(8).randint(3, VOCAB, (self.batch, self.length), np.int32)
        return {"encoder_tokens_BT": tokens} if self.has_encoder else {}


# Sizes with the same names in most families.
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip

SCALED = {"original_max_position_embeddings": 16, "rope_theta": 1e4}
DENSE = {**SMALL, "intermediate_size": 40}

CASES = {
    **{
        name: Case(settings, quick=name in QUICK)
        for name, settings in OTHERS.items()
    },
    **{
        name: Case(settings, quick=name in ("deepseek_v2", "deepseek_v3"))
        for name, settings in DEEPSEEK.items()
    },
    **{
        name: Case(settings, quick=name == settings["model_type"])
        for name, settings in SOFTMAX.items()
    },
    **{
        name: Case(settings, scale=1.0, quick=name in ("t5_gated", "switch"))
        for name, settings in ENCODER_DECODERS.items()
    },
    "llama": Case({**DENSE, "model_type": "llama", "rope_theta": 5e4}, quick=False),
    "llama_biases": Case(
        {**DENSE, "model_type": "llama", "attention_bias": True, "mlp_bias": True,
         "head_dim": None, "hidden_act": "gelu", "tie_word_embeddings": True,
         "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, **SCALED}}
    ),
    "llama_linear": Case(
        {**DENSE, "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 3.0}},
        quick=False,
    ),
    "llama_dynamic": Case(
        {**DENSE, "model_type": "llama", "max_position_embeddings": 12,
         "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        quick=False,
    ),
    "llama_yarn": Case(
        {**DENSE, "model_type": "llama", "num_key_value_heads": None,
         "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2,
                             "beta_fast": 4.0, **SCALED}},
        quick=False,
    ),
    "mistral": Case({**DENSE, "model_type": "mistral", "sliding_window": 6}),
    "mistral_full": Case(
        {**DENSE, "model_type": "mistral", "sliding_window": None}, quick=False
    ),
    "qwen2": Case({**DENSE, "model_type": "qwen2", "head_dim": 8}, quick=False),
    "qwen2_windows": Case(
        {**DENSE, "model_type": "qwen2", "head_dim": 8, "num_hidden_layers": 3,
         "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": Case({**DENSE, "model_type": "qwen3", "attention_bias": True}, quick=False),
    "qwen3_windows": Case(
        {**DENSE, "model_type": "qwen3", "num_hidden_layers": 3, "use_sliding_window": True,
         "sliding_window": 5,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    ),
    "mixtral": Case(
        {**SMALL, "model_type": "mixtral", "intermediate_size": 24, "num_local_experts": 4,
         "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    ),
}  # fmt: skip


def tensor_values(name: str, shape: tuple[int, ...], scale: float = 1.5) -> np.ndarray:
    """Values of a tensor, away from neutral values: a function of its name and shape."""
    name = re.sub(r"model\.layers\.\d+\.embed_tokens", "model.embed_tokens", name)
    name = re.sub(r"model\.layers\.\d+\.shared_head\.head", "lm_head", name)
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("A_log"):
        return np.log(random.uniform(1, 8, shape)).astype(np.float32)
    if len(shape) == 1 and "norm" in name and not name.endswith("bias"):
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("e_score_correction_bias"):
        return random.normal(-0.5, 0.3, shape).astype(np.float32)  # some scores fall below 0
    if "sinks" in name:
        return random.normal(0, 1, shape).astype(np.float32)
    if len(shape) == 1 or name.endswith("bias"):
        return random.normal(0, 0.3, shape).astype(np.float32)
    return random.normal(0, scale * shape[-1] ** -0.5, shape).astype(np.float32)


def written_by_rules(case: Case) -> list[ToWrite]:
    """The tensors that the rules of the family write, with their values."""
    model = case.family.model(Reader(case.settings))
    leaves = leaves_of(model)
    empty = {leaf.path: np.empty(0, np.float32) for leaf in leaves}
    tensors = tensors_of(case.family, model, leaves, empty, None)
    return [with_values(one.name, one.shape, case) for one in tensors]


def with_values(name: str, shape: tuple[int, ...], case: Case) -> ToWrite:
    """A tensor with its values."""
    return ToWrite(
        name, np.dtype(np.float32), shape, lambda: tensor_values(name, shape, case.scale)
    )


def write_model(directory: pathlib.Path, case: Case, **settings: Any) -> pathlib.Path:
    """Writes the directory of a tiny model as Hugging Face would; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    own = {"architectures": [case.family.architecture], "dtype": "float32"}
    (directory / CONFIG).write_text(json.dumps({**own, **case.settings, **settings}))
    write_tensors(directory, written_by_rules(case))
    return directory
