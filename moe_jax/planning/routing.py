"""What routers cost, by family (legend: `moe_jax.moe`)."""

from moe_jax.config import MoEConfig
from moe_jax.moe.capacity import num_slots
from moe_jax.moe.dispatch import dispatcher_name
from moe_jax.moe.parameters import router_specs
from moe_jax.moe.routing import fills_slots
from moe_jax.moe.routing.replay import most_choices


def router_matrices(moe: MoEConfig, model_dim: int) -> list[tuple[int, ...]]:
    """[I, O] of every matrix by which the router multiplies a token.

    Beside the router's own: its noise, a projection, a predictor; one column a slot of Soft MoE;
    none where experts are fixed beforehand.
    """
    if moe.num_options == 1:
        return []
    specs = router_specs(moe, model_dim)
    return [spec.shape for spec in specs.values() if len(spec.shape) == 2]


def router_flops(moe: MoEConfig, model_dim: int) -> float:
    """Forward FLOPs a token of its products."""
    return sum(2.0 * inward * outward for inward, outward in router_matrices(moe, model_dim))


def router_outputs(moe: MoEConfig, model_dim: int) -> int:
    """Numbers that its products give a token, in float32."""
    return sum(outward for _, outward in router_matrices(moe, model_dim))


def router_activations(moe: MoEConfig, model_dim: int) -> int:
    """Those, and the probabilities made of them: of E experts; of Soft MoE, of P slots, twice."""
    outputs = router_outputs(moe, model_dim)
    if moe.has_soft_slots:
        return 3 * outputs
    return outputs + moe.num_options * (outputs > 0)


def slots_of_an_expert(moe: MoEConfig, sequence_length: int) -> int:
    """C of a group in training."""
    group_size, factor = moe.group_size or sequence_length, moe.capacity.train_factor
    selected, options = moe.num_selected_experts, moe.num_options
    return num_slots(group_size, options, selected, factor, moe.capacity)


def slots_of_a_token(moe: MoEConfig, sequence_length: int) -> float:
    """Slots of all experts in training, over the tokens that share them: E C / S."""
    slots = moe.num_experts * slots_of_an_expert(moe, sequence_length)
    return slots / (moe.group_size or sequence_length)


def expert_rows(moe: MoEConfig, sequence_length: int) -> float:
    """Rows that experts compute for a token in training.

    Every slot, filled or not; of the sorted rows of "ragged", which has no slots, those of choices
    that are kept: no more than there are slots.
    """
    slots = slots_of_a_token(moe, sequence_length)
    is_sorted = dispatcher_name(moe.dispatch) == "ragged"
    return min(slots, mean_experts(moe, sequence_length)) if is_sorted else slots


def dispatched_copies(moe: MoEConfig) -> int:
    """Tokens that a dispatcher carries for each: with gates on the input one a choice."""
    return most_choices(moe) if moe.router.gate_on_input else 1


def mean_experts(moe: MoEConfig, sequence_length: int) -> float:
    """Experts that compute a token in training, in the mean over tokens that are no padding.

    K, or 1 by `choice_policy="none"`, of which zero and copy experts have their part if loads are
    even; but where experts choose, and in Soft MoE, every slot is filled: E C / S. Where the data
    decide how many of the K count (`top_p`, `choice_policy` "threshold" or "random"), it is the
    most that can: K.
    """
    filled = slots_of_a_token(moe, sequence_length)
    if moe.has_soft_slots:
        return filled
    if fills_slots(moe, training=True):
        return min(filled, most_choices(moe))
    selected = 1 if moe.router.choice_policy == "none" else moe.num_selected_experts
    return selected * moe.num_experts / moe.num_options
