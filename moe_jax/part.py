"""What every part of a model is: its settings, and everything that depends on its kind.

A `Part` is a frozen dataclass of settings with pure functions as methods. A model is a tree of
parts; the step, checkpoints, planning and analysis ask parts and never test their kind. Defaults
assume the worst: a part that says nothing of later tokens is taken to look at them. Legend of
shapes: `moe_jax.moe`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.settings import Settings
from moe_jax.parameters import ParameterSpec

if TYPE_CHECKING:
    from moe_jax.costs import Cost, Saving

Sums = Mapping[str, Any]
NOTHING: dict[str, Any] = {}
DTYPES = ("float32", "bfloat16")  # of activations


class Dims(NamedTuple):
    """The sizes that a model lends to its parts.

    Attributes:
      model_dim: M.
      vocab_size: V; 0 outside a model.
    """

    model_dim: int
    vocab_size: int = 0


class RunShape(NamedTuple):
    """The batch and the mesh that a model is to run on.

    Attributes:
      sequences: of a microbatch, over all devices.
      length: L, tokens.
      shards: in how many parts the mesh splits a dim, by its name in `parallel.rules`.
    """

    sequences: int
    length: int
    shards: Mapping[str, int]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions_BL", "segments_BL", "tokens_BL", "step", "rng", "memory", "shared"],
    meta_fields=["causal", "capacity", "record"],
)
@dataclasses.dataclass(frozen=True)
class Call:
    """What every layer of a model is told alike.

    Attributes:
      positions_BL: int32, of tokens in their documents; None: in their sequences.
      segments_BL: int32, document of a token within its sequence, 0 for padding; None: one document
        without padding.
      tokens_BL: int32 token ids, or None outside a model.
      step: int32 scalar, finished steps of training, for settings that are annealed; None: at their
        ends.
      rng: key of a training pass, for dropout and noise; None: evaluation, which is deterministic.
      memory: [B, T, M], the encoder's output; None without one.
      shared: what the stack's shared parts gave, by name.
      causal: whether a token must not see later ones; the stack sets it.
      capacity: slots over the mean load, 0 for dropless; None: each part's own, of training or of
        evaluation. A part with a fixed number of slots keeps it, except if dropless.
      record: whether `Aux.choices` has the choices of every token.
    """

    positions_BL: jax.Array | None = None
    segments_BL: jax.Array | None = None
    tokens_BL: jax.Array | None = None
    step: jax.Array | None = None
    rng: jax.Array | None = None
    memory: jax.Array | None = None
    shared: Any = None
    causal: bool = True
    capacity: float | None = None
    record: bool = False

    @property
    def training(self) -> bool:
        """Whether this is a pass of training."""
        return self.rng is not None

    def with_defaults(self, x_BLM: jax.Array) -> "Call":
        """Positions and segments filled in for these tokens."""
        shape = x_BLM.shape[:2]
        positions, segments = self.positions_BL, self.segments_BL
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        if segments is None:
            segments = jnp.ones(shape, jnp.int32)
        return dataclasses.replace(self, positions_BL=positions, segments_BL=segments)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "state", "cache", "replay"],
    meta_fields=["branch"],
)
@dataclasses.dataclass(frozen=True)
class Own:
    """What one layer is told alone; of a layer, trees by its branches.

    Attributes:
      index: int32 scalar, which layer it is; None outside a stack.
      state: as `Part.state_specs` declares it, or None.
      cache: as `Part.cache_specs` declares it, or None.
      replay: choices to take in place of the router's own, or None.
      branch: which branch of the layer it is, so that each has noise of its own.
    """

    index: jax.Array | None = None
    state: Any = None
    cache: Any = None
    replay: Any = None
    branch: int = 0

    def of(self, name: str, number: int) -> "Own":
        """What one branch of the layer is told."""
        state, cache, replay = (
            (tree or {}).get(name) for tree in (self.state, self.cache, self.replay)
        )
        return Own(self.index, state, cache, replay, number)

    def key(self, call: Call) -> jax.Array | None:
        """The branch's own random key; None in evaluation."""
        if call.rng is None or self.index is None:
            return call.rng
        return jax.random.fold_in(jax.random.fold_in(call.rng, self.index), self.branch)


class Aux(NamedTuple):
    """What a part says of one call, beside its output.

    Attributes:
      sums: numbers and arrays that add up over the parts of a batch and over devices.
      maxima: those of which the largest counts.
      sequences: those with a leading dim of sequences, which stay with the call.
      choices: of every token, where `Call.record` asks for them; else None.
    """

    sums: Sums = NOTHING
    maxima: Mapping[str, jax.Array] = NOTHING
    sequences: Mapping[str, Any] = NOTHING
    choices: Any = None


Output = tuple[jax.Array, Any, Any]  # y_BLM, `Aux` or None, the new cache or None


