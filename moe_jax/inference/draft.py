"""The draft of speculative decoding: what proposes tokens, and how many of them were accepted."""

import dataclasses
import math
from typing import Any

import numpy as np

from moe_jax.config import ExperimentConfig
from moe_jax.config.check import require
from moe_jax.inference.decoding import Serving, for_inference, layers_apart, why_anew
from moe_jax.inference.drafting import Drafter, OwnModules, SmallerModel, parts_take_back
from moe_jax.inference.sampling import Sampling
from moe_jax.inference.speculative import Speculation
from moe_jax.layers.cache import SPARE
from moe_jax.models.model import LanguageModel


@dataclasses.dataclass
class Draft:
    """What proposes tokens, and how many of them were accepted.

        draft = Draft(*load_run("runs/small"), length=4)
        answers = generate_tokens(config, params, prompts, 64, draft=draft)
        print(draft.acceptance_rate, draft.tokens_per_pass)

    Attributes:
      config: of a smaller model of the same tokens; None: the multi-token modules of the model
        itself propose.
      trained: its parameters, state and step: a `TrainState`, or a `Serving`.
      length: Y, tokens proposed before each pass of the model.
      passes: of the model, in each text.
      proposed: tokens, in all of them.
      accepted: tokens that were proposed and are in the texts.
      added: tokens that came of passes and are in the texts.
    """

    config: ExperimentConfig | None = None
    trained: Any = None
    length: int = 4
    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    added: int = 0

    @property
    def acceptance_rate(self) -> float:
        """The share of proposed tokens that are in the texts; nan before the first pass."""
        return self.accepted / self.proposed if self.proposed else math.nan

    @property
    def tokens_per_pass(self) -> float:
        """How many tokens a pass of the model adds to a text; nan before the first pass."""
        return self.added / self.passes if self.passes else math.nan

    def line(self) -> str:
        """What is said at the end."""
        return (
            f"draft: {self.acceptance_rate:.1%} of {self.proposed} proposed tokens were accepted, "
            f"{self.tokens_per_pass:.2f} tokens a pass"
        )

    def count(self, counts_BR: np.ndarray, kept_BR: np.ndarray) -> None:
        """Counts passes, by the tokens that they drew, and how many of those are in the texts.

        The last token that a pass draws is the model's own; a pass behind the end of a text draws
        none.
        """
        passes = int(np.count_nonzero(counts_BR))
        self.passes += passes
        self.proposed += passes * self.length
        self.accepted += int(np.minimum(np.maximum(counts_BR - 1, 0), kept_BR).sum())
        self.added += int(kept_BR.sum())

    def drafter(self, model: LanguageModel, num_ids: int | None) -> Drafter:
        """What proposes tokens to a model of so many ids.

        Raises:
          ValueError: it cannot.
        """
        require(
            1 <= self.length <= SPARE,
            f"a draft proposes 1 to {SPARE} tokens, for which a ring of a cache has room",
            f"length={self.length}",
            f"Use 1 to {SPARE}",
        )
        require(
            (self.config is None) == (self.trained is None),
            "a smaller model as draft has a config and what was trained; without both, the "
            "multi-token modules of the model itself propose",
            f"{'config' if self.config is None else 'trained'}=None",
            "Pass both, as load_run gives them, or neither",
        )
        require(
            not model.has_encoder,
            "a draft is of decoders alone",
            "the model has an encoder",
            "Generate without a draft",
        )
        if self.config is None:
            return self.own_modules(model)
        own = for_inference(self.config.model)
        why = "it has an encoder" if own.has_encoder else why_anew(own)
        require(
            not why,
            "a draft is a causal decoder that goes on from caches",
            why,
            "Use another",
        )
        known = model.vocab_size if num_ids is None else num_ids
        require(
            known <= own.vocab_size,
            "a draft knows all tokens of the model",
            f"vocab_size={own.vocab_size}, the model has {known} ids",
            "Use a draft of the same tokenizer",
        )
        return SmallerModel(own, model.vocab_size, self.config.data.objective.sees_prompt)

    def own_modules(self, model: LanguageModel) -> OwnModules:
        """The multi-token modules of the model."""
        modules = model.modules
        require(
            modules is not None,
            "a model proposes tokens to itself by its multi-token modules",
            "it has none, multi_token=None",
            "Use a smaller model as draft",
        )
        assert modules is not None
        drafter, stack = OwnModules(model), modules.module
        stuck = stack.without_cache(model.dims)
        stuck += [n for n, p in stack.parts().items() if not parts_take_back({n: p}, model.dims)]
        require(
            not stuck,
            "multi-token modules propose tokens if those are taken back by writing over them",
            f"{stuck} have no such cache",
            "Use a smaller model as draft",
        )
        places = drafter.places(self.length)
        require(
            places <= SPARE + 1,
            f"a draft of multi-token modules has length + min(length, depth) of at most "
            f"{SPARE + 1}",
            f"length={self.length}, depth={modules.depth}",
            "Lower the length",
        )
        return drafter

    def of(
        self,
        model: LanguageModel,
        serving: Serving,
        sampling: Sampling,
        num_ids: int | None,
        record: bool,
    ) -> tuple[Speculation, Serving]:
        """How a model speculates with this draft, and the parameters and state of the draft."""
        drafter, own = self.drafter(model, num_ids), serving
        if isinstance(drafter, SmallerModel):
            own = self.trained
            if not isinstance(own, Serving):
                own = Serving(own.params, own.model_state, own.step)
            smaller, own = layers_apart(drafter.model, own)
            drafter = dataclasses.replace(drafter, model=smaller)
        return Speculation(model, drafter, self.length, sampling, num_ids, record), own
