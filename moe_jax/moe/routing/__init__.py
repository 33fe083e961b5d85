"""Routers: which experts take which token, and with what weight (legend: `moe_jax.moe`).

A router is one class with its settings, parameters, checks and maths. `Router` is the base class,
`TokenChoice` the default.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.settings import Settings, setting
from moe_jax.parallel.rules import mesh_in_use, partition_spec
from moe_jax.part import DTYPES, NOTHING, Aux, Dims, RunShape, Sums

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE


class Choices(NamedTuple):
    """The experts that tokens chose, recorded or to be replayed.

    Leading dims are those of the tokens: [G, S] in a router, [B, L] around a block, [X, B, L] for
    the layers of a model. E counts all options: zero-computation experts come last.

    Attributes:
      expert_index: int32 in [0, E), the choices of a token, best first; those that count are
        distinct.
      chosen: bool, which choices count.
      gate: float32, weight of each choice in the token's output before drops, 0 if it does not
        count. Not replayed: gates are recomputed.
      kept: bool, which choices were kept. Not replayed: slots are reassigned.
    """

    expert_index: jax.Array
    chosen: jax.Array
    gate: jax.Array | None = None
    kept: jax.Array | None = None


class Mixing(NamedTuple):
    """How tokens and slots mix if the router fills the slots itself (Soft MoE).

    Attributes:
      dispatch_GSEC: weights of the tokens in a slot; 0 for padding.
      combine_GSEC: weights of the slots in a token's output; 0 for padding.
    """

    dispatch_GSEC: jax.Array
    combine_GSEC: jax.Array


class Routing(NamedTuple):
    """What a router decided. E counts all options: zero-computation experts come last.

    Attributes:
      logits_GSE: router logits, including noise; for Soft MoE the logits of slots, [G, S, P].
      probs_GSE: >= 0, each row of a valid token sums to 1; the balance losses use them.
      expert_index_GSK: int32 in [0, E), the choices of a token, best first; those that count
        are distinct.
      gate_GSK: the weight of each choice in the token's output, >= 0; 0 if it does not count.
      chosen_GSK: bool, which choices count. The others take no slot, compute nothing and are not in
        the statistics.
      scores_GSE: the scores that select experts, without bias; None if the router has none.
      unbiased_GSK: int32, the K best by score only, if a selection bias or a limit to groups of
        experts affects the choices; else None.
      clean_GSE: the logits without noise, or None if there is no noise.
      noise_std_GSE: standard deviation of the noise, broadcastable to GSE, or None.
      loss_GS: float32 >= 0, the weighted loss of the router per token; the training loss adds its
        mean over the layers of the part. None: no loss.
      mixing: how tokens mix in slots, if the router filled them; the choices are then only for
        statistics.
      sums: arrays of the call that add up over a batch, for `Router.next_state` and
        `Router.metrics`: such as a sum over valid tokens, or a parameter times their number.
    """

    logits_GSE: jax.Array
    probs_GSE: jax.Array
    expert_index_GSK: jax.Array
    gate_GSK: jax.Array
    chosen_GSK: jax.Array
    scores_GSE: jax.Array | None = None
    unbiased_GSK: jax.Array | None = None
    clean_GSE: jax.Array | None = None
    noise_std_GSE: jax.Array | None = None
    loss_GS: jax.Array | None = None
    mixing: Mixing | None = None
    sums: Sums = NOTHING


class Options(NamedTuple):
    """What a router chooses among: experts, choices per token and slots, as Python ints.

    Attributes:
      num_experts: E, experts that compute.
      num_options: these, followed by the zero-computation experts.
      num_selected: K, the most choices of a token.
      slots: C, slots of an expert in a group.
      dropless: whether every choice is kept; C is then at least S.
    """

    num_experts: int
    num_options: int
    num_selected: int
    slots: int
    dropless: bool = False


class RouterInputs(NamedTuple):
    """Inputs of a router in addition to token representations.

    Attributes:
      options: the experts to choose among.
      valid_GS: bool, False for padding.
      positions_GS: int32, position of each token in its document.
      tokens_GS: int32 token ids, or None if the call has none.
      previous_GS: int32, the id before each token in its document, -1 if there is none; or None.
      bias_E: float32 selection bias, or None.
      rng: random key in training; None in evaluation.
      step: int32 scalar, completed training steps, for annealed settings; None: their end values.
      replay: choices to use; None: the router chooses.
      state: arrays of this layer as `Router.state_specs` declares them, or None.
    """

    options: Options
    valid_GS: jax.Array
    positions_GS: jax.Array
    tokens_GS: jax.Array | None = None
    previous_GS: jax.Array | None = None
    bias_E: jax.Array | None = None
    rng: jax.Array | None = None
    step: jax.Array | None = None
    replay: Choices | None = None
    state: Any = None

    @property
    def training(self) -> bool:
        """Whether this is a training pass."""
        return self.rng is not None


@dataclasses.dataclass(frozen=True)
class Router(Settings):
    """Maps tokens to experts and gates.

    A subclass overrides `route`, and declares which attributes are true for it.

    Attributes:
      replays: whether `route` uses `inputs.replay` instead of its own choices.
      learns: whether a gradient reaches its parameters through `probs_GSE`.
      takes_bias: whether it adds `inputs.bias_E` to the scores that select experts.
      takes_zero_computation_experts: whether its options can include zero-computation experts.
      mixes: whether it fills slots with mixtures of tokens, so that no row moves (`Mixing`).
      has_smooth_load: whether it selects the K largest noisy logits at every training step.
      has_independent_scores: whether it selects the best scores of all experts, where each score is
        in [0, 1] and depends only on its own logit.
    """

    family: ClassVar[str] = "router"
    replays: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False
    takes_zero_computation_experts: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    scaling_factor: float = setting(1.0, above=0)  # multiplies gates last (DeepSeek-V3: 2.5)
    dtype: str = setting("float32", choices=DTYPES)  # of logits and gates; others are for studies

    @property
    def gates_need_all_choices(self) -> bool:
        """Whether a choice that does not count still changes the gates of a token's others."""
        return False

    @property
    def has_smooth_load(self) -> bool:
        """See the class."""
        return False

    @property
    def has_independent_scores(self) -> bool:
        """See the class."""
        return False

    def looks_ahead(self, training: bool) -> bool:
        """Whether a token's choices or gates can depend on later tokens of its group."""
        del training
        return True

    def fills_slots(self, training: bool) -> bool:
        """Whether experts choose tokens for all of their slots, which needs a capacity."""
        del training
        return False

    def num_choices(self, options: Options) -> int:
        """K of the arrays in the returned `Routing`."""
        return options.num_selected

    def mean_experts(self, options: Options, group_size: int) -> float:
        """The mean number of choices per token that count, which sets the active parameters."""
        del group_size
        return options.num_selected

    def check_block(self, moe: "MoE") -> None:
        """Checks the block that uses this router.

        Raises:
          ValueError: by `require`.
        """

    def check_run(self, moe: "MoE", run: RunShape) -> None:
        """Checks the batch that the block is to run on; see `Part.check_run`.

        Raises:
          ValueError: by `require`.
        """

    def specs(self, dims: Dims, options: Options) -> dict[str, Any]:
        """The parameters: nested dicts of `ParameterSpec`, of component "router"."""
        del dims, options
        return {}

    def state_specs(self, dims: Dims, options: Options) -> dict[str, Any]:
        """Arrays of one layer that the step updates outside the optimizer: `RouterInputs.state`."""
        del dims, options
        return {}

    def next_state(self, state: Any, sums: Sums, step: jax.Array, num_steps: int) -> Any:
        """The state of all layers after a step; see `Part.next_state`.

        `sums` of the block include `assigned_KE`, `num_tokens` and, as "router", `Routing.sums`.
        """
        del sums, step, num_steps
        return state

    def metrics(self, aux: Aux) -> dict[str, jax.Array]:
        """Metrics of a step in addition to those of every block; see `Part.metrics`."""
        del aux
        return {}

    def only_option(self, x_GSM: jax.Array) -> Routing:
        """The routing of a layer with one option: every token takes it, with a scaled gate of 1."""
        index_GS1 = jnp.zeros((*x_GSM.shape[:-1], 1), jnp.int32)
        gate_GS1 = jnp.full(index_GS1.shape, self.scaling_factor, self.dtype)
        return routing_of(index_GS1, 1, gate_GS1)

    def route(self, params: Any, x_GSM: jax.Array, inputs: RouterInputs) -> Routing:
        """Chooses the experts of every token.

        Args:
          params: arrays in the tree that `specs` declares.
          x_GSM: token representations, any float dtype.
          inputs: valid tokens, ids, positions, bias, random key and replay.

        Returns:
          The `Routing` of every token.
        """
        raise NotImplementedError


