"""Trains a SentencePiece BPE tokenizer on a corpus.

    python -m moe_jax.data.train_tokenizer --corpus=embedded --vocab_size=4096 --out=bpe4096.model

Use it with `--config.data.tokenizer=sentencepiece:bpe4096.model`. It is trained on only the
training split, with equal bytes per domain. The same corpus and flags give the same tokenizer.
"""

import io
import os
import pathlib
import re
import sys
from collections.abc import Iterator

import sentencepiece
from absl import flags

from moe_jax import command_line
from moe_jax.command_line import Command
from moe_jax.config import DataConfig
from moe_jax.config.check import require
from moe_jax.data.corpora import open_corpus
from moe_jax.data.documents import HELDOUT, TRAIN, Corpus, heldout_digests, text_digest
from moe_jax.data.records import Fields
from moe_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe_jax.files import write_atomically

# 256 bytes, pad, bos, eos, unk, newline and tab, and room for some merges.
_MIN_VOCAB_SIZE = 300


def train(
    corpus: Corpus,
    path: str,
    *,
    vocab_size: int,
    heldout_fraction: float,
    max_bytes: int = 14_000_000,
) -> SentencePieceTokenizer:
    """Trains a byte-exact BPE tokenizer and writes it to a file.

    Ids: 0 pad, 1 bos, 2 eos, 3 unk (never used: unknown characters become bytes),
    4 newline, 5 tab, then 256 bytes, then the merges.

    Args:
        corpus: what to train on.
        path: the .model file; replaced if it exists, once the tokenizer is trained.
        vocab_size: number of ids, in [300, 65536].
        heldout_fraction: share of the corpus that is held out and not trained on.
        max_bytes: UTF-8 bytes to train on, in equal shares per domain.

    Returns:
        The tokenizer.

    Raises:
        ValueError: if the vocabulary is too small for the text's characters, too large for the
            text, or out of range.
    """
    if not _MIN_VOCAB_SIZE <= vocab_size <= 2**16:
        raise ValueError(
            f"vocab_size lies in [{_MIN_VOCAB_SIZE}, 65536]: got {vocab_size}. "
            "Set --vocab_size, e.g. to 8192."
        )
    require(0 <= heldout_fraction < 1, "--heldout_fraction lies in [0, 1)",
            f"--heldout_fraction={heldout_fraction:g}", "Correct it")  # fmt: skip
    require(max_bytes > 0, "--max_mb must be above 0", f"--max_mb={max_bytes / 1e6:g}", "Raise it")
    model, num_bytes = io.BytesIO(), 0

    def counted() -> Iterator[str]:
        nonlocal num_bytes
        for text in _balanced_texts(corpus, heldout_fraction, max_bytes):
            num_bytes += len(text.encode())
            yield text

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=counted(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # Indentation: 30 % fewer tokens in Python.
            user_defined_symbols=["\n", "\t"],
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=2**30,
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        require(num_bytes > 0, "A tokenizer needs text to train on", f"{corpus.name!r} has none",
                "Name another corpus")  # fmt: skip
        raise ValueError(
            "The vocabulary must hold the characters of the text, and the text must yield the "
            f"merges of the vocabulary: --vocab_size={vocab_size}, {num_bytes} bytes of "
            f"{corpus.name!r}. {_fix(str(error))}."
        ) from error
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, model.getvalue())
    return SentencePieceTokenizer(path)


def _fix(error: str) -> str:
    """What to change, from an error message of SentencePiece."""
    if most := re.search(r"too high .* <= (\d+)", error):
        return f"Set --vocab_size to at most {most[1]}, or train on more text"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"Set --vocab_size to more than {least[1]}, or --max_mb to fewer megabytes"
    reason = re.sub(r"^\w+: \S+\(\d+\) \[.*?\] ", "", " ".join(error.split())).rstrip(".")
    return f"Change --vocab_size or --max_mb as SentencePiece says: {reason}"


def _balanced_texts(corpus: Corpus, heldout_fraction: float, max_bytes: int) -> Iterator[str]:
    """Yields training texts: an equal share of `max_bytes` per domain, or all of its text."""
    domains = corpus.domains()
    never_trains = heldout_digests(corpus, heldout_fraction)
    for domain in domains:
        budget = max_bytes // len(domains)
        for split, document in corpus.documents(domain, heldout_fraction):
            if split == TRAIN and text_digest(document.text) not in never_trains:
                text = document.text.encode()[:budget].decode(errors="ignore")
                budget -= len(text.encode())
                yield text
            if budget <= 0:
                break


def main() -> None:
    """Trains a tokenizer and prints its held-out bytes per token."""
    options = flags.FLAGS
    command_line.require_file("out", options.out, replaces="")
    # Checked like the settings of a run.
    data = DataConfig(
        corpus=options.corpus,
        text_field=options.text_field,
        group_field=options.group_field,
        id_field=options.id_field,
        heldout_fraction=options.heldout_fraction,
    )
    try:
        corpus = open_corpus(data.corpus, Fields(data.text_field, data.id_field, data.group_field))
        tokenizer = train(
            corpus,
            options.out,
            vocab_size=options.vocab_size,
            heldout_fraction=options.heldout_fraction,
            max_bytes=int(options.max_mb * 1e6),
        )
    except ValueError as error:  # a setting of a run is a flag of this command
        raise ValueError(str(error).replace("config.data.", "--")) from error
    for domain in corpus.domains():
        documents = corpus.documents(domain, options.heldout_fraction)
        heldout = [document.text for split, document in documents if split == HELDOUT]
        num_tokens = sum(len(tokenizer.encode(text)) for text in heldout)
        num_bytes = sum(len(text.encode()) for text in heldout)
        print(f"{domain:<16} {num_bytes / max(num_tokens, 1):.2f} held-out bytes per token")
    print(f"wrote {options.out}")


def define_flags() -> None:
    """Defines the flags of the command."""
    for name in ("corpus", "text_field", "id_field", "group_field"):
        flags.DEFINE_string(name, getattr(DataConfig, name), f"As config.data.{name}.")
    flags.DEFINE_integer("vocab_size", 8192, "Number of ids, at most 65536.")
    flags.DEFINE_string("out", None, "Path of the .model file to write.")
    flags.DEFINE_float("max_mb", 14.0, "Megabytes of text to train on, over all domains.")
    flags.DEFINE_float(
        "heldout_fraction",
        DataConfig.heldout_fraction,
        "As config.data.heldout_fraction: what is held out there must not be seen here.",
    )


command = Command(main, define_flags, required=("out",), uses_devices=False)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
