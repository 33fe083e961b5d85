"""Low-rank adapters: the model's outputs before, while and after they learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.__main__ import main
from moe_jax.config import InitFrom, MeshConfig
from moe_jax.inference import generate_tokens
from moe_jax.models.trained import combine, filter_tree
from moe_jax.models.wrapping import dense_params, plain_model, quantised_params
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.parameters import ParameterSpec, Weight, init_parameters, learning, zeros
from moe_jax.part import Call
from moe_jax.training.arrays import by_name
from moe_jax.training.imported import save_imported, save_state
from moe_jax.training.init_from import open_source
from moe_jax.training.saved import load_run
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step
from moe_jax.weights.low_rank import ADAPTERS, Adapters, LowRank
from moe_jax.weights.quantised import Quantisation
from tests.tiny_run import cut, quick_jit, tiny_batch, tiny_config, tiny_state

NAMES = ("attention", "experts")
INT4 = Quantisation(("experts",), 4, 16)
HALF = Quantisation(("all",), 16)
MIXED = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
TOKENS = np.random.default_rng(1).integers(3, 259, (8, 8), np.int32)


def adapted(base=None, per_expert=True, learned=True):
    """A tiny model with adapters and its parameters; the model without them and its parameters."""
    adapters = Adapters(NAMES, rank=4, alpha=2.0, per_expert=per_expert)
    before = dataclasses.replace(tiny_config().model, quantisation=base)
    params = tiny_state(tiny_config()).params
    if base is not None:
        params = quantised_params(params, tiny_config().model.specs(), base)
    model = dataclasses.replace(before, adapters=adapters)
    drawn = init_parameters(jax.random.key(0), model.specs())
    random = np.random.default_rng(2)

    def joined(one, own):
        if not isinstance(own, LowRank):
            return one
        b = jnp.asarray(random.normal(size=own.b.shape), jnp.float32) if learned else own.b
        return dataclasses.replace(own, base=one, b=b)

    with_adapters = jax.tree.map(
        lambda own, one: joined(one, own),
        drawn,
        params,
        is_leaf=lambda leaf: isinstance(leaf, LowRank),
    )
    return model, with_adapters, before, params


def logits(model, params):
    return quick_jit(lambda p: model.run(p, Call(tokens_BL=TOKENS)).logits_BLV)(params)


@pytest.mark.parametrize(
    ("base", "per_expert"),
    [
        (INT4, False),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param(HALF, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_model_that_gets_adapters_says_what_it_said(base, per_expert):
    model, params, before, its = adapted(base, per_expert, learned=False)
    np.testing.assert_array_equal(logits(model, params), logits(before, its))


@pytest.mark.parametrize(
    ("base", "per_expert"),
    [
        (None, True),
        pytest.param(INT4, False, marks=pytest.mark.slow),
        pytest.param(HALF, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_merged_model_says_what_the_adapted_one_says(base, per_expert):
    model, params, before, its = adapted(base, per_expert)
    found, expected = logits(plain_model(model), dense_params(params)), logits(model, params)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    apart = np.abs(expected - logits(before, its)).max()
    assert apart > 0.1 * np.abs(expected).max()
    wanted = jax.tree.map(lambda spec: (spec.shape, spec.dtype), plain_model(model).specs())
    assert jax.tree.map(lambda array: (array.shape, array.dtype), dense_params(params)) == wanted


@pytest.mark.slow
def test_adapters_that_are_named_by_their_place_are_generated_with():
    """Generation runs layers one by one, where no layer belongs to a repeated unit."""
    _, params, _, _ = adapted()
    names = ("unit/0/attention", "unit/0/moe/experts")
    model = dataclasses.replace(adapted()[0], adapters=Adapters(names, rank=4, alpha=2.0))
    optimizer = dataclasses.replace(tiny_config().optimizer, trainable=(ADAPTERS,))
    config = dataclasses.replace(tiny_config(), model=model, optimizer=optimizer)
    prompt = TOKENS[0].tolist()
    [answer] = generate_tokens(config, params, [prompt], 1)
    call = Call(tokens_BL=jnp.array([prompt]), capacity=0.0)
    assert answer == [int(model.run(params, call).logits_BLV[0, -1].argmax())]


def test_a_merged_matrix_by_hand():
    """Alpha / rank = 2. Two experts that share an adapter get the same update."""
    a, b = jnp.asarray([[1.0], [2.0]]), jnp.asarray([[3.0, 0.0]])
    np.testing.assert_array_equal(LowRank(jnp.eye(2), a, b, scale=2.0).dense(), [[7, 0], [12, 1]])
    experts = jnp.stack([jnp.zeros((2, 2)), jnp.eye(2)])
    shared = LowRank(experts, a, b, scale=2.0, shared=True)
    np.testing.assert_array_equal(shared.dense(), [[[6, 0], [12, 0]], [[7, 0], [12, 1]]])
    spread = shared.of_experts(2)
    assert spread.a.shape == (2, 2, 1) and not spread.shared
    np.testing.assert_array_equal(spread.dense(), shared.dense())


@pytest.mark.parametrize("per_expert", [True, False])
def test_an_adapter_starts_with_the_variance_of_peft(per_expert):
    """PEFT's `a` is uniform within 1 / sqrt(inputs): its variance is a third of 1 / inputs."""
    spec = ParameterSpec((4, 256, 64), ("expert", "model", None), zeros, "experts")
    adapters = Adapters(("experts",), rank=32, per_expert=per_expert)
    drawn = init_parameters(jax.random.key(0), adapters.wrap("wi", spec, spec))
    assert drawn.a.shape == ((4, 256, 32) if per_expert else (256, 32))
    # At least 8,192 values: the deviation of their variance is at most 1.6 % of it.
    np.testing.assert_allclose(256 * np.var(drawn.a), 1 / 3, rtol=0.05)
    assert abs(np.mean(drawn.a)) < 0.003 and not np.any(drawn.b)


