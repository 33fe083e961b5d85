"""Rows sorted by expert: kept choices only, no padding (legend: `moe_jax.moe`).

Experts compute `SortedRows` through a kernel (`grouped_matmul`). On a CPU they run one after
another (`expert_loop`).
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.capacity import Assignment
from moe_jax.moe.experts import Experts, Weights
from moe_jax.moe.run_experts.expert_loop import expert_loop, one_by_one
from moe_jax.moe.run_experts.gather import combine, fill, fill_gates
from moe_jax.moe.run_experts.grouped_matmul import grouped_matmul
from moe_jax.moe.run_experts.sorting import UngroupedChoices, sort_by_expert, without_groups

# A CPU computes up to this many choices one by one, not in a loop over experts: when it decodes one
# text, or a few. Inside a scan over layers, XLA copies the operands of a loop: the matrices of all
# experts of the layer.
FEW_CHOICES = 8


class SortedRows:
    """Rows `[R, I]` sorted by expert: the first `rows_E[0]` are expert 0's, and so on.

    Args:
      rng: key of the experts, or None.
      rows_E: int32, rows of each expert.
      num_rows: R, including rows past the last expert's.
      kernel: of `grouped_matmul`.
      likely_rows: the likely number of rows of all experts; None: all.
    """

    def __init__(
        self,
        rng: jax.Array | None,
        rows_E: jax.Array,
        num_rows: int,
        kernel: str,
        likely_rows: int | None = None,
    ):
        self.rng, self.kernel, self.likely_rows = rng, kernel, likely_rows or num_rows
        ends_E = jnp.cumsum(rows_E)
        self.rows_E = rows_E
        self.is_filled_R = jnp.arange(num_rows) < ends_E[-1]
        self.expert_R = jnp.searchsorted(ends_E, jnp.arange(num_rows), side="right")

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[R, I] x [E, I, O] -> [R, O]; rows past the last expert's are 0 for any `x`."""
        # Kernels leave rows of no expert undefined, in both directions.
        x = jnp.where(self.is_filled_R[:, None], x, 0)
        y = grouped_matmul(x, weight, self.rows_E, self.kernel, self.likely_rows)
        return jnp.where(self.is_filled_R[:, None], y, 0)

    def expand(self, bias: jax.Array) -> jax.Array:
        """[E, O] -> [R, O]; rows past the last expert's get the last expert's bias."""
        return jnp.take(bias, self.expert_R, axis=0, mode="clip")


def run_sorted_rows(
    x_GSM: jax.Array,
    assignment: Assignment,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None = None,
    *,
    kernel: str,
) -> jax.Array:
    """Sorts the kept choices by expert, computes them, and sums the outputs by token.

    Arguments and result are those of `run_experts`; slots are not used. `kernel` multiplies rows
    and weights (`grouped_matmul`); "loop" runs experts block by block (`expert_loop`).
    """
    x_JM = x_GSM.reshape(-1, x_GSM.shape[-1])
    y_JM = through_sorted_rows(x_JM, without_groups(assignment), weights, experts, rng, kernel)
    return y_JM.reshape(x_GSM.shape)


def through_sorted_rows(
    x_JM: jax.Array,
    choices: UngroupedChoices,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None,
    kernel: str,
    likely_rows: int | None = None,
) -> jax.Array:
    """`run_sorted_rows` without groups: [J, M] -> [J, M] in the dtype of `x_JM`.

    `likely_rows` is the likely number of kept choices; None: all.
    """
    _, gate_JK, kept_JK = choices
    if kernel == "loop" and kept_JK.size <= FEW_CHOICES and likely_rows is None:
        return one_by_one(x_JM, choices, weights, experts, rng)
    order = sort_by_expert(choices, num_experts_of(weights))
    if kernel == "loop":
        return expert_loop(experts, weights, rng, x_JM, gate_JK, kept_JK, order, likely_rows)
    layout = SortedRows(rng, order.rows_E, kept_JK.size, kernel, likely_rows)
    places = order.places(kept_JK)
    gate_R1 = fill_gates(gate_JK, places)
    y_RM = experts(fill(x_JM, places), weights, layout, gate_R1)
    y_JM: jax.Array = combine(y_RM, places)
    return y_JM


def num_experts_of(weights: Weights) -> int:
    """The leading dim of expert weights."""
    return jax.tree.leaves(dict(weights))[0].shape[0]