def routing_of(
    expert_index_GSK: jax.Array, num_options: int, gate_GSK: jax.Array | None = None
) -> Routing:
    """A `Routing` of choices made without logits: all count, with equal gates unless given.

    Probabilities are 1 / K for each chosen expert, whatever the gates. Logits are 0.
    """
    num_choices = expert_index_GSK.shape[-1]
    if gate_GSK is None:
        gate_GSK = jnp.full(expert_index_GSK.shape, 1 / num_choices, jnp.float32)
    chosen_GSKE = jax.nn.one_hot(expert_index_GSK, num_options, dtype=gate_GSK.dtype)
    probs_GSE = jnp.sum(chosen_GSKE, axis=-2) / num_choices
    return Routing(
        logits_GSE=jnp.zeros_like(probs_GSE),
        probs_GSE=probs_GSE,
        expert_index_GSK=expert_index_GSK.astype(jnp.int32),
        gate_GSK=gate_GSK,
        chosen_GSK=jnp.ones(expert_index_GSK.shape, jnp.bool_),
    )


def choose(values_GSE: jax.Array, expert_index_GSK: jax.Array) -> jax.Array:
    """The values of the selected experts, [G, S, K].

    This is a one-hot product, which fuses into a sum. The gradient of an indexed read would be a
    scatter, slow on every platform.
    """
    chosen_GSKE = jax.nn.one_hot(expert_index_GSK, values_GSE.shape[-1], dtype=values_GSE.dtype)
    return jnp.sum(chosen_GSKE * values_GSE[..., None, :], axis=-1)


def top_k(values_GSE: jax.Array, k: int) -> Sequence[jax.Array]:
    """The k largest values of each token and their indices, [G, S, k]; no gradient.

    Ties go to the lower index, also between 0 and -0. On a mesh each device handles its own tokens;
    the compiler by itself would gather all tokens.
    """
    values_GSE = jnp.where(values_GSE == 0, 0, values_GSE)  # -0 sorts below 0
    mesh = mesh_in_use()
    if mesh is None:
        return jax.lax.top_k(values_GSE, k)
    tokens = partition_spec(("group", None, None), mesh)
    own_top_k = functools.partial(jax.lax.top_k, k=k)
    return jax.shard_map(own_top_k, mesh=mesh, in_specs=tokens, out_specs=tokens)(values_GSE)


__all__ = [
    "Choices", "Mixing", "Options", "Router", "RouterInputs", "Routing", "choose", "routing_of",
    "top_k",
]  # fmt: skip