def gradients(model, params):
    """Gradients of a random function of the logits with respect to all float arrays."""
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(8, 8, 384)), jnp.float32)
    marks = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating), params)
    floats = filter_tree(params, marks)

    def loss(floats):
        output = model.run(combine(floats, params), Call(tokens_BL=TOKENS))
        return jnp.sum(output.logits_BLV * weights)

    return jax.jit(jax.grad(loss))(floats)


def test_what_lies_under_an_adapter_has_no_gradient():
    model, params, _, _ = adapted(INT4)
    layer = gradients(model, params)["stack"]["unit"]["0"]
    marks = learning(params)["stack"]["unit"]["0"]
    for group in (layer["attention"], layer["moe"]["experts"]):
        for adapter in group.values():
            assert np.abs(adapter.a).max() > 0 and np.abs(adapter.b).max() > 0
            for array in jax.tree.leaves(adapter.base):
                assert not np.asarray(array).any()
    assert np.abs(layer["moe"]["router"]["weight"]).max() > 0
    wi = marks["moe"]["experts"]["wi"]
    assert (wi.a, wi.b, jax.tree.leaves(wi.base)) == (True, True, [False, False])


@pytest.mark.slow
def test_the_gradient_of_a_shared_adapter_is_the_sum_of_those_of_the_experts():
    model, params, _, _ = adapted(per_expert=False)
    own = dataclasses.replace(model, adapters=dataclasses.replace(model.adapters, per_expert=True))

    def spread(leaf):
        if not isinstance(leaf, LowRank) or not leaf.shared:
            return leaf
        a, b = (jnp.repeat(each[:, None], 4, 1) for each in (leaf.a, leaf.b))
        return dataclasses.replace(leaf, a=a, b=b, shared=False)

    each = jax.tree.map(spread, params, is_leaf=lambda leaf: isinstance(leaf, Weight))
    found = gradients(model, params)["stack"]["unit"]["0"]["moe"]["experts"]
    expected = gradients(own, each)["stack"]["unit"]["0"]["moe"]["experts"]
    for name in ("wi", "wo"):
        for array in ("a", "b"):
            total = getattr(expected[name], array).sum(1)
            np.testing.assert_allclose(
                getattr(found[name], array), total, rtol=0, atol=1e-5 * np.abs(total).max()
            )


@pytest.mark.slow
@pytest.mark.parametrize("per_expert", [True, False])
def test_logits_and_gradients_on_a_mesh_are_those_of_one_device(per_expert):
    model, params, _, _ = adapted(INT4, per_expert)
    expected = logits(model, params), gradients(model, params)
    mesh = make_mesh(MIXED)
    shardings = jax.tree.map(lambda spec: named_sharding(spec.axes, mesh), model.specs())
    placed = jax.device_put(params, shardings)
    wi = placed["stack"]["unit"]["0"]["moe"]["experts"]["wi"]
    assert wi.b.addressable_shards[0].data.size * (4 if per_expert else 2) == wi.b.size
    with jax.set_mesh(mesh):
        found = logits(model, placed), gradients(model, placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(np.asarray(b)).max())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ("embedding",)}, "only matrices that multiply can have adapters"),
        ({"rank": 17}, r"rank=17, .*attention/wk \(16, 16\). Use a rank of at most 16"),
        ({"names": ("norms",)}, "names must choose at least one matrix"),
        ({"rank": 0}, "rank lies in"),
    ],
    ids=str,
)
def test_what_has_no_adapter_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config().model, adapters=Adapters(**settings))


