"""The dense twins of Switch and ST-MoE cost what their sparse models do."""

import pytest

from configs import st_moe, switch_base
from moe_jax.config import from_config_dict
from moe_jax.planning.arithmetic import count_flops


def flops(file, presets):
    config = from_config_dict(file.get_config(presets))
    return count_flops(config.model, config.lengths)


@pytest.mark.parametrize("presets", ["", "tiny"])
@pytest.mark.parametrize("file", [switch_base, st_moe], ids=lambda file: file.__name__)
def test_a_twin_computes_what_experts_have_room_for_in_training(file, presets):
    """Slots that no choice needs are no work of the model; choices without a slot are not served.

    Switch has room for 1.25 of one choice, ST-MoE for 1.25 of two.
    """
    sparse, twin = flops(file, presets), flops(file, ",".join(["dense", *presets.split()]))
    served = sparse.experts + min(sparse.padding, 0)
    assert twin.dense_ffn == pytest.approx(sparse.dense_ffn + served, rel=0.01)
    assert (twin.experts, twin.attention) == (0, sparse.attention)
