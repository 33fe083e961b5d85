"""Dense models made sparse: changes by hand, unchanged models, moments, a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.mesh import MeshConfig
from moe_jax.config.settings import setting
from moe_jax.finetune.expert_changes import Copies, Drop, ExpertChange, Granular, Noise, Shared
from moe_jax.finetune.moments import remodelled_optimizer
from moe_jax.finetune.preservation import TOLERANCE, Outputs, difference
from moe_jax.finetune.remodel import remodelled
from moe_jax.finetune.upcycle import Upcycled, Upcycling, gates_without_preference, upcycle
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.layout import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.experts import FeedForward
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parameters import SAME_WEIGHTS
from moe_jax.part import Call, Dims, Own
from moe_jax.training.state import init_state
from tests.tiny_run import DENSE, quick_jit, tiny_batch, tiny_config, tiny_state

KEY = jax.random.key(0)
DIMS = Dims(model_dim=4, vocab_size=16)
NETWORK = Mlp(dim=6, activation=SwiGLU(), use_bias=True)


def weights_of(part, seed=0):
    """Weights of a part, biases included, all different from 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.normal(size=spec.shape), jnp.float32), part.specs(DIMS)
    )


def params_of(origin, old):
    """Parameters of a block, each made from those of the dense network."""
    made = {
        path: origin.make(path, [old[name] for (name,) in origin.needs(path)], KEY, None, False)
        for path in origin.spec_of
    }
    for path, value in made.items():
        assert value.shape == origin.spec_of[path].shape, path
    params = {}
    for path, value in made.items():
        inner = params
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return params


def outputs(upcycling):
    """Outputs of the block and of the dense network for the same tokens."""
    origin, old = Upcycled(NETWORK, upcycling, DIMS), weights_of(NETWORK)
    x_BLM = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 4)), jnp.float32)

    @quick_jit
    def both():
        call = Call(capacity=0.0).with_defaults(x_BLM)
        sparse, _, _ = origin.block.apply(params_of(origin, old), x_BLM, call, Own())
        return sparse, FeedForward(NETWORK.activation)(x_BLM, old, SAME_WEIGHTS)

    return both()


def test_copies_noise_and_drop_by_hand():
    moe = MoE(num_experts=2, expert_dim=4)
    wi_EMH = jnp.broadcast_to(jnp.arange(8.0).reshape(2, 4), (2, 2, 4))
    wo_EHM = jnp.broadcast_to(jnp.arange(8.0).reshape(4, 2), (2, 4, 2))
    np.testing.assert_array_equal(ExpertChange().experts(Copies("wi", wi_EMH), moe, KEY), wi_EMH)
    for change in (Noise(stddev=0.1, ratio=0.5), Drop(ratio=0.5)):
        # Two of four units per expert change, the same in both matrices.
        in_wi_EH = np.any(change.experts(Copies("wi", wi_EMH), moe, KEY) != wi_EMH, axis=1)
        in_wo_EH = np.any(change.experts(Copies("wo", wo_EHM), moe, KEY) != wo_EHM, axis=2)
        np.testing.assert_array_equal(in_wi_EH, in_wo_EH)
        assert in_wi_EH.sum(axis=1).tolist() == [2, 2]
        bo_EM = jnp.ones((2, 2))
        np.testing.assert_array_equal(change.experts(Copies("bo", bo_EM), moe, KEY), bo_EM)


def test_drop_draws_from_the_mean_and_deviation_of_the_units_it_replaces():
    moe, value = MoE(num_experts=1, expert_dim=512), jnp.ones((1, 64, 512))
    value = value.at[0, ::2].set(5.0)  # every unit has mean 3 and deviation 2
    made = Drop(ratio=0.25).experts(Copies("wi", value), moe, KEY)
    drawn = np.asarray(made[0])[:, np.any(made[0] != value[0], axis=0)]
    assert drawn.shape == (64, 128)
    assert abs(drawn.mean() - 3) < 0.1 and abs(drawn.std() - 2) < 0.1
    moments = Drop(ratio=0.25).experts(Copies("wi", value, moment=True), moe, KEY)
    assert int(np.all(moments[0] == 0, axis=0).sum()) == 128


