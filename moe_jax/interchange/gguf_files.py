"""Reads dense models of llama.cpp: one GGUF file with settings, tensors and the tokenizer.

Source: docs/gguf.md of ggml-org/ggml, and the package `gguf` of ggml-org/llama.cpp, which reads
the file and its quantised blocks. `gguf_names.py` lists the tensors.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moe_jax.config import DataConfig, ExperimentConfig
from moe_jax.config.check import require
from moe_jax.interchange.family import load_family
from moe_jax.interchange.gguf_metadata import SETTINGS
from moe_jax.interchange.gguf_names import gguf_rules
from moe_jax.interchange.read import read_parameters
from moe_jax.interchange.tensor_files import Stored

PAIRED = ("llama",)  # architectures whose queries and keys are stored in pairs
ARCHITECTURES = ("llama", "qwen2", "qwen3")


class GGUFFile:
    """The settings and tensors of a GGUF file; tensors are dequantised one by one.

    Args:
      path: of the file.

    Raises:
      ValueError: the package gguf is not installed, or there is no whole GGUF file at the path.
    """

    def __init__(self, path: pathlib.Path):
        if not path.is_file():
            raise ValueError(f"a GGUF model must be one file: there is no {path}. Correct it.")
        try:
            import gguf
        except ImportError as error:
            raise ValueError(
                "GGUF files are read by the package gguf: it is not installed. Run "
                "pip install 'moe_jax[gguf]'."
            ) from error
        self.path, self._gguf = path, gguf
        try:
            reader = gguf.GGUFReader(str(path))
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"{path} is not a complete GGUF file: {error}. Download it again."
            ) from error
        self.settings = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.tensors = {
            name: Stored(path, np.dtype(np.float32), tuple(map(int, tensor.shape[::-1])), 0)
            for name, tensor in self._tensors.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """A tensor in float32, or one row of its first dim."""
        tensor = self._tensors[name]
        data = tensor.data if row is None else tensor.data[row]
        shape = self.tensors[name].shape if row is None else self.tensors[name].shape[1:]
        return self._gguf.quants.dequantize(data, tensor.tensor_type).reshape(shape)


def from_gguf(
    path: str | pathlib.Path, *, mesh: Mesh | None = None
) -> tuple[ExperimentConfig, Any]:
    """Reads a dense Llama-like model from a GGUF file.

    Args:
      path: of the file. Quantised tensors become float32.
      mesh: see `from_hf`.

    Returns:
      The config and the parameters, as `from_hf` does; the family is the architecture of the file.

    Raises:
      ValueError: the file is damaged or incomplete, or `hf_settings` refuses it.
    """
    file = GGUFFile(pathlib.Path(path))
    settings = hf_settings(file)
    family = load_family(settings["model_type"])
    model = family.read(settings)
    heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    rules = gguf_rules(*heads, paired=settings["model_type"] in PAIRED)
    family = dataclasses.replace(
        family, rules=lambda _: rules, ignored=(r"rope_freqs\.weight", r"output\.weight")
    )
    params = read_parameters(file, family, model, mesh=mesh)
    length = min(int(settings["max_position_embeddings"]), 2048)
    data = DataConfig(sequence_length=length)
    return ExperimentConfig(name=family.name, model=model, data=data), params


def hf_settings(file: GGUFFile) -> dict[str, Any]:
    """The settings of the file as those of a config.json.

    Raises:
      ValueError: the architecture is not one of `ARCHITECTURES`, or the model has experts or scaled
        rotary positions.
    """
    architecture = file.settings.get("general.architecture")
    require(
        architecture in ARCHITECTURES,
        f"the architectures of GGUF files that can be read are {list(ARCHITECTURES)}",
        f"{architecture!r} in {file.path}",
        "Use the model's safetensors files with --from-hf",
    )
    require(
        not file.settings.get(f"{architecture}.expert_count"),
        "only dense models can be read from GGUF",
        f"{file.path} has experts",
        "Use the model's safetensors files with --from-hf",
    )
    settings: dict[str, Any] = {"model_type": architecture, "hidden_act": "silu"}
    for name, own in SETTINGS.items():
        if (key := f"{architecture}.{own}") in file.settings:
            settings[name] = file.settings[key]
    settings.setdefault("num_key_value_heads", settings.get("num_attention_heads"))
    # Stored in float32: 9.999999747378752e-06 means 1e-5.
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")
    settings["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    settings["tie_word_embeddings"] = "output.weight" not in file
    scaled = "rope_freqs.weight" in file or f"{architecture}.rope.scaling.type" in file.settings
    require(
        not scaled,
        "only GGUF files without scaled rotary positions can be read",
        f"{file.path} has them",
        "Use the model's safetensors files with --from-hf",
    )
    return settings


# Values of "pre" that split text by GPT-2's pattern, and whether digits are split one by one first.
PRE_TOKENIZERS = {"gpt-2": False, "default": False, "smollm": True}


def tokenizer_json(file: GGUFFile) -> str:
    """The tokenizer as the content of a `tokenizer.json`.

    Raises:
      ValueError: it is no byte-level BPE, or splits text in an unknown way.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    known = file.settings
    kind, pre = known.get("tokenizer.ggml.model"), known.get("tokenizer.ggml.pre", "default")
    require(
        kind == "gpt2" and pre in PRE_TOKENIZERS,
        f"the tokenizers of GGUF files that can be read are gpt2's, of {sorted(PRE_TOKENIZERS)}",
        f"{kind!r} of {pre!r} in {file.path}",
        "Put the model's tokenizer.json beside the file",
    )
    tokens = known["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ", 1)) for pair in known["tokenizer.ggml.merges"]]
    # A file may have a merge of no tokens: llama.cpp refuses a list without any.
    merges = [pair for pair in merges if {*pair, "".join(pair)} <= vocab.keys()]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if PRE_TOKENIZERS[pre] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # of GGUF's token types
    types = known.get("tokenizer.ggml.token_type", [])
    special = [token for token, one in zip(tokens, types, strict=False) if one == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return str(tokenizer.to_str())


def tokenizer_config(file: GGUFFile) -> dict[str, Any]:
    """The content of a `tokenizer_config.json`: bos and eos tokens, and the chat template."""
    known = file.settings
    tokens = known.get("tokenizer.ggml.tokens", [])
    ids = {one: known.get(f"tokenizer.ggml.{one}_token_id") for one in ("bos", "eos")}
    found: dict[str, Any] = {
        f"{one}_token": tokens[i] for one, i in ids.items() if i is not None and i < len(tokens)
    }
    others = ("tokenizer.ggml.add_bos_token", "tokenizer.chat_template")
    return found | {key.rpartition(".")[2]: known[key] for key in others if key in known}
