"""Chooses parameters of a model by component and by part."""

from collections.abc import Sequence
from typing import Any

import jax

from moe_jax.config.check import require
from moe_jax.parameters import ParameterSpec

ALL = "all"


def select(specs: Any, names: Sequence[str]) -> Any:
    """Marks the parameters that any of these names chooses.

    A name is a component ("experts", "router", "attention", "norms": see
    `ParameterSpec.component`), or a step of the path to a parameter ("encoder_moe", "multi_token",
    "head"). Names joined by "/" must all match: "encoder/attention" is the attention of the
    encoder. "all" chooses everything.

    >>> from moe_jax.models.model import LanguageModel
    >>> specs = LanguageModel().specs()
    >>> marks = select(specs, ("moe/router", "embedding"))
    >>> marks["embedding"], marks["stack"]["unit"]["0"]["moe"]["router"]["weight"]
    (True, True)
    >>> marks["stack"]["unit"]["0"]["moe"]["experts"]["wi"]
    False

    Args:
      specs: the tree of `ParameterSpec` of a model.
      names: what to choose.

    Returns:
      bools in the same tree.

    Raises:
      ValueError: a name chooses nothing; the message lists valid names.
    """
    check_names(specs, names)
    return marked(specs, names)


def check_names(specs: Any, names: Sequence[str]) -> None:
    """Raises `ValueError` if a name chooses nothing; see `select`."""
    paths = jax.tree_util.tree_leaves_with_path(specs)
    words = [words_of(path, spec) for path, spec in paths]
    for name in names:
        require(
            any(matches(name, one) for one in words),
            "each name must choose a parameter",
            f"{name!r} chooses none",
            f"Join some of these by '/', or write {ALL!r}: {', '.join(vocabulary(specs))}",
        )


def marked(specs: Any, names: Sequence[str]) -> Any:
    """`select` in which names may choose nothing, for specs of a part of a model."""
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: any(matches(name, words_of(path, spec)) for name in names), specs
    )


def words_of(path: tuple[Any, ...], spec: ParameterSpec) -> frozenset[str]:
    """The words that choose a parameter: the steps of its path, and its component."""
    return frozenset(
        {*jax.tree_util.keystr(path, simple=True, separator="/").split("/"), spec.component}
    )


def matches(name: str, words: frozenset[str]) -> bool:
    """Whether a name chooses the parameter with these words."""
    return name == ALL or words.issuperset(name.split("/"))


def vocabulary(specs: Any) -> list[str]:
    """The words that choose parameters: components, stacks and parts, without numbers."""
    words: set[str] = set()
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        words |= {word for word in words_of(path, spec) if not word.isdecimal()}
    return sorted(words)
