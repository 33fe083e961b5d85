"""Models of this library for EleutherAI's lm-evaluation-harness, the package `lm-eval`.

    import lm_eval
    from moe_jax.inference.harness import register

    register()
    lm_eval.simple_evaluate(model="moe_jax", model_args={"workdir": "runs/smollm2"}, tasks=["piqa"])

On the command line `python -m moe_jax.inference.harness run --model moe_jax --model_args
workdir=runs/smollm2 --tasks piqa`, with the flags of `lm-eval`.
"""

import collections
import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

from moe_jax.config import MeshConfig, parse_mesh
from moe_jax.config.check import require
from moe_jax.config.json_text import json_text
from moe_jax.data import open_tokenizer_of
from moe_jax.inference.generation import ROWS
from moe_jax.inference.scoring import encode_pair, score_continuations
from moe_jax.inference.text import stream_encoded
from moe_jax.training.loss_labels import NOTES, SEES, loss_labels
from moe_jax.training.saved import load_run

logger = logging.getLogger(__name__)

MOST = "max_gen_toks"
SAME = ("max_new_tokens", "max_tokens", "max_completion_tokens")  # other names of it
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")


class HarnessModel:
    """Answers the three request types of the harness; `register` makes it an `lm_eval` model.

    It reads only `args` of a request. Texts are scored and continued dropless.
    """

    def __init__(
        self,
        workdir: str,
        *,
        step: int | None = None,
        context: int | None = None,
        batch_size: int | str = ROWS,
        add_bos: bool = True,
        trust: bool = False,
        mesh: MeshConfig | str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """Loads a model.

        Args:
          workdir: of a run, or of an imported model.
          step: of the checkpoint; None: the newest.
          context: maximum number of tokens read; None: `data.sequence_length`.
          batch_size: texts at once; "auto": 32.
          add_bos: whether a text begins with `bos_id`, as a document in training does. The `hf`
            model of the harness follows the model's tokenizer: GPT-2, Qwen and SmolLM2 add no BOS
            token, and their published scores are without it.
          trust: whether modules outside the library may be imported for parts of the model.
          mesh: devices that share the model, such as "data=2:fsdp=-1"; None: one device. Colons
            separate sizes, since commas separate the arguments of the harness.
          device: torch device, which the harness always passes; not used.
          max_batch_size: limit for an automatic batch size; not used.

        Raises:
          ValueError: `mesh` is not a mesh; or see `load_run`.
        """
        super().__init__()
        del device, max_batch_size
        if isinstance(mesh, str):
            mesh = parse_mesh(mesh, "mesh", ":")
        self.config, state = load_run(workdir, mesh, step, trust=trust)
        self.params, self.step = state.params, int(state.step)
        self.how: dict[str, Any] = {"state": state.model_state, "step": state.step}
        self.how["batch_size"] = ROWS if batch_size == "auto" else int(batch_size)
        self.tokenizer = open_tokenizer_of(self.config.data)
        self.how["num_ids"] = self.tokenizer.vocab_size
        self.max_length = context or self.config.data.sequence_length
        self.add_bos = add_bos
        self.has_encoder = self.config.model.has_encoder
        self.label = loss_labels(self.config.model)["dropless"]
        if self.label.mark == SEES:
            logger.warning("%s", NOTES[SEES])

    def get_model_info(self) -> dict[str, Any]:
        """The entry on the model in the results, including whether it sees later tokens."""
        scored = {"routing": self.label.label, "mark": self.label.mark}
        return {"step": self.step, "context": self.max_length, "add_bos": self.add_bos, **scored}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The log-likelihood of each (context, continuation), and whether it is greedy."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            bos = self.add_bos or not context.strip()
            pairs.append(
                encode_pair(
                    self.tokenizer, context, continuation, bos=bos, has_encoder=self.has_encoder
                )
            )
        return [(one.log_likelihood, one.is_greedy) for one in self.score(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood per text: scores each token once; context fills up the last window.

        Raises:
          ValueError: the model is an encoder-decoder.
        """
        require(
            not self.has_encoder,
            "only a decoder can score a text without context",
            "the model has an encoder, which needs a text of its own",
            "Leave out tasks of perplexity",
        )
        pairs, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            ids, most = self.tokenizer.encode(text).tolist(), self.max_length
            before = [self.tokenizer.bos_id, *ids]
            for start in range(0, len(ids), most):
                context = before[max(start + 1 - most, 0) : start + 1]
                pairs.append((context, ids[start : start + most]))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, scored in zip(owners, self.score(pairs), strict=True):
            sums[owner] += scored.log_likelihood
        return sums

    def score(self, pairs: Sequence[Any]) -> list[Any]:
        """`score_continuations` of this model."""
        return score_continuations(
            self.config, self.params, pairs, context=self.max_length,
            start_token=self.tokenizer.pad_id, **self.how,
        )  # fmt: skip

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continues the text of each (text, settings) until a stop string or a stop token."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for i, request in enumerate(requests):
            groups[json_text(request.args[1], sort_keys=True)].append(i)
        for settings, numbers in groups.items():
            prompts = [requests[i].args[0] for i in numbers]
            continued = self.continue_texts(prompts, json.loads(settings))
            for i, answer in zip(numbers, continued, strict=True):
                answers[i] = answer
        return answers

    def continue_texts(self, prompts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Continues texts with the settings of a task; a long prompt is cut from the left."""
        num_tokens, stop, sampling = settings_of(settings)
        room = self.max_length - num_tokens
        require(
            room > 0,
            f"{MOST} of a task must be below the context",
            f"{MOST}={num_tokens}, context={self.max_length}",
            "Lower it with gen_kwargs, or raise context",
        )
        answers = [""] * len(prompts)
        most = self.max_length if self.has_encoder else room
        encoded = [self.encode(prompt)[-most:] for prompt in prompts]
        how = {"stop": stop, "context": self.max_length, **self.how, **sampling}
        how |= {"tokenizer": self.tokenizer}
        for piece in stream_encoded(self.config, self.params, encoded, num_tokens, **how):
            answers[piece.row] += piece.text
        return answers

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt, at least one."""
        if self.has_encoder:
            return [*self.tokenizer.encode(prompt).tolist(), self.tokenizer.eos_id]
        begin = [self.tokenizer.bos_id] if self.add_bos or not prompt else []
        return begin + self.tokenizer.encode(prompt).tolist()


def settings_of(settings: dict[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
    """The generation settings of a task.

    Args:
      settings: `until`, strings; `max_gen_toks` or one of `SAME`; `do_sample`, `temperature` and
        those of `SAMPLING`. As in the harness (`normalize_gen_kwargs`), a temperature samples
        unless `do_sample` is false. Without one, decoding is greedy; with `do_sample` it is 1.

    Returns:
      Maximum number of tokens, by default 256; the stop strings; fields of `Sampling`.

    Raises:
      ValueError: there are other settings.
    """
    rest = dict(settings)
    until = rest.pop("until", None) or []
    stop = [text for text in ([until] if isinstance(until, str) else until) if text]
    given = [rest.pop(name) for name in (MOST, *SAME) if name in rest]
    samples = rest.pop("do_sample", None)
    temperature = float(rest.pop("temperature", 1.0 if samples else 0.0))
    temperature *= samples is not False
    sampling = {name: rest.pop(name) for name in SAMPLING if name in rest}
    require(
        not rest,
        f"settings of a task must be among until, {MOST}, do_sample, temperature, "
        f"{', '.join(SAMPLING)}",
        f"got {rest}",
        "Leave these out with gen_kwargs, or in the file of the task",
    )
    return int(given[0] if given else 256), stop, {"temperature": temperature, **sampling}


@functools.cache
def register() -> type:
    """Registers `moe_jax` with the harness; its `model_args` are those of `HarnessModel`.

    Returns:
      The model's class, a `lm_eval.api.model.LM`.

    Raises:
      ImportError: the package is not installed.
    """
    try:
        # The harness registers its own models only while its registry is empty.
        import lm_eval.models  # noqa: F401 (imported only to register them)
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ImportError(
            f"the harness needs the package lm-eval: {error}. Run pip install 'moe_jax[lm_eval]'."
        ) from error
    made: type = register_model("moe_jax")(type("MoeJax", (HarnessModel, LM), {}))
    return made


if __name__ == "__main__":
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
