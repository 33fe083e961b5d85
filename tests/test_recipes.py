"""How the decoder configs balance experts, by the sources that they name.

Switch and ST-MoE: `test_t5_recipes`.
"""

import importlib

import pytest

from moe_jax.config import from_config_dict
from moe_jax.moe.load_balance import HuggingFaceLoadBalance, LoadBalance

# Nats that the balance loss adds at uniform routing: the weight, times the layers if they are
# summed, times K if the loss is K there.
AT_UNIFORM = {
    "dbrx": 0.05,
    "deepseek_v2": 59 * 0.003,
    "deepseek_v2:lite": 26 * 0.001,
    "deepseek_v3": 58 * 1e-4,
    "gpt_oss": 4 * 0.01,
    "granite_moe": 8 * 0.001,
    "grok1": 2 * 0.001,
    "jamba": 2 * 0.001,
    "llama4": 0.001,
    "mixtral": 2 * 0.02,
    "olmoe": 0.01,
    "phi_moe": 0.01,
    "qwen2_moe": 4 * 0.001,
    "qwen3_moe": 8 * 0.001,
}


def config_of(name):
    """The config of a file with its preset."""
    file, _, preset = name.partition(":")
    return importlib.import_module(f"configs.{file}").get_config(preset)


@pytest.mark.parametrize("name", sorted(AT_UNIFORM))
def test_what_the_balance_loss_adds_at_uniform_routing(name):
    model = from_config_dict(config_of(name)).model
    moe = model.part["moe"]
    (loss,) = (one for one in moe.losses if isinstance(one, LoadBalance))
    at_uniform = moe.num_selected_experts if isinstance(loss, HuggingFaceLoadBalance) else 1
    layers = len(model.moe_layers["moe"]) if loss.over_layers == "sum" else 1
    assert layers * at_uniform * loss.weight == pytest.approx(AT_UNIFORM[name])


@pytest.mark.parametrize("name", ["deepseek_v3", "granite_moe", "olmoe", "phi_moe"])
def test_nothing_is_dropped_where_the_published_training_drops_nothing(name):
    assert config_of(name).model.parts.moe.capacity.train_factor == 0


def test_the_z_loss_of_olmoe_is_divided_by_its_choices():
    """As in MegaBlocks: 1e-3 over K = 8."""
    assert config_of("olmoe").model.parts.moe.losses.router_z.weight == 1.25e-4


def test_one_line_balances_by_layer():
    """The line of docs/routing.md."""
    config = config_of("mixtral")
    config.model.parts.moe.losses.huggingface_load_balance.kind = "flaxformer_load_balance"
    (loss,) = from_config_dict(config).model.part["moe"].losses
    assert (type(loss).__name__, loss.weight) == ("FlaxformerLoadBalance", 0.02)
