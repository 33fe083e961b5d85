"""Packs the tokens of a corpus into a portable folder: `python -m moe_jax.data.pack --out=DIR`.

    python -m moe_jax.data.pack --corpus=jsonl:runs/corpus --heldout_fraction=0.005 \
        --tokenizer=sentencepiece:runs/corpus/bpe8192.model --out=runs/packed
    python -m moe_jax.train --config=... --config.data.corpus=packed:runs/packed \
        --config.data.tokenizer=sentencepiece:runs/packed/bpe8192.model

The folder has the compressed tokens and the tokenizer: 40 million tokens of the large corpus, with
a vocabulary of 8,192, take 21 MB. The first documents of each domain are packed, up to its share
of --max_tokens; the held-out split is packed whole. A run on the folder reads the same tokens on
any machine, without the text.
"""

import hashlib
import json
import pathlib
import shutil
import sys
import tarfile
from typing import Any

import numpy as np
from absl import flags

from moe_jax.command_line import Command
from moe_jax.config import DataConfig
from moe_jax.config.check import require
from moe_jax.data.documents import SPLITS, TRAIN
from moe_jax.data.opened import Data, open_data
from moe_jax.data.packed_corpus import MANIFEST, TOKENS
from moe_jax.data.token_files import TokenFiles, digest_of_manifest
from moe_jax.data.tokenizers import form_and_path
from moe_jax.files import require_absent, whole_or_absent

REQUIRED = ("corpus", "tokenizer")
# Data settings that are string flags of the command.
SETTINGS = (*REQUIRED, "text_field", "id_field", "group_field", "bos_token", "eos_token")


def pack(data: Data, out: pathlib.Path, *, max_tokens: int, tokenizer: pathlib.Path) -> int:
    """Packs the tokens of a corpus.

    Args:
        data: the corpus and the tokenizer, opened.
        out: the folder to create.
        max_tokens: training tokens over all domains, at most; a smaller corpus is packed whole.
        tokenizer: the tokenizer's file, which is copied to `out`.

    Returns:
        The number of packed training tokens.

    Raises:
        ValueError: `out` exists and is not empty, `max_tokens` is not above 0, or the share of a
            domain is less than its first document.
    """
    require_absent(out)
    files = data.files
    counts = files.counts[TRAIN]
    total = sum(count.tokens for count in counts.values())
    require(max_tokens > 0, "--max_tokens must be above 0", f"--max_tokens={max_tokens}, the "
            f"training split has {total:,}", "Correct it")  # fmt: skip
    max_tokens = min(max_tokens, total)
    with whole_or_absent(out) as partial:
        tree = partial / "tree"
        kept = {
            domain: write_domain(files, domain, max_tokens * count.tokens // total, tree)
            for domain, count in counts.items()
        }
        manifest = manifest_of(files, kept, tree, max_tokens)
        with tarfile.open(partial / TOKENS, "w:xz") as archive:
            for path in sorted(tree.rglob("*.npy")):
                archive.add(path, path.relative_to(tree).as_posix())
        shutil.rmtree(tree)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        shutil.copyfile(tokenizer, partial / tokenizer.name)
    return sum(count["tokens"] for count in kept.values())


def write_domain(
    files: TokenFiles, domain: str, max_tokens: int, out: pathlib.Path
) -> dict[str, Any]:
    """Writes the first training and all held-out documents; returns the training counts."""
    kept: dict[str, Any] = {}
    for split in SPLITS:
        (out / split).mkdir(parents=True, exist_ok=True)
        tokens = np.load(files.tokens_path(split, domain), mmap_mode="r")
        offsets = np.load(files.offsets_path(split, domain))
        count = files.counts[split][domain]
        if split == TRAIN:
            documents = int(np.searchsorted(offsets, max_tokens, side="right")) - 1
            require(
                documents > 0 or not count.documents,
                "A domain must keep a document to train on",
                f"the first of {domain!r} has {int(offsets[min(1, len(offsets) - 1)]):,} tokens, "
                f"its share of --max_tokens is {max_tokens:,}",
                "Raise --max_tokens, or cut the document up",
            )
            share = offsets[documents] / max(int(offsets[-1]), 1)
            offsets = offsets[: documents + 1]
            # Bytes are known only for the whole domain.
            kept = {"documents": documents, "tokens": int(offsets[-1]),
                    "bytes": int(count.bytes * share)}  # fmt: skip
        np.save(out / split / f"{domain}.tokens.npy", tokens[: offsets[-1]])
        np.save(out / split / f"{domain}.offsets.npy", offsets)
    return kept


def manifest_of(
    files: TokenFiles, kept: dict[str, Any], tree: pathlib.Path, max_tokens: int
) -> dict[str, Any]:
    """The manifest of the packed documents, with its own checksum."""
    old = json.loads((files.directory / MANIFEST).read_text(encoding="utf-8"))
    packed = hashlib.sha256(f"{old['corpus_sha256']} {max_tokens}".encode()).hexdigest()
    digests = {
        path.relative_to(tree).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(tree.rglob("*.npy"))
    }
    changed = {
        "corpus_sha256": packed,
        "packed_of_sha256": old["corpus_sha256"],
        "max_tokens": max_tokens,
        "counts": {**old["counts"], TRAIN: kept},
        "sha256": digests,
    }
    manifest = {name: value for name, value in old.items() if name != "manifest_sha256"} | changed
    return manifest | {"manifest_sha256": digest_of_manifest(json.loads(json.dumps(manifest)))}


def main() -> None:
    """Packs a corpus and prints the size."""
    options = flags.FLAGS
    settings: dict[str, Any] = {name: getattr(options, name) for name in SETTINGS}
    try:
        data = open_data(DataConfig(heldout_fraction=options.heldout_fraction, **settings))
        _ = data.files
    except ValueError as error:
        # A setting of a run is a flag of this command.
        raise ValueError(str(error).replace("config.data.", "--")) from error
    tokenizer = pathlib.Path(form_and_path(options.tokenizer)[1]).expanduser()
    require(tokenizer.is_file(), "--tokenizer must name a file, which is packed too",
            f"--tokenizer={options.tokenizer}",
            "Train one with moe_jax.data.train_tokenizer")  # fmt: skip
    out = pathlib.Path(options.out)
    tokens = pack(data, out, max_tokens=options.max_tokens, tokenizer=tokenizer)
    size = sum(path.stat().st_size for path in out.iterdir())
    total = sum(count.tokens for count in data.files.counts[TRAIN].values())
    print(f"{tokens:,} of {total:,} training tokens in {size / 1e6:.1f} MB: {out}")
    if tokens < total:
        print(f"{total - tokens:,} were left out: --max_tokens={options.max_tokens}, and documents "
              "are kept whole")  # fmt: skip


def define_flags() -> None:
    """Defines the flags of the command."""
    for name in SETTINGS:
        default = None if name in REQUIRED else getattr(DataConfig, name)
        more = "; a file" if name == "tokenizer" else ""
        flags.DEFINE_string(name, default, f"As config.data.{name}{more}.")
    flags.DEFINE_float(
        "heldout_fraction", DataConfig.heldout_fraction, "As config.data.heldout_fraction."
    )
    flags.DEFINE_integer("max_tokens", 40_000_000, "Training tokens over all domains, at most.")
    flags.DEFINE_string("out", None, "Folder to make.")


command = Command(main, define_flags, required=(*REQUIRED, "out"), uses_devices=False)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
