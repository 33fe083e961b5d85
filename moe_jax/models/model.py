"""A language model: embeddings, a stack of layers, an output head (legend: `moe_jax.moe`)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config import OptimizerConfig
from moe_jax.config.check import require
from moe_jax.config.settings import Settings, setting
from moe_jax.layers.attention import Attention
from moe_jax.layers.norms import Norm, RMSNorm
from moe_jax.models.checks import check_names, check_replay, check_stack
from moe_jax.models.layer import PLACEMENTS, Layer, dropout
from moe_jax.models.layout import SEGMENTS, StackLayout
from moe_jax.models.multi_token import NAME, Modules, MultiToken, joined, separated
from moe_jax.models.output import Encoded, ModelOutput, of_both
from moe_jax.models.stack import REMAT, Stack, StackOutput
from moe_jax.models.trained import check_trained
from moe_jax.models.wrapping import wrapped
from moe_jax.moe.part import MoE
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import ParameterSpec, ToLogits, dense, grouped, normal_init, rows, zeros
from moe_jax.part import DTYPES, Aux, Call, Dims, Part, RunShape, check_divides
from moe_jax.weights.low_rank import Adapters
from moe_jax.weights.quantised import Quantisation


@dataclasses.dataclass(frozen=True)
class LanguageModel(Settings):
    """A decoder-only Transformer made of parts.

    The layers of `stack` name entries of `parts`. A part that is a whole layer has its own settings
    in place of `norm`, `norm_placement`, `residual_multiplier` and `dropout_rate`.
    """

    family: ClassVar[str] = "model"

    vocab_size: int = setting(384, at_least=1)  # at least the tokenizer's; 384 for bytes
    model_dim: int = setting(128, at_least=1)  # M
    parts: tuple[tuple[str, Part], ...] | Mapping[str, Part] = (
        ("attention", Attention()),
        ("moe", MoE()),
    )  # by name, as sorted pairs
    stack: StackLayout = StackLayout()  # the layers, by the names of their parts
    norm: Norm = RMSNorm()  # before every branch and before the head: "rmsnorm", "layernorm"
    norm_placement: str = setting("pre", choices=PLACEMENTS)  # before branches, after, or both
    residual_multiplier: float = setting(1.0, above=0)  # of a branch's output (Granite)
    tie_embeddings: bool = True  # the output head is the input embedding, transposed
    embedding_multiplier: float | None = setting(
        None, above=0
    )  # of embedded tokens; None: sqrt(model_dim)
    # Of initial embeddings; None: model_dim**-0.5 (T5: 1.0).
    embedding_stddev: float | None = setting(None, above=0)
    head_init_scale: float = setting(1.0, above=0)  # of an untied head: variance x model_dim
    head_bias: bool = False  # of the output head (Phi-3.5)
    # Of logits: 1 / logits_scaling (Granite), model_dim**-0.5 (tied head of T5).
    logits_multiplier: float = setting(1.0, above=0)
    logits_softcap: float | None = setting(None, above=0)  # c: logits become c * tanh(logit / c)
    dropout_rate: float = setting(0.0, at_least=0, below=1)  # on embeddings and on every branch
    compute_dtype: str = setting("float32", choices=DTYPES)  # of activations and matmuls
    multi_token: MultiToken | None = None  # modules that predict later tokens; None: none
    quantisation: Quantisation | None = None  # of weights, which then do not train; None: none
    adapters: Adapters | None = None  # low-rank, added to frozen weights (LoRA); None: none
    scan_layers: bool = setting(True, changes_results=False)  # compile the repeated layers once
    # What the backward pass recomputes: "dots": all except matmuls and attention; "full": all.
    remat: str = setting("none", choices=tuple(REMAT), changes_results=False)

    def check(self) -> None:
        """See `Settings`."""
        object.__setattr__(self, "parts", tuple(sorted(dict(self.parts).items())))
        check_names(self)
        for name, stack in self.stacks.items():
            check_stack(name, self.layouts[name], stack, self.dims)
        blind = sorted(n for n, part in self.part.items() if part.reads_memory)
        require(
            self.has_encoder or not blind,
            "a part that reads the output of an encoder needs a model with one",
            f"{blind} in a model without",
            "Use the model 'encoder_decoder', or remove the part",
        )
        require(
            not self.tie_embeddings or self.head_init_scale == 1,
            "model.head_init_scale requires an untied head",
            f"{self.head_init_scale} with tie_embeddings=True",
            "Set tie_embeddings=False, or embedding_stddev instead",
        )
        if self.modules is not None:
            self.modules.check(self.stack, list(dict(self.parts)), self.has_encoder)
        self.specs()  # parts raise if sizes of the model do not fit theirs

    @property
    def dims(self) -> Dims:
        """The sizes that parts depend on."""
        return Dims(self.model_dim, self.vocab_size)

    @property
    def part(self) -> dict[str, Part]:
        """Parts by name, including the branches of whole layers."""
        branches = [branch for stack in self.stacks.values() for branch in stack.named_parts()]
        return {**dict(self.parts), **dict(branches)}

    @property
    def layouts(self) -> dict[str, StackLayout]:
        """The layouts of the stacks, by the name of the stack's parameters."""
        return {"stack": self.stack}

    @functools.cached_property
    def stacks(self) -> dict[str, Stack]:
        """The stacks by the name of their parameters, in the order of layer numbers."""
        return {name: self.built(layout) for name, layout in self.layouts.items()}

    @property
    def has_encoder(self) -> bool:
        """Whether the model has an encoder."""
        return "encoder" in self.layouts

    @property
    def decoder(self) -> Stack:
        """The stack whose output the head reads."""
        return self.stacks["stack"]

    def built(self, layout: StackLayout) -> Stack:
        """The stack of a layout."""
        part = dict(self.parts)
        segments = {name: tuple(map(self.layer, getattr(layout, name))) for name in SEGMENTS}
        return Stack(
            **segments,
            repeats=layout.repeats,
            shared=tuple((name, part[name]) for name in layout.shared),
            tied=layout.tied,
            causal=layout.causal,
            scan=self.scan_layers,
            remat=self.remat,
        )

    def layer(self, names: str | tuple[str, ...]) -> Any:
        """The layer of these parts; a bare name is a whole layer."""
        part = dict(self.parts)
        if isinstance(names, str):
            return part[names]
        return Layer(
            branches=tuple((name, part[name]) for name in names),
            norm=self.norm,
            placement=self.norm_placement,
            multiplier=self.residual_multiplier,
            dropout_rate=self.dropout_rate,
        )

    @functools.cached_property
    def modules(self) -> Modules | None:
        """The modules of `multi_token`."""
        given = self.multi_token
        if given is None:
            return None
        stack = Stack(unit=(self.layer(given.layer),), repeats=given.depth, remat=self.remat)
        return Modules(given.depth, given.weight, self.norm, stack)

    @property
    def all_parts(self) -> dict[str, Part]:
        """The parts of the stacks, and of the multi-token modules as multi_token_NAME."""
        return self.part | (joined(self.modules.stack.parts()) if self.modules else {})

    @property
    def layers_of(self) -> dict[str, tuple[int, ...]]:
        """The layers that use each part, in order; multi-token modules come last."""
        indices: dict[str, tuple[int, ...]] = {}
        start = 0
        for stack in self.stacks.values():
            for part, found in stack.layer_indices().items():
                indices[part] = indices.get(part, ()) + tuple(start + i for i in found)
            start += stack.num_layers
        return indices | ({} if self.modules is None else self.modules.layer_indices(start))

    @property
    def moe_parts(self) -> dict[str, Any]:
        """The parts of the stacks that route tokens to experts: those with `routes`."""
        used = self.layers_of  # leaves out parts that only the multi-token modules use
        return {name: part for name, part in self.part.items() if part.routes and name in used}

    def map_parts(self, change: Callable[[Part], Part]) -> "LanguageModel":
        """The model with `change` applied to every part and to the branches of whole layers."""
        parts = tuple((name, part.map_branches(change)) for name, part in dict(self.parts).items())
        return dataclasses.replace(self, parts=parts)

    @property
    def moe_layers(self) -> dict[str, tuple[int, ...]]:
        """The layers that use each of `moe_parts`, in order."""
        layers = self.layers_of
        return {name: layers[name] for name in self.moe_parts}

    def specs(self) -> dict[str, Any]:
        """The parameters; a quantised or adapted weight has one spec per array."""
        return wrapped(self.plain_specs(), (self.quantisation, self.adapters))

    def plain_specs(self) -> dict[str, Any]:
        """`embedding`, `final_norm`, `stack`, and any `head`, `head_bias`, `multi_token`."""
        vocab, model = self.vocab_size, self.model_dim
        specs: dict[str, Any] = {
            "embedding": self.embedding_spec(),
            "final_norm": self.norm.specs(model),
            **{name: stack.specs(self.dims) for name, stack in self.stacks.items()},
        }
        if not self.tie_embeddings:
            init = normal_init(self.head_init_scale**0.5 * model**-0.5)
            specs["head"] = ParameterSpec((model, vocab), ("model", "vocab"), init, "head")
        if self.head_bias:
            specs["head_bias"] = ParameterSpec((vocab,), ("vocab",), zeros, "head", decays=False)
        if self.modules is not None:
            specs[NAME] = self.modules.specs(self.dims)
        return specs

    def embedding_spec(self) -> ParameterSpec:
        """The spec of an input embedding, [V, M]."""
        init = normal_init(self.embedding_stddev or self.model_dim**-0.5)
        shape = (self.vocab_size, self.model_dim)
        return ParameterSpec(shape, ("vocab", "model"), init, "embedding", decays=False)

    def state_specs(self) -> dict[str, Any]:
        """State by part, with a leading dim of layers."""
        specs = [stack.state_specs(self.dims) for stack in self.stacks.values()]
        if self.modules is not None:
            specs.append(joined(self.modules.stack.state_specs(self.dims)))
        return {name: own for one in specs for name, own in one.items()}

    def looks_ahead(self, training: bool) -> bool:
        """Whether a logit can depend on later tokens."""
        parts = (self.part[name] for name in self.stack.names | set(self.decoder.parts()))
        return not self.stack.causal or any(part.looks_ahead(training) for part in parts)

    def check_trained(self, optimizer: OptimizerConfig) -> None:
        """Checks the names of parameters that train; see `models.trained`."""
        check_trained(optimizer, self)

    def check_run(self, run: RunShape) -> None:
        """Checks that the mesh can split the batch, the parts and the vocabulary.

        Raises:
          ValueError: with the sizes and what to change.
        """
        check_divides({k: v for k, v in self.plain_specs().items() if k not in self.stacks}, run)
        for name, stack in self.stacks.items():
            own = run._replace(length=run.encoder_length) if name == "encoder" else run
            stack.check_run(self.dims, own)
        if self.modules is not None:
            self.modules.check_run(self.dims, run)
        check_divides(self.specs(), run)

    def run(
        self,
        params: Any,
        call: Call,
        *,
        state: Mapping[str, Any] | None = None,
        replay: Mapping[str, Any] | None = None,
        cache: Any = None,
        multi_token: bool = False,
        last_alone: bool = False,
    ) -> ModelOutput:
        """Predicts the next token at every position.

        Args:
          params: in the tree that `specs` declares.
          call: with `tokens_BL`.
          state: by part, as `state_specs` declares it, or None.
          replay: choices that replace the routers' own, by part, [X, B, L, K]; or None.
          cache: by position, or None.
          multi_token: also run the multi-token modules, without replay and cache.
          last_alone: compute only the logits of the last place, [B, 1, V].
        """
        assert call.tokens_BL is not None
        x_BLM = self.embed(params, call.tokens_BL)
        trees: dict[str, Any] = {"state": state, "replay": replay, "cache": cache}
        trees |= {"multi_token": multi_token, "last_alone": last_alone}
        return self.run_embedded(params, x_BLM, call, **trees)

    def embed(self, params: Any, tokens_BL: jax.Array) -> jax.Array:
        """The embedded tokens in float32, [B, L, M]."""
        # Gather the whole table over fsdp; otherwise the compiler replicates the batch. In float32,
        # so that the gradient sums the many rows of a frequent token in float32.
        with jax.named_scope("embedding"):
            table_VM = jax.tree.map(lambda a: constrain(a, "vocab", None), params["embedding"])
            multiplier = self.embedding_multiplier
            embedded_BLM = rows(table_VM, tokens_BL).astype(jnp.float32)
            return embedded_BLM * (self.model_dim**0.5 if multiplier is None else multiplier)

    def run_embedded(
        self,
        params: Any,
        x_BLM: jax.Array,
        call: Call,
        *,
        state: Mapping[str, Any] | None = None,
        replay: Mapping[str, Any] | None = None,
        cache: Any = None,
        multi_token: bool = False,
        last_alone: bool = False,
    ) -> ModelOutput:
        """`run`, starting from embedded tokens."""
        check_replay({n: own for n, own in self.layers_of.items() if n in self.part}, replay)
        call, encoded = self.encode(params, call, state=state, replay=replay)
        trees = {"state": state, "replay": replay, "cache": cache}
        output = self.through("stack", params, x_BLM, call, **trees)
        hidden_BLM = self.norm.apply(params["final_norm"], output.x_BLM)
        scored_BLM = hidden_BLM[:, -1:] if last_alone else hidden_BLM
        found = ModelOutput(
            self.logits(params, scored_BLM),
            of_both(encoded.aux, output.aux),
            output.cache,
            output.residual_XBLM,
            encoder_residual_XBTM=encoded.residual_XBTM,
            hidden_BLM=hidden_BLM,
        )
        if not multi_token:
            return found
        assert self.modules is not None, "multi_token=None"
        embed, call = functools.partial(self.embed, params), call.with_defaults(x_BLM)
        later, more = self.modules.apply(params[NAME], hidden_BLM, call, embed, separated(state))
        later_BLV = tuple(self.logits(params, one_BLM) for one_BLM in later)
        aux = found.aux | joined(more)
        return found._replace(aux=aux, later_BLV=later_BLV, later_BLM=tuple(later))

    def encode(self, params: Any, call: Call, **trees: Any) -> tuple[Call, Encoded]:
        """Runs before the decoder; does nothing in a model without an encoder."""
        del params, trees
        return call, Encoded()

    def through(
        self, name: str, params: Any, x_BLM: jax.Array, call: Call, **trees: Any
    ) -> StackOutput:
        """Runs the stack of this name on embedded tokens; for `trees` see `Stack.apply`."""
        stack, call = self.stacks[name], call.with_defaults(x_BLM)
        x_BLM = constrain(x_BLM.astype(self.compute_dtype), "batch", None, None)
        key = None if call.rng is None else jax.random.fold_in(call.rng, stack.num_layers)
        x_BLM = dropout(x_BLM, self.dropout_rate, key)
        return stack.apply(params[name], x_BLM, call, **trees)

    def head_params(self, params: Any) -> dict[str, Any]:
        """The parameters that `logits` reads."""
        names = ("embedding" if self.tie_embeddings else "head", "head_bias")
        return {name: params[name] for name in names if name in params}

    def logits(self, params: Any, x_BLM: jax.Array) -> jax.Array:
        """The output head on a normed residual: float32 [B, L, V], after bias, scale and cap."""
        with jax.named_scope("head"):
            weight = params["embedding" if self.tie_embeddings else "head"]
            x_BLM = x_BLM.astype(self.compute_dtype)
            logits_BLV = grouped(x_BLM, weight, ToLogits(self.tie_embeddings))
            if self.head_bias:
                logits_BLV += dense(params["head_bias"])
            if self.logits_multiplier != 1:
                logits_BLV *= self.logits_multiplier
            if self.logits_softcap is not None:
                logits_BLV = self.logits_softcap * jnp.tanh(logits_BLV / self.logits_softcap)
            return constrain(logits_BLV, "batch", None, "vocab")

    def next_state(
        self, state: Any, sums: Mapping[str, Any], step: jax.Array, num_steps: int
    ) -> Any:
        """The state by part after a step, from the sums over its whole batch, by part."""
        parts = self.all_parts
        return {
            name: parts[name].next_state(own, sums.get(name, {}), step, num_steps)
            for name, own in state.items()
        }

    @property
    def has_capacity(self) -> bool:
        """See `Part`."""
        stacks = self.stacks.values()
        return any(part.has_capacity for stack in stacks for part in stack.parts().values())

    @property
    def depends_on_microbatches(self) -> bool:
        """See `Part`."""
        return any(part.depends_on_microbatches for part in self.all_parts.values())

    @property
    def needs_batch_sums(self) -> bool:
        """See `Part`."""
        return any(part.needs_batch_sums for part in self.all_parts.values())

    def loss(
        self,
        aux: Mapping[str, Aux],
        num_tokens: jax.Array,
        batch: Mapping[str, Any] | None,
        encoder_tokens: jax.Array | None = None,
        later_tokens_D: jax.Array | None = None,
    ) -> jax.Array | float:
        """The loss of all parts, to be added to the training loss; see `Part.loss`.

        Args:
          aux: by part.
          num_tokens: float32 scalar, valid tokens of the whole batch.
          batch: sums of the whole batch by part, or None.
          encoder_tokens: float32 scalar, valid tokens of the encoder; None without one.
          later_tokens_D: float32, valid tokens of each multi-token module; None if none ran.
        """
        del encoder_tokens
        parts = self.part
        total = sum(
            parts[name].loss(own, num_tokens, None if batch is None else batch[name])
            for name, own in aux.items()
            if name in parts
        )
        return total + (self.modules.loss(aux, later_tokens_D, batch) if self.modules else 0)

    def metrics(self, aux: Mapping[str, Aux]) -> dict[str, jax.Array]:
        """Metrics of a step as PART/NAME, each with a leading dim of layers."""
        found = {name: part.metrics(aux[name]) for name, part in self.part.items() if name in aux}
        found |= self.modules.metrics(aux) if self.modules else {}
        return {f"{name}/{key}": value for name, own in found.items() for key, value in own.items()}
