"""Sparse models made dense, and experts dropped: by hand, and cases where this is exact."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.finetune.downcycle import (
    merge_experts,
    prune_experts,
    used_experts,
    weights_of,
    without_experts,
)
from moe_jax.finetune.expert_changes import Shared
from moe_jax.finetune.made import describe_names
from moe_jax.finetune.moments import remodelled_optimizer
from moe_jax.finetune.preservation import TOLERANCE, Outputs, check_preserved, difference
from moe_jax.finetune.remodel import remodelled, remodelled_state
from moe_jax.finetune.upcycle import Upcycling, upcycle
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.multi_token import MultiToken
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.state import init_state
from tests.tiny_run import DENSE, tiny_batch, tiny_config, tiny_moe, tiny_state

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def sparse():
    """A run of two sparse layers where no token chooses experts 1 and 3, and its outputs."""
    config = tiny_config(
        {"model": {"scan_layers": True}}
        | tiny_moe(
            router={"kind": "token_choice", "renormalize": True},
            bias={"kind": "sign"}, shared_expert_dim=8,
        )
    )  # fmt: skip
    state, mesh = tiny_state(config), make_mesh(config.mesh)
    bias = jnp.tile(jnp.array([0.0, -9.0, 0.0, -9.0]), (2, 1)) + jnp.arange(2.0)[:, None]
    state = state._replace(model_state={"moe": {"bias_E": bias}})
    batches = [tiny_batch()]
    return config, state, mesh, batches, said_of(config, state.params, state, batches, mesh)


def said_of(config, params, state, batches, mesh):
    return Outputs(config, params, state.model_state, batches, mesh)


def experts_of(params, name="wi"):
    return params["stack"]["unit"]["0"]["moe"]["experts"][name]


def test_dropping_experts_that_no_token_chooses_changes_nothing(sparse):
    config, state, mesh, batches, said = sparse
    assert (said.load["moe"][:, [1, 3]] == 0).all() and said.load["moe"].sum() > 0
    kept = used_experts(said.load, {"moe": 2})
    assert kept["moe"].tolist() == [[0, 2], [0, 2]]
    remodel = prune_experts(config, kept)
    assert remodel.new.model.part["moe"].num_experts == 2
    params = remodelled(remodel, state.params, KEY, mesh)
    np.testing.assert_array_equal(experts_of(params), experts_of(state.params)[:, [0, 2]])
    router = params["stack"]["unit"]["0"]["moe"]["router"]["weight"]
    old_router = state.params["stack"]["unit"]["0"]["moe"]["router"]["weight"]
    np.testing.assert_array_equal(router, old_router[..., [0, 2]])
    model_state = remodelled_state(remodel, state.model_state, KEY)
    assert model_state["moe"]["bias_E"].tolist() == [[0, 0], [1, 1]]
    new = Outputs(remodel.new, params, model_state, batches, mesh)
    assert difference(said, new) <= TOLERANCE


def test_the_most_loaded_experts_are_kept_and_as_many_in_each_layer():
    load = {"moe": np.array([[5, 0, 3, 0], [0, 2, 2, 7]])}
    assert used_experts(load, {"moe": 2})["moe"].tolist() == [[0, 1, 2], [1, 2, 3]]
    assert used_experts(load, {"moe": 2}, keep=2)["moe"].tolist() == [[0, 2], [1, 3]]


def test_an_expert_stays_in_its_group():
    load = {"moe": np.array([[5, 0, 3, 1], [0, 2, 2, 7]])}
    groups = {"moe": 2}  # {0, 1} and {2, 3}; by load alone the first layer would keep 0 and 2
    assert used_experts(load, {"moe": 1}, 2, groups)["moe"].tolist() == [[0, 2], [1, 3]]
    assert used_experts(load, {"moe": 1}, 3, groups)["moe"].shape == (2, 2)  # one is dropped
    assert used_experts(load, {"moe": 2}, None, groups)["moe"].tolist() == [[0, 1, 2, 3]] * 2
    router = TokenChoice(groups=ExpertGroups(2, 1, "max"))
    config = tiny_config(tiny_moe(num_experts=8, router=router))
    kept = np.array([[0, 1, 2, 4, 5, 7], [1, 2, 3, 4, 6, 7]])
    assert prune_experts(config, {"moe": kept}).new.model.part["moe"].num_experts == 6
    kept[1] = [2, 3, 4, 5, 6, 7]
    message = r"each stays in its group: .* of 2 groups, \[\[3, 3\], \[2, 4\]\] by layer"
    with pytest.raises(ValueError, match=message):
        prune_experts(config, {"moe": kept})


def test_what_is_not_by_expert_in_a_state_stays(sparse):
    """A router may keep such state: two of four experts are dropped, but two numbers stay."""
    config, *_ = sparse
    remodel = prune_experts(config, {"moe": np.array([[1, 2], [0, 3]])})
    old = {
        "bias_E": jnp.arange(8.0).reshape(2, 4),
        "router": {"calls": jnp.array([5.0, 6.0]), "two": jnp.ones((2, 2))},
    }
    start = {
        "bias_E": jnp.zeros((2, 2)),
        "router": {"calls": jnp.zeros(2), "two": jnp.zeros((2, 2))},
    }
    (origin,) = remodel.origins.values()
    new = origin.state(start, old, [0, 1])
    assert new["bias_E"].tolist() == [[1, 2], [4, 7]]
    assert new["router"]["calls"].tolist() == [5, 6]
    assert new["router"]["two"].tolist() == [[1, 1], [1, 1]]


def test_each_layer_drops_its_own_experts(sparse):
    config, state, mesh, *_ = sparse
    remodel = prune_experts(config, {"moe": np.array([[1, 2], [0, 3]])})
    params = remodelled(remodel, state.params, KEY, mesh)
    old_XEMH = experts_of(state.params)
    np.testing.assert_array_equal(experts_of(params)[0], old_XEMH[0, jnp.array([1, 2])])
    np.testing.assert_array_equal(experts_of(params)[1], old_XEMH[1, jnp.array([0, 3])])


def test_experts_of_multi_token_modules_alone_are_left_as_they_are():
    modules = {"depth": 1, "layer": ("attention", "other")}
    parts = {"other": {"kind": "moe", "num_experts": 3, "expert_dim": 8}}
    config = tiny_config({"model": {"multi_token": modules, "parts": parts}})
    kept = without_experts(config.model, [0])
    assert {name: kept_XE.tolist() for name, kept_XE in kept.items()} == {"moe": [[1, 2, 3]] * 2}
    for remodel in (prune_experts(config, kept), merge_experts(config)):
        assert remodel.new.model.part["other"] == config.model.part["other"]


def test_a_logit_that_is_nan_is_a_difference(sparse):
    """In any batch: `max` of Python forgets a NaN that does not come first."""
    logits = [np.ones((4, 3)), np.ones((4, 3))]
    broken = [np.ones((4, 3)), np.full((4, 3), np.nan)]
    old, new = SimpleNamespace(logits=logits), SimpleNamespace(logits=broken)
    assert difference(old, old) == 0
    with pytest.raises(ValueError, match="differ by nan"):
        check_preserved(difference(old, new), allow_change=True, fix="Mend it.")


def test_the_mean_is_weighted_by_load(sparse):
    config, state, mesh, *_ = sparse
    load = {"moe": np.array([[3, 1, 0, 0], [0, 0, 0, 0]])}
    weights = weights_of(config.model, "moe", load)
    assert weights[0].tolist() == [0.75, 0.25, 0, 0] and weights[1].tolist() == [0.25] * 4
    remodel = merge_experts(config, load)
    assert remodel.new.model.part["mlp"] == Mlp(dim=40)  # the shared expert's 8 units, then 32
    params = remodelled(remodel, state.params, KEY, mesh)
    wi_XMH = params["stack"]["unit"]["0"]["mlp"]["wi"]
    shared = state.params["stack"]["unit"]["0"]["moe"]["shared"]["wi"]
    np.testing.assert_array_equal(wi_XMH[..., :8], shared)
    old_XEMH = experts_of(state.params)
    expected = 0.75 * old_XEMH[0, 0] + 0.25 * old_XEMH[0, 1]
    np.testing.assert_allclose(wi_XMH[0, :, 8:], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(wi_XMH[1, :, 8:], old_XEMH[1].mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_copies_merge_to_the_network_that_they_are_of(shared):
    """Merged layers and the remaining dense layers become one part again."""
    config = tiny_config(DENSE)
    state, mesh = tiny_state(config), make_mesh(config.mesh)
    changes = (Shared(8),) if shared else ()
    up = upcycle(config, Upcycling(layers=(1,), changes=changes))
    params = remodelled(up, state.params, KEY, mesh)
    down = merge_experts(up.new)
    assert down.new.model == config.model
    merged = remodelled(down, params, KEY, mesh)
    for given, expected in zip(*map(jax.tree.leaves, (merged, state.params)), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-6, atol=1e-7)


def numbered_optimizer(config):
    """An optimizer state whose arrays all count up from 1."""
    abstract = jax.eval_shape(lambda: init_state(config)).opt_state
    return jax.tree.map(
        lambda a: jnp.arange(1, a.size + 1).astype(a.dtype).reshape(a.shape), abstract
    )


def test_moments_go_where_their_parameters_go(sparse):
    config, _, mesh, *_ = sparse
    opt_state = numbered_optimizer(config)
    old = opt_state[1].mu["stack"]["unit"]["0"]["moe"]
    pruned = prune_experts(config, {"moe": np.array([[1, 2], [0, 3]])})
    made = remodelled_optimizer(pruned, opt_state, {}, KEY, mesh)
    for moments in (made[1].mu, made[1].nu):
        moe = moments["stack"]["unit"]["0"]["moe"]
        for layer, kept in enumerate(([1, 2], [0, 3])):
            for name in ("wi", "wo"):
                expected = old["experts"][name][layer, jnp.array(kept)]
                np.testing.assert_array_equal(moe["experts"][name][layer], expected)
            expected = old["router"]["weight"][layer][..., jnp.array(kept)]
            np.testing.assert_array_equal(moe["router"]["weight"][layer], expected)
        np.testing.assert_array_equal(moe["shared"]["wi"], old["shared"]["wi"])

    load = {"moe": np.array([[3, 1, 0, 0], [1, 1, 1, 1]])}
    made = remodelled_optimizer(merge_experts(config, load), opt_state, {}, KEY, mesh)
    mlp = made[1].nu["stack"]["unit"]["0"]["mlp"]
    np.testing.assert_array_equal(mlp["wi"][..., :8], old["shared"]["wi"])
    expected = 0.75 * old["experts"]["wi"][0, 0] + 0.25 * old["experts"]["wi"][0, 1]
    np.testing.assert_allclose(mlp["wi"][0, :, 8:], expected, rtol=1e-6)
    np.testing.assert_allclose(mlp["wo"][1, 8:], old["experts"]["wo"][1].mean(axis=0), rtol=1e-6)


def test_rows_and_columns_of_adafactor_go_where_their_parameters_go():
    """Matrices with 128 rows and more are factored, separately for each expert."""
    wide = {"model_dim": 128, "scan_layers": True, "parts": {"moe": {"expert_dim": 128}}}
    config = tiny_config({"model": wide, "optimizer": {"name": "adafactor"}})
    opt_state, mesh = numbered_optimizer(config), make_mesh(config.mesh)

    def factors_of(opt_state, block):
        layer = opt_state[1]["stack"]["unit"]["0"][block]
        factored = layer.get("experts", layer)["wi"][0]
        return {"rows": factored.v_row, "columns": factored.v_col}

    def is_of_a_new_run(remodel, made):
        wanted = jax.eval_shape(lambda: init_state(remodel.new)).opt_state
        assert jax.tree.structure(made) == jax.tree.structure(wanted)
        for given, expected in zip(*map(jax.tree.leaves, (made, wanted)), strict=True):
            assert (given.shape, given.dtype) == (expected.shape, expected.dtype)

    old = factors_of(opt_state, "moe")
    assert old["rows"].shape == old["columns"].shape == (2, 4, 128)
    pruned = prune_experts(config, {"moe": np.array([[1, 2], [0, 3]])})
    merged = merge_experts(config)
    of_pruned, of_merged = (
        remodelled_optimizer(remodel, opt_state, {}, KEY, mesh) for remodel in (pruned, merged)
    )
    is_of_a_new_run(pruned, of_pruned)
    is_of_a_new_run(merged, of_merged)
    made, mean = factors_of(of_pruned, "moe"), factors_of(of_merged, "mlp")
    for name, old_XEN in old.items():
        np.testing.assert_array_equal(made[name][0], old_XEN[0, jnp.array([1, 2])])
        np.testing.assert_array_equal(made[name][1], old_XEN[1, jnp.array([0, 3])])
        np.testing.assert_allclose(mean[name], old_XEN.mean(axis=1), rtol=1e-6)


def test_moments_of_muon_are_merged_beside_a_shared_expert(sparse):
    """Every expert has its own step count, an integer."""
    optimizer = dataclasses.replace(sparse[0].optimizer, name="muon")
    config = dataclasses.replace(sparse[0], optimizer=optimizer)
    remodel = merge_experts(config)
    made = remodelled_optimizer(remodel, numbered_optimizer(config), {}, KEY, sparse[2])
    wanted = jax.eval_shape(lambda: init_state(remodel.new)).opt_state
    for given, expected in zip(*map(jax.tree.leaves, (made, wanted)), strict=True):
        assert (given.shape, given.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"frozen": ("router", "embedding")}, {"frozen": ("embedding",)}),
        ({"trainable": ("router", "norms")}, {"trainable": ("norms",)}),
        ({"trainable": ("moe",), "frozen": ("router",)}, {}),
        ({"trainable": ("experts", "norms"), "frozen": ("norms",)}, {}),
        (
            {"learning_rates": (("experts", 0.5), ("attention", 0.1))},
            {"learning_rates": (("attention", 0.1),)},
        ),
    ],
)
def test_names_that_the_new_model_lacks_choose_nothing_in_it(sparse, given, left):
    """By hand: a dense model has attention, norms, an embedding, and a dense network."""
    plain = sparse[0].optimizer
    config = dataclasses.replace(sparse[0], optimizer=dataclasses.replace(plain, **given))
    remodel = merge_experts(config)
    assert remodel.new.optimizer == dataclasses.replace(plain, **left)
    said = describe_names(remodel).partition("; now")[0]
    names = dataclasses.replace(plain, **given).chosen
    assert all((name in said) == (name not in remodel.new.optimizer.chosen) for name in names)
    same = prune_experts(config, {"moe": np.array([[1, 2], [0, 3]])})
    assert same.new.optimizer == config.optimizer and not describe_names(same)
    assert upcycle(remodel.new, Upcycling(every=2)).new.optimizer == remodel.new.optimizer


def test_what_cannot_be_made_is_refused(sparse):
    config = sparse[0]
    with pytest.raises(ValueError, match="parts that route"):
        merge_experts(tiny_config(DENSE))
    with pytest.raises(ValueError, match="experts of moe are 0 to 3: drop \\[4\\]"):
        without_experts(config.model, [0, 4])
    for dropped, left in (([0, 1, 2], 1), ([0, 1, 2, 3], 0)):
        with pytest.raises(ValueError, match=rf"'moe' keeps {left}, a token selects 2\. Raise"):
            prune_experts(config, without_experts(config.model, dropped))
    settings = {"router": {"kind": "soft"}, "group_size": 16, "run_experts": "auto"}
    soft = tiny_config({"model": {"stack": {"allow_lookahead": True}, "parts": {"moe": settings}}})
    with pytest.raises(ValueError, match="only if tokens choose among them; the slots of Soft MoE"):
        prune_experts(soft, without_experts(soft.model, [0]))
    gated = tiny_config(tiny_moe(shared_expert_dim=8, shared_expert_gate=True))
    with pytest.raises(ValueError, match="the shared expert has no gate"):
        merge_experts(gated)
    model = dataclasses.replace(tiny_config().model, multi_token=MultiToken())
    with pytest.raises(ValueError, match="no multi-token module"):
        prune_experts(
            dataclasses.replace(tiny_config(), model=model), {"moe": np.array([[0, 1], [0, 1]])}
        )
