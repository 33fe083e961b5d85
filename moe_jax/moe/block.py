"""The MoE block: route, assign slots, run experts, combine (legend: `moe_jax.moe`)."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.moe.capacity import assign_slots
from moe_jax.moe.choices import replay_in_groups
from moe_jax.moe.experts import FeedForward
from moe_jax.moe.routing import RouterInputs, Routing
from moe_jax.moe.routing.zero_computation import add_zero_computation, computing_choices
from moe_jax.moe.run_experts import mix_experts, run_experts
from moe_jax.moe.run_experts.buffer import Combined
from moe_jax.moe.run_experts.plan import Plan, plan_experts
from moe_jax.moe.statistics import measure
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import SAME_WEIGHTS, linear, of_experts
from moe_jax.part import Aux, Call, Dims, Own

if TYPE_CHECKING:
    from moe_jax.moe.part import MoE


def moe_block(
    params: Any, x_BLM: jax.Array, moe: "MoE", call: Call | None = None, own: Own | None = None
) -> tuple[jax.Array, Aux]:
    """Sends every token through its experts; a pure function.

    Args:
      params: arrays in the tree that `moe.specs` declares.
      x_BLM: tokens, in the compute dtype.
      moe: the settings.
      call: inputs shared by all layers; None: evaluation of whole sequences without padding.
      own: inputs of this layer only: its index, its state (`moe.state_specs`), and choices [B, L,
        K] to replay.

    Returns:
      y_BLM in the dtype of `x_BLM`, to be added to the residual, and the `Aux` that `measure`
      describes. A token whose choices were all dropped gets 0 from the routed experts.

    Raises:
      ValueError: the group size or the choices to replay do not fit the tokens, or the state of
        `moe.state_specs` is missing.
    """
    call, own = (call or Call()).with_defaults(x_BLM), own or Own()
    rng = own.key(call)
    router_key, queue_key, experts_key = (None,) * 3 if rng is None else jax.random.split(rng, 3)
    x_GSM, inputs = router_inputs(x_BLM, moe, call, own, router_key)
    plan = plan_experts(moe, call.training, inputs.options.dropless)

    routing = route(params, x_GSM, moe, inputs)
    y_GSM, kept_GSK, buffer = routed_experts(
        params["experts"], x_GSM, routing, moe, inputs, plan, queue_key, experts_key
    )
    if moe.shared_expert_dim > 0:
        y_GSM += shared_expert(params["shared"], x_GSM, moe) * inputs.valid_GS[..., None]
    aux = measure(routing, kept_GSK, moe, call, inputs, x_BLM.shape, buffer)
    return y_GSM.reshape(x_BLM.shape), aux


def router_inputs(
    x_BLM: jax.Array, moe: "MoE", call: Call, own: Own, rng: jax.Array | None
) -> tuple[jax.Array, RouterInputs]:
    """Tokens in groups that share a capacity, and the router's other inputs."""
    batch, length, model_dim = x_BLM.shape
    group_size = tokens_per_group(batch, length, moe.group_size)
    x_GSM = constrain(jnp.asarray(x_BLM).reshape(-1, group_size, model_dim), "group", None, None)
    options = moe.options(group_size, call.training, call.capacity)
    tokens_BL, positions_BL, segments_BL = call.tokens_BL, call.positions_BL, call.segments_BL
    assert segments_BL is not None and positions_BL is not None, "with_defaults"
    state = own.state or {}
    missing = sorted(moe.state_specs(Dims(model_dim)).keys() - state.keys())
    require(
        not missing,
        "a block with a selection bias, or with a router that has a state, needs that state",
        f"Own.state lacks {missing}",
        "Pass Own(state=...): at first init_parameters(key, moe.state_specs(dims)), then what "
        "moe.next_state returns; in a model, the state= of LanguageModel.run",
    )

    def grouped(values_BL: jax.Array | None) -> jax.Array | None:
        return None if values_BL is None else values_BL.reshape(x_GSM.shape[:2])

    return x_GSM, RouterInputs(
        options=options,
        valid_GS=(segments_BL > 0).reshape(x_GSM.shape[:2]),
        positions_GS=positions_BL.reshape(x_GSM.shape[:2]),
        tokens_GS=grouped(tokens_BL),
        previous_GS=grouped(previous_tokens(call)),
        bias_E=state.get("bias_E"),
        rng=rng,
        step=call.step,
        replay=replay_in_groups(own.replay, (batch, length), x_GSM.shape[:2], moe, options),
        state=state.get("router"),
    )


