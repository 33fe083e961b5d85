"""A run in llama.cpp: loss and speed of the run's GGUF files in every format.

    python -m benchmarks.llama_cpp --workdir=runs/quickstart [--bytes=256]

Needs `pip install xllamacpp`, a prebuilt llama.cpp for CPUs. The texts are held-out texts of the
embedded corpus, one per domain; a token is predicted from all tokens before it.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import moe_jax
from moe_jax.config import ExperimentConfig
from moe_jax.data import open_tokenizer_of
from moe_jax.data.corpora import open_corpus
from moe_jax.data.documents import HELDOUT
from moe_jax.interchange.gguf_vocabulary import vocabulary
from moe_jax.interchange.gguf_write import FORMATS, to_gguf
from moe_jax.interchange.leaves import STATE
from moe_jax.training.saved import load_run


class Answer(NamedTuple):
    """A greedy continuation.

    Attributes:
      ids: token ids, N.
      logp_NV: float64, the log-probabilities that predict each token.
    """

    ids: list[int]
    logp_NV: np.ndarray


# Loads a file, then answers each line of requests with a line of answers. It ends by a kill, since
# closing a server may wait for ever.
WORKER = """
import json, os, sys, urllib.request
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.warmup, params.verbosity = False, -1
server = xllamacpp.Server(params)

def tokenize(asked):
    request = urllib.request.Request(
        server.listening_address + "/tokenize",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)

for line in sys.stdin:
    asked = json.loads(line)
    call = tokenize if "content" in asked[0] else server.handle_completions
    print(json.dumps([call(one) for one in asked]), file=answers, flush=True)
"""


class LlamaCpp:
    """A GGUF file in llama.cpp, on one thread, with a cache in float32 (its own is in float16).

    Args:
      path: path of the file.
      vocab_size: V.
      num_slots: maximum number of tokens of a prompt and its answer.
    """

    def __init__(self, path: pathlib.Path, vocab_size: int, num_slots: int = 128):
        command = [sys.executable, "-c", WORKER, str(path), str(num_slots)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.vocab_size = vocab_size

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers to requests.

        Raises:
          RuntimeError: the process ended or refused a request; the message has its output.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise RuntimeError(f"llama.cpp ended: {self.process.stderr.read()}")
        found: list[dict[str, Any]] = json.loads(line)
        if bad := [one for one in found if "error" in one]:
            raise RuntimeError(f"llama.cpp refused a request: {bad[0]}")
        return found

    def answer(self, prompt: Sequence[int], num_tokens: int) -> Answer:
        """Continues a prompt with the most probable tokens, also after the end of a document."""
        [answer] = self.answers([prompt], num_tokens)
        return answer

    def answers(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, always: int | None = None
    ) -> list[Answer]:
        """Answers several prompts; `always`: a token id that every answer repeats."""
        how: dict[str, Any] = {
            "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True,
            "logprobs": self.vocab_size, "cache_prompt": True,
        }  # fmt: skip
        if always is not None:
            how["logit_bias"] = [[always, 1000.0]]
        found = []
        for result in self.ask([{"prompt": list(prompt), **how} for prompt in prompts]):
            steps = result["choices"][0]["logprobs"]["content"]
            logp_NV = np.full((len(steps), self.vocab_size), np.nan)
            for row, step in zip(logp_NV, steps, strict=True):
                for one in step["top_logprobs"]:
                    row[one["id"]] = one["logprob"]
            found.append(Answer([step["id"] for step in steps], logp_NV))
        return found

    def loss(self, ids: Sequence[int]) -> float:
        """Nats per token of a text, given its first token."""
        letter = self.encode("a")[-1]  # an answer that ends inside a character has no logprobs
        answers = self.answers([ids[:i] for i in range(1, len(ids))], 1, letter)
        found = [one.logp_NV[0, i] for one, i in zip(answers, ids[1:], strict=True)]
        return -float(np.mean(found))

    def rate(self, prompt: Sequence[int], num_tokens: int) -> float:
        """Tokens per second of a greedy answer."""
        how = {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
        [found] = self.ask([{"prompt": list(prompt), **how}])
        return float(found["timings"]["predicted_per_second"])

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the file adds in front."""
        [found] = self.ask([{"content": text, "add_special": True, "parse_special": False}])
        ids: list[int] = found["tokens"]
        return ids


def dropless(model: Any) -> Any:
    """The model without drops, as in llama.cpp."""
    parts = dict(model.parts)
    for name, part in parts.items():
        if hasattr(part, "capacity"):
            capacity = dataclasses.replace(part.capacity, eval_factor=0.0)
            parts[name] = dataclasses.replace(part, capacity=capacity)
    return dataclasses.replace(model, parts=parts)


def heldout(config: ExperimentConfig, num_bytes: int) -> list[list[int]]:
    """The ids of one held-out text per domain, with the initial token."""
    tokenizer, corpus = open_tokenizer_of(config.data), open_corpus("embedded")
    texts = []
    for domain in corpus.domains():
        documents = corpus.documents(domain, config.data.heldout_fraction)
        text = next(one.text for split, one in documents if split == HELDOUT)
        cut = text.encode()[:num_bytes].decode(errors="ignore")
        ids = [tokenizer.bos_id, *tokenizer.encode(cut).tolist()]
        texts.append(ids[: config.data.sequence_length])
    return texts


def our_loss(config: ExperimentConfig, params: Any, state: Any, texts: list[list[int]]) -> float:
    """Nats per token of the texts in this library."""
    variables = {"params": {**params, **({STATE: state} if state else {})}}
    network, losses = moe_jax.build(dropless(config.model)), []
    for ids in texts:
        logits_LV = np.asarray(network.apply(variables, np.array([ids], np.int32))[0], np.float64)
        logp_LV = logits_LV - np.logaddexp.reduce(logits_LV, axis=-1, keepdims=True)
        losses += [-logp_LV[i, one] for i, one in enumerate(ids[1:])]
    return float(np.mean(losses))


def main() -> None:
    """Prints a table of the formats."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--bytes", type=int, default=256, help="of a text of each domain")
    arguments = parser.parse_args()
    config, state = load_run(arguments.workdir)
    params = {**state.params, **({STATE: state.model_state} if state.model_state else {})}
    tokenizer, size = open_tokenizer_of(config.data), config.model.vocab_size
    words = vocabulary(tokenizer.name, tokenizer.bos_id, tokenizer.eos_id, size)
    texts = heldout(config, arguments.bytes)
    count, longest = sum(len(ids) - 1 for ids in texts), max(map(len, texts))
    own = our_loss(config, state.params, state.model_state, texts)
    print(f"{count} tokens of {len(texts)} texts")
    print(f"{'format':<8}{'MB':>8}{'nats/token':>12}{'behind':>9}{'tokens/s':>10}")
    print(f"{'here':<8}{'':>8}{own:>12.4f}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            path = pathlib.Path(folder) / f"{kind}.gguf"
            to_gguf(config, params, path, words, format=kind)
            with LlamaCpp(path, size, longest + 80) as model:
                loss = sum(model.loss(ids) * (len(ids) - 1) for ids in texts) / count
                rate = model.rate(texts[0][:16], 64)
            megabytes = path.stat().st_size / 1e6
            line = f"{kind:<8}{megabytes:>8.1f}{loss:>12.4f}{loss - own:>9.4f}{rate:>10.0f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
