"""Tokenizers as metadata of a GGUF file, so that llama.cpp encodes a text to the same ids.

A byte-level BPE is llama.cpp's "gpt2", a BPE with byte fallback its "llama". llama.cpp knows the
patterns that split a text before the BPE only by name: `PATTERNS` contains those names.

Sources: `src/llama-vocab.cpp` of ggml-org/llama.cpp; GGUF's token types: docs/gguf.md of ggml.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from moe_jax.config.check import require

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # token types
SUFFIX = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LOWER, UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
WORDS = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*" + SUFFIX
# The patterns of a tokenizer.json in order, and llama.cpp's name for all of them. "regex" is the
# pattern of GPT-2, "digits" splits digits one by one.
PATTERNS: Mapping[tuple[str, ...], str] = {
    ("regex",): "gpt-2",
    ("digits", "regex"): "smollm",
    (WORDS % "{1,3}",): "llama-bpe",
    (WORDS % "",): "qwen2",
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ENDINGS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ENDINGS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SUFFIX,
    ): "gpt-4o",
    (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
     "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
     "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"): "deepseek-v3",
}  # fmt: skip
PREFIX = "tokenizer.ggml."
# A model without a template continues the messages; llama.cpp would use a template of its own.
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def vocabulary(
    name: str, bos_id: int, eos_id: int, size: int, *, as_file: bool = False
) -> dict[str, Any]:
    """The GGUF keys of a tokenizer.

    Args:
      name: as `Tokenizer.name`: "byte", "tokenizers:PATH" or "sentencepiece:PATH".
      bos_id: begins every prompt, as it begins every document in training. "add_bos_token" in the
        `tokenizer_config.json` of an imported model decides, if it is there, or else `as_file`.
      eos_id: ends an answer.
      size: V of the model; ids beyond those of the tokenizer are unused.
      as_file: whether the model has seen prompts as the tokenizer's file encodes them: with a chat
        template, or before an import. Training here puts no space before a text.

    Raises:
      ValueError: llama.cpp has no such tokenizer, or it has more ids than the model.
    """
    form, _, path = name.partition(":")
    makers = {"byte": byte_tokens, "tokenizers": json_tokens, "sentencepiece": piece_tokens}
    require(
        form in makers,
        "a tokenizer of a GGUF file must be byte, a tokenizer.json or a .model",
        f"{name!r}",
        "Write the model with another tokenizer, or with --to-hf",
    )
    keys, tokens, types = makers[form](path)
    require(
        len(tokens) <= size,
        "a model must have at least the ids of its tokenizer",
        f"{len(tokens)} ids in {name}, vocab_size={size}",
        "Correct config.data.tokenizer",
    )
    missing = range(len(tokens), size)
    tokens, types = [*tokens, *(f"[PAD{i}]" for i in missing)], [*types, *(UNUSED for _ in missing)]
    if "scores" in keys:
        keys["scores"] = [*keys["scores"], *(0.0 for _ in missing)]
    beside = beside_tokenizer(path)
    space, begins = in_front(form, path, bos_id) if as_file else (False, True)
    given = beside.get("add_bos_token")
    begins = begins if given is None else bool(given)
    keys |= {
        "tokens": tokens, "token_type": types, "bos_token_id": bos_id, "eos_token_id": eos_id,
        "add_bos_token": begins, "add_eos_token": False,
        "add_space_prefix": space,
    }  # fmt: skip
    template = beside.get("chat_template")
    template = template if isinstance(template, str) else PLAIN
    return {**{PREFIX + key: keys[key] for key in keys}, "tokenizer.chat_template": template}


def in_front(form: str, path: str, bos_id: int) -> tuple[bool, bool]:
    """Whether a tokenizer's file puts a space before a text, also after special tokens; and bos."""
    if form == "sentencepiece":
        return bool(model_of(path).normalizer_spec.add_dummy_prefix), True
    if form == "byte":
        return False, True
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(path).expanduser()))
    tokenizer.no_padding()
    bos = tokenizer.id_to_token(bos_id)
    tokens = tokenizer.encode(f"{bos}a", add_special_tokens=False).tokens
    return tokens[1].startswith("\u2581"), tokenizer.encode("a").ids[:1] == [bos_id]


