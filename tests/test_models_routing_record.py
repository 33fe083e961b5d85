"""Recording the decisions of routers, and routing by a record."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.routing_record import (
    check_record,
    load_record,
    record_routing,
    save_record,
)
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import Choices, Options, RouterInputs
from moe_jax.moe.routing.assignment import Sinkhorn
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.moe.routing.fixed import Hash
from moe_jax.moe.routing.logits import Sigmoid, SoftmaxOverSelected
from moe_jax.moe.routing.noise import Gaussian
from moe_jax.moe.routing.selection import RandomChoices, Sampled, Threshold
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.part import Call, Dims, Own
from moe_jax.training.loss import batch_totals, call_of_batch
from moe_jax.training.step import gradient
from tests.slow import slow_but
from tests.tiny_run import DENSE, MLP, cut, quick_jit, tiny_batch, tiny_config, tiny_state

BATCH, LENGTH, MODEL_DIM = 2, 6, 4
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)

# Routers that differ in how they choose, or in which choices count.
ROUTERS = {
    "softmax after top-k": TokenChoice(score=SoftmaxOverSelected()),
    "top-p": TokenChoice(top_p=0.6, renormalize=True),
    "random later choices": TokenChoice(choices=RandomChoices(), renormalize=True),
    "sampled sigmoids": TokenChoice(
        score=Sigmoid(), selection=Sampled(), noise=(Gaussian(stddev=0.5),)
    ),
    "expert choice": ExpertChoice(max_experts=2, predictor_loss_weight=0.5),
    "a balanced plan": Sinkhorn(noise=(Gaussian(stddev=0.5),)),
    "hashed": Hash(),
}
BALANCED = ("expert choice", "a balanced plan")
QUICK = ("softmax after top-k", "sampled sigmoids", "expert choice", "hashed")


def make_block(router=None, seed=0):
    moe = MoE(
        num_experts=4, num_selected_experts=2, expert_dim=3, run_experts="einsum", group_size=3,
        capacity=Capacity(train_factor=0.75), router=router or TokenChoice(),
    )  # fmt: skip
    random = np.random.default_rng(seed)

    def draw(spec):
        return random.normal(size=spec.shape).astype(np.float32)

    params = jax.tree.map(draw, moe.specs(Dims(MODEL_DIM)))
    return moe, params, random.normal(size=(BATCH, LENGTH, MODEL_DIM)).astype(np.float32)


@functools.partial(quick_jit, static_argnames=("moe", "record"))
def run_block(params, x, moe, replay=None, record=False):
    """Output, aux, and gradients of a loss that includes all losses of the block."""
    call = Call(
        segments_BL=jnp.asarray(VALID, jnp.int32), rng=jax.random.key(3), record=record,
        tokens_BL=jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH),
    )  # fmt: skip

    def loss(params, x):
        y, aux = moe_block(params, x, moe, call, Own(replay=replay))
        metrics = moe.metrics(jax.tree.map(lambda a: a[None], aux))
        losses = sum(
            metrics[name][0] for name in ("load_balance_loss", "router_z_loss", "router_loss")
        )
        return jnp.sum(y**2) + losses, (y, aux)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("name", slow_but(QUICK, ROUTERS))
def test_a_block_told_its_own_choices_does_the_same(name):
    moe, params, x = make_block(ROUTERS[name])
    grads, (y, aux) = run_block(params, x, moe, record=True)
    choices = aux.choices
    again, (y_again, aux_again) = run_block(params, x, moe, choices)
    assert aux_again.choices is None
    got = (again, y_again, aux_again)
    silent = aux._replace(choices=None, logits_BLE=None)
    # These are two programs, so the compiler may order their sums differently.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(same, got, (grads, y, silent))

    # The record equals the counts, choice by choice, before and after drops.
    counted = (("assigned_KE", choices.chosen), ("kept_KE", choices.kept))
    for counts, mask_BLK in counted:
        one_hot = jax.nn.one_hot(choices.expert_index, 4, dtype=int) * mask_BLK[..., None]
        np.testing.assert_array_equal(one_hot.sum(axis=(0, 1)), aux.sums[counts])
    assert not choices.chosen[~VALID].any() and not choices.gate[~VALID].any()
    if name not in BALANCED:
        assert 0 < choices.kept.sum() < choices.chosen.sum()

    # Other parameters give the same experts and other gates, and the router has a gradient.
    other = jax.tree.map(lambda a: 1 - a, params)
    grads, (_, aux) = run_block(other, x, moe, choices, record=True)
    np.testing.assert_array_equal(aux.choices.expert_index, choices.expert_index)
    np.testing.assert_array_equal(aux.choices.chosen, choices.chosen)
    if moe.router.learns:
        assert not np.array_equal(aux.choices.gate, choices.gate)
        assert np.abs(grads[0]["router"]["weight"]).min() > 0
        own = run_block(other, x, moe, record=True)[1][1].choices
        assert not np.array_equal(own.expert_index, choices.expert_index)


def test_gates_of_a_replay_are_those_of_the_chosen_experts():
    """Logits are log 1, 2, 3, 4: probabilities .1, .2, .3, .4."""
    params = {"weight": jnp.log(jnp.arange(1.0, 5.0))[None]}
    index = jnp.array([[[3, 2], [0, 3], [1, 2]]])
    chosen = jnp.array([[[True, True], [True, True], [True, False]]])

    def gates_of(**router):
        inputs = RouterInputs(
            Options(4, 4, 2, 3), jnp.ones((1, 3), jnp.bool_), jnp.arange(3)[None],
            replay=Choices(index, chosen),
        )  # fmt: skip
        routing = TokenChoice(**router).route(params, jnp.ones((1, 3, 1)), inputs)
        assert routing.expert_index_GSK is index and routing.chosen_GSK is chosen
        return routing.gate_GSK[0]

    plain = [[0.4, 0.3], [0.1, 0.4], [0.2, 0]]
    np.testing.assert_allclose(gates_of(), plain, rtol=1e-6)
    # Gates are renormalised over both choices, even if one of them does not count, ...
    renormalized = [[4 / 7, 3 / 7], [1 / 5, 4 / 5], [2 / 5, 0]]
    np.testing.assert_allclose(gates_of(renormalize=True), renormalized, rtol=1e-6)
    # ... but top-p renormalises over the choices that it kept.
    renormalized[2] = [1, 0]
    np.testing.assert_allclose(gates_of(renormalize=True, top_p=0.5), renormalized, rtol=1e-6)


def test_choices_that_do_not_fit_are_refused():
    moe, params, x = make_block()
    index = jnp.zeros((BATCH, LENGTH, 2), jnp.int32)
    all_count = jnp.ones(index.shape, jnp.bool_)

    def message(index, chosen=all_count, moe=moe):
        with pytest.raises(ValueError, match=r"[Rr]eplay") as error:
            moe_block(params, x, moe, own=Own(replay=Choices(index, chosen)))
        return str(error.value)

    for wrong in (index[:, :5], index[:1], index[..., :1]):
        assert re.search(r"expert_index .* needs \(2, 6, 2\)", message(wrong))
    assert "chosen (2, 6)" in message(index, index[..., 0] == 0)
    assert "float32" in message(index.astype(jnp.float32))
    both = make_block(TokenChoice(top_p=0.5, choices=Threshold()))[0]
    assert re.search(r"top_p=0\.5, choices=Threshold", message(index, moe=both))


# MoE, dense, MoE.
SPARSE, DENSE_LAYER = ["attention", "moe"], ["attention", "mlp"]
LAYERS = {
    "parts": {"mlp": MLP, "moe": {"capacity": {"train_factor": 1.0}}},
    "stack": {"unit": [SPARSE, DENSE_LAYER], "repeats": 1, "last": [SPARSE]},
}


def make_model(**model):
    config = tiny_config({"model": LAYERS | model})
    return config, tiny_state(config), tiny_batch()


@functools.partial(quick_jit, static_argnames=("model", "num_parts"))
def run_training(state, batch, model, num_parts=1):
    keys = jax.random.split(jax.random.key(0), num_parts)
    loss, grads, _ = gradient(state, cut(batch, num_parts), keys, batch_totals(batch), model)
    return loss, grads


def changed(record, **fields):
    """The record with other choices for its part."""
    part = record.parts["moe"]
    choices = part.choices._replace(**fields)
    return record._replace(parts={"moe": part._replace(choices=choices)})


@pytest.mark.slow
def test_training_by_a_models_own_record_changes_nothing():
    """Neither does cutting the batch into parts, each with its share of the record."""
    config, state, batch = make_model()
    model = config.model
    places = {"positions_BL": batch["positions"], "segments_BL": batch["segment_ids"]}
    record = record_routing(model, state.params, batch["inputs"], **places, capacity=1.0)
    own = run_training(state, batch, model)
    again = run_training(state, batch | record.batch_fields(model), model)
    jax.tree.map(np.testing.assert_array_equal, again, own)
    # A record that differs from the model's own choices, so ignoring part of it would show.
    other = changed(record, expert_index=3 - record.parts["moe"].choices.expert_index)
    whole = run_training(state, batch | other.batch_fields(model), model)
    parts = run_training(state, batch | other.batch_fields(model), model, 4)
    assert abs(whole[0] - own[0]) > 1e-3
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), parts, whole)


@functools.partial(quick_jit, static_argnames="model")
def run_model(params, batch, model, replay=None):
    return model.run(params, call_of_batch(batch, capacity=0.0, record=True), replay=replay)


def test_scanned_layers_record_and_replay_each_its_own():
    stack = {"unit": [SPARSE, DENSE_LAYER], "repeats": 2}
    config, state, batch = make_model(stack=stack, scan_layers=True)
    own = run_model(state.params, batch, config.model)
    choices = own.aux["moe"].choices
    assert choices.expert_index.shape == (2, 4, 16, 2)
    assert len({layer.tobytes() for layer in np.asarray(choices.expert_index)}) == 2
    again = run_model(state.params, batch, config.model, {"moe": choices})
    jax.tree.map(np.testing.assert_array_equal, again, own)
    swapped = jax.tree.map(lambda a: a[::-1], choices)
    other = run_model(state.params, batch, config.model, {"moe": swapped})
    assert np.abs(other.logits_BLV - own.logits_BLV).max() > 1e-3
    for i, field in enumerate(other.aux["moe"].choices[:2]):
        np.testing.assert_array_equal(field, swapped[i])


def test_a_record_is_saved_whole_and_checked_when_read(tmp_path):
    config, state, batch = make_model()
    record = record_routing(config.model, state.params, batch["inputs"])
    part = record.parts["moe"]
    assert part.choices.expert_index.shape == (2, 4, 16, 2)
    assert part.layers == (0, 2) and part.num_experts == 4
    assert part.choices.chosen.all() and part.choices.kept.all()
    save_record(record, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert set(file.files) > {"tokens", "moe/layers", "moe/expert_index", "moe/chosen"}
    loaded = load_record(tmp_path / "a.npz")
    equal = functools.partial(np.testing.assert_array_equal, strict=True)
    jax.tree.map(equal, loaded, record)
    for field, value in zip(loaded.replay(config.model)["moe"][:2], part.choices[:2], strict=True):
        equal(field, value)

    (tmp_path / "b.npz").write_bytes(b"PK nothing of the kind")
    with pytest.raises(ValueError, match=r"a record of routing must be an \.npz"):
        load_record(tmp_path / "b.npz")
    np.save(tmp_path / "b.npy", np.zeros(2))
    with pytest.raises(ValueError, match=r"a record of routing must be an \.npz"):
        load_record(tmp_path / "b.npy")
    index = part.choices.expert_index.copy()
    index[1, 2, 3] = 1
    broken = {
        r"\[1, 2, 3\] has the experts \[1, 1\]": changed(record, expert_index=index),
        r"got 1\.\.4 with num_experts=4 .*in range too": changed(
            record, expert_index=part.choices.expert_index + 1
        ),
        "Record anew": record._replace(tokens_BL=record.tokens_BL[:, 1:]),
    }
    for message, other in broken.items():
        save_record(other, tmp_path / "c.npz")
        with pytest.raises(ValueError, match=message):
            load_record(tmp_path / "c.npz")
    chosen = part.choices.chosen.copy()
    chosen[1, 2, 3, 1] = False
    check_record(changed(record, expert_index=index, chosen=chosen))


def test_a_record_of_another_model_is_refused():
    config, state, batch = make_model()
    record = record_routing(config.model, state.params, batch["inputs"])
    fewer = jax.tree.map(lambda a: a[:1], record.replay(config.model))
    with pytest.raises(ValueError, match="2 layers of 'moe'"):
        config.model.run(state.params, call_of_batch(batch), replay=fewer)
    other_place = {"unit": [DENSE_LAYER, SPARSE], "repeats": 1, "last": [DENSE_LAYER]}
    for settings, numbers in (
        (
            {"parts": LAYERS["parts"] | {"moe": {"num_experts": 5}}},
            r"4 experts in the layers \(0, 2\), .* has 5 .* in \(0, 2\)",
        ),
        (
            {"stack": other_place},
            r"4 experts in the layers \(0, 2\), .* has 4 .* in \(1,\)",
        ),
    ):
        other = tiny_config({"model": LAYERS | settings}).model
        for replayed in (record.replay, record.batch_fields):
            with pytest.raises(ValueError, match=numbers):
                replayed(other)
    dense = tiny_config(DENSE)
    with pytest.raises(ValueError, match=r"the record is of \['moe'\], the model has \[\]"):
        record.replay(dense.model)
    with pytest.raises(ValueError, match="a model with MoE layers"):
        record_routing(dense.model, tiny_state(dense).params, batch["inputs"])


@pytest.mark.slow
def test_parts_of_other_sizes_are_recorded_and_replayed_beside_each_other(tmp_path):
    """Layers alternate between four experts with top 2, and two experts with top 1."""
    pair = {"kind": "moe", "num_experts": 2, "expert_dim": 8}
    stack = {"unit": [SPARSE, ["attention", "pair"]], "repeats": 2}
    config = tiny_config({"model": {"parts": {"pair": pair}, "stack": stack}})
    model, state, batch = config.model, tiny_state(config), tiny_batch()
    record = record_routing(
        model, state.params, batch["inputs"], segments_BL=batch["segment_ids"],
        positions_BL=batch["positions"],
    )  # fmt: skip
    found = {name: (part.layers, part.num_experts) for name, part in record.parts.items()}
    assert found == {"moe": ((0, 2), 4), "pair": ((1, 3), 2)}
    assert record.parts["pair"].choices.expert_index.shape == (2, 4, 16, 1)
    save_record(record, tmp_path / "a.npz")
    replay = load_record(tmp_path / "a.npz").replay(model)
    replay["pair"] = replay["pair"]._replace(expert_index=1 - replay["pair"].expert_index)
    own, other = (run_model(state.params, batch, model, told) for told in (None, replay))
    first = jax.tree.map(lambda a: a[0], own.aux["moe"].choices)
    jax.tree.map(
        np.testing.assert_array_equal, jax.tree.map(lambda a: a[0], other.aux["moe"].choices), first
    )
    np.testing.assert_array_equal(
        other.aux["pair"].choices.expert_index, replay["pair"].expert_index
    )
    assert np.abs(other.logits_BLV - own.logits_BLV).max() > 1e-3
    fields = record.batch_fields(model)
    assert {name: value.shape for name, value in fields.items()} == {
        "replay/moe/expert_index": (4, 16, 2, 2), "replay/moe/chosen": (4, 16, 2, 2),
        "replay/pair/expert_index": (4, 16, 2, 1), "replay/pair/chosen": (4, 16, 2, 1),
    }  # fmt: skip
