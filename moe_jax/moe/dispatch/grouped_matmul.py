"""Grouped matmul: rows sorted by expert, each group times its own expert's matrix.

Legend: N rows, E experts, M model dim, H expert hidden dim.

`jax.lax.ragged_dot` on CPU is a dense masked product, E times the work.  Here a loop over experts copies
each weight matrix once and multiplies one block of rows by it, the block padded to the next size in `BLOCKS`.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Rows of one matrix product.  A group takes one product of the smallest block that holds it;
# a larger group first takes products of the largest block.  Finer steps waste fewer rows but
# compile more branches.
BLOCKS = tuple(range(640, 0, -64))


def _for_each_block(group_sizes_E, carry, body):
    """carry = body(carry, expert, start, size, block) for every block of rows, experts ascending.

    `block` is static, `size` <= 0 never occurs; rows start .. start + min(size, block) are the expert's.
    A while loop that runs at most once stands for `lax.cond`: XLA updates a while loop's carry in
    place, and copies a conditional's.
    """
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E

    def expert_body(expert, carry):
        state = (starts_E[expert], group_sizes_E[expert], carry)
        for block, smaller in zip(BLOCKS, BLOCKS[1:] + (0,), strict=True):

            def step(state, block=block):
                start, size, carry = state
                return start + block, size - block, body(carry, expert, start, size, block)

            state = lax.while_loop(lambda state, smaller=smaller: state[1] > smaller, step, state)
        return state[2]

    return lax.fori_loop(0, group_sizes_E.shape[0], expert_body, carry)


def _rows(x_NM, start, size, block):
    """Rows start .. start + block, those past `size` zero (whatever they held)."""
    rows_BM = lax.dynamic_slice_in_dim(x_NM, start, block)
    return jnp.where(jnp.arange(block)[:, None] < size, rows_BM, 0)


def _pad_rows(x_NM):
    return jnp.pad(x_NM, ((0, BLOCKS[0]), (0, 0)))


def _matmul(x_NM, w_EMH, group_sizes_E, w_dim):
    """y_n = x_n . w_e, contracting dimension `w_dim` (0: M, 1: H) of the expert's matrix."""
    num_rows = x_NM.shape[0]
    x_NM = _pad_rows(x_NM)

    def body(y_NH, expert, start, size, block):
        rows_BM = _rows(x_NM, start, size, block)
        y_BH = lax.dot_general(rows_BM, w_EMH[expert], (((1,), (w_dim,)), ((), ())),
                               preferred_element_type=jnp.float32)
        # Rows past `size` are zero, and overwritten by the next expert's.
        return lax.dynamic_update_slice_in_dim(y_NH, y_BH.astype(y_NH.dtype), start, 0)

    y_NH = jnp.zeros((x_NM.shape[0], w_EMH.shape[2 - w_dim]), x_NM.dtype)
    return _for_each_block(group_sizes_E, y_NH, body)[:num_rows]


def _weight_grad(x_NM, dy_NH, group_sizes_E, dtype):
    """dw_e = x_e^T dy_e."""
    x_NM, dy_NH = _pad_rows(x_NM), _pad_rows(dy_NH)

    def body(dw_EMH, expert, start, size, block):
        dw_MH = lax.dot_general(_rows(x_NM, start, size, block), _rows(dy_NH, start, size, block),
                                (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return dw_EMH.at[expert].add(dw_MH)

    shape = (group_sizes_E.shape[0], x_NM.shape[1], dy_NH.shape[1])
    return _for_each_block(group_sizes_E, jnp.zeros(shape, jnp.float32), body).astype(dtype)


@jax.custom_vjp
def grouped_matmul(x_NM, w_EMH, group_sizes_E):
    """Rows of x times their expert's matrix.

    Args:
      x_NM: [N, M], rows sorted by expert.
      w_EMH: [E, M, H].
      group_sizes_E: int32 [E], rows of each expert, sum <= N.

    Returns:
      [N, H] in x's dtype, accumulated in float32; rows past the sum are 0.
    """
    return _matmul(x_NM, w_EMH, group_sizes_E, 0)


def _forward(x_NM, w_EMH, group_sizes_E):
    return grouped_matmul(x_NM, w_EMH, group_sizes_E), (x_NM, w_EMH, group_sizes_E)


def _backward(residuals, dy_NH):
    x_NM, w_EMH, group_sizes_E = residuals
    dx_NM = _matmul(dy_NH, w_EMH, group_sizes_E, 1)
    return dx_NM, _weight_grad(x_NM, dy_NH, group_sizes_E, w_EMH.dtype), None


grouped_matmul.defvjp(_forward, _backward)
