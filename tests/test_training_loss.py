"""The loss: its terms, their weights, and what it is divided by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.balance import RouterZ
from moe_jax.moe.load_balance import (
    FlaxformerLoadBalance,
    HuggingFaceLoadBalance,
    HuggingFaceSwitchLoadBalance,
    LoadBalance,
    SwitchLoadBalance,
)
from moe_jax.training.loss import (
    CrossEntropy,
    CrossEntropyZ,
    Scored,
    batch_totals,
    call_of_batch,
    partial_loss,
    replayed_choices,
    target_nats,
)
from tests.tiny_run import DENSE, quick_jit, tiny_batch, tiny_config, tiny_moe, tiny_state

FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}  # sums of some hundred float32 terms, in another order
NO_LOSSES = {"losses": {}}
CONVENTIONS = {
    "load_balance": LoadBalance,
    "switch_load_balance": SwitchLoadBalance,
    "flaxformer_load_balance": FlaxformerLoadBalance,
    "huggingface_load_balance": HuggingFaceLoadBalance,
}
NUM_VALID = 16 + 13 + 0 + 5  # tokens of tiny_batch()


def make(**moe):
    config = tiny_config(tiny_moe(**moe))
    return config.model, tiny_state(config)


def loss_of(params, batch, model, state=None):
    totals = batch_totals(batch)
    return partial_loss(params, batch, totals, model, model_state=state, rng=jax.random.key(1))


def forward(params, batch, model):
    """The same forward pass by the model; without noise, training is deterministic."""
    return model.run(params, call_of_batch(batch, capacity=model.part["moe"].capacity.train_factor))


def router_of(params):
    """The routers of both layers, [X, M, E]."""
    return params["stack"]["unit"]["0"]["moe"]["router"]["weight"]


def weighted_mean_nats(logits_BLV, batch):
    log_probs_BLV = jax.nn.log_softmax(logits_BLV)
    nats_BL = -jnp.take_along_axis(log_probs_BLV, batch["targets"][..., None], -1)[..., 0]
    return jnp.sum(nats_BL * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])


def test_target_nats_are_minus_log_softmax_in_float32():
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)) * 30
    targets = np.array([[0, 3, 6], [1, 1, 5]])
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    nats = target_nats(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    np.testing.assert_allclose(nats, expected, **FLOAT32)
    assert target_nats(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(targets)).dtype == jnp.float32


def test_totals_count_weights_and_valid_tokens():
    batch = tiny_batch()
    totals = batch_totals(batch)
    np.testing.assert_allclose(totals.loss_weight, batch["loss_weights"].sum())
    assert totals.tokens == NUM_VALID
    assert totals.sums is None


def test_weights_above_zero_enter_the_gradient():
    """The gradient is that of `ce + sum of weight * term`, with the terms differentiated alone."""
    weights = {"load_balance": 0.3, "router_z": 0.2, "token_entropy": 0.4, "batch_entropy": 0.7}
    model, state = make(losses={name: {"weight": weight} for name, weight in weights.items()})
    batch = tiny_batch()

    def terms(params):
        logits_BLV, aux = forward(params, batch, model)[:2]
        sums = aux["moe"].sums
        counts_XE = jnp.sum(sums["assigned_KE"], axis=1)
        share_XE = counts_XE / jnp.sum(counts_XE, axis=1, keepdims=True)
        # `sums["prob_sum_E"]` has no gradient; that of the load-balance loss has one.
        mean_prob_XE = sums["losses"]["load_balance_loss"]["prob_sum_E"] / NUM_VALID
        balance = jnp.mean(4 * jnp.sum(share_XE * mean_prob_XE, axis=1))
        entropy_X = -jnp.sum(mean_prob_XE * jnp.log(mean_prob_XE), axis=-1)
        means = {
            name: jnp.mean(sums["losses"][name]["total"]) / NUM_VALID
            for name in ("router_z_loss", "token_entropy_loss")
        }
        return (
            weighted_mean_nats(logits_BLV, batch), balance, means["router_z_loss"],
            means["token_entropy_loss"], jnp.log(4) - jnp.mean(entropy_X),
        )  # fmt: skip

    @quick_jit
    def compare(params):
        (loss, said), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch, model)
        return loss, said, grads, terms(params), jax.jacrev(terms)(params)

    def total(task, *others):
        return task + sum(w * x for w, x in zip(weights.values(), others, strict=True))

    loss, said, grads, values, term_grads = compare(state.params)
    np.testing.assert_allclose(said.cross_entropy, values[0], **FLOAT32)
    np.testing.assert_allclose(loss, total(*values), **FLOAT32)
    for term in term_grads[1:]:
        for router_ME in router_of(term):
            norm = jnp.linalg.norm(router_ME)
            assert norm > 1e-3, "the comparison would not see the term"
    jax.tree.map(
        lambda g, *of_terms: np.testing.assert_allclose(g, total(*of_terms), **FLOAT32),
        grads,
        *term_grads,
    )


def test_without_balance_losses_the_router_learns_from_the_task_alone():
    """This holds with one expert per token too, where a renormalised gate would be constant."""
    model, state = make(**NO_LOSSES, num_selected_experts=1)
    function = quick_jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=2)
    (loss, said), grads = function(state.params, tiny_batch(), model)
    assert loss == said.cross_entropy
    for router_ME in router_of(grads):
        assert jnp.linalg.norm(router_ME) > 1e-4

    nothing = jax.tree.map(jnp.zeros_like, tiny_batch())
    (loss, _), grads = function(state.params, nothing, model)
    assert loss == 0, "a batch of padding alone"
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_the_loss_of_a_predictor_enters_with_its_weight():
    router = {"kind": "expert_choice", "predictor_loss_weight": 0.5}
    settings = tiny_moe(**NO_LOSSES, router=router)
    settings["model"]["stack"] = {"allow_lookahead": True}
    config = tiny_config(settings)
    model, state = config.model, tiny_state(config)
    loss, said = quick_jit(loss_of, static_argnums=2)(state.params, tiny_batch(), model)
    # The router weights its own loss where it computes it.
    router_loss_X = said.aux["moe"].sums["router_loss"] / NUM_VALID
    assert np.all(router_loss_X > 0.5 * 0.1)
    np.testing.assert_allclose(loss, said.cross_entropy + np.mean(router_loss_X), **FLOAT32)

    settings["model"]["parts"]["moe"]["router"]["predictor_loss_weight"] = 1.0
    model = tiny_config(settings).model
    _, twice = quick_jit(loss_of, static_argnums=2)(state.params, tiny_batch(), model)
    twice_X = twice.aux["moe"].sums["router_loss"] / NUM_VALID
    np.testing.assert_allclose(twice_X, 2 * router_loss_X, **FLOAT32)


def test_a_dense_model_has_its_cross_entropy_only():
    config = tiny_config(DENSE)
    function = quick_jit(loss_of, static_argnums=2)
    loss, said = function(tiny_state(config).params, tiny_batch(), config.model)
    assert loss == said.cross_entropy and said.aux == {}


@pytest.mark.slow
def test_a_uniform_router_costs_the_weight_times_1():
    """It is K for conventions that count all K choices; here K = 2."""
    at_uniform = dict(zip(CONVENTIONS, (1.0, 1.0, 2.0, 2.0), strict=True))
    models = {}
    for convention in at_uniform:
        pooled = convention == "huggingface_load_balance"
        for scope in ("global",) if pooled else ("group", "global"):
            losses = {convention: {"weight": 0.5, "scope": scope}, "router_z": {}}
            model, state = make(losses=losses, group_size=8)
            models[convention, scope] = model
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.zeros_like(leaf) if "'router'" in jax.tree_util.keystr(path) else leaf
        ),
        state.params,
    )

    @quick_jit
    def extra(params, batch):
        losses = {}
        for name, model in models.items():
            loss, said = loss_of(params, batch, model)
            losses["/".join(name)] = loss - said.cross_entropy
        return losses

    for name, value in extra(params, tiny_batch()).items():
        expected = 0.5 * at_uniform[name.split("/")[0]]
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=name)


def made_up_sums(counted_XKE, prob_XE):
    """What layers would report for four tokens."""
    return {"counted_KE": jnp.array(counted_XKE), "prob_sum_E": 4 * jnp.array(prob_XE)}


def test_huggingface_pools_over_layers_and_the_others_do_not():
    """Two layers that collapse on different experts look balanced when pooled."""
    opposite = made_up_sums([[[4, 0]], [[0, 4]]], [[1.0, 0.0], [0.0, 1.0]])
    # Mean over layers: (2 * 1 + 1) / 2. Pooled: 2 * (0.75 * 0.75 + 0.25 * 0.25).
    uneven = made_up_sums([[[4, 0]], [[2, 2]]], [[1.0, 0.0], [0.5, 0.5]])
    for sums, by_layer, pooled in ((opposite, 2, 1), (uneven, 1.5, 1.25)):
        values = {
            name: float(convention(weight=1.0).loss(sums, jnp.float32(4), sums))
            for name, convention in CONVENTIONS.items()
        }
        assert values.pop("huggingface_load_balance") == pooled
        assert set(values.values()) == {by_layer}


def test_layers_are_averaged_or_each_adds_its_loss():
    """Switch adds the losses of all layers; a mean makes that of 58 layers 58 times weaker."""
    sums = made_up_sums([[[4, 0]], [[2, 2]], [[2, 2]]], [[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    z = {"total": jnp.array([4.0, 8.0, 12.0])}
    for scope in ("group", "global"):
        of_scope = sums | ({"total": jnp.array([8.0, 4.0, 4.0])} if scope == "group" else {})
        for over_layers, expected, expected_z in (("mean", 4 / 3, 2.0), ("sum", 4.0, 6.0)):
            loss = SwitchLoadBalance(weight=1.0, scope=scope, over_layers=over_layers)
            assert loss.loss(of_scope, jnp.float32(4), of_scope) == pytest.approx(expected)
            z_loss = RouterZ(weight=1.0, over_layers=over_layers)
            assert z_loss.loss(z, jnp.float32(4), None) == expected_z
    for pooled in (HuggingFaceLoadBalance, HuggingFaceSwitchLoadBalance):
        with pytest.raises(ValueError, match="pool all layers into one number: over_layers='sum'"):
            pooled(weight=1.0, over_layers="sum")


def test_the_z_loss_of_logits_is_the_weighted_mean_of_the_squared_log_normaliser():
    """The normaliser of ln 2 and ln 6 is 8, of 0 and 0 it is 2; no target, no share."""
    logits_BLV = jnp.log(jnp.array([[[2.0, 6.0], [1.0, 1.0], [9.0, 9.0]]]))
    part = {"loss_weights": jnp.array([[1.0, 0.5, 0.0]]), "segment_ids": jnp.ones((1, 3), int)}
    scored = Scored(logits_BLV, jnp.zeros((1, 3)), jnp.float32(5))
    expected = (np.log(8) ** 2 + 0.5 * np.log(2) ** 2) / 1.5
    loss, says = CrossEntropyZ(z_loss=0.1).share(scored, part, batch_totals(part), ())
    assert says["z_loss"] == pytest.approx(expected, rel=1e-6)
    assert loss == pytest.approx(5 + 0.1 * expected, rel=1e-6)
    assert CrossEntropy().share(scored, part, batch_totals(part), ()) == (5, {})


def test_scope_global_takes_the_load_of_the_whole_batch():
    sums = made_up_sums([[[4, 0]], [[4, 0]]], [[0.75, 0.25], [0.5, 0.5]])
    batch = made_up_sums([[[4, 4]], [[2, 6]]], [[0.0, 0.0], [0.0, 0.0]])
    loss = LoadBalance(weight=1.0)
    # Layer 0: 2 * (0.5 * 0.75 + 0.5 * 0.25) = 1; layer 1: 2 * 0.5 = 1. By own loads: 1.5 and 1.
    assert float(loss.loss(sums, jnp.float32(4), batch)) == 1.0
    assert float(loss.loss(sums, jnp.float32(4), sums)) == 1.25


def test_the_loss_of_a_part_of_a_batch_goes_by_the_sums_of_the_batch_when_they_are_given():
    model, state = make(losses={"load_balance": {"weight": 1.0}})
    batch = tiny_batch()

    @quick_jit
    def losses(params):
        _, said = loss_of(params, batch, model)
        own = {name: aux.sums for name, aux in said.aux.items()}
        evened = jax.tree.map(jnp.ones_like, own)  # every expert has the same load
        totals = batch_totals(batch)
        return said, [
            partial_loss(
                params, batch, totals._replace(sums=sums), model,
                model_state={}, rng=jax.random.key(1),
            )[0]
            for sums in (None, own, evened)
        ]  # fmt: skip

    said, (alone, with_own, with_evened) = losses(state.params)
    assert alone == with_own
    assert said.cross_entropy + 1.04 < alone
    np.testing.assert_allclose(with_evened, said.cross_entropy + 1, **FLOAT32)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_selection_bias_steers_each_layer(scan_layers):
    settings = tiny_moe(num_selected_experts=1, bias="sign")
    settings["model"]["scan_layers"] = scan_layers
    config = tiny_config(settings)
    state = {"moe": {"bias_E": 10.0 * jax.nn.one_hot(jnp.array([1, 3]), 4)}}
    function = quick_jit(loss_of, static_argnums=2)
    _, said = function(tiny_state(config).params, tiny_batch(), config.model, state)
    np.testing.assert_array_equal(
        said.aux["moe"].sums["assigned_KE"][:, 0], [[0, NUM_VALID, 0, 0], [0, 0, 0, NUM_VALID]]
    )


def test_choices_to_replay_are_read_by_part_and_cut_by_sequences():
    random = np.random.default_rng(0)
    index_BLXK = jnp.asarray(random.integers(0, 4, (4, 16, 2, 2)), jnp.int32)
    chosen_BLXK = jnp.asarray(random.integers(0, 2, (4, 16, 2, 2)), jnp.bool_)
    batch = tiny_batch()
    assert replayed_choices(batch) == {}
    batch |= {
        "replay/moe/expert_index": index_BLXK,
        "replay/moe/chosen": chosen_BLXK,
        "replay/other/expert_index": index_BLXK[:, :, :1],
    }
    replay = replayed_choices({name: value[:2] for name, value in batch.items()})
    assert set(replay) == {"moe", "other"}
    for layer in range(2):
        np.testing.assert_array_equal(replay["moe"].expert_index[layer], index_BLXK[:2, :, layer])
        np.testing.assert_array_equal(replay["moe"].chosen[layer], chosen_BLXK[:2, :, layer])
    assert replay["other"].expert_index.shape == (1, 2, 16, 2)
    assert np.all(replay["other"].chosen), "without a field, all choices count"


@pytest.mark.parametrize(
    "name", ["replay/expert_index", "replay/moe/experts", "replay/moe/chosen", "replay/moe"]
)
def test_a_field_to_replay_that_nothing_would_read_is_refused(name):
    with pytest.raises(ValueError, match=rf"expert_index and, beside it.*'{name}'"):
        replayed_choices(tiny_batch() | {name: jnp.zeros((4, 16, 2, 2), jnp.int32)})
