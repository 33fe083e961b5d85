"""Batches of all processes, made of what each process reads."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.parallel.rules import named_sharding


def host_share(mesh: Mesh, num_rows: int) -> tuple[int, int]:
    """Which of the rows of a batch this process reads: share h of H equal, consecutive ones.

    Processes whose devices have the same rows (under `tensor`) have the same h.

    Returns:
      h and H.

    Raises:
      ValueError: the rows cannot be split evenly, or those of this process do not follow each
        other.
    """
    shards = named_sharding(("batch",), mesh).addressable_devices_indices_map((num_rows,))
    spans = sorted({index[0].indices(num_rows)[:2] for index in shards.values() if index})
    start, stop = spans[0][0], spans[-1][1]
    size = stop - start
    whole = sum(b - a for a, b in spans) == size
    if not whole or num_rows % size or start % size:
        raise ValueError(
            "A process reads consecutive rows of a batch, as many as every other: of "
            f"{num_rows} rows process {jax.process_index()} has {spans}. Change the sizes of "
            "config.mesh, so that the devices of a process are neighbours along data, fsdp and "
            "expert."
        )
    return start // size, num_rows // size


def from_shares(
    share: Mapping[str, np.ndarray], mesh: Mesh, names: tuple[str | None, ...]
) -> dict[str, jax.Array]:
    """Global arrays from this process's share of their rows.

    Args:
      share: arrays by name, each of this process's rows along the dim named "batch".
      mesh: where they go.
      names: of the dims of each array, as in `rules.RULES`.
    """
    sharding = named_sharding(names, mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in share.items()
    }


def from_whole(
    whole: Mapping[str, np.ndarray], mesh: Mesh, names: tuple[str | None, ...]
) -> dict[str, jax.Array]:
    """Global arrays from all of their rows, which every process has."""
    sharding = named_sharding(names, mesh)

    def place(value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return {key: place(value) for key, value in whole.items()}
