"""The base class of every part of a model, and the types of its inputs and outputs.

A `Part` is a frozen dataclass of settings with pure functions as methods. A model is a tree of
parts. The step, checkpoints, planning and analysis call methods of parts and never test their
kind. Defaults assume the worst: a part that does not override `looks_ahead` counts as looking at
later tokens. Legend of shapes: `moe_jax.moe`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.settings import Settings
from moe_jax.parallel.rules import RULES
from moe_jax.parameters import ParameterSpec

if TYPE_CHECKING:
    from moe_jax.costs import Cost, Saving

Sums = Mapping[str, Any]
NOTHING: dict[str, Any] = {}
DTYPES = ("float32", "bfloat16")  # of activations
MOST_FITS = 4  # numbers of devices that an error proposes


class Dims(NamedTuple):
    """Sizes of a model that its parts depend on.

    Attributes:
      model_dim: M.
      vocab_size: V; 0 outside a model.
      memory_length: tokens of the encoder's output that a decoder reads; 0 without an encoder.
    """

    model_dim: int
    vocab_size: int = 0
    memory_length: int = 0


class RunShape(NamedTuple):
    """The batch and the mesh of a run.

    Attributes:
      sequences: sequences per microbatch, over all devices.
      length: L, tokens per sequence.
      shards: number of shards of a dim on the mesh, by its name in `parallel.rules`.
      encoder_length: tokens per sequence of the encoder; 0 without one.
    """

    sequences: int
    length: int
    shards: Mapping[str, int]
    encoder_length: int = 0


class EncoderInputs(NamedTuple):
    """The text that the encoder of an encoder-decoder model reads; T tokens per sequence.

    Attributes:
      tokens_BT: int32 token ids.
      positions_BT: int32, position of a token in its text; None: in its sequence.
      segments_BT: int32, number of a token's text in its sequence, 0 for padding. The decoder's
        segment of the same number reads it. None: one text without padding.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array | None = None
    segments_BT: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """Inputs that are the same for every layer of a model.

    Attributes:
      positions_BL: int32, position of a token in its document; None: in its sequence, which begins
        at the first slot of a cache.
      segments_BL: int32, number of a token's document in its sequence, 0 for padding; None: one
        document without padding.
      tokens_BL: int32 token ids; None outside a model.
      step: int32 scalar, finished training steps, for annealed settings; None: their end values.
      rng: random key of a training pass, for dropout and noise; None: a deterministic evaluation.
      encoder: what the encoder reads; None without an encoder.
      memory: [B, T, M], the output of the encoder; None without one, or before it ran.
      memory_segments_BT: int32, segments of the memory, as in `EncoderInputs`.
      shared: outputs of the stack's shared parts, by name.
      cache_index: int32, number of cache slots that earlier calls filled, including padding. This
        call writes its tokens from that slot on. A scalar for all rows, or [B]; None without a
        cache.
      previous_B: int32, the token id before the first token of every row that continues from a
        cache; None: rows have no earlier token.
      lengths_B: int32, final length of each row's document, for parts that depend on it (some
        rotary scalings); None: the length in `positions_BL`.
      causal: whether a token must not see later tokens; the stack sets it.
      contiguous: whether positions of a document grow by one from place to place, here and in
        `encoder`, as in `moe_jax.data`. Attention kernels need this: otherwise "auto" chooses the
        kernel that reads positions. Set to True if no positions are given.
      capacity: capacity factor, 0 for dropless; None: each part's own factor for training or
        evaluation. A fixed number of slots stays in use, except if dropless. Experts that choose
        tokens cannot be dropless: for 0 they use their training factor.
      record: whether to report the choices and router logits of every token in `Aux`, and the
        residual stream after every layer in the output of a stack.
      cache_length: T, slots of the caches; None without a cache.
      prefill: whether the caches are empty, so that tokens of this call attend only to each other.
      in_prefix_BL: bool, tokens of a prefix, which every token of their document sees; None: no
        token sees a later token.
    """

    positions_BL: jax.Array | None = None
    segments_BL: jax.Array | None = None
    tokens_BL: jax.Array | None = None
    step: jax.Array | None = None
    rng: jax.Array | None = None
    encoder: EncoderInputs | None = None
    memory: jax.Array | None = None
    memory_segments_BT: jax.Array | None = None
    shared: Any = None
    cache_index: jax.Array | int | None = None
    previous_B: jax.Array | None = None
    lengths_B: jax.Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    contiguous: bool = dataclasses.field(default=False, metadata={"static": True})
    capacity: float | None = dataclasses.field(default=None, metadata={"static": True})
    record: bool = dataclasses.field(default=False, metadata={"static": True})
    cache_length: int | None = dataclasses.field(default=None, metadata={"static": True})
    prefill: bool = dataclasses.field(default=False, metadata={"static": True})
    in_prefix_BL: jax.Array | None = None

    @property
    def training(self) -> bool:
        """Whether this is a training pass."""
        return self.rng is not None

    def with_defaults(self, x_BLM: jax.Array) -> "Call":
        """This call with positions and segments filled in for these tokens."""
        shape = x_BLM.shape[:2]
        positions, segments = self.positions_BL, self.segments_BL
        given = [positions, None if self.encoder is None else self.encoder.positions_BT]
        contiguous = self.contiguous or all(one is None for one in given)
        if positions is None:
            start = 0 if self.cache_index is None else self.cache_index
            places = jnp.reshape(start, (-1, 1)) + jnp.arange(shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(places, shape)
        if segments is None:
            segments = jnp.ones(shape, jnp.int32)
        return dataclasses.replace(
            self,
            positions_BL=positions,
            segments_BL=segments,
            contiguous=contiguous,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own:
    """Inputs of one layer. Inputs of a whole layer are trees by branch.

    Attributes:
      index: int32 scalar, number of the layer; None outside a stack.
      state: arrays as `Part.state_specs` declares them, or None.
      cache: arrays as `Part.cache_specs` declares them, or None.
      replay: choices that replace the router's own, or None.
      branch: number of the branch in its layer, which gives each branch its own noise.
    """

    index: jax.Array | None = None
    state: Any = None
    cache: Any = None
    replay: Any = None
    branch: int = dataclasses.field(default=0, metadata={"static": True})

    def of(self, name: str, number: int) -> "Own":
        """The inputs of one branch of the layer."""
        state, cache, replay = (
            (tree or {}).get(name) for tree in (self.state, self.cache, self.replay)
        )
        return Own(self.index, state, cache, replay, number)

    def key(self, call: Call) -> jax.Array | None:
        """The random key of this branch; None in evaluation."""
        if call.rng is None or self.index is None:
            return call.rng
        return jax.random.fold_in(jax.random.fold_in(call.rng, self.index), self.branch)


class Aux(NamedTuple):
    """What a part reports from one call in addition to its output.

    Attributes:
      sums: arrays that add up over microbatches and devices.
      maxima: arrays reduced to the maximum over microbatches and devices.
      sequences: arrays with a leading dim of sequences, which are not reduced.
      choices: the choices of every token if `Call.record` is set, else None.
      logits_BLE: router logits of every token, including noise, if `Call.record` is set, else None;
        for Soft MoE, logits of slots, [B, L, P].
    """

    sums: Sums = NOTHING
    maxima: Mapping[str, jax.Array] = NOTHING
    sequences: Mapping[str, Any] = NOTHING
    choices: Any = None
    logits_BLE: Any = None


def merge_aux(aux_of: dict[str, Aux]) -> dict[str, Aux]:
    """Merges the `Aux` of microbatches (leading dim) into one for the batch, by part of the model.

    Sums are added, and maxima reduced by max; values per sequence are left out.
    """
    return {
        name: Aux(
            sums=jax.tree.map(lambda a: jnp.sum(a, axis=0), aux.sums),
            maxima=jax.tree.map(lambda a: jnp.max(a, axis=0), aux.maxima),
        )
        for name, aux in aux_of.items()
    }


Output = tuple[jax.Array, Any, Any]  # y_BLM, `Aux` or None, the new cache or None


@dataclasses.dataclass(frozen=True)
class Part(Settings):
    """A part of a layer: attention, a feed-forward network, an MoE block; or a whole layer."""

    family: ClassVar[str] = "part"
    # Routes tokens, and reports choices in `Aux`; has the settings and methods of `MoE`.
    routes: ClassVar[bool] = False
    adds_to_residual: ClassVar[bool] = True  # else it can only be a shared part of a stack
    reads_prefix: ClassVar[bool] = False  # all tokens see those of `Call.in_prefix_BL`
    reads_memory: ClassVar[bool] = False  # needs the encoder's output: `Call.memory`
    pointwise: ClassVar[bool] = False  # a token's output needs no other token: no cache to decode
    # Whether its cache takes tokens back by overwriting (`layers.cache`). Otherwise speculative
    # decoding restores the previous cache and reads the accepted tokens again.
    cache_can_rewind: ClassVar[bool] = False
    # Parameters that only a prefill reads: the cache keeps what they give.
    prefill_only: ClassVar[tuple[str, ...]] = ()

    def specs(self, dims: Dims) -> dict[str, Any]:
        """The parameters: nested dicts of `ParameterSpec`."""
        del dims
        return {}

    def state_specs(self, dims: Dims) -> dict[str, Any]:
        """Arrays of one layer that the step updates outside the optimizer, such as a bias."""
        del dims
        return {}

    def cache_specs(self, dims: Dims, batch: int, length: int) -> dict[str, Any]:
        """Arrays that decoding keeps of earlier tokens."""
        del dims, batch, length
        return {}

    def looks_ahead(self, training: bool) -> bool:
        """Whether the output of a token can depend on later tokens, in training or in evaluation.

        It is asked for causal stacks, with `Call.causal` set.
        """
        del training
        return True

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """Computes one branch of one layer; a pure function.

        Args:
          params: arrays in the tree that `specs` declares.
          x_BLM: normed tokens in the compute dtype.
          call: inputs of all layers, with positions and segments as arrays.
          own: inputs of this layer.

        Returns:
          Three values: y_BLM in the dtype of `x_BLM`, to be added to the residual; an `Aux` or
          None; the new cache or None.
        """
        raise NotImplementedError

    def next_state(self, state: Any, sums: Sums, step: jax.Array, num_steps: int) -> Any:
        """The state of all layers of this part after a training step.

        Args:
          state: arrays with a leading dim of layers.
          sums: `Aux.sums` of the whole batch, with a leading dim of layers.
          step: int32 scalar, 0 for the first step.
          num_steps: steps of the run.
        """
        del sums, step, num_steps
        return state

    def steps_independent_of_length(self, num_steps: int) -> float:
        """Number of first steps that do not change if `num_steps` is raised; inf: all."""
        del num_steps
        return math.inf

    def loss(self, aux: Aux, num_tokens: jax.Array, batch: Sums | None) -> jax.Array | float:
        """The weighted loss of all layers of the part, to be added to the training loss.

        Args:
          aux: of a microbatch, with a leading dim of layers; the gradient flows through it.
          num_tokens: float32 scalar >= 1, valid tokens of the whole batch.
          batch: sums over the whole batch; None: `aux` is of the whole batch, or no loss of the
            model has `needs_batch_sums`.

        Returns:
          Scalar. The losses of microbatches add up to the loss of the batch.
        """
        del aux, num_tokens, batch
        return 0.0

    @property
    def needs_batch_sums(self) -> bool:
        """Whether `loss` needs sums over the whole batch, which costs one more forward pass."""
        return False

    @property
    def depends_on_microbatches(self) -> bool:
        """Whether a step depends, beyond noise and rounding, on how its batch is split."""
        return type(self).loss is not Part.loss

    @property
    def has_capacity(self) -> bool:
        """Whether evaluation with its own capacity differs from dropless evaluation."""
        return False

    def metrics(self, aux: Aux) -> dict[str, jax.Array]:
        """Metrics of a step: arrays with a leading dim of layers, from a whole batch."""
        del aux
        return {}

    def resolved(self, dtype: str, in_prefix: bool = False) -> "Part":
        """The part with every setting "auto" replaced by its choice for the mesh and platform.

        Args:
          dtype: of activations.
          in_prefix: whether calls have `Call.in_prefix_BL`.
        """
        del dtype, in_prefix
        return self

    def map_branches(self, change: Callable[["Part"], "Part"]) -> "Part":
        """The part after `change`; a whole layer applies it to each of its branches."""
        return change(self)

    def costs(self, dims: Dims, length: int, dtype: str) -> "tuple[Cost, ...]":
        """The training costs of one token in one layer of the part, by stage.

        The default traces `apply`. A part overrides this if a trace cannot find its costs: empty
        slots, loops of unknown length, splits over `tensor`.

        Args:
          dims: sizes of the model.
          length: L, tokens per sequence.
          dtype: of activations.
        """
        from moe_jax.costs import traced_costs  # `costs` imports this module

        return traced_costs(self, dims, length, dtype)

    def decode_flops(self, dims: Dims, length: int, dtype: str) -> float:
        """FLOPs of one decoded token in one layer, with a cache of `length` tokens.

        The default is the FLOPs of a token in training. Override it if decoding computes otherwise.
        """
        return sum(cost.flops for cost in self.costs(dims, length, dtype))

    def savings(self) -> "Iterable[Saving]":
        """Changes of settings that save memory in training."""
        return ()

    def check_run(self, dims: Dims, run: RunShape) -> None:
        """Checks that the mesh can split the batch and the part.

        Raises:
          ValueError: with the sizes and what to change.
        """
        check_divides(self.specs(dims), run)


def check_divides(specs: Any, run: RunShape) -> None:
    """Checks that the mesh splits every parameter evenly.

    Raises:
      ValueError: with the parameter, its dim and the shards.
    """
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        assert isinstance(spec, ParameterSpec), path
        for name, size in zip(spec.axes, spec.shape, strict=True):
            shards = 1 if name is None else run.shards[name]
            if name is not None and size % shards:
                fits = [n for n in range(1, shards) if size % n == 0]
                raise ValueError(
                    f"The mesh must split every parameter evenly: dim {name!r} of "
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')} {spec.shape} is "
                    f"{size}, over {shards} devices. Set config.mesh.{RULES[name][-1]} so that "
                    f"they are {', '.join(map(str, fits[-MOST_FITS:]))}, or change the size."
                )
