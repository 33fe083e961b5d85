"""Experts one after another, on blocks of their rows: how a CPU computes sorted rows.

The whole expert runs inside one loop, on rows gathered block by block. So sorted tokens and hidden
activations exist for one block at a time. The backward pass recomputes the hidden activations.
Legend: `moe_jax.moe`; W: rows of a block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.moe.experts import Experts, Weights
from moe_jax.moe.run_experts.gather import sum_choices, take_or_zero
from moe_jax.moe.run_experts.sorting import Order, UngroupedChoices
from moe_jax.parameters import learning

# A small block has an eighth of an expert's mean rows, at most this many. On average half of an
# expert's last block is padding.
MAX_SMALL_BLOCK = 128
# Rows of a large block, whose products are faster, over those of a small one.
LARGE_OVER_SMALL = 4


class OneExpert:
    """Rows `[W, I]` of one expert times its weights `[I, O]`; each block has its own `rng`."""

    def __init__(self, rng: jax.Array | None, start: jax.Array):
        self.rng = None if rng is None else jax.random.fold_in(rng, start)

    def matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[W, I] x [I, O] -> [W, O], accumulated in float32."""
        return jnp.dot(x, weight, preferred_element_type=jnp.float32).astype(x.dtype)

    def expand(self, bias: jax.Array) -> jax.Array:
        """[O], which broadcasts."""
        return bias


class Block(NamedTuple):
    """A run of rows of one expert.

    Attributes:
      expert: int32 scalar.
      start: int32 scalar, its first row.
      size: int32 scalar, rows of the expert that are left. If fewer than W, the rest of the block
        belongs to other experts.
      rows: W, rows of the block; a Python int.
    """

    expert: jax.Array
    start: jax.Array
    size: jax.Array
    rows: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 7))
def expert_loop(
    experts: Experts,
    weights: Weights,
    rng: jax.Array | None,
    x_JM: jax.Array,
    gate_JK: jax.Array,
    kept_JK: jax.Array,
    order: Order,
    likely_rows: int | None = None,
) -> jax.Array:
    """The gated sum over the kept choices of every token.

    Args:
      experts: `(rows, weights of one expert, layout) -> rows`; acts on each row separately and
        closes over no array.
      weights: by name, leading dim E.
      rng: key for the experts, or None.
      x_JM: tokens.
      gate_JK: float32.
      kept_JK: bool.
      order: of the kept choices.
      likely_rows: the likely number of rows of all experts, which sets block sizes, so that extra
        room does not change the order of sums; None: all.

    Returns:
      [J, M] in the dtype of `x_JM`.
    """
    return _forward(experts, weights, rng, x_JM, gate_JK, kept_JK, order, likely_rows)[0]


def _forward(
    experts: Experts,
    weights: Weights,
    rng: jax.Array | None,
    x_JM: jax.Array,
    gate_JK: jax.Array,
    kept_JK: jax.Array,
    order: Order,
    likely_rows: int | None,
) -> tuple[jax.Array, Any]:
    choice_R, row_JK, rows_E = order
    num_rows = choice_R.shape[0]
    blocks = block_sizes(min(likely_rows or num_rows, num_rows), rows_E.shape[0])
    choice_R = jnp.pad(choice_R, (0, blocks[0]))
    token_R = choice_R // gate_JK.shape[1]
    gate_R1 = gate_JK.reshape(-1, 1)[choice_R]

    def body(y_RM: jax.Array, weights_e: Weights, block: Block) -> jax.Array:
        x_WM, gate_W1 = _gather_rows(x_JM, token_R, block), _rows_of(gate_R1, block)
        y_WM = experts(x_WM, weights_e, OneExpert(rng, block.start), gate_W1)
        return lax.dynamic_update_slice_in_dim(y_RM, y_WM, block.start, 0)

    y_RM = jnp.zeros_like(x_JM, shape=(token_R.shape[0], x_JM.shape[1]))
    y_RM = for_each_block(rows_E, blocks, y_RM, weights, body)
    y_JM = sum_choices(y_RM, row_JK, kept_JK).astype(x_JM.dtype)
    return y_JM, (weights, rng, x_JM, gate_R1, kept_JK, Order(choice_R, row_JK, rows_E))


