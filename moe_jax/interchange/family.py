"""A family of models: how its `config.json` and its tensors are read and written."""

import dataclasses
import functools
import importlib
import logging
import math
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from moe_jax.config import difference, to_dict
from moe_jax.config.check import require
from moe_jax.interchange.rules import Rule
from moe_jax.interchange.tensor_files import Files, TensorFiles
from moe_jax.layers.attention import Attention
from moe_jax.models.model import LanguageModel

logger = logging.getLogger(__name__)

Settings = Mapping[str, Any]  # of a config.json

# The table of each family, by the "model_type" of its config.json. A model that several can express
# is written as the first of them, so the plainest come first.
FAMILIES = {
    "llama": "moe_jax.interchange.families.dense:LLAMA",
    "mixtral": "moe_jax.interchange.families.mixtral:MIXTRAL",
    "dbrx": "moe_jax.interchange.families.dbrx:DBRX",
    "deepseek_v2": "moe_jax.interchange.families.deepseek:DEEPSEEK_V2",
    "deepseek_v3": "moe_jax.interchange.families.deepseek:DEEPSEEK_V3",
    "kimi_k2": "moe_jax.interchange.families.deepseek:DEEPSEEK_V3",
    "granitemoe": "moe_jax.interchange.families.granite:GRANITE_MOE",
    "granitemoeshared": "moe_jax.interchange.families.granite:GRANITE_MOE_SHARED",
    "grok-1": "moe_jax.interchange.families.grok1:GROK1",
    "jamba": "moe_jax.interchange.families.jamba:JAMBA",
    "llama4": "moe_jax.interchange.families.llama4:LLAMA4",
    "llama4_text": "moe_jax.interchange.families.llama4:LLAMA4",
    "mistral": "moe_jax.interchange.families.dense:MISTRAL",
    "qwen2": "moe_jax.interchange.families.dense:QWEN2",
    "qwen3": "moe_jax.interchange.families.dense:QWEN3",
    "qwen2_moe": "moe_jax.interchange.families.qwen_moe:QWEN2_MOE",
    "qwen3_moe": "moe_jax.interchange.families.qwen_moe:QWEN3_MOE",
    "gpt_oss": "moe_jax.interchange.families.gpt_oss:GPT_OSS",
    "olmoe": "moe_jax.interchange.families.qwen_moe:OLMOE",
    "switch_transformers": "moe_jax.interchange.families.t5:SWITCH",
    "t5": "moe_jax.interchange.families.t5:T5",
    "phimoe": "moe_jax.interchange.families.phimoe:PHIMOE",
}

NEAREST = 2  # families whose shortcomings are listed if none can express a model