def test_routers_have_no_adapter_unless_a_name_says_so():
    for names, expected in ((("moe",), False), (("moe", "router"), True), (("all",), False)):
        model = dataclasses.replace(tiny_config().model, adapters=Adapters(names, rank=2))
        router = model.specs()["stack"]["unit"]["0"]["moe"]["router"]["weight"]
        assert isinstance(router, LowRank) == expected


@pytest.mark.slow
def test_adapters_alone_move_in_training():
    """The base is quantised. Only a step after the first moves a: its gradient is 0 while b is."""
    model = adapted(INT4)[0]
    plain = tiny_config({"optimizer": {"schedule": "constant"}})
    optimizer = dataclasses.replace(plain.optimizer, trainable=(ADAPTERS,))
    config = dataclasses.replace(plain, model=model, optimizer=optimizer)
    state = init_state(config)
    step = quick_jit(make_train_step(config))
    after = state
    for _ in range(2):
        after, _ = step(after, cut(tiny_batch()))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    marks = jax.tree.map(lambda spec: spec.component == ADAPTERS, config.model.specs())
    assert moved == marks
    kept = {leaf.shape for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim}
    adapters = {
        spec.shape for spec in jax.tree.leaves(config.model.specs()) if spec.component == ADAPTERS
    }
    assert kept == adapters


def test_a_model_with_adapters_names_what_trains():
    with pytest.raises(
        ValueError, match=r"must name what trains.*Set optimizer.trainable=adapters"
    ):
        dataclasses.replace(tiny_config(), model=adapted()[0])


def test_a_run_with_adapters_starts_from_a_quantised_one(tmp_path):
    """Every array of the base is taken as stored; adapters are fresh."""
    model, _, before, its = adapted(INT4)
    plain = tiny_config()
    save_imported(tmp_path, dataclasses.replace(plain, model=before), its, {}, {}, {})
    optimizer = dataclasses.replace(plain.optimizer, trainable=(ADAPTERS,))
    given = InitFrom(str(tmp_path), fresh=(ADAPTERS,))
    config = dataclasses.replace(plain, model=model, optimizer=optimizer, init_from=given)
    source = open_source(config, {})
    experts = "params/stack/unit/0/moe/experts/wi"
    assert source.takes[f"{experts}/base/values"] == f"{experts}/values"
    assert source.takes[f"{experts}/base/scales"] == f"{experts}/scales"
    assert set(source.fresh) == {
        f"params/{name}"
        for name, spec in by_name(model.specs()).items() if spec.component == ADAPTERS
    }  # fmt: skip


@pytest.mark.slow
def test_the_command_makes_a_run_without_adapters(tmp_path, capsys):
    model, params, _, _ = adapted(INT4)
    plain = tiny_config()
    optimizer = dataclasses.replace(plain.optimizer, trainable=(ADAPTERS,))
    given = InitFrom(str(tmp_path / "gone"), fresh=(ADAPTERS,))
    config = dataclasses.replace(plain, model=model, optimizer=optimizer, init_from=given)
    run, output = tmp_path / "run", tmp_path / "merged"
    run.mkdir()
    state = tiny_state(plain)._replace(step=jnp.int32(7), params=params, opt_state=())
    save_state(run, config, state, {}, {})
    assert main(["merge_adapters", f"--workdir={run}", f"--output={output}"]) == 0
    said = capsys.readouterr().out
    assert "weights of 4 bits (experts) are written as floats" in said and "merged" in said
    found, state = load_run(output)
    assert int(state.step) == 7, "annealed settings keep the values that they had in the run"
    assert found == dataclasses.replace(plain, mesh=found.mesh)
    jax.tree.map(np.testing.assert_array_equal, state.params, dense_params(params))
    with pytest.raises(SystemExit):
        main(["merge_adapters", f"--workdir={output}", f"--output={tmp_path / 'again'}"])
    said = capsys.readouterr().err
    assert "only a run with adapters can be merged" in said and said.count("\n") == 1