def test_granular_experts_are_shards_and_a_virtual_group_is_one_network():
    change, moe = Granular(shards=2), MoE(num_experts=4, expert_dim=4)
    wi_MH, wo_HM = jnp.arange(8.0).reshape(2, 4), jnp.arange(8.0).reshape(4, 2)
    wi_EMH = change.experts(Copies("wi", jnp.broadcast_to(wi_MH, (4, 2, 4))), moe, KEY)
    wo_EHM = change.experts(Copies("wo", jnp.broadcast_to(wo_HM, (4, 4, 2))), moe, KEY)
    assert change.block(moe).expert_dim == 2
    for expert, units in enumerate([[0, 1], [2, 3], [0, 1], [2, 3]]):
        np.testing.assert_array_equal(wi_EMH[expert], wi_MH[:, np.array(units)])
        np.testing.assert_array_equal(wo_EHM[expert], 2 * wo_HM[np.array(units)])
    router_ME = jnp.arange(8.0).reshape(2, 4)
    assert change.router(router_ME, moe).tolist() == [[0, 0, 2, 2], [4, 4, 6, 6]]


def test_a_shared_expert_has_the_first_units_and_routed_ones_the_rest():
    moe, bo_M = MoE(num_experts=2, expert_dim=4), jnp.ones(2)
    wo_HM = jnp.arange(8.0).reshape(4, 2)
    copies = Copies("wo", jnp.broadcast_to(wo_HM, (2, 4, 2)))
    block = Shared(dim=1).block(moe)
    assert (block.shared_expert_dim, block.expert_dim) == (1, 3)
    assert Shared(dim=1).shared("wo", wo_HM).tolist() == [[0, 1]]
    assert Shared(dim=1).experts(copies, moe, KEY)[1].tolist() == [[2, 3], [4, 5], [6, 7]]
    # The output bias exists once.
    assert Shared(dim=1).shared("bo", bo_M).tolist() == [1, 1]
    assert not Shared(dim=1).experts(Copies("bo", jnp.ones((2, 2))), moe, KEY).any()
    block = Shared().block(moe)
    assert (block.shared_expert_dim, block.expert_dim) == (4, 4)
    assert not Shared().experts(copies, moe, KEY).any()


def moe_of(router, **settings):
    return dataclasses.replace(Upcycling().moe, router=router, num_experts=4, **settings)


RENORMALISED = moe_of(TokenChoice(renormalize=True))
UNNORMALISED = moe_of(TokenChoice())
SWITCH = moe_of(TokenChoice(), num_selected_experts=1)
SIGMOID = moe_of(TokenChoice(score=Sigmoid()))
PRESERVING = {
    "copies": Upcycling(RENORMALISED),
    "granular": Upcycling(RENORMALISED, changes=(Granular(2),)),
    "shared whole": Upcycling(UNNORMALISED, changes=(Shared(),)),
    "shared whole, Switch": Upcycling(SWITCH, changes=(Shared(),)),
    "shared part": Upcycling(RENORMALISED, changes=(Shared(2),)),
    "shared part, granular": Upcycling(RENORMALISED, changes=(Shared(2), Granular(2))),
    "softmax without preference": Upcycling(UNNORMALISED, router_stddev=0.0),
    "Switch without preference": Upcycling(SWITCH, router_stddev=0.0),
    "sigmoid without preference": Upcycling(SIGMOID, router_stddev=0.0),
    "sigmoid, renormalised": Upcycling(moe_of(TokenChoice(score=Sigmoid(), renormalize=True))),
}
CHANGING = {
    "softmax": Upcycling(UNNORMALISED),
    "not rescaled": Upcycling(UNNORMALISED, router_stddev=0.0, rescale=False),
    "noise": Upcycling(RENORMALISED, changes=(Noise(),)),
    "drop": Upcycling(RENORMALISED, changes=(Drop(),)),
    "three of two shards": Upcycling(
        moe_of(TokenChoice(renormalize=True), num_selected_experts=3), changes=(Granular(2),)
    ),
}


