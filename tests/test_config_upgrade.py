"""Configs in earlier layouts are read as current ones."""

import json

import jax
import numpy as np
import pytest

from moe_jax.config import ExperimentConfig, read_config
from moe_jax.config.convert import write_config
from moe_jax.config.upgrade import FORMAT, upgrade
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.rotary import Rotary
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.training import loop, run_record
from moe_jax.training.files import read_json
from moe_jax.training.loop import train
from moe_jax.training.saved import load_run
from moe_jax.training.workdir import changes
from tests.tiny_run import tiny_config, tiny_training

# The default settings of attention in format 2.
OLD = {
    "kind": "attention", "num_heads": 4, "num_kv_heads": 0, "head_dim": 32, "qkv_bias": False,
    "output_bias": False, "qk_norm": False, "norm_epsilon": 1e-6, "rotary": True,
    "rope_base": 10_000.0, "init_scale": 1.0,
}  # fmt: skip


def old_config(**settings):
    """A current config with attention and norms in format 2, through JSON."""
    written = json.loads(json.dumps(write_config(ExperimentConfig())))
    written["format"] = 2
    written["model"]["parts"]["attention"] = OLD | settings
    written["model"]["norm"] = {"kind": "rmsnorm", "epsilon": 1e-6}
    return written


def attention_of(**settings):
    return read_config(old_config(**settings), ExperimentConfig).model.part["attention"]


def test_a_config_of_format_2_is_that_of_today():
    assert read_config(old_config(), ExperimentConfig) == ExperimentConfig()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"qkv_bias": True}, {"biases": ("q", "k", "v")}),
        ({"output_bias": True}, {"biases": ("o",)}),
        ({"qkv_bias": True, "output_bias": True}, {"biases": tuple("qkvo")}),
        ({"qk_norm": True}, {"qk_norm": RMSNorm(1e-6)}),
        ({"qk_norm": True, "norm_epsilon": 1e-5}, {"qk_norm": RMSNorm(1e-5)}),
        ({"norm_epsilon": 1e-5}, {"qk_norm": None}),
        ({"rope_base": 500.0}, {"rotary": Rotary(base=500.0)}),
        ({"rotary": False}, {"rotary": None}),
    ],
)
def test_settings_of_attention(old, new):
    attention = attention_of(**old)
    assert {name: getattr(attention, name) for name in new} == new
    assert attention.qk_norm_at == "heads"


def test_attention_inside_other_parts_is_upgraded_too():
    written = old_config()
    branches = [["attention", OLD | {"rope_base": 7.0}], ["mlp", {"kind": "mlp"}]]
    written["model"]["parts"] = {"whole": {"kind": "layer", "branches": branches}}
    written["model"]["stack"]["unit"] = ["whole"]
    config = read_config(written, ExperimentConfig)
    assert config.model.part["attention"].rotary == Rotary(base=7.0)


def test_a_part_of_format_3_keeps_a_field_that_attention_had_in_format_2():
    written = json.loads(json.dumps(write_config(ExperimentConfig())))
    written["model"]["parts"]["mixer"] = mixer = {"kind": "a.file:Mixer", "rope_base": 7.0}
    assert upgrade(written | {"format": 3})["model"]["parts"]["mixer"] == mixer
    assert upgrade(written | {"format": 2})["model"]["parts"]["mixer"] != mixer


def test_a_config_of_today_is_left_as_it_is():
    written = write_config(ExperimentConfig())
    assert written["format"] == FORMAT and upgrade(written) == written
    with pytest.raises(ValueError, match="formats 2 to 5 can be read: this one is of format 6"):
        upgrade(written | {"format": 6})


@pytest.mark.parametrize(
    ("microbatches", "num_microbatches", "batches"),
    [(0, 4, 0), (10, 1, 10), (80, 8, 10), (5, 2, 3)],
)
def test_format_3_counted_held_out_text_in_microbatches(microbatches, num_microbatches, batches):
    counted = {"evaluation_batches": microbatches, "num_microbatches": num_microbatches}
    written = json.loads(json.dumps(write_config(ExperimentConfig())))
    written |= {"format": 3, "training": written["training"] | counted}
    training = read_config(written, ExperimentConfig).training
    assert (training.evaluation_batches, training.num_microbatches) == (batches, num_microbatches)


def test_gates_over_their_l1_norm_in_format_4_are_over_their_sum():
    def router(**settings):
        written = json.loads(json.dumps(write_config(ExperimentConfig())))
        written["model"]["parts"]["moe"]["num_selected_experts"] = 2
        written["model"]["parts"]["moe"]["router"] |= settings
        return read_config(written | {"format": 4}, ExperimentConfig).model.part["moe"].router

    assert router(norm_order=None) == TokenChoice()
    assert router(norm_order=1.0) == TokenChoice(renormalize=True)
    with pytest.raises(ValueError, match=r"the norm of gates is their sum: norm_order=2\.0"):
        router(norm_order=2.0)
    own = {"kind": "a.file:Router", "norm_order": 2.0}
    assert upgrade({"format": 4, "router": own})["router"] == own


def test_parameters_have_the_names_and_shapes_that_they_had():
    specs = attention_of(qkv_bias=True, output_bias=True, qk_norm=True, head_dim=6).specs(
        ExperimentConfig().model.dims._replace(model_dim=8)
    )
    assert jax.tree.map(lambda spec: spec.shape, specs) == {
        "wq": (8, 24), "wk": (8, 24), "wv": (8, 24), "wo": (24, 8),
        "bq": (24,), "bk": (24,), "bv": (24,), "bo": (8,),
        "q_norm": {"scale": (6,)}, "k_norm": {"scale": (6,)},
    }  # fmt: skip


def write_as_before(config, content=None):
    """`write_config` of the previous release, for default attention of any size."""
    written = json.loads(json.dumps(write_config(config, content)))
    attention = written["model"]["parts"]["attention"]
    sizes = {name: attention[name] for name in ("num_heads", "head_dim")}
    written["model"]["parts"]["attention"] = OLD | sizes
    written["model"]["norm"].pop("use_scale")
    return written | {"format": 2}


@pytest.mark.slow
def test_a_run_of_format_2_goes_on(tmp_path, monkeypatch, capsys):
    """Its checkpoints and config.json have the old layout; five steps plus three equal eight."""

    def config(steps):
        training = {"num_steps": steps, "evaluate_every": 0, "sample_prompt": ""}
        return tiny_training({"optimizer": {"schedule": "constant"}, "training": training})

    with monkeypatch.context() as earlier:
        for module in (run_record, loop):
            earlier.setattr(module, "write_config", write_as_before)
        train(config(5), tmp_path / "old")
    assert read_json(tmp_path / "old" / "config.json")["format"] == 2
    capsys.readouterr()
    train(config(8), tmp_path / "old")
    assert "resuming after step 5 of 8" in capsys.readouterr().out
    train(config(8), tmp_path / "new")
    states = [load_run(tmp_path / name, moments=True)[1] for name in ("old", "new")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_run_of_format_2_is_compared_setting_by_setting():
    config = tiny_config()
    record = write_as_before(config)
    assert changes(record, config, {}) == []
    other = tiny_config({"model": {"parts": {"attention": {"sink": True}}}})
    assert changes(record, other, {}) == ["config.model.parts.attention.sink: False -> True"]
