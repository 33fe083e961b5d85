"""Multi-token prediction: modules that predict tokens after the next one (legend: `moe_jax.moe`).

Module k = 1, 2, ... has its own layer, and uses the model's embedding and head. At position j it
joins the embedding of token j + k with the previous module's output at position j (module 1: the
model's normed residual). It predicts token j + k + 1. The modules run in training, and as the draft
of speculative decoding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.layers.norms import Norm
from moe_jax.models.stack import Stack, StackLayout, StackOutput, unstacked
from moe_jax.parameters import ParameterSpec, linear, scaled_init
from moe_jax.part import Aux, Call, Dims, RunShape

if TYPE_CHECKING:
    from moe_jax.models.model import LanguageModel

NAME = "multi_token"
NORMS = ("embedding_norm", "hidden_norm", "final_norm")


@dataclasses.dataclass(frozen=True)
class MultiToken(Settings):
    """The modules that predict later tokens, and the weight of their loss.

    Source: DeepSeek-V3, arXiv:2412.19437, sec. 2.2.
    """

    depth: int = setting(1, at_least=1)  # modules; the last predicts the token depth + 1 ahead
    layer: tuple[str, ...] = ("attention", "moe")  # of each module, by the names of its parts
    weight: float = setting(0.3, at_least=0)  # of the mean of their losses


@dataclasses.dataclass(frozen=True)
class Modules:
    """The modules of a model.

    Attributes:
      depth: D, number of modules.
      weight: of the mean of their losses.
      norm: of the embedding, of the hidden state, and before the head.
      stack: their layers, as a unit repeated D times.
    """

    depth: int
    weight: float
    norm: Norm
    stack: Stack

    def check(self, layout: StackLayout, names: list[str], has_encoder: bool) -> None:
        """Checks the stack and the names of the model's parts.

        Raises:
          ValueError: a rule is broken.
        """
        require(
            layout.causal and not layout.shared and not has_encoder,
            "multi_token needs a causal stack without shared parts, and no encoder",
            f"stack.causal={layout.causal}, stack.shared={layout.shared}, encoder: {has_encoder}",
            "Set multi_token=None",
        )
        taken = [name for name in names if name.startswith(NAME)]
        require(
            not taken,
            f"names that begin with {NAME!r} are those of the parts of multi_token",
            f"parts {taken}",
            "Rename them",
        )
        if not layout.allow_lookahead:
            self.stack.check_causality()

    def layer_indices(self, start: int) -> dict[str, tuple[int, ...]]:
        """The layers of the modules and of their parts, numbered from `start`."""
        found = joined(self.stack.layer_indices()) | {NAME: range(self.depth)}
        return {name: tuple(start + layer for layer in layers) for name, layers in found.items()}

    def specs(self, dims: Dims) -> dict[str, Any]:
        """`project` [2M, M], three norms and `stack`, each with a leading dim of modules."""
        model_dim = dims.model_dim
        init = scaled_init(1.0, 2 * model_dim)
        own: dict[str, Any] = {name: self.norm.specs(model_dim) for name in NORMS}
        own["project"] = ParameterSpec((2 * model_dim, model_dim), (None, "model"), init, NAME)
        own = jax.tree.map(lambda spec: spec.stack(self.depth), own)
        return own | {"stack": self.stack.specs(dims)}

    def check_run(self, dims: Dims, run: RunShape) -> None:
        """See `Part`."""
        self.stack.check_run(dims, run)

    def apply(
        self,
        params: Any,
        hidden_BLM: jax.Array,
        call: Call,
        embed: Callable[[jax.Array], jax.Array],
        state: Mapping[str, Any],
    ) -> tuple[list[jax.Array], dict[str, Aux]]:
        """Runs all modules.

        Args:
          params: in the tree that `specs` declares.
          hidden_BLM: the model's normed residual, in the compute dtype.
          call: of the model, with positions and segments.
          embed: from tokens [B, L] to embeddings [B, L, M].
          state: of the modules' parts, each with a leading dim of layers.

        Returns:
          The head input of each module, [B, L, M], and the `Aux` by part, with a leading dim of
          layers.
        """
        outputs, auxes = [], []
        for k, own in enumerate(self.each(params, state)):
            output = self.run(own, hidden_BLM, later_call(call, k + 1), embed)
            hidden_BLM = output.x_BLM
            outputs.append(hidden_BLM)
            auxes.append(output.aux)
        return outputs, jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)

    @property
    def module(self) -> Stack:
        """The stack of one module."""
        return dataclasses.replace(self.stack, first=self.stack.unit, unit=(), repeats=0)

    def each(self, params: Any, state: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        """The parameters and the state of every module."""
        trees = unstacked({**params, "stack": params["stack"]["unit"]}, self.depth)
        return list(zip(trees, self.by_module(dict(state)), strict=True))

    def by_module(self, tree: Any) -> list[Any]:
        """Splits arrays with a leading dim of layers by module."""
        return [
            jax.tree.map(lambda a, k=k: jnp.split(a, self.depth)[k], tree)
            for k in range(self.depth)
        ]

    def run(
        self,
        own: tuple[Any, Any],
        hidden_BLM: jax.Array,
        later: Call,
        embed: Callable[[jax.Array], jax.Array],
        cache: Any = None,
    ) -> StackOutput:
        """Runs one module.

        Args:
          own: its parameters and state, from `each`.
          hidden_BLM: head input of the previous module, or the model's normed residual.
          later: the call of the module, see `later_call`.
          embed: from tokens [B, L] to embeddings [B, L, M].
          cache: of `module`, or None.

        Returns:
          The output of its stack, with the head input as `x_BLM`.
        """
        params, state = own
        assert later.tokens_BL is not None
        embedded_BLM = embed(later.tokens_BL).astype(hidden_BLM.dtype)
        both_BLN = jnp.concatenate(
            [
                self.norm.apply(params["embedding_norm"], embedded_BLM),
                self.norm.apply(params["hidden_norm"], hidden_BLM),
            ],
            axis=-1,
        )
        layers = {"first": params["stack"], "unit": {}, "last": {}}
        x_BLM = linear(both_BLN, params["project"])
        output = self.module.apply(layers, x_BLM, later, state=state, cache=cache)
        return output._replace(x_BLM=self.norm.apply(params["final_norm"], output.x_BLM))

    def loss(
        self, aux: Mapping[str, Aux], tokens_D: jax.Array | None, batch: Mapping[str, Any] | None
    ) -> jax.Array | float:
        """What the modules add to the training loss: their own losses and those of their parts.

        Each is a mean over modules. A module has fewer tokens than the previous one, so the losses
        of its parts are per token of that module.

        Args:
          aux: by part, as the model names them; `multi_token` has `loss_D`, nats per target.
          tokens_D: float32, valid tokens of each module in the whole batch; None if none ran.
          batch: sums of the whole batch by part, or None.
        """
        total = self.weight * jnp.mean(aux[NAME].sums["loss_D"]) if NAME in aux else 0.0
        sums, parts = separated(batch), self.stack.parts()
        for name, own in separated(aux).items():
            assert tokens_D is not None, "batch_totals was told the model"
            of_each = (self.by_module(own), tokens_D, self.by_module(sums.get(name)))
            losses = [parts[name].loss(*one) for one in zip(*of_each, strict=True)]
            total += sum(losses) / self.depth
        return total

    def metrics(self, aux: Mapping[str, Aux]) -> dict[str, dict[str, jax.Array]]:
        """Metrics by part, as the model names them, and each module's `loss`, nats per target."""
        parts, found = self.stack.parts(), {}
        for name, own in separated(aux).items():
            of_each = [parts[name].metrics(one) for one in self.by_module(own)]
            found[name] = jax.tree.map(lambda *a: jnp.concatenate(a), *of_each)
        own_loss = {NAME: {"loss": aux[NAME].sums["loss_D"]}} if NAME in aux else {}
        return joined(found) | own_loss