def _backward(
    experts: Experts, likely_rows: int | None, residuals: Any, dy_JM: jax.Array
) -> tuple[Any, ...]:
    weights, rng, x_JM, gate_R1, kept_JK, (choice_R, row_JK, rows_E) = residuals
    num_rows = kept_JK.size
    blocks = block_sizes(min(likely_rows or num_rows, num_rows), rows_E.shape[0])
    token_R = choice_R // kept_JK.shape[1]

    arrays, tree = jax.tree.flatten(weights)
    learns = jax.tree.leaves(learning(weights))
    learned = select(arrays, learns)

    def body(carry: Any, arrays_e: list[jax.Array], block: Block) -> Any:
        drows, dweights = carry
        x_WM, gate_W1 = _gather_rows(x_JM, token_R, block), _rows_of(gate_R1, block)
        layout = OneExpert(rng, block.start)

        def compute(x_WM: jax.Array, gate_W1: jax.Array, learned_e: list[jax.Array]) -> jax.Array:
            weights_e = jax.tree.unflatten(tree, replace(arrays_e, learns, learned_e))
            return experts(x_WM, weights_e, layout, gate_W1)

        _, vjp = jax.vjp(compute, x_WM, gate_W1, select(arrays_e, learns))
        *drows_W, dweights_e = vjp(_gather_rows(dy_JM, token_R, block))
        drows = [
            lax.dynamic_update_slice_in_dim(all_R, own_W, block.start, 0)
            for all_R, own_W in zip(drows, drows_W, strict=True)
        ]
        return drows, jax.tree.map(functools.partial(_add, block=block), dweights, dweights_e)

    dweights = [jnp.zeros_like(array, jnp.float32) for array in learned]
    empty_RM = jnp.zeros_like(x_JM, shape=(token_R.shape[0], x_JM.shape[1]))
    carry = ([empty_RM, jnp.zeros_like(gate_R1)], dweights)
    (dx_RM, dgate_R1), dweights = for_each_block(rows_E, blocks, carry, arrays, body)
    dweights = [d.astype(array.dtype) for d, array in zip(dweights, learned, strict=True)]
    dx_JM = sum_choices(dx_RM, row_JK, kept_JK).astype(x_JM.dtype)
    dgate_JK = take_or_zero(dgate_R1, row_JK, kept_JK)[..., 0]
    no_gradient = [
        jnp.zeros_like(array) if jnp.issubdtype(array.dtype, jnp.inexact)
        else np.zeros(array.shape, jax.dtypes.float0)
        for array in arrays
    ]  # fmt: skip
    dweights = jax.tree.unflatten(tree, replace(no_gradient, learns, dweights))
    return dweights, None, dx_JM, dgate_JK, None, None


expert_loop.defvjp(_forward, _backward)


def select(values: list[Any], chosen: list[bool]) -> list[Any]:
    """The values that are chosen."""
    return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen]


def replace(values: list[Any], chosen: list[bool], others: list[Any]) -> list[Any]:
    """The values, with the chosen values replaced by `others`."""
    remaining = iter(others)
    return [next(remaining) if c else v for v, c in zip(values, chosen, strict=True)]


def _gather_rows(x_JM: jax.Array, token_R: jax.Array, block: Block) -> jax.Array:
    """The tokens of a block's rows, [W, M]; rows of other experts are 0."""
    token_W = lax.dynamic_slice_in_dim(token_R, block.start, block.rows)
    is_own_W = jnp.arange(block.rows) < block.size
    return jnp.where(is_own_W[:, None], x_JM.at[token_W].get(mode="promise_in_bounds"), 0)


def _rows_of(values_R1: jax.Array, block: Block) -> jax.Array:
    """The values of a block's rows, [W, 1], also of rows of other experts."""
    return lax.dynamic_slice_in_dim(values_R1, block.start, block.rows)


def _add(total_E: jax.Array, part: jax.Array, block: Block) -> jax.Array:
    """Adds to one expert's entry of an accumulator."""
    part = part + lax.dynamic_index_in_dim(total_E, block.expert, keepdims=False)
    return lax.dynamic_update_index_in_dim(total_E, part.astype(total_E.dtype), block.expert, 0)