def previous_tokens(call: Call) -> jax.Array | None:
    """int32 [B, L], the id before each token of its document, -1 if none; None without ids."""
    tokens_BL, first_B = call.tokens_BL, call.previous_B
    if tokens_BL is None:
        return None
    first_B = jnp.full_like(tokens_BL[:, 0], -1) if first_B is None else first_B
    previous_BL = jnp.concatenate([first_B[:, None], tokens_BL[:, :-1]], axis=1)
    return jnp.where(call.positions_BL == 0, -1, previous_BL)


@jax.named_scope("router")
def route(params: Any, x_GSM: jax.Array, moe: "MoE", inputs: RouterInputs) -> Routing:
    """The router's choices; with only one option every token takes it, and no router runs."""
    if moe.num_options == 1:
        return moe.router.only_option(x_GSM)
    return moe.router.route(params.get("router", {}), x_GSM, inputs)


@jax.named_scope("run_experts")
def routed_experts(
    params: Any,
    x_GSM: jax.Array,
    routing: Routing,
    moe: "MoE",
    inputs: RouterInputs,
    plan: Plan,
    queue_key: jax.Array | None,
    experts_key: jax.Array | None,
) -> Combined:
    """What a token's experts add to it: their outputs times its gates, summed over its choices.

    Choices of zero-computation experts take no slot, and are added after the experts have run.
    """
    options, valid_GS1 = inputs.options, inputs.valid_GS[..., None]
    weights = of_experts(params, moe.num_experts)
    axes = moe.expert_axes(x_GSM.shape[-1])
    if routing.mixing is not None:  # Soft MoE: every token is in every slot
        y_GSM = mix_experts(x_GSM, routing.mixing, weights, axes, moe.experts, plan, experts_key)
        return Combined(constrain(y_GSM, "group", None, None), valid_GS1)
    computing = computing_choices(routing, options)
    queue = moe.capacity.queue
    assignment = assign_slots(computing, queue, options, inputs.valid_GS, queue_key)
    y_GSM, kept_GSK, buffer = run_experts(
        x_GSM, assignment, weights, axes, moe.experts, plan, experts_key
    )
    y_GSM, kept_GSK = add_zero_computation(
        x_GSM, y_GSM, routing, kept_GSK, valid_GS1, options,
        first_copy=moe.num_experts + moe.num_zero_experts,
    )  # fmt: skip
    return Combined(constrain(y_GSM, "group", None, None), kept_GSK, buffer)


@jax.named_scope("shared_expert")
def shared_expert(params: Any, x_GSM: jax.Array, moe: "MoE") -> jax.Array:
    """The output of the shared expert, which every token uses: [G, S, M]."""
    y_GSM = FeedForward(moe.activation)(x_GSM, params, SAME_WEIGHTS)
    if moe.shared_expert_gate:
        y_GSM *= jax.nn.sigmoid(linear(x_GSM, params["gate"]))
    return y_GSM


def block_loss_and_metrics(moe: "MoE", aux: Aux) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted losses of one block outside a stack, and its metrics.

    Args:
      moe: the settings.
      aux: what `moe_block` returned for the whole batch.

    Returns:
      float32 scalar, to be added to the loss of the task; metrics by name, as in `docs/training.md`
      without the dim of layers.
    """
    layers = jax.tree.map(lambda a: a[None], aux)  # `Part.loss` and `Part.metrics` are of a stack
    num_tokens = jnp.maximum(aux.sums["num_tokens"], 1).astype(jnp.float32)
    metrics = jax.tree.map(lambda a: a[0], moe.metrics(layers))
    return jnp.asarray(moe.loss(layers, num_tokens, None)), metrics


def tokens_per_group(batch: int, length: int, group_size: int) -> int:
    """S, tokens per group: `group_size`, or one sequence if it is 0.

    Raises:
      ValueError: S neither divides a sequence nor is a number of whole sequences that divides the
        batch.
    """
    group_size = group_size or length
    fits = batch * length % group_size == 0
    if not fits or (length % group_size and group_size % length):
        raise ValueError(
            "group_size must divide the sequence, or be a number of whole sequences that divides "
            f"the batch: group_size={group_size}, batch of {batch} sequences of {length} tokens. "
            "Set group_size=0 for one sequence, or to a divisor."
        )
    return group_size
