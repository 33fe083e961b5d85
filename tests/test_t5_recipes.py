"""What Switch and ST-MoE share with the T5 from which they come, and their twins' costs."""

import jax
import numpy as np
import pytest

from configs import st_moe, switch_base, switch_c, switch_xxl
from moe_jax.config import from_config_dict
from moe_jax.moe.queues import ChoiceMajor
from moe_jax.parameters import init_parameters
from moe_jax.planning.arithmetic import count_flops

FILES = pytest.mark.parametrize("file", [switch_base, st_moe], ids=lambda file: file.__name__)


def flops(file, presets):
    config = from_config_dict(file.get_config(presets))
    return count_flops(config.model, config.lengths)


@FILES
@pytest.mark.parametrize("presets", ["", "tiny"])
def test_a_twin_computes_what_experts_have_room_for_in_training(file, presets):
    """Slots that no choice needs are not model work; choices without a slot are not served.

    Switch has room for 1.25 times one choice, ST-MoE for 1.25 times two.
    """
    sparse, twin = flops(file, presets), flops(file, ",".join(["dense", *presets.split()]))
    served = sparse.experts + min(sparse.padding, 0)
    assert twin.dense_ffn == pytest.approx(sparse.dense_ffn + served, rel=0.01)
    assert twin.experts == 0 and twin.attention == pytest.approx(sparse.attention)


@FILES
def test_scores_start_as_if_they_were_scaled(file):
    """Queries have variance 0.1 / (M D), keys 0.1 / M: T5 folds D**-0.5 into the initial values."""
    model = from_config_dict(file.get_config("tiny")).model
    for name in ("attention", "cross_attention"):
        layer = next(part for part in model.specs()["stack"]["unit"].values() if name in part)
        values = init_parameters(jax.random.key(0), {name: layer[name]})[name]
        width, head_dim = model.model_dim, model.part[name].head_dim
        for matrix, variance in (("wq", 0.1 / (width * head_dim)), ("wk", 0.1 / width)):
            assert np.std(values[matrix]) == pytest.approx(variance**0.5, rel=0.05)


@pytest.mark.parametrize("file", [st_moe, switch_c, switch_xxl], ids=lambda file: file.__name__)
def test_an_untied_head_starts_small(file):
    """Variance 0.1 / M: output_logits_kernel_init in flaxformer's t5x/configs/moe."""
    model = from_config_dict(file.get_config("tiny")).model
    head = init_parameters(jax.random.key(0), {"head": model.specs()["head"]})["head"]
    assert np.std(head) == pytest.approx((0.1 / model.model_dim) ** 0.5, rel=0.03)


@FILES
def test_every_layer_adds_its_losses_and_logits_have_a_z_loss(file):
    config = from_config_dict(file.get_config())
    assert config.training.loss.z_loss == 1e-4
    for name in ("moe", "encoder_moe"):
        assert {loss.over_layers for loss in config.model.part[name].losses} == {"sum"}


@pytest.mark.parametrize(("presets", "sequences"), [("", 4), ("tiny", 4), ("32b", 8)])
def test_st_moe_serves_choices_by_position_in_groups_of_whole_sequences(presets, sequences):
    """Zoph et al. 2022, sec. 7.2: 2,048 and 456 tokens; flaxformer's st_moe_32b.gin: 4,096."""
    config = from_config_dict(st_moe.get_config(presets))
    lengths = config.lengths
    for name, length in (("encoder_moe", lengths.encoder), ("moe", lengths.decoder)):
        moe = config.model.part[name]
        assert moe.group_size == sequences * length
        assert isinstance(moe.capacity.queue, ChoiceMajor)


def test_the_steps_of_st_moe_make_its_published_tokens():
    for presets, tokens in (("", 0.5e12), ("32b", 1.5e12)):
        training = st_moe.get_config(presets).training
        assert training.num_steps * training.batch_size * 512 == pytest.approx(tokens, rel=0.05)


@FILES
def test_fine_tuning_leaves_small_models_their_steps(file):
    for preset in ("smoke", "tiny"):
        small, tuned = (file.get_config(presets) for presets in (preset, f"{preset},finetune"))
        assert tuned.training == small.training
        assert tuned.optimizer.learning_rate == small.optimizer.learning_rate
        assert tuned.model.dropout_rate == 0.1
    assert file.get_config("finetune").training.num_steps == 16_000