Tokens = tuple[dict[str, Any], list[str], list[int]]  # keys of this kind, tokens, token types


def byte_tokens(path: str) -> Tokens:
    """The byte tokenizer, as a BPE without merges; see `ByteTokenizer`."""
    del path
    sentinels = [f"<sentinel_{i}>" for i in range(125)]
    tokens = ["<pad>", "<bos>", "<eos>", *byte_letters(), *sentinels]
    types = [*[CONTROL] * 3, *[NORMAL] * 256, *[CONTROL] * 125]
    # llama.cpp requires merges: this one never applies, since byte letters end below U+0144.
    return {"model": "gpt2", "pre": "gpt-2", "merges": ["\u4e00 \u4e00"]}, tokens, types


def byte_letters() -> list[str]:
    """The letters by which GPT-2's byte-level BPE writes the 256 bytes, in order."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def json_tokens(path: str) -> Tokens:
    """The BPE of a tokenizer.json.

    Raises:
      ValueError: it splits texts in a way that llama.cpp has no name for.
    """
    spec = json.loads(pathlib.Path(path).expanduser().read_text())
    model, added = spec["model"], spec.get("added_tokens") or ()
    ids = {**model["vocab"], **{one["content"]: one["id"] for one in added}}
    kinds = {one["content"]: CONTROL if one.get("special") else USER for one in added}
    size = max(ids.values()) + 1
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    fallback = bool(model.get("byte_fallback"))
    for token, id_ in ids.items():
        byte = fallback and len(token) == 6 and token.startswith("<0x")
        tokens[id_], types[id_] = token, kinds.get(token, BYTE if byte else NORMAL)
    merges = [" ".join(one) if isinstance(one, list) else one for one in model["merges"]]
    if fallback:
        ranks = {one.replace(" ", "", 1): -float(i) for i, one in enumerate(merges)}
        return {"model": "llama", "scores": [ranks.get(one, 0.0) for one in tokens]}, tokens, types
    found = tuple(patterns(spec.get("pre_tokenizer") or {}))
    require(
        found in PATTERNS,
        f"llama.cpp splits texts only by the patterns of {sorted(PATTERNS.values())}",
        f"pre_tokenizer of {path} has {list(found)}",
        "Add llama.cpp's name of them to interchange/gguf_vocabulary.py",
    )
    return {"model": "gpt2", "pre": PATTERNS[found], "merges": merges}, tokens, types


def patterns(part: Mapping[str, Any]) -> list[str]:
    """The patterns by which a pre-tokenizer splits a text."""
    kind = part.get("type")
    if kind == "Sequence":
        return [one for inner in part["pretokenizers"] for one in patterns(inner)]
    if kind == "Split":
        return [part["pattern"].get("Regex", f"the string {part['pattern'].get('String')!r}")]
    if kind == "Digits":
        return ["digits" if part.get("individual_digits") else "runs of digits"]
    if kind == "ByteLevel":
        return ["regex"] if part.get("use_regex", True) else []
    return [str(kind)]


def piece_tokens(path: str) -> Tokens:
    """The BPE of a SentencePiece .model.

    Raises:
      ValueError: the model is no BPE.
    """
    proto = model_of(path)
    kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
    require(
        kind == "BPE",
        "a .model of SentencePiece can be written only if it is a BPE",
        f"{kind} in {path}",
        "Write the model with --to-hf",
    )
    pieces = [(one.piece, one.score, one.type) for one in proto.pieces]
    tokens, scores, types = (list(column) for column in zip(*pieces, strict=True))
    return {"model": "llama", "scores": scores}, tokens, types


def model_of(path: str) -> Any:
    """A SentencePiece .model as a protocol buffers message."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(pathlib.Path(path).expanduser().read_bytes())
    return proto


def beside_tokenizer(path: str) -> dict[str, Any]:
    """The `tokenizer_config.json` beside a tokenizer, with the chat template; {} if none."""
    folder = pathlib.Path(path).expanduser().parent
    if not path or not folder.is_dir():
        return {}
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if isinstance(named := found.get("chat_template"), list):  # as earlier transformers wrote it
        named = {one.get("name"): one.get("template") for one in named}
        found["chat_template"] = named.get("default")
    return found | ({"chat_template": template.read_text()} if template.is_file() else {})
