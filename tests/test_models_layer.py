"""Parts that are whole layers, with branches of their own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ExperimentConfig, config_dict, from_config_dict, read_config
from moe_jax.config.convert import write_config
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.layer import Layer, ParallelLayer
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.part import MoE
from moe_jax.parameters import init_parameters
from moe_jax.part import Call

ATTENTION, MLP = Attention(num_heads=2, head_dim=4), Mlp(dim=8)
MOE = MoE(num_experts=4, num_selected_experts=2, expert_dim=8, run_experts="gather")
# In this order, not in the order of their names.
BRANCHES = (("mlp", MLP), ("attention", ATTENTION), ("moe", MOE))


def model(layer, **settings):
    return LanguageModel(
        vocab_size=16,
        model_dim=8,
        parts={"whole": layer, "mlp": MLP},
        stack=StackLayout(first=(("mlp",),), unit=("whole",), repeats=2),
        **settings,
    )


def run(model):
    params = init_parameters(jax.random.key(0), model.specs())
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 16)
    return params, jax.jit(model.run)(params, Call(tokens_BL=tokens))


@pytest.mark.parametrize("kind", [Layer, ParallelLayer])
def test_a_config_keeps_the_branches_and_their_order(kind):
    config = ExperimentConfig(model=model(kind(branches=BRANCHES)))
    assert from_config_dict(config_dict(config)) == config
    written = json.loads(json.dumps(write_config(config)))
    again = read_config(written, ExperimentConfig)
    assert again == config
    assert [name for name, _ in dict(again.model.parts)["whole"].branches] == [
        "mlp", "attention", "moe",
    ]  # fmt: skip


def test_a_layer_of_its_own_is_the_layer_of_the_same_names():
    whole = model(Layer(branches=BRANCHES))
    by_names = LanguageModel(
        vocab_size=16,
        model_dim=8,
        parts=dict(BRANCHES),
        stack=StackLayout(first=(("mlp",),), unit=(("mlp", "attention", "moe"),), repeats=2),
    )
    assert whole.layers_of == by_names.layers_of == {
        "mlp": (0, 1, 2), "attention": (1, 2), "moe": (1, 2),
    }  # fmt: skip
    assert whole.moe_layers == {"moe": (1, 2)}
    (params, given), (others, expected) = run(whole), run(by_names)
    assert jax.tree.structure(params) == jax.tree.structure(others)
    np.testing.assert_array_equal(given.logits_BLV, expected.logits_BLV)
    sums = {name: aux.sums for name, aux in given.aux.items()}
    assert whole.needs_batch_sums == by_names.needs_batch_sums is True
    losses = [one.loss(given.aux, jnp.float32(12), sums) for one in (whole, by_names)]
    assert losses[0] == losses[1] > 0
    assert whole.metrics(given.aux).keys() == by_names.metrics(expected.aux).keys()


def test_two_parts_of_one_name_are_refused():
    branches = (("mlp", Mlp(dim=4)), ("attention", ATTENTION))
    with pytest.raises(ValueError, match=r"same part, in whole layers too: \['mlp'\] differ"):
        model(Layer(branches=branches))


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        (Layer, ("mlp", "mlp", "mlp_0"), r"\['mlp_0', 'mlp_1', 'mlp_0'\]"),
        (Layer, ("mlp", "mlp_norm"), r"NAME_norm .*\['mlp', 'mlp_norm'\]"),
        (Layer, ("mlp_post_norm", "mlp"), r"NAME_post_norm: .*'mlp_post_norm'"),
        (ParallelLayer, ("mlp", "norm"), r"'norm' is the one norm .*\['mlp', 'norm'\]"),
    ],
)
def test_branches_whose_parameters_would_have_one_name_are_refused(kind, names, message):
    with pytest.raises(ValueError, match=message):
        kind(branches=tuple((name, MLP) for name in names))
    named = Layer(branches=(("mlp", MLP), ("mlp", MLP), ("norm", MLP))).named
    assert [name for name, _ in named] == ["mlp_0", "mlp_1", "norm"]


@dataclasses.dataclass(frozen=True)
class Backwards(Layer):
    """Declares that it looks ahead, although none of its branches does."""

    def looks_ahead(self, training):
        return True


def test_a_layer_that_looks_ahead_by_itself_is_refused_in_a_causal_stack():
    with pytest.raises(ValueError, match=r"must not depend on later tokens: .*'Backwards'"):
        model(Backwards(branches=BRANCHES))
