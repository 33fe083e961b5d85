"""Corpora, tokenizers, objectives, and the batches made from them.

A document (`documents`) of a corpus (`corpora`) is encoded (`tokenizers`) into token files
(`token_files`). These are read back in windows (`windows`, `packed_windows`), turned into examples
(`objectives`), mixed and batched (`pipeline`). `opened` opens all of this once per run.
"""

from moe_jax.data.corpora import open_corpus
from moe_jax.data.documents import Corpus, Document
from moe_jax.data.objectives import Example, Objective
from moe_jax.data.opened import Data, open_data, open_tokenizer_of, with_whole_paths
from moe_jax.data.pipeline import check_data, heldout_batches, train_batches
from moe_jax.data.token_files import TokenFiles, prepare_token_files
from moe_jax.data.tokenizers import ByteTokenizer, Tokenizer, open_tokenizer
from moe_jax.data.windows import RawWindow

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "Data",
    "Document",
    "Example",
    "Objective",
    "RawWindow",
    "TokenFiles",
    "Tokenizer",
    "check_data",
    "heldout_batches",
    "open_corpus",
    "open_data",
    "open_tokenizer",
    "open_tokenizer_of",
    "prepare_token_files",
    "train_batches",
    "with_whole_paths",
]
