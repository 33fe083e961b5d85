"""Global batches, made of the rows that each process reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.parallel.rules import named_sharding


def rows_of_process(mesh: Mesh, num_rows: int) -> list[int]:
    """The rows of a batch that this process reads: those that its devices hold, ascending.

    They need not be consecutive. A TPU mesh follows the torus, where a host has a block of chips:
    with 256 rows over `data=256` on v5e:16x16, the first host reads rows 0, 1, 16 and 17. Processes
    spanned by `tensor` read the same rows.

    Raises:
      ValueError: the devices of the mesh cannot share the rows evenly.
    """
    shards = named_sharding(("batch",), mesh).addressable_devices_indices_map((num_rows,))
    spans = {index[0].indices(num_rows) for index in shards.values() if index}
    return sorted(row for span in spans for row in range(*span))


def from_rows(
    read: Mapping[str, np.ndarray],
    rows: Sequence[int],
    num_rows: int,
    mesh: Mesh,
    names: tuple[str | None, ...],
) -> dict[str, jax.Array]:
    """Makes global arrays from the rows that this process reads.

    Args:
      read: arrays by name, each of `rows` along the dim named "batch".
      rows: the result of `rows_of_process`.
      num_rows: number of rows of the global arrays.
      mesh: mesh to place them on.
      names: dim names of each array, as in `rules.RULES`; only "batch" may be split.
    """
    sharding = named_sharding(names, mesh)
    dim = names.index("batch")

    def place(value: np.ndarray) -> jax.Array:
        def held(index: Any) -> np.ndarray:
            start, stop, _ = index[dim].indices(num_rows)
            first = int(np.searchsorted(rows, start))  # the rows of a device are consecutive
            return value[(slice(None),) * dim + (slice(first, first + stop - start),)]

        shape = (*value.shape[:dim], num_rows, *value.shape[dim + 1 :])
        return jax.make_array_from_callback(shape, sharding, held)

    return {key: place(value) for key, value in read.items()}


def from_whole(
    whole: Mapping[str, np.ndarray], mesh: Mesh, names: tuple[str | None, ...]
) -> dict[str, jax.Array]:
    """Makes global arrays from whole arrays, which every process has."""
    sharding = named_sharding(names, mesh)

    def place(value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return {key: place(value) for key, value in whole.items()}