QUICK = ("copies", "shared part, granular", "Switch without preference", "softmax", "drop")


def cases(table):
    """The names of a table, with those outside `QUICK` marked as slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", cases(PRESERVING))
def test_a_block_gives_what_the_network_gave(name):
    sparse, dense = outputs(PRESERVING[name])
    np.testing.assert_allclose(sparse, dense, rtol=0, atol=1e-5 * np.abs(dense).max())


@pytest.mark.parametrize("name", cases(CHANGING))
def test_gates_that_do_not_sum_to_one_and_changed_copies_are_seen(name):
    sparse, dense = outputs(CHANGING[name])
    assert np.abs(sparse - dense).max() > 1e-3 * np.abs(dense).max()


@pytest.mark.parametrize(
    ("moe", "expected"),
    [(RENORMALISED, 1), (UNNORMALISED, 2 / 4), (SWITCH, 1 / 4), (SIGMOID, 2 / 2),
     (moe_of(TokenChoice(scaling_factor=3.0)), 3 * 2 / 4)],
)  # fmt: skip
def test_the_sum_of_gates_without_preference(moe, expected):
    assert gates_without_preference(moe, DIMS) == pytest.approx(expected)


@dataclasses.dataclass(frozen=True)
class Numbered(ExpertChange):
    """A user's change: the biases of the hidden units are the number of the expert."""

    step: float = setting(1.0)  # between experts

    def experts(self, copies, moe, key):
        if copies.name != "bi":
            return copies.value
        return copies.value * 0 + self.step * jnp.arange(moe.num_experts)[:, None]


def test_a_way_of_a_user_composes_with_others():
    upcycling = Upcycling(RENORMALISED, changes=(Granular(2), Numbered(step=2.0)))
    origin = Upcycled(NETWORK, upcycling, DIMS)
    bi_EH = origin.make(("experts", "bi"), [jnp.ones(6)], KEY, None, False)
    assert bi_EH.tolist() == [[2 * expert] * 3 for expert in range(4)]


@pytest.fixture(scope="module")
def dense():
    """A run of three dense layers, and its outputs for some tokens."""
    config = tiny_config(DENSE | {"model": {**DENSE["model"], "scan_layers": True}})
    layout = StackLayout(unit=(("attention", "mlp"),), repeats=3)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, stack=layout))
    state, mesh = tiny_state(config), make_mesh(config.mesh)
    batches = [tiny_batch()]
    return config, state, mesh, batches, Outputs(config, state.params, {}, batches, mesh)


def test_layers_become_sparse_and_the_model_stays_the_same(dense):
    """Layers move: the second of three was in the middle of the scanned unit."""
    config, state, mesh, batches, said = dense
    remodel = upcycle(config, Upcycling(RENORMALISED, layers=(1,)))
    new = remodel.new.model
    assert new.layers_of["moe"] == (1,) and new.layers_of["mlp"] == (0, 2)
    params = remodelled(remodel, state.params, KEY, mesh)
    assert jax.tree.structure(params) == jax.tree.structure(new.specs())
    wq = [own["attention"]["wq"] for own in layers_in_order(params, new)]
    old_XMM = state.params["stack"]["unit"]["0"]["attention"]["wq"]
    np.testing.assert_array_equal(np.stack(wq), old_XMM)
    assert difference(said, Outputs(remodel.new, params, {}, batches, mesh)) <= TOLERANCE