@dataclasses.dataclass(frozen=True)
class Part(Settings):
    """A part of a layer: attention, a feed-forward network, an MoE block; or a whole layer."""

    family: ClassVar[str] = "part"
    routes: ClassVar[bool] = False  # sends tokens to experts: `Aux` has what `moe` measures

    def specs(self, dims: Dims) -> dict[str, Any]:
        """The parameters: nested dicts of `ParameterSpec`."""
        del dims
        return {}

    def state_specs(self, dims: Dims) -> dict[str, Any]:
        """Arrays of one layer that the step updates outside the optimizer, such as a bias."""
        del dims
        return {}

    def cache_specs(self, dims: Dims, batch: int, length: int) -> dict[str, Any]:
        """What decoding keeps of earlier tokens."""
        del dims, batch, length
        return {}

    def looks_ahead(self, training: bool) -> bool:
        """Whether the output of a token can depend on later tokens, in training or in evaluation.

        Asked in a causal stack, with `Call.causal` on.
        """
        del training
        return True

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """Computes one branch of one layer; a pure function.

        Args:
          params: arrays in the tree that `specs` declares.
          x_BLM: normed tokens in the compute dtype.
          call: what all layers are told; its positions and segments are arrays.
          own: what this one is told.

        Returns:
          y_BLM in the dtype of `x_BLM`, to be added to the residual; what it says, or None; the new
          cache, or None.
        """
        raise NotImplementedError

    def next_state(self, state: Any, sums: Sums, step: jax.Array, num_steps: int) -> Any:
        """The state of all layers of this part after a step.

        Args:
          state: arrays with a leading dim of layers.
          sums: of the whole batch, likewise.
          step: int32 scalar, 0 for the first.
          num_steps: of the run.
        """
        del sums, step, num_steps
        return state

    def loss(self, aux: Aux, num_tokens: jax.Array, batch: Sums | None) -> jax.Array | float:
        """What the part adds to the training loss, weighted, over all of its layers.

        Args:
          aux: of a microbatch, with a leading dim of layers; the gradient flows through it.
          num_tokens: float32 scalar >= 1, valid tokens of the whole batch.
          batch: sums of the whole batch where `needs_batch_sums`; None: this is all of it.

        Returns:
          Scalar. The losses of the microbatches add up to the loss of the batch.
        """
        del aux, num_tokens, batch
        return 0.0

    @property
    def needs_batch_sums(self) -> bool:
        """Whether `loss` needs all sums of the whole batch, which costs one more forward pass."""
        return False

    @property
    def depends_on_microbatches(self) -> bool:
        """Whether a step depends, beyond noise and rounding, on how its batch is cut."""
        return type(self).loss is not Part.loss

    @property
    def has_capacity(self) -> bool:
        """Whether an evaluation within its own capacity differs from a dropless one."""
        return False

    def metrics(self, aux: Aux) -> dict[str, jax.Array]:
        """What is logged of a step: arrays with a leading dim of layers, from the whole batch's."""
        del aux
        return {}

    def resolved(self) -> "Part":
        """The part with its settings "auto" as the mesh and the platform in use decide them."""
        return self

    def map_branches(self, change: Callable[["Part"], "Part"]) -> "Part":
        """The part changed; of a whole layer, each of its branches."""
        return change(self)

    def costs(self, dims: Dims, length: int, dtype: str) -> "tuple[Cost, ...]":
        """What one layer of the part costs a token in training, stage by stage.

        By default traced from `apply`. A part says it itself where a trace does not know it: slots
        that stay empty, loops of unknown length, what is split over `tensor`.

        Args:
          dims: what it is lent.
          length: L, tokens of a sequence.
          dtype: of activations.
        """
        from moe_jax.costs import traced_costs  # costs are about parts

        return traced_costs(self, dims, length, dtype)

    def savings(self) -> "Iterable[Saving]":
        """Changes of settings by which training needs less memory."""
        return ()

    def check_run(self, dims: Dims, run: RunShape) -> None:
        """Refuses a batch or a mesh that the part cannot be split over.

        Raises:
          ValueError: with the sizes and what to change.
        """
        check_divides(self.specs(dims), run)


def check_divides(specs: Any, run: RunShape) -> None:
    """Refuses a mesh that does not split a parameter evenly.

    Raises:
      ValueError: naming the parameter, its dim and the shards.
    """
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        assert isinstance(spec, ParameterSpec), path
        for name, size in zip(spec.axes, spec.shape, strict=True):
            shards = 1 if name is None else run.shards[name]
            if size % shards:
                raise ValueError(
                    f"The mesh splits every parameter evenly: dim {name!r} of "
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')} {spec.shape} is "
                    f"{size}, over {shards} devices. Change config.mesh or the size."
                )