def block_sizes(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Ascending numbers of rows that a block may have; more sizes take longer to compile.

    A single expert has all rows in one block, so it rounds as the dense network does.
    """
    eighth = -(-num_rows // (64 * num_experts)) * 8  # of an expert's mean rows, a multiple of 8
    small = max(min(eighth, MAX_SMALL_BLOCK), 8)
    larger = {LARGE_OVER_SMALL * small, num_rows if num_experts == 1 else small}
    return (small, *sorted(size for size in larger if small < size <= num_rows))


def for_each_block(
    rows_E: jax.Array,
    sizes: tuple[int, ...],
    carry: Any,
    operands_E: Any,
    body: Callable[[Any, Any, Block], Any],
) -> Any:
    """Folds `body` over the blocks of every expert that has rows, experts ascending.

    An expert's rows are split into blocks of the largest size while they fit, then of the next. The
    last block has the smallest size, and may end in rows of other experts. A later block processes
    these rows again, so a body may overwrite them with anything. They extend up to `sizes[0]` rows
    past the end.

    Args:
      rows_E: int32, rows of each expert.
      sizes: ascending numbers of rows that a block may have.
      carry: pytree of arrays, updated in place.
      operands_E: pytree of arrays with leading dim E; a body gets the entry of its expert, copied
        once.
      body: `(carry, operand, block) -> carry`.

    Returns:
      The final carry.
    """
    starts_E = jnp.cumsum(rows_E) - rows_E

    def one_expert(expert: jax.Array, carry: Any) -> Any:
        operand = expert_of(operands_E, expert)
        row, end = starts_E[expert], starts_E[expert] + rows_E[expert]
        for rows in reversed(sizes):
            least = 1 if rows == sizes[0] else rows

            def has_another(state: Any, least: int = least) -> jax.Array:
                return end - state[0] >= least

            def another(state: Any, rows: int = rows) -> Any:
                row, carry = state
                return row + rows, body(carry, operand, Block(expert, row, end - row, rows))

            row, carry = lax.while_loop(has_another, another, (row, carry))
        return carry

    def unless_empty(expert: jax.Array, carry: Any) -> Any:
        # Few tokens use few experts: the weights of unused experts are not copied.
        return at_most_once(rows_E[expert] > 0, functools.partial(one_expert, expert), carry)

    return lax.fori_loop(0, rows_E.shape[0], unless_empty, carry)


def at_most_once(condition: jax.Array, change: Callable[[Any], Any], carry: Any) -> Any:
    """`change(carry)` if the condition holds; else the carry.

    Not `lax.cond`: on a CPU, XLA updates a loop's carry in place, but copies a conditional's.
    """

    def once(state: Any) -> Any:
        return jnp.zeros_like(state[0]), change(state[1])

    return lax.while_loop(lambda state: state[0], once, (condition, carry))[1]


def one_by_one(
    x_JM: jax.Array,
    choices: UngroupedChoices,
    weights: Weights,
    experts: Experts,
    rng: jax.Array | None,
) -> jax.Array:
    """`through_sorted_rows` for few choices: each reads the weights of its expert in place.

    The matrices of an expert are sliced directly from the parameters of all layers.
    """
    y_JM = []
    expert_JK, gate_JK, kept_JK = choices
    num_tokens, num_choices = kept_JK.shape
    for j in range(num_tokens):
        x_1M = x_JM[j : j + 1].astype(jnp.float32)  # so that its gradient is summed in float32
        y_1M = jnp.zeros_like(x_1M)
        for k in range(num_choices):
            layout = OneExpert(rng, jnp.int32(j * num_choices + k))
            weights_e, gate_11 = expert_of(weights, expert_JK[j, k]), gate_JK[j : j + 1, k : k + 1]
            row_1M = experts(x_1M.astype(x_JM.dtype), weights_e, layout, gate_11)
            y_1M += jnp.where(kept_JK[j, k], row_1M.astype(jnp.float32), 0)
        y_JM.append(y_1M)
    return jnp.concatenate(y_JM).astype(x_JM.dtype)


def expert_of(operands_E: Any, expert: jax.Array) -> Any:
    """The entry of one expert in a pytree of arrays with leading dim E."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[expert], operands_E)
