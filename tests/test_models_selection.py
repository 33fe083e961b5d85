"""Names select parameters by component and by part; an unknown name lists what exists."""

import jax
import pytest

from configs import st_moe
from moe_jax.config import from_config_dict
from moe_jax.models.selection import select

SPECS = from_config_dict(st_moe.get_config("tiny,smoke")).model.specs()


def chosen(*names: str) -> set[str]:
    """Paths of the parameters that the names select."""
    marks = jax.tree_util.tree_leaves_with_path(select(SPECS, names))
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, mark in marks if mark}


@pytest.mark.parametrize(
    "names, those",
    [
        (("head",), {"head"}),
        (("encoder_moe/router",), {"encoder/unit/1/encoder_moe/router/weight"}),
        (
            ("router",),
            {"encoder/unit/1/encoder_moe/router/weight", "stack/unit/1/moe/router/weight"},
        ),
        (("stack/router", "head"), {"stack/unit/1/moe/router/weight", "head"}),
        ((), set()),
    ],
)
def test_a_name_chooses_by_component_and_by_path(names, those):
    assert chosen(*names) == those


def test_a_component_is_more_than_the_part_of_its_name():
    """Cross-attention and relative positions belong to the attention component too."""
    attention = chosen("attention")
    assert "stack/unit/0/cross_attention/wq" in attention
    assert "stack/shared/position/table" in attention
    assert not any("norm" in path for path in attention - chosen("norms"))


def test_all_is_everything():
    assert len(chosen("all")) == len(jax.tree.leaves(SPECS))


def test_a_name_that_chooses_nothing_lists_what_there_is():
    with pytest.raises(
        ValueError, match=r"each name must choose a parameter: 'expert' chooses none"
    ):
        select(SPECS, ("expert",))
    with pytest.raises(ValueError, match=r"encoder_moe, .*experts, .*router"):
        select(SPECS, ("encoder/cross_attention",))
