"""Reading rows, and summing them by token (legend: `moe_jax.moe`)."""

import jax
import jax.numpy as jnp


def take_or_zero(x: jax.Array, index: jax.Array, valid: jax.Array) -> jax.Array:
    """`x[index]` along the first dim where valid, else 0; an invalid index may be out of range."""
    return jnp.where(valid[..., None], x.at[index].get(mode="clip"), 0)


def sum_choices(
    y_RM: jax.Array, row_JK: jax.Array, weight_JK: jax.Array, kept_JK: jax.Array
) -> jax.Array:
    """sum_k weight[j, k] * y[row[j, k]] over kept choices.

    Args:
      y_RM: rows in any float dtype; only those of kept choices are read.
      row_JK: int32, where the row of each choice is.
      weight_JK: float32.
      kept_JK: bool.

    Returns:
      float32 [J, M]; choice by choice, so that no [J, K, M] array is made.
    """
    y_JM = jnp.zeros((row_JK.shape[0], y_RM.shape[1]), jnp.float32)
    for k in range(row_JK.shape[1]):
        y_k_JM = take_or_zero(y_RM, row_JK[:, k], kept_JK[:, k]).astype(jnp.float32)
        y_JM = y_JM + y_k_JM * weight_JK[:, k, None]
    return y_JM


def gate_gradient(
    y_RM: jax.Array, row_JK: jax.Array, dy_JM: jax.Array, kept_JK: jax.Array
) -> jax.Array:
    """The gradient of `sum_choices` with respect to its weights: float32 [J, K]."""
    dy_JM = dy_JM.astype(jnp.float32)
    columns = [
        jnp.sum(take_or_zero(y_RM, row_JK[:, k], kept_JK[:, k]).astype(jnp.float32) * dy_JM, -1)
        for k in range(row_JK.shape[1])
    ]
    return jnp.stack(columns, axis=1)
