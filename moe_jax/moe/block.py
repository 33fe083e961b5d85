"""The MoE block: route, assign slots, run experts, combine (legend: `moe_jax.moe`)."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import assign_slots
from moe_jax.moe.choices import replay_in_groups
from moe_jax.moe.experts import FeedForward
from moe_jax.moe.routing import RouterInputs, Routing
from moe_jax.moe.routing.zero_computation import add_zero_computation, computing_choices
from moe_jax.moe.run_experts import mix_experts, run_experts
from moe_jax.moe.run_experts.parallel import Combined
from moe_jax.moe.run_experts.plan import Plan, plan_experts
from moe_jax.moe.statistics import measure
from moe_jax.parallel.rules import constrain
from moe_jax.parameters import SHARED, linear, of_experts
from moe_jax.part import Aux, Call, Own

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
      ValueError: the group size or the choices to replay do not fit the tokens.
    """
    call, own = (call or Call()).with_defaults(x_BLM), own or Own()
    rng = own.key(call)
    router_key, queue_key, experts_key = (None,) * 3 if rng is None else jax.random.split(rng, 3)
    x_GSM, inputs = in_groups(x_BLM, moe, call, own, router_key)
    plan = plan_experts(moe, call.training, inputs.options.dropless)

    routing = route(params, x_GSM, moe, inputs)
    y_GSM, kept_GSK, buffer = routed_experts(
        params["experts"], x_GSM, routing, moe, inputs, plan, queue_key, experts_key
    )
    if moe.shared_expert_dim > 0:
        y_GSM += shared_expert(params["shared"], x_GSM, moe) * inputs.valid_GS[..., None]
    aux = measure(routing, kept_GSK, moe, call, inputs, x_BLM.shape, buffer)
    return y_GSM.reshape(x_BLM.shape), aux


def in_groups(
    x_BLM: jax.Array, moe: "MoE", call: Call, own: Own, rng: jax.Array | None
) -> tuple[jax.Array, RouterInputs]:
    """Tokens in groups that share a capacity, and the router's other inputs."""
    batch, length, model_dim = x_BLM.shape
    group_size = tokens_per_group(batch, length, moe.group_size)
    x_GSM = constrain(jnp.asarray(x_BLM).reshape(-1, group_size, model_dim), "group", None, None)
    options = moe.options(group_size, call.training, call.capacity)
    tokens_BL, positions_BL, segments_BL = call.tokens_BL, call.positions_BL, call.segments_BL
    assert segments_BL is not None and positions_BL is not None, "with_defaults"
    tokens_GS = previous_GS = None
    if tokens_BL is not None:
        first_B = jnp.full_like(tokens_BL[:, 0], -1) if call.previous_B is None else call.previous_B
        previous_BL = jnp.concatenate([first_B[:, None], tokens_BL[:, :-1]], axis=1)
        previous_BL = jnp.where(positions_BL == 0, -1, previous_BL)
        tokens_GS, previous_GS = (a.reshape(x_GSM.shape[:2]) for a in (tokens_BL, previous_BL))
    return x_GSM, RouterInputs(
        options=options,
        valid_GS=(segments_BL > 0).reshape(x_GSM.shape[:2]),
        positions_GS=positions_BL.reshape(x_GSM.shape[:2]),
        tokens_GS=tokens_GS,
        previous_GS=previous_GS,
        bias_E=(own.state or {}).get("bias_E"),
        rng=rng,
        step=call.step,
        replay=replay_in_groups(own.replay, (batch, length), x_GSM.shape[:2], moe, options),
        state=(own.state or {}).get("router"),
    )


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
    y_GSM = FeedForward(moe.activation)(x_GSM, params, SHARED)
    if moe.shared_expert_gate:
        y_GSM *= jax.nn.sigmoid(linear(x_GSM, params["gate"]))
    return y_GSM


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