# Model settings that a `config.json` lacks: how the model trains.
OF_TRAINING = (
    "losses", "capacity", "group_size", "noise", "init_scale", "query_init_scale", "init_stddev",
    "identical_init", "dropout_rate", "expert_dropout_rate", "compute_dtype", "buffer_factor",
    "eval_buffer_factor", "stop_at_overflow", "rate", "schedule", "frozen_fraction", "anneal_from",
    "anneal_steps", "weight", "embedding_stddev", "head_init_scale", "allow_constant_gate",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """The table of one family.

    Attributes:
      name: "model_type" of its config.json.
      architecture: the class of transformers that loads it.
      model: builds the model of a config.json, with defaults for settings that the file omits.
      settings: returns the config.json of a model, without the class and without settings that the
        family cannot express.
      rules: returns the rules of a model's tensors. If several rules hold one parameter, the first
        is written, and the first whose tensors are in the files is read.
      copies: maps a model's tensors that repeat another to that original; they are written too.
      repeats: maps tensors that may repeat another in the files to it; they are not written.
      ignored: regular expressions of tensors that hold no parameters, such as buffers.
      opened: wraps the files before the rules read them, for example to dequantise.
    """

    name: str
    architecture: str
    model: Callable[["Reader"], LanguageModel]
    settings: Callable[[LanguageModel], dict[str, Any]]
    rules: Callable[[LanguageModel], Iterable[Rule]]
    copies: Callable[[LanguageModel], Mapping[str, str]] = lambda model: {}
    repeats: Callable[[LanguageModel], Mapping[str, str]] = lambda model: {}
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    opened: Callable[[TensorFiles], Files] = lambda files: files

    def read(self, settings: Settings, tensors: Container[str] | None = None) -> LanguageModel:
        """The model of a config.json.

        Args:
          settings: of the file.
          tensors: names of the tensors beside the file, or None if unknown.

        Raises:
          ValueError: a size is missing, or a setting has no counterpart.
        """
        config = Reader(settings, tensors)
        model = self.model(config)
        config.warn_of_unread()
        return model

    def written(self, model: LanguageModel) -> dict[str, Any]:
        """The config.json of a model, with every setting that its outputs depend on.

        Raises:
          OtherFamilyError: the family cannot express a part or a setting; names it.
        """
        model = spelled_out(model)
        try:
            settings = self.settings(model)
            again = spelled_out(self.model(Reader(settings)))
        except (KeyError, AttributeError, ValueError, TypeError, AssertionError) as error:
            raise OtherFamilyError(
                f"a model can be written as {self.name} only if it has its parts: {lacks(error)}",
                1 if isinstance(error, ValueError) else math.inf,
            ) from error
        own, read = (to_dict(one, only_results=True) for one in (model, again))
        lines = [
            line
            for line in difference(own, read, "config.model")
            if not set(line.partition(":")[0].split(".")) & set(OF_TRAINING)
        ]
        if lines:
            raise OtherFamilyError(
                f"a model can be written as {self.name} only if {self.name} can say all its "
                f"settings: {'; '.join(f'{line} if read again' for line in lines)}. Change them, "
                "or write it as another family.",
                len(lines),
            )
        return {"architectures": [self.architecture], "model_type": self.name, **settings}


class OtherFamilyError(ValueError):
    """A family cannot express a model.

    Attributes:
      differences: settings that it cannot express, one if it stopped at the first; inf if the model
        has other parts.
    """

    def __init__(self, message: str, differences: float):
        super().__init__(message)
        self.differences = differences


def lacks(error: Exception) -> str:
    """What a model lacks if the table of a family fails with this error."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, KeyError):
        return f"it has no {error}."
    if isinstance(error, AttributeError) and error.name is not None:
        return f"its {type(error.obj).__name__} has no {error.name}."
    return "its layers have parts of other kinds."


def spelled_out(model: LanguageModel) -> LanguageModel:
    """The same model, with defaults that follow from other settings written out."""
    parts = dict(model.parts)
    for name, part in parts.items():
        if isinstance(part, Attention):
            scale = part.head_dim**-0.5 if part.scale is None else part.scale
            parts[name] = dataclasses.replace(part, num_kv_heads=part.kv_heads, scale=scale)
    multiplier = model.embedding_multiplier
    multiplier = model.model_dim**0.5 if multiplier is None else multiplier
    return dataclasses.replace(model, parts=parts, embedding_multiplier=multiplier)


@functools.cache
def load_family(name: str) -> Family:
    """The built-in family of a "model_type".

    Raises:
      ValueError: there is none.
    """
    require(
        name in FAMILIES,
        f"the architectures that can be read and written are {sorted(FAMILIES)}",
        f"model_type={name!r}",
        "Use one of them, or name a table of yours: family='package.module:ATTRIBUTE'",
    )
    module, _, attribute = FAMILIES[name].partition(":")
    family = getattr(importlib.import_module(module), attribute)
    assert isinstance(family, Family), name
    return family


def named_family(name: str) -> Family:
    """The family that a user names: a "model_type", or "package.module:ATTRIBUTE" of a table.

    The import runs code, so the name never comes from a file of a model.

    Raises:
      ValueError: there is none.
    """
    if ":" not in name:
        return load_family(name)
    module, _, attribute = name.partition(":")
    try:
        family = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"a family 'package.module:ATTRIBUTE' must be importable: {name!r} gives {error!r}. "
            "Correct the path, or put its folder on PYTHONPATH."
        ) from error
    require(
        isinstance(family, Family),
        "a family must be a moe_jax.interchange.family.Family",
        f"{name!r} is {family!r}",
        "Name another",
    )
    return family


def trusted(given: str, recorded: str) -> str:
    """The family name that a user gives, or else the one that an import recorded.

    Raises:
      ValueError: the recorded name is a module path, and no file may cause an import.
    """
    require(
        bool(given) or ":" not in recorded,
        "only --family may name a table outside the library",
        f"the model was imported by {recorded!r}",
        f"Give --family={recorded} if you trust that module",
    )
    return given or recorded


def family_of(model: LanguageModel, name: str = "") -> Family:
    """The family of this name (see `named_family`), or the first that can express the model.

    Raises:
      ValueError: none can; says what the nearest families cannot express.
    """
    if name:
        return named_family(name)
    refusals = []
    for known in FAMILIES:
        try:
            load_family(known).written(model)
        except OtherFamilyError as error:
            refusals.append(error)
        else:
            return load_family(known)
    nearest = sorted(refusals, key=lambda error: error.differences)[:NEAREST]
    raise ValueError(
        f"one of {len(FAMILIES)} families must express a model: none does. The nearest: "
        f"{' '.join(map(str, nearest))} The family that you name says what it cannot express."
    )


class Reader:
    """The settings of a config.json, with their defaults; warns of settings that were not read.

    Args:
      settings: of the file.
      tensors: names of the tensors beside the file; None: unknown, assumed as the settings imply.
    """

    # Settings that no output depends on.
    HARMLESS = frozenset(
        ["architectures", "model_type", "dtype", "torch_dtype", "transformers_version",
         "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
         "output_router_logits", "router_aux_loss_coef", "max_position_embeddings",
         "max_seq_len", "attention_dropout", "_name_or_path", "auto_map", "pretraining_tp",
         "hidden_dropout", "resid_pdrop", "emb_pdrop", "initializer_factor", "is_encoder_decoder",
         "router_jitter_noise", "dropout_rate", "classifier_dropout", "add_router_probs",
         "encoder_sparse_step", "decoder_sparse_step", "router_ignore_padding_tokens",
         "is_decoder", "add_cross_attention", "decoder_start_token_id", "task_specific_params",
         "is_gated_act", "scale_decoder_outputs", "n_positions", "output_past",
         "output_attentions", "output_hidden_states", "return_dict", "tie_encoder_decoder",
         "ep_size", "attn_pdrop", "moe_jitter_eps", "_attn_implementation_autoset"]
    )  # fmt: skip

    def __init__(self, settings: Settings, tensors: Container[str] | None = None):
        self.settings = settings
        self.tensors = tensors
        self.unread = set(settings) - self.HARMLESS
        self.inners: dict[str, Reader] = {}

    def __getitem__(self, name: str) -> Any:
        self.unread.discard(name)
        value = self.settings.get(name)
        require(
            value is not None,
            "a config.json must have the sizes of its model",
            f"{name!r} is {'null' if name in self.settings else 'not'} in it",
            "Add it",
        )
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, or the default if it is absent or null."""
        self.unread.discard(name)
        value = self.settings.get(name)
        return default if value is None else value

    def with_settings(self, **settings: Any) -> "Reader":
        """A reader with some settings changed; what it reads counts as read here."""
        other = Reader({**self.settings, **settings}, self.tensors)
        other.unread, other.inners = self.unread, self.inners
        return other

    def inner(self, name: str) -> "Reader":
        """The settings of a dict in the file; its unread settings count as unread here too."""
        return self.inners.setdefault(name, Reader(self.get(name, {})))

    def or_absent(self, name: str, default: Any = None) -> Any:
        """A setting, which may be null (None), or the default if it is absent."""
        self.unread.discard(name)
        return self.settings.get(name, default)

    def require(self, name: str, *allowed: Any) -> None:
        """Refuses a value of a setting that the family does not support.

        Raises:
          ValueError: it has another value.
        """
        value = self.get(name)
        require(
            value is None or value in allowed,
            f"{name} must be {' or '.join(map(repr, allowed))} in a model that can be read",
            f"{name}={value!r}",
            "There is no such option yet",
        )

    def warn_of_unread(self) -> None:
        """Warns of settings in the file that had no effect."""
        if unread := self.unread_settings():
            logger.warning(
                "config.json has settings that are not read: %s. If the model's outputs depend on "
                "them, they are wrong here.", unread,
            )  # fmt: skip

    def unread_settings(self) -> dict[str, Any]:
        """Settings that were not read; in an inner dict, named like "attn_config.clip_qkv"."""
        found = {name: self.settings[name] for name in sorted(self.unread)}
        for outer, inner in self.inners.items():
            found |= {f"{outer}.{name}": one for name, one in inner.unread_settings().items()}
        return {name: value for name, value in found.items() if value not in (None, False)}
