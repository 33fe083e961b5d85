"""The tokenizer of an imported model: into a run directory, and out of it again."""

import logging
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from moe_jax.config import ExperimentConfig
from moe_jax.config.json_text import json_text
from moe_jax.data import open_tokenizer_of
from moe_jax.data.objectives.supervised import Supervised
from moe_jax.data.tokenizers import form_and_path, open_tokenizer
from moe_jax.interchange.gguf_files import GGUFFile, tokenizer_config, tokenizer_json
from moe_jax.interchange.gguf_vocabulary import vocabulary
from moe_jax.training.files import read_json
from moe_jax.training.imported import IMPORTED_FILE, TOKENIZER, TOKENIZER_FILES, copy_tokenizer

logger = logging.getLogger(__name__)


def bring_tokenizer(
    source: pathlib.Path, workdir: pathlib.Path, mode: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Copies the model's tokenizer.

    A model without a readable tokenizer gets the byte tokenizer, with a warning that gives the
    reason. Its files are kept for an export.

    Returns:
      The fields of the data config, with the tokenizer as a path relative to the workdir; and the
      tokenizer's sha256, {} for bytes.

    Raises:
      ValueError: the package that reads the tokenizer is not installed.
    """
    folder = workdir / TOKENIZER
    beside = source if source.is_dir() else source.parent
    names, warn = copy_tokenizer(beside, folder), logger.warning
    found = [one for one in ("tokenizer.json", "tokenizer.model") if one in names]
    if not found and mode == "from_gguf":
        try:
            file = GGUFFile(source)
            text = tokenizer_json(file)
            folder.mkdir(exist_ok=True)
            (folder / "tokenizer.json").write_text(text)
            (folder / "tokenizer_config.json").write_text(json_text(tokenizer_config(file)) + "\n")
            found = ["tokenizer.json"]
        except (ValueError, ImportError) as error:
            warn("The tokenizer cannot be read: %s", error)
    special = special_tokens(folder)
    for name in found:
        try:
            tokenizer = open_tokenizer(str(folder / name), **special)
        except ValueError as error:
            if isinstance(error.__context__, ImportError):  # not the model, a missing package
                raise
            warn("%s cannot be used: %s", name, str(error).replace(str(folder), str(beside)))
            continue
        fields = {"tokenizer": f"{TOKENIZER}/{name}", **special}
        return fields, {"tokenizer": tokenizer.fingerprint()}
    if "tiktoken.model" in names:
        warn(
            "tiktoken.model is kept and not read: how it splits a text, and which ids are special, "
            "is in the model's own code. As tiktoken:PATH a text may get other ids.",
        )  # fmt: skip
    warn(
        "There is no usable tokenizer in %s: data.tokenizer is byte. Write the path of one into "
        "config.json.", beside,
    )  # fmt: skip
    return {"tokenizer": "byte"}, {}


def special_tokens(folder: pathlib.Path) -> dict[str, str]:
    """data.bos_token and data.eos_token, if the model names them."""
    path = folder / "tokenizer_config.json"
    written = read_json(path) if path.is_file() else {}
    found = {}
    for name in ("bos_token", "eos_token"):
        token = written.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            found[name] = str(token)
    return found


def write_tokenizer(config: ExperimentConfig, workdir: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the run's tokenizer, the files beside it, and the chat template."""
    _, path = form_and_path(config.data.tokenizer)
    given = pathlib.Path(path).expanduser()
    if not given.is_file():  # bytes; an import may have kept tokenizer files that we cannot read
        names = copy_tokenizer(workdir / TOKENIZER, target)
        if path and given.name not in names:
            logger.warning(
                "The tokenizer of the run is not written: there is no %s. Copy it to %s.",
                given, target,
            )  # fmt: skip
    elif given.name in TOKENIZER_FILES:
        copy_tokenizer(given.parent, target)
    else:
        shutil.copyfile(given, target / given.name)
    for name in config.data.objective.file_settings:
        own = pathlib.Path(getattr(config.data.objective, name)).expanduser()
        if own.suffix:  # the run was trained with its own template file
            shutil.copyfile(own, target / f"{name}.jinja")


def ends_of_documents(config: ExperimentConfig, origin: Mapping[str, Any]) -> dict[str, int]:
    """The bos and eos ids of the run's tokenizer for a config.json; none if the import has ids."""
    known = any(name.endswith("token_id") for name in origin.get("settings", {}))
    if known or (origin and config.data.tokenizer == "byte"):  # as a stand-in
        return {}
    tokenizer = open_tokenizer_of(config.data)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def words_of(workdir: pathlib.Path, config: ExperimentConfig, step: int) -> dict[str, Any]:
    """The tokenizer for llama.cpp, set to encode prompts as in training."""
    tokenizer, objective = open_tokenizer_of(config.data), config.data.objective
    chat = objective.template(tokenizer) if isinstance(objective, Supervised) else None
    path = workdir / IMPORTED_FILE
    origin = read_json(path) if step == 0 and path.exists() else {}
    as_imported = bool(origin) and "made_by" not in origin
    words = vocabulary(
        tokenizer.name, tokenizer.bos_id, tokenizer.eos_id, config.model.vocab_size,
        as_file=chat is not None or as_imported,
    )  # fmt: skip
    if chat is not None:
        begin = objective.prompt_ids(tokenizer, "a")[:1]
        words["tokenizer.ggml.add_bos_token"] = begin == [tokenizer.bos_id]
        words["tokenizer.chat_template"] = chat.source
    return words
