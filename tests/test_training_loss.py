"""The loss: what is in it, with which weight, and what it is divided by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models import Decoder
from moe_jax.moe.statistics import MoEAux
from moe_jax.training.loss import Totals, batch_totals, load_balance, partial_loss, target_nats
from tests.tiny_run import quick_jit, tiny_batch, tiny_config, tiny_state

FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}  # sums of some hundred float32 terms, in another order
NO_AUX = {"load_balance_weight": 0.0, "router_z_loss_weight": 0.0}
NUM_VALID = 16 + 13 + 0 + 5  # tokens of tiny_batch()


def make(balance=None, **moe):
    config = tiny_config({"model": {"moe": {**moe, "balance": balance or {}}}})
    return config.model, tiny_state(config)


def loss_of(params, batch, model, bias=None):
    return partial_loss(
        params, batch, batch_totals(batch), model, router_bias_XE=bias, rng=jax.random.key(1)
    )


def forward(params, batch, model):
    """The same forward pass by the model itself; without noise, training is deterministic."""
    return Decoder(model).apply(
        {"params": params},
        batch["inputs"],
        batch["positions"],
        batch["segment_ids"],
        capacity_factor=model.moe.capacity.train_factor,
    )


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
    assert totals.load_XE is None


def test_weights_above_zero_enter_the_gradient():
    """The gradient is that of `ce + sum of weight * term`, with the terms differentiated alone."""
    weights = {
        "load_balance_weight": 0.3, "router_z_loss_weight": 0.2, "token_entropy_weight": 0.4,
        "batch_entropy_weight": 0.7,
    }  # fmt: skip
    model, state = make(weights)
    batch = tiny_batch()

    def terms(params):
        logits_BLV, aux = forward(params, batch, model)
        counts_XE = jnp.sum(aux.assigned_KE, axis=1)
        share_XE = counts_XE / jnp.sum(counts_XE, axis=1, keepdims=True)
        balance = jnp.mean(4 * jnp.sum(share_XE * aux.mean_prob_E, axis=1))
        entropy_X = -jnp.sum(aux.mean_prob_E * jnp.log(aux.mean_prob_E), axis=-1)
        return (
            weighted_mean_nats(logits_BLV, batch), balance, jnp.mean(aux.router_z_loss),
            jnp.mean(aux.router_entropy), jnp.log(4) - jnp.mean(entropy_X),
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
        for layer in ("layer_0", "layer_1"):
            norm = jnp.linalg.norm(term["first"][layer]["moe"]["router"])
            assert norm > 1e-3, "the comparison would not see the term"
    jax.tree.map(
        lambda g, *of_terms: np.testing.assert_allclose(g, total(*of_terms), **FLOAT32),
        grads,
        *term_grads,
    )


def test_without_balance_losses_the_router_learns_from_the_task_alone():
    """Also with one expert a token, where a renormalised gate would be constant."""
    model, state = make(NO_AUX, num_selected_experts=1)
    function = quick_jit(jax.value_and_grad(loss_of, has_aux=True), static_argnums=2)
    (loss, said), grads = function(state.params, tiny_batch(), model)
    assert loss == said.cross_entropy
    for layer in ("layer_0", "layer_1"):
        assert jnp.linalg.norm(grads["first"][layer]["moe"]["router"]) > 1e-4

    nothing = jax.tree.map(jnp.zeros_like, tiny_batch())
    (loss, _), grads = function(state.params, nothing, model)
    assert loss == 0, "a batch of padding alone"
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_the_loss_of_a_predictor_enters_with_its_weight():
    router = {"kind": "expert_choice", "predictor_loss_weight": 0.5}
    model, state = make(NO_AUX, router=router, allow_noncausal_routing=True)
    loss, said = quick_jit(loss_of, static_argnums=2)(state.params, tiny_batch(), model)
    assert np.all(said.aux.predictor_loss > 0.1)
    extra = 0.5 * np.mean(said.aux.predictor_loss)
    np.testing.assert_allclose(loss, said.cross_entropy + extra, **FLOAT32)


def test_a_dense_model_has_its_cross_entropy_only():
    config = tiny_config({"model": {"moe": {"layer_period": 0}}})
    function = quick_jit(loss_of, static_argnums=2)
    loss, said = function(tiny_state(config).params, tiny_batch(), config.model)
    assert loss == said.cross_entropy and said.aux is None


def test_a_uniform_router_costs_the_weight_times_1():
    """K in the conventions that count all K choices; here K = 2."""
    at_uniform = {"megatron": 1.0, "switch": 1.0, "flaxformer": 2.0, "huggingface": 2.0}
    models = {}
    for convention in at_uniform:
        for scope in ("group", "global") if convention != "huggingface" else ("global",):
            balance = {"load_balance_scope": scope, "load_balance_convention": convention}
            model, state = make({"load_balance_weight": 0.5, **balance}, group_size=8)
            models[convention, scope] = model
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1].key == "router" else leaf, state.params
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


def made_up_aux(assigned_XKE, prob_XE):
    """What layers would say of four tokens."""
    said = dict.fromkeys(MoEAux._fields, jnp.zeros(len(prob_XE)))
    said["balanced_KE"], said["mean_prob_E"] = jnp.array(assigned_XKE), jnp.array(prob_XE)
    return MoEAux(**said | {"num_tokens": jnp.full(len(prob_XE), 4)})


def test_huggingface_pools_over_layers_and_the_others_do_not():
    """Two layers that collapse on different experts look balanced when they are pooled."""
    totals = Totals(jnp.float32(1), jnp.float32(4))
    opposite = made_up_aux([[[4, 0]], [[0, 4]]], [[1.0, 0.0], [0.0, 1.0]])
    # By layer (2 * 1 + 1) / 2; pooled 2 * (0.75 * 0.75 + 0.25 * 0.25).
    uneven = made_up_aux([[[4, 0]], [[2, 2]]], [[1.0, 0.0], [0.5, 0.5]])
    for aux, by_layer, pooled in ((opposite, 2, 1), (uneven, 1.5, 1.25)):
        values = {}
        for convention in ("megatron", "switch", "flaxformer", "huggingface"):
            moe = {"num_experts": 2, "num_selected_experts": 1}
            model, _ = make({"load_balance_convention": convention}, **moe)
            values[convention] = float(load_balance(aux, model, totals))
        assert values.pop("huggingface") == pooled
        assert set(values.values()) == {by_layer}


def test_scope_global_takes_the_load_of_the_whole_batch_when_it_is_given():
    aux = made_up_aux([[[4, 0]], [[4, 0]]], [[0.75, 0.25], [0.5, 0.5]])
    model, _ = make(num_experts=2, num_selected_experts=1)
    load_XE = jnp.array([[0.5, 0.5], [0.25, 0.75]])
    totals = Totals(jnp.float32(1), jnp.float32(4), load_XE)
    # Layer 0: 2 * (0.5 * 0.75 + 0.5 * 0.25) = 1; layer 1: 2 * 0.5 = 1. Its own load: 1.5 and 1.
    assert float(load_balance(aux, model, totals)) == 1.0
    assert float(load_balance(aux, model, totals._replace(load_XE=None))) == 1.25


@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_selection_bias_steers_each_layer(scan_layers):
    moe = {"num_selected_experts": 1}
    config = tiny_config({"model": {"scan_layers": scan_layers, "moe": moe}})
    bias_XE = 10.0 * jax.nn.one_hot(jnp.array([1, 3]), 4)
    function = quick_jit(loss_of, static_argnums=2)
    _, said = function(tiny_state(config).params, tiny_batch(), config.model, bias_XE)
    np.testing.assert_array_equal(
        said.aux.assigned_KE[:, 0], [[0, NUM_VALID, 0, 0], [0, 0, 0, NUM_VALID]]
    )
