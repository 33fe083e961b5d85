"""The draft of speculative decoding: it proposes tokens and counts the accepted ones."""

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
    """The source of proposed tokens, with counts of proposed and accepted ones.

        draft = Draft(*load_run("runs/small"), length=4)
        answers = generate_tokens(config, params, prompts, 64, draft=draft)
        print(draft.acceptance_rate, draft.tokens_per_pass)

    Attributes:
      config: of a smaller model with the same vocabulary; None: the model's own multi-token modules
        propose.
      trained: its parameters, state and step: a `TrainState`, or a `Serving`.
      length: Y, tokens proposed before each pass of the model.
      passes: number of model passes, summed over texts.
      proposed: number of proposed tokens in these passes.
      accepted: number of proposed tokens in the texts.
      added: number of tokens in the texts that passes added.
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
        """The mean number of tokens that a pass adds to a text; nan before the first pass."""
        return self.added / self.passes if self.passes else math.nan

    def line(self) -> str:
        """A summary for the end of a generation."""
        return (
            f"draft: {self.acceptance_rate:.1%} of {self.proposed} proposed tokens were accepted, "
            f"{self.tokens_per_pass:.2f} tokens a pass"
        )

    def count(self, counts_BR: np.ndarray, kept_BR: np.ndarray) -> None:
        """Counts passes and tokens, given how many tokens each pass drew, and how many were kept.

        The last token of a pass is the model's own. A pass after the end of a text draws no token.
        """
        passes = int(np.count_nonzero(counts_BR))
        self.passes += passes
        self.proposed += passes * self.length
        self.accepted += int(np.minimum(np.maximum(counts_BR - 1, 0), kept_BR).sum())
        self.added += int(kept_BR.sum())

    def drafter(self, model: LanguageModel, num_ids: int | None) -> Drafter:
        """The drafter for a model with `num_ids` tokens.

        Raises:
          ValueError: the draft does not fit the model.
        """
        require(
            1 <= self.length <= SPARE,
            f"a draft must propose 1 to {SPARE} tokens, for which a ring of a cache has room",
            f"length={self.length}",
            f"Use 1 to {SPARE}",
        )
        require(
            (self.config is None) == (self.trained is None),
            "a smaller model as draft needs a config and what was trained; without both, the "
            "multi-token modules of the model itself propose",
            f"{'config' if self.config is None else 'trained'}=None",
            "Pass both, as load_run gives them, or neither",
        )
        require(
            not model.has_encoder,
            "only decoders support a draft",
            "the model has an encoder",
            "Generate without a draft",
        )
        if self.config is None:
            return self.own_modules(model)
        own = for_inference(self.config.model)
        why = "it has an encoder" if own.has_encoder else why_anew(own)
        require(
            not why,
            "a draft must be a causal decoder that goes on from caches",
            why,
            "Use another",
        )
        known = model.vocab_size if num_ids is None else num_ids
        require(
            known <= own.vocab_size,
            "a draft must know all tokens of the model",
            f"vocab_size={own.vocab_size}, the model has {known} ids",
            "Use a draft of the same tokenizer",
        )
        return SmallerModel(own, model.vocab_size, self.config.data.objective.sees_prompt)

    def own_modules(self, model: LanguageModel) -> OwnModules:
        """The multi-token modules of the model."""
        modules = model.modules
        require(
            modules is not None,
            "a model needs multi-token modules to propose tokens to itself",
            "it has none, multi_token=None",
            "Use a smaller model as draft",
        )
        assert modules is not None
        drafter, stack = OwnModules(model), modules.module
        stuck = stack.without_cache(model.dims)
        stuck += [n for n, p in stack.parts().items() if not parts_take_back({n: p}, model.dims)]
        require(
            not stuck,
            "multi-token modules can propose tokens only if their caches allow overwriting",
            f"{stuck} have no such cache",
            "Use a smaller model as draft",
        )
        places = drafter.places(self.length)
        require(
            places <= SPARE + 1,
            f"a draft of multi-token modules must have length + min(length, depth) of at most "
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
        """The settings of speculation with this draft, and the draft's parameters and state."""
        drafter, own = self.drafter(model, num_ids), serving
        if isinstance(drafter, SmallerModel):
            own = self.trained
            if not isinstance(own, Serving):
                own = Serving(own.params, own.model_state, own.step)
            smaller, own = layers_apart(drafter.model, own)
            drafter = dataclasses.replace(drafter, model=smaller)
        return Speculation(model, drafter, self.length, sampling, num_ids, record), own