def layers_in_order(params, model):
    """The parameters of each layer, in order."""
    stack, layout = jax.tree.map(np.asarray, params["stack"]), model.stack
    unit = [
        jax.tree.map(lambda a, r=r: a[r], stack["unit"][str(i)])
        for r in range(layout.repeats)
        for i in range(len(layout.unit))
    ]
    first, last = (
        [stack[name][str(i)] for i in range(len(stack[name]))] for name in ("first", "last")
    )
    return [*first, *unit, *last]


def test_a_layout_says_which_layers_are_sparse(dense):
    config = dense[0]
    layers = [("attention", "moe"), ("attention", "mlp"), ("attention", "moe")]
    upcycling = Upcycling(RENORMALISED, stacks=(("stack", StackLayout.of(layers)),))
    assert upcycle(config, upcycling).new.model.stack.layers == tuple(layers)
    for wrong, message in [
        (layers[:2], "as many layers"),
        ([("attention", "moe", "mlp"), *layers[1:]], "the old one made sparse"),
    ]:
        with pytest.raises(ValueError, match=message):
            stacks = (("stack", StackLayout.of(wrong)),)
            upcycle(config, Upcycling(RENORMALISED, stacks=stacks))


@pytest.mark.parametrize(
    ("upcycling", "message"),
    [
        (Upcycling(RENORMALISED, every=4), "a dense layer must become sparse"),
        (Upcycling(RENORMALISED, layers=(3,)), "layers of the model are 0 to 2"),
        (Upcycling(RENORMALISED, changes=(Granular(3),)), "shards=3, hidden units 32, experts 4"),
        (Upcycling(RENORMALISED, changes=(Shared(32),)), "dim=32, hidden units 32"),
        (Upcycling(RENORMALISED, changes=(Granular(2), Shared())), "whole dense .* leave 16 of 32"),
        (Upcycling(RENORMALISED, changes=(Granular(2), Shared(8))), "'shared' before 'granular'"),
    ],
)
def test_what_does_not_fit_is_refused(dense, upcycling, message):
    with pytest.raises(ValueError, match=message):
        upcycle(dense[0], upcycling)


def test_a_model_without_dense_networks_is_refused(dense):
    sparse = upcycle(dense[0], Upcycling(RENORMALISED)).new
    with pytest.raises(
        ValueError, match=r"must start from a model with dense .* Start from a dense"
    ):
        upcycle(sparse, Upcycling(RENORMALISED))


def test_layers_are_named_once():
    with pytest.raises(ValueError, match="must be named only once"):
        Upcycling(every=2, layers=(1,))


def test_a_shared_expert_is_asked_for_by_its_way():
    block = dataclasses.replace(RENORMALISED, shared_expert_dim=3)
    with pytest.raises(
        ValueError, match=r"only the change 'shared' can .*: moe\.shared_expert_dim=3\. Leave"
    ):
        Upcycling(block)


def test_moments_are_carried_to_every_copy(dense):
    config, _, mesh, *_ = dense
    opt_state = jax.tree.map(lambda a: a + 1, jax.jit(lambda: init_state(config).opt_state)())
    adam = opt_state[1]
    wi = adam.mu["stack"]["unit"]["0"]["mlp"]["wi"]
    numbered = jnp.arange(wi.size, dtype=jnp.float32).reshape(wi.shape)
    adam.mu["stack"]["unit"]["0"]["mlp"]["wi"] = numbered
    remodel = upcycle(config, Upcycling(RENORMALISED, changes=(Granular(2),)))
    made = remodelled_optimizer(remodel, opt_state, {}, KEY, mesh)
    assert int(made[1].count) == int(made[3].count) == 1
    moe = made[1].mu["stack"]["unit"]["0"]["moe"]
    for expert in range(4):
        half = slice(16 * (expert % 2), 16 * (expert % 2) + 16)
        np.testing.assert_array_equal(moe["experts"]["wi"][:, expert], numbered[..., half])
    assert not moe["router"]["weight"].any()
    assert (moe["experts"]["wo"] == 1).all()  # not scaled as weights are