def shift(values: jax.Array, k: int) -> jax.Array:
    """The values [..., L] shifted from k positions later; 0 beyond the end."""
    length = values.shape[-1]
    padding = [(0, 0)] * (values.ndim - 1) + [(0, min(k, length))]
    return jnp.pad(values[..., k:], padding)


def same_document(segments: jax.Array, k: int) -> jax.Array:
    """Whether the token k positions later is in the same document: bool, like `segments`."""
    return (segments > 0) & (segments == shift(segments, k))


def later_call(call: Call, k: int) -> Call:
    """The call of module k: tokens and positions k later, or padding if there is no such token.

    It has its own random key, and so its own noise.
    """
    tokens_BL, positions_BL, segments_BL = call.tokens_BL, call.positions_BL, call.segments_BL
    assert tokens_BL is not None and positions_BL is not None and segments_BL is not None
    previous_B = tokens_BL[:, k - 1] if k <= tokens_BL.shape[1] else call.previous_B
    return dataclasses.replace(
        call,
        tokens_BL=shift(tokens_BL, k),
        previous_B=previous_B,
        positions_BL=shift(positions_BL, k),
        segments_BL=jnp.where(same_document(segments_BL, k), segments_BL, 0),
        rng=None if call.rng is None else jax.random.fold_in(call.rng, 2**31 - k),
    )


def later_weights(weights: jax.Array, segments: jax.Array, k: int) -> jax.Array:
    """The loss weights of the targets of module k: weights k later, in the same document.

    A target counts only if the model's own target at that position counts.

    Args:
      weights: float32 [..., L], of the next token.
      segments: int32 [..., L].
      k: number of the module.
    """
    return jnp.where(same_document(segments, k) & (weights > 0), shift(weights, k), 0)


def without_modules(model: "LanguageModel") -> "LanguageModel":
    """The model without multi-token modules and the parts that only they use."""
    if model.multi_token is None:
        return model
    used = {name for layout in model.layouts.values() for name in layout.names}
    parts = {name: part for name, part in dict(model.parts).items() if name in used}
    return dataclasses.replace(model, parts=parts, multi_token=None)


def joined(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Values by part of the modules, under the model's names for these parts."""
    return {f"{NAME}_{name}": value for name, value in parts.items()}


def own_name(part: str) -> str:
    """The name of a part in `LanguageModel.parts`, from its name in `all_parts`."""
    return part.removeprefix(f"{NAME}_")


def separated(parts: Mapping[str, Any] | None) -> dict[str, Any]:
    """The inverse of `joined`; leaves out parts outside the modules."""
    start = f"{NAME}_"
    found = (parts or {}).items()
    return {own_name(name): own for name, own in found if name.startswith(start)}
