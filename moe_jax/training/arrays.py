"""Arrays of a state by name: reading them from a checkpoint, and comparing them with a run's."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

MOST_LINES = 5  # of differences in a message


def name_of(path: tuple[Any, ...]) -> str:
    """The name of an array from its path, such as "params/stack/unit/0/attention/wq".

    Named tuples and dicts give the same names, since Orbax reports named tuples as dicts.
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their names."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def describe(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf by its name, {"params/embedding": "float32[384,128]"}."""
    return {
        name: f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        for name, leaf in by_name(tree).items()
    }


def describe_saved(path: pathlib.Path) -> dict[str, str]:
    """`describe` of the arrays in a folder that Orbax wrote; any process may call it alone."""
    return describe(ocp.StandardCheckpointHandler().metadata(path).tree)


def read_arrays(
    path: pathlib.Path, tree: Any, wanted: Mapping[str, jax.ShapeDtypeStruct], gigabytes: int
) -> dict[str, jax.Array]:
    """Reads some arrays of a folder that Orbax wrote, straight onto their devices.

    Args:
      path: path of the folder.
      tree: tree of all its arrays.
      wanted: shape, dtype and sharding by name; floats may change their dtype.
      gigabytes: limit of what is copied at once between files and arrays.
    """
    require_shardings(dict(wanted))
    item = jax.tree_util.tree_map_with_path(
        lambda path, _: wanted.get(name_of(path), ocp.PLACEHOLDER), tree
    )
    arguments = jax.tree.map(
        lambda leaf: (
            ocp.RestoreArgs()
            if leaf is ocp.PLACEHOLDER
            else ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
            )
        ),
        item,
    )
    args = ocp.args.PyTreeRestore(item, restore_args=arguments)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=gigabytes)) as reader:
        found = by_name(reader.restore(path, args=args))
    return {name: found[name] for name in wanted}


def gigabytes_of_largest(tree: Any) -> int:
    """The size of the largest array in whole GB, rounded up: the least `gigabytes_in_flight`."""
    sizes = (math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    return max(1, math.ceil(max(sizes, default=0) / 1e9))


def differences(saved: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """The arrays that differ, one per line."""
    return [
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, "
        f"{wanted.get(name, 'absent')} in this run"
        for name in {**saved, **wanted}
        if saved.get(name) != wanted.get(name)
    ]


def some(lines: Sequence[str]) -> str:
    """The number of lines and the first few of them, in one line."""
    return f"{len(lines)}, {'; '.join(lines[:MOST_LINES])}"


def require_shardings(abstract_state: Any) -> None:
    """Refuses an array without a sharding.

    Raises:
      ValueError: naming the array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state):
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(
                f"every array must be restored into a known sharding: {name_of(path)} has none. "
                "Pass a jax.ShapeDtypeStruct with a sharding for each leaf."
            )