@pytest.mark.parametrize("optimizer", [{"ema_decay": 0.5}, {"name": "schedule_free"}])
def test_an_average_of_what_was_frozen_starts_at_the_new_parameters(dense, optimizer):
    """The dense network was frozen, so nothing was kept of it; the experts train."""
    config, state, mesh, *_ = dense
    frozen = dataclasses.replace(
        config.optimizer, schedule="constant", frozen=("mlp",), **optimizer
    )
    config = dataclasses.replace(config, optimizer=frozen)
    abstract = jax.eval_shape(lambda: init_state(config)).opt_state
    opt_state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract)
    remodel = upcycle(config, Upcycling(RENORMALISED, layers=(0,)))
    assert remodel.new.optimizer.frozen == ("mlp",)
    last = remodelled_optimizer(remodel, opt_state, state.params, KEY, mesh)[-1]
    average = last.average if "ema_decay" in optimizer else last.z
    params = remodelled(remodel, state.params, KEY, mesh)
    layers = [one["first"]["0"]["moe"] for one in (average["stack"], params["stack"])]
    jax.tree.map(np.testing.assert_array_equal, *layers)
    assert not average["embedding"].any(), "carried"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "lion", "muon", "schedule_free"])
def test_what_other_optimizers_keep_is_carried(dense, name):
    constant = {"schedule": "constant"} if name == "schedule_free" else {}
    optimizer = dataclasses.replace(dense[0].optimizer, name=name, **constant)
    config = dataclasses.replace(dense[0], optimizer=optimizer)
    state = jax.jit(lambda: init_state(config))()
    remodel = upcycle(config, Upcycling(RENORMALISED, layers=(0, 2)))
    made = remodelled_optimizer(remodel, state.opt_state, {}, KEY, dense[2])
    wanted = jax.eval_shape(lambda: init_state(remodel.new)).opt_state
    assert jax.tree.structure(made) == jax.tree.structure(wanted)
    for given, expected in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        assert (given.shape, given.dtype) == (expected.shape, expected.dtype)


@pytest.mark.slow
def test_factors_of_shards_are_refused(dense):
    optimizer = dataclasses.replace(dense[0].optimizer, name="adafactor")
    model = dataclasses.replace(dense[0].model, model_dim=128)
    parts = {**dict(model.parts), "mlp": Mlp(dim=256)}
    model = dataclasses.replace(model, parts=parts)
    config = dataclasses.replace(dense[0], optimizer=optimizer, model=model)
    state = jax.jit(lambda: init_state(config))()
    remodel = upcycle(config, Upcycling(RENORMALISED, changes=(Granular(2),)))
    with pytest.raises(ValueError, match="Leave out the optimizer state"):
        remodelled_optimizer(remodel, state.opt_state, {}, KEY, dense[2])


@pytest.mark.slow
def test_a_mesh_gives_the_parameters_of_one_device(dense):
    config, state, mesh, *_ = dense
    remodel = upcycle(config, Upcycling(RENORMALISED, every=1, changes=(Drop(), Granular(2))))
    expected = remodelled(remodel, state.params, KEY, mesh)
    split = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2).fill(8))
    placed = jax.device_put(
        state.params, jax.tree.map(lambda s: jax.NamedSharding(split, s), jax.tree.map(
            lambda _: jax.P(), state.params)),
    )  # fmt: skip
    made = remodelled(remodel, placed, KEY, split, donate=True)
    wi = made["stack"]["unit"]["0"]["moe"]["experts"]["wi"]
    assert wi.sharding.shard_shape(wi.shape) == (3, 2, 8, 8)
    for given, wanted in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-6)
    # The weights of the dense networks are deleted.
    assert all(a.is_deleted() for a in placed["stack"]["unit"]["0"]["mlp"].values())
    assert not placed["embedding"].is_deleted()
