"""Balance losses at their limits, and against loops and the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import balance
from moe_jax.moe.balance import BatchEntropy, Importance, Load, RouterZ, TokenEntropy, named_losses
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import assign_slots
from moe_jax.moe.load_balance import (
    FlaxformerLoadBalance,
    HuggingFaceLoadBalance,
    HuggingFaceSwitchLoadBalance,
    LoadBalance,
    SwitchLoadBalance,
)
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import TokenMajor
from moe_jax.moe.routing import Options, Routing
from moe_jax.moe.routing.logits import Sigmoid, SoftmaxOverSelected
from moe_jax.moe.routing.noise import Learned
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.moe.statistics import dropped_fraction, routing_aux, routing_metrics
from moe_jax.part import Aux, Call, Dims, Own
from tests import moe_oracle

# A few float32 sums and one softmax.
FLOAT32 = 2e-6

E, K = 8, 2


CONVENTIONS = {
    "megatron": LoadBalance,
    "switch": SwitchLoadBalance,
    "flaxformer": FlaxformerLoadBalance,
    "huggingface": HuggingFaceLoadBalance,
}


def loss_of(counts_KE, prob_sum_E, tokens, convention):
    """The loss of one unit."""
    counts, probs = jnp.asarray(counts_KE), jnp.asarray(prob_sum_E, jnp.float32)
    sums = {"counted_KE": counts[None], "prob_sum_E": probs[None]}
    num_tokens = jnp.maximum(tokens, 1).astype(jnp.float32)
    loss = CONVENTIONS[convention]()
    by_layer = loss.by_layer(sums, num_tokens)
    np.testing.assert_allclose(loss.loss(sums, num_tokens, sums), by_layer[0], rtol=FLOAT32)
    return float(by_layer[0])


def make_routing(probs_GSE, index_GSK, gate_GSK=None, chosen_GSK=None, logits_GSE=None, **more):
    """A `Routing` whose choices all count and whose gates are the probabilities, by default."""
    probs, index = jnp.asarray(probs_GSE, jnp.float32), jnp.asarray(index_GSK)
    if gate_GSK is None:
        gate_GSK = jnp.take_along_axis(probs, index, axis=-1)
    if chosen_GSK is None:
        chosen_GSK = jnp.ones(index.shape, jnp.bool_)
    logits = jnp.log(probs) if logits_GSE is None else logits_GSE
    return Routing(logits, probs, index, gate_GSK, chosen_GSK, **more)


def mean_of(loss, routing, valid):
    """A loss's measurement of one call, divided by the number of tokens."""
    total = loss.measure(routing, valid, valid.shape)["total"]
    return total / jnp.maximum(jnp.sum(valid), 1)


@pytest.mark.parametrize(
    ("convention", "value"),
    [("megatron", 1), ("switch", 1), ("flaxformer", K), ("huggingface", K)],
)
def test_uniform_routing_gives_the_value_of_the_convention(convention, value):
    # 80 tokens: 10 per choice and expert. Every probability is 1/8, so each sum is 80/8.
    counts = np.full((K, E), 10)
    assert loss_of(counts, np.full(E, 10.0), 80, convention) == pytest.approx(value, rel=FLOAT32)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_uniform_routing_to_one_expert_a_token_gives_one(convention):
    assert loss_of(np.full((1, E), 10), np.full(E, 10.0), 80, convention) == pytest.approx(1)


def test_a_token_without_a_choice_is_a_token_of_hugging_faces_loss():
    """Two of four tokens have a choice that counts; both of E = 2 experts have probability 1/2."""
    chosen_GSK = jnp.array([[[True], [True], [False], [False]]])
    routing = make_routing(
        jnp.full((1, 4, 2), 0.5), jnp.array([[[0], [1], [0], [0]]]), chosen_GSK=chosen_GSK
    )
    valid_GS = jnp.ones((1, 4), bool)
    for scope in ("microbatch", "global"):
        loss = HuggingFaceLoadBalance(scope=scope)
        sums = loss.measure(routing, valid_GS, valid_GS.shape)
        layers = jax.tree.map(lambda a: a[None], sums)
        # 2 * (1/4 * 1/2 + 1/4 * 1/2)
        assert loss.loss(layers, jnp.float32(4), layers) == pytest.approx(0.5), scope


@pytest.mark.parametrize(
    ("convention", "value"),
    [
        # All 80 tokens choose experts 0 and 1, with probabilities .75 and .25:
        # 8 * (1/2 * .75 + 1/2 * .25) = 4 = E / K, the largest value that K choices allow,
        ("megatron", 4.0),
        # 8 * (1 * .75) from first choices only,
        ("switch", 6.0),
        # 8 * (1 * .75 + 1 * .25) = E.
        ("flaxformer", 8.0),
        ("huggingface", 8.0),
    ],
)
def test_collapsed_routing_gives_the_largest_value(convention, value):
    counts = np.zeros((K, E), int)
    counts[0, 0] = counts[1, 1] = 80
    prob_sum = np.zeros(E)
    prob_sum[:2] = 60, 20
    assert loss_of(counts, prob_sum, 80, convention) == pytest.approx(value, rel=FLOAT32)


def test_collapse_to_one_expert_gives_the_number_of_experts():
    counts, prob_sum = np.zeros((1, E), int), np.zeros(E)
    counts[0, 3] = prob_sum[3] = 80
    for convention in CONVENTIONS:
        assert loss_of(counts, prob_sum, 80, convention) == pytest.approx(E)


def test_units_are_weighted_by_their_tokens():
    # A collapsed unit (8) of 30 tokens, a balanced unit (1) of 10, and a unit of padding: 6.25.
    probs, index = np.full((3, 30, E), 1 / 8), np.zeros((3, 30, 1), int)
    probs[0] = np.eye(E)[0]
    index[1, :10, 0] = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    valid = jnp.arange(30) < jnp.array([[30], [10], [0]])
    routing = make_routing(probs, index)
    loss = mean_of(SwitchLoadBalance(scope="sequence"), routing, valid)
    assert float(loss) == pytest.approx((8 * 30 + 1 * 10) / 40, rel=FLOAT32)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_no_tokens_at_all_give_zero_and_no_nan(convention):
    assert loss_of(np.zeros((K, E), int), np.zeros(E), 0, convention) == 0


BATCH, LENGTH, MODEL_DIM = 2, 6, 4
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)
SCOPES = {"group": 3, "sequence": 0, "microbatch": 0, "global": 12}  # each with a group size


def make_block(convention, scope, choices=K):
    loss = CONVENTIONS[convention](weight=0.01, scope=scope)
    moe = MoE(
        num_experts=5, num_selected_experts=choices, expert_dim=3, run_experts="einsum",
        group_size=SCOPES[scope], losses=(loss, RouterZ()),
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: random.normal(size=spec.shape).astype(np.float32), moe.specs(Dims(MODEL_DIM))
    )
    return moe, params, random.normal(size=(BATCH, LENGTH, MODEL_DIM)).astype(np.float32)


def loss_named(aux, moe, name):
    """An unweighted loss, as if the block were a whole model and its batch one microbatch."""
    of_layers = jax.tree.map(lambda leaf: leaf[None], aux)
    num_tokens = jnp.maximum(aux.sums["num_tokens"], 1).astype(jnp.float32)
    sums = of_layers.sums["losses"][name] | of_layers.sequences["losses"][name]
    return dict(named_losses(moe.losses))[name].loss(sums, num_tokens, sums)


def in_segments(valid):
    return None if valid is None else jnp.asarray(valid, jnp.int32)


@functools.partial(jax.jit, static_argnames=("moe", "name"))
def loss_and_gradient(params, x, valid, moe, name):
    def loss(params, x):
        call = Call(segments_BL=in_segments(valid), capacity=moe.capacity.train_factor)
        return loss_named(moe_block(params, x, moe, call)[1], moe, name)

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)


def router_of(grads):
    return grads["router"]["weight"]


ALL = [
    (convention, scope)
    for convention in CONVENTIONS
    for scope in SCOPES
    if convention != "huggingface" or scope in ("microbatch", "global")
]


@pytest.mark.parametrize(("convention", "scope"), ALL)
def test_every_convention_and_scope_equals_the_oracle(convention, scope):
    moe, params, x = make_block(convention, scope)
    loss, (grads, dx) = loss_and_gradient(params, x, VALID, moe, "load_balance_loss")
    decided = moe_oracle.moe_block(params, x, moe, valid_BL=VALID)
    assert float(loss) == pytest.approx(decided.load_balance_loss, rel=FLOAT32)
    # The oracle's gradient is that of sum(f * P) with f constant.
    _, expected, expected_dx = moe_oracle.gradients(params, x, moe, decided, 0 * x, 1.0)
    assert np.abs(router_of(expected)).max() > 0.01
    for grad, wanted in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(grad, wanted, atol=FLOAT32)
    np.testing.assert_allclose(dx, expected_dx, atol=FLOAT32)


def test_scopes_differ_where_sequences_do():
    values = set()
    for scope in ("group", "sequence", "microbatch"):
        moe, params, x = make_block("megatron", scope)
        loss, _ = loss_and_gradient(params, x, VALID, moe, "load_balance_loss")
        values.add(round(float(loss), 4))
    assert len(values) == 3


@pytest.mark.parametrize("field", ["load_balance_loss", "router_z_loss"])
@pytest.mark.parametrize("scope", SCOPES)
def test_padding_has_no_part_in_a_loss_or_its_gradient(field, scope):
    moe, params, x = make_block("megatron", scope)
    loss, (grads, dx) = loss_and_gradient(params, x, VALID, moe, field)
    other = np.where(VALID[..., None], x, 3.0).astype(np.float32)
    changed, (changed_grads, _) = loss_and_gradient(params, other, VALID, moe, field)
    assert float(loss) == float(changed)
    np.testing.assert_array_equal(router_of(grads), router_of(changed_grads))
    assert not np.asarray(dx)[~VALID].any()
    assert np.asarray(dx)[VALID].any(axis=-1).all()


def test_losses_do_not_reach_the_experts():
    moe, params, x = make_block("megatron", "global")
    for field in ("load_balance_loss", "router_z_loss"):
        _, (grads, _) = loss_and_gradient(params, x, VALID, moe, field)
        assert not any(np.any(grad) for grad in grads["experts"].values())


def test_loads_are_counted_before_drops():
    # Cutting off an overloaded expert must not lower the loss.
    moe, params, x = make_block("megatron", "global")
    run = jax.jit(lambda f: moe_block(params, x, moe, Call(capacity=f))[1], static_argnums=0)
    tight, dropless = run(0.3), run(0.0)
    dropped = [
        dropped_fraction(a.sums["assigned_KE"], a.sums["kept_KE"]) for a in (tight, dropless)
    ]
    assert dropped[0].max() > 0.2 and not np.any(dropped[1])
    losses = [float(loss_named(aux, moe, "load_balance_loss")) for aux in (tight, dropless)]
    assert losses[0] == losses[1]


def test_choices_that_do_not_count_are_in_no_statistic():
    # Two tokens, three experts. Token 0 chooses 0 and 1, token 1 chooses 1 and (not counting) 2.
    routing = make_routing(
        [[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]],
        [[[0, 1], [1, 2]]],
        jnp.array([[[0.5, 0.3], [0.6, 0.0]]]),
        jnp.array([[[True, True], [True, False]]]),
    )
    one_slot = Options(3, 3, 2, 1)  # expert 1 has room for token 0 only
    assignment = assign_slots(routing, TokenMajor(), one_slot)
    valid = jnp.ones((1, 2), jnp.bool_)
    aux = routing_aux(routing, assignment.kept_GSK, valid, (1, 2))
    assigned_KE, kept_KE = aux.sums["assigned_KE"], aux.sums["kept_KE"]
    assert assigned_KE.tolist() == [[1, 1, 0], [0, 1, 0]]
    assert kept_KE.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert aux.sequences["assigned_BE"].tolist() == [[1, 2, 0]]
    np.testing.assert_allclose(dropped_fraction(assigned_KE, kept_KE), [0.5, 0.0])
    # Loads 1, 2, 0 of 3 choices; mean probabilities .3, .45, .25: 3 * (.3 / 3 + .45 * 2 / 3).
    loss = mean_of(LoadBalance(scope="microbatch"), routing, valid)
    np.testing.assert_allclose(loss, 1.2, rtol=FLOAT32)
    violation = balance.max_violation(assigned_KE.sum(axis=0))
    np.testing.assert_allclose(violation, 2 / 1 - 1, rtol=FLOAT32)


def test_where_nothing_was_chosen_nothing_was_dropped():
    """One layer has only padding; the other keeps 3 of 4 choices."""
    assigned_XKE = jnp.array([[[0, 0, 0], [0, 0, 0]], [[2, 0, 0], [1, 1, 0]]])
    kept_XKE = jnp.array([[[0, 0, 0], [0, 0, 0]], [[1, 0, 0], [1, 1, 0]]])
    sums = {"assigned_KE": assigned_XKE, "kept_KE": kept_XKE}
    sums |= {"num_tokens": jnp.array([0, 2]), "entropy": jnp.zeros(2)}
    metrics = routing_metrics(Aux(sums, {"max_logit": jnp.zeros(2)}))
    assert metrics["dropped_fraction"].tolist() == [0, 0.25]
    assert metrics["dropped_fraction_by_choice"].tolist() == [[0, 0], [0.5, 0]]


@pytest.mark.parametrize(
    ("router", "bias", "made"),
    [
        ({"score": Sigmoid()}, [0, 0, 0.9, 0.9], [[0, 0, 3, 0], [0, 0, 0, 3]]),
        ({"groups": ExpertGroups(2, 1, "top2_sum")}, None,
         [[1, 0, 2, 0], [0, 1, 0, 2]]),
    ],
)  # fmt: skip
def test_megatrons_loss_counts_the_best_scores_whatever_bias_and_groups_select(router, bias, made):
    """One token of three scores experts 0 and 1 best; the other two score 0 and 2 best."""
    logits = np.log(np.array([[0.5, 0.3, 0.12, 0.08], [0.4, 0.05, 0.3, 0.25]], np.float32))
    x = logits[[0, 1, 1]][None]
    bias = None if bias is None else jnp.array(bias)
    for convention, counted in (("megatron", [[3, 0, 0, 0], [0, 1, 2, 0]]), ("flaxformer", made)):
        moe = MoE(
            num_experts=4, num_selected_experts=2, expert_dim=1, run_experts="einsum",
            router=TokenChoice(**router), losses=(CONVENTIONS[convention](scope="sequence"),),
        )  # fmt: skip
        params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), moe.specs(Dims(4)))
        params["router"] = {"weight": jnp.eye(4)}
        own = Own(state=None if bias is None else {"bias_E": bias})
        aux = moe_block(params, x, moe, Call(), own)[1]
        measured = aux.sums["losses"]["load_balance_loss"]
        assert aux.sums["assigned_KE"].tolist() == made
        assert measured["counted_KE"].tolist() == counted
        share = np.sum(counted, axis=0) / (6 if convention == "megatron" else 3)
        expected = 4 * share @ np.asarray(aux.sums["prob_sum_E"]) / 3
        got = loss_named(aux, moe, "load_balance_loss")
        np.testing.assert_allclose(got, expected, rtol=FLOAT32)


def huggingface_switch(logits_XBLE, valid_BL):
    """Hugging Face's Switch loss and its gradient by the logits, in float64 loops.

    The router probabilities of all layers are joined along the sequence. Per sequence, f is the
    mean one-hot first choice and P the mean probability, both over the valid tokens of all layers;
    the loss is E * sum(f * P). The batch's loss is the mean weighted by tokens. f has no gradient.
    """
    layers, batch, length, experts = logits_XBLE.shape
    total, gradient = 0.0, np.zeros(logits_XBLE.shape)
    for b in range(batch):
        joined = [(x, s) for x in range(layers) for s in range(length) if valid_BL[b, s]]
        share, mean_prob, prob_of = np.zeros(experts), np.zeros(experts), {}
        for x, s in joined:
            prob = np.exp(logits_XBLE[x, b, s]) / np.exp(logits_XBLE[x, b, s]).sum()
            prob_of[x, s] = prob
            share[np.argmax(prob)] += 1 / len(joined)
            mean_prob += prob / len(joined)
        weight = valid_BL[b].sum() / valid_BL.sum()
        total += experts * share @ mean_prob * weight
        for place, prob in prob_of.items():
            by_prob = experts * share / len(joined) * weight
            gradient[place[0], b, place[1]] = prob * (by_prob - prob @ by_prob)
    return total, gradient


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_switchs_loss_as_hugging_face_has_it_joins_the_layers_of_a_sequence(padded):
    """Two layers route differently; only the first of two choices counts."""
    moe = MoE(
        num_experts=5, num_selected_experts=2, expert_dim=3, run_experts="einsum",
        losses=(HuggingFaceSwitchLoadBalance(weight=0.5),),
    )  # fmt: skip
    assert not moe.needs_batch_sums
    random = np.random.default_rng(2)
    specs = {name: moe.specs(Dims(MODEL_DIM)) for name in "ab"}
    params = jax.tree.map(lambda spec: random.normal(size=spec.shape).astype(np.float32), specs)
    x = random.normal(size=(2, BATCH, LENGTH, MODEL_DIM)).astype(np.float32)
    valid = VALID if padded else np.ones_like(VALID)
    num_tokens = jnp.float32(valid.sum())

    def run(params, rows):
        call = Call(segments_BL=jnp.asarray(valid[rows], jnp.int32))
        said = [
            moe_block(params[name], tokens[rows], moe, call)[1]
            for name, tokens in zip("ab", x, strict=True)
        ]
        aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *said)
        return moe.loss(aux, num_tokens, None), aux

    whole = slice(None)
    (loss, aux), grads = jax.value_and_grad(run, has_aux=True)(params, whole)
    weights = [params[name]["router"]["weight"].astype(np.float64) for name in "ab"]
    logits = np.stack([tokens @ weight for tokens, weight in zip(x, weights, strict=True)])
    expected, by_logits = huggingface_switch(logits, valid)
    np.testing.assert_allclose(loss, 0.5 * expected, rtol=FLOAT32)
    for name, tokens, by in zip("ab", x, by_logits, strict=True):
        wanted = 0.5 * np.einsum("blm,ble->me", tokens, by)
        assert np.abs(wanted).max() > 0.01
        np.testing.assert_allclose(grads[name]["router"]["weight"], wanted, atol=FLOAT32)
    # Joining matters: the mean of the layers' own losses, which metrics report, is another number.
    apart = [huggingface_switch(layer[None], valid)[0] for layer in logits]
    np.testing.assert_allclose(moe.metrics(aux)["load_balance_loss"], apart, rtol=FLOAT32)
    assert abs(np.mean(apart) - expected) > 0.01
    # The losses of single-sequence microbatches add up to that of the batch.
    parts = [run(params, slice(b, b + 1))[0] for b in range(BATCH)]
    np.testing.assert_allclose(sum(parts), loss, rtol=FLOAT32)


def test_hugging_faces_switch_loss_is_one_at_uniform_routing_and_e_at_collapse():
    index = np.arange(2 * 2 * E).reshape(2, 2 * E, 1) % E
    uniform = make_routing(np.full((2, 2 * E, E), 1 / E), index)
    collapsed = make_routing(np.broadcast_to(np.eye(E)[3], (2, 2 * E, E)), np.full_like(index, 3))
    valid, loss = jnp.ones((2, 2 * E), bool), HuggingFaceSwitchLoadBalance()
    for routing, value in ((uniform, 1), (collapsed, E)):
        sums = loss.measure_sequences(routing, valid, valid.shape)
        sums = jax.tree.map(lambda leaf: leaf[None], sums)
        assert float(loss.loss(sums, jnp.float32(4 * E), None)) == pytest.approx(value)
        assert float(mean_of(loss, routing, valid)) == pytest.approx(value)
    nothing = loss.measure_sequences(uniform, ~valid, valid.shape)
    assert loss.loss(jax.tree.map(lambda leaf: leaf[None], nothing), jnp.float32(1), None) == 0


def test_importance_loss_is_the_squared_variation_of_the_gates():
    # Gates per expert: .5 + 0, .3 + .6 and .1. The third token is padding.
    routing = make_routing(
        jnp.full((1, 3, 3), 1 / 3),
        jnp.array([[[0, 1], [1, 2], [0, 1]]]),
        jnp.array([[[0.5, 0.3], [0.6, 0.1], [0.9, 0.9]]]),
    )
    valid = jnp.array([[True, True, False]])
    sums = np.array([0.5, 0.9, 0.1])
    expected = sums.var() / sums.mean() ** 2
    np.testing.assert_allclose(mean_of(Importance(), routing, valid), expected, rtol=FLOAT32)
    assert mean_of(Importance(), routing, jnp.zeros((1, 3), bool)) == 0


def noisy_routing(clean, std, num_selected, key=0):
    """Top-K routing of logits with Gaussian noise of this standard deviation."""
    clean = jnp.asarray(clean)
    noisy = clean + std * jax.random.normal(jax.random.key(key), clean.shape)
    gate, index = jax.lax.top_k(jax.nn.softmax(noisy), num_selected)
    std = jnp.full((1, 1, 1), std)
    return make_routing(
        jax.nn.softmax(noisy), index, gate, logits_GSE=noisy, clean_GSE=clean, noise_std_GSE=std
    )


def test_smooth_load_is_the_chance_of_an_expert_to_be_chosen_with_new_noise():
    clean, std, choices = np.array([[[0.3, -0.2, 0.9, 0.1]]], np.float32), 0.7, 2
    routing = noisy_routing(clean, std, choices)
    noisy = np.asarray(routing.logits_GSE[0, 0])
    draws = clean[0, 0] + std * np.random.default_rng(0).normal(size=(20_000, 4))
    chance = [  # one expert's noise is drawn again, the others' stays
        np.mean(np.sum(np.delete(noisy, e) > draws[:, e, None], axis=1) < choices) for e in range(4)
    ]
    expected = np.var(chance) / np.mean(chance) ** 2
    loss = mean_of(Load(), routing, jnp.ones((1, 1), bool))
    np.testing.assert_allclose(loss, expected, rtol=0.05)


def test_load_loss_gradient_equals_finite_differences():
    clean = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
    valid = jnp.arange(5) < jnp.array([[5], [3]])

    @jax.jit
    def loss(clean):
        return mean_of(Load(), noisy_routing(clean, 0.8, 2), valid)

    grad = np.asarray(jax.grad(loss)(clean))
    assert not grad[1, 3:].any() and np.abs(grad[0]).max() > 0.01
    for place in ((0, 0, 1), (0, 4, 3), (1, 2, 0)):
        step = np.zeros_like(clean)
        step[place] = 1e-2  # too small to change a rank
        difference = (loss(clean + step) - loss(clean - step)) / 2e-2
        np.testing.assert_allclose(grad[place], difference, rtol=0.02, atol=1e-4)


def test_load_loss_has_a_finite_gradient_where_a_deviation_underflows():
    clean = jnp.array([[[0.3, -0.2, 0.9, 0.1]]])

    def loss(std):
        routing = noisy_routing(clean, 0.5, 2)._replace(noise_std_GSE=std)
        return mean_of(Load(), routing, jnp.ones((1, 1), bool))

    assert np.isfinite(jax.grad(loss)(jnp.array([[[0.5, 1e-25, 1e-30, 0.0]]]))).all()


def test_load_loss_is_zero_without_noise_and_where_all_are_chosen():
    valid = jnp.ones((1, 3), bool)
    clean = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    assert mean_of(Load(), noisy_routing(clean, 0.5, 2), valid) == 0
    calm = noisy_routing(clean, 0.5, 1)._replace(clean_GSE=None, noise_std_GSE=None)
    assert mean_of(Load(), calm, valid) == 0


def test_a_block_says_the_variation_losses():
    router = TokenChoice(noise=(Learned(),), score=SoftmaxOverSelected())
    moe = MoE(
        num_experts=4, num_selected_experts=2, expert_dim=3, run_experts="einsum", router=router,
        losses=(Importance(weight=0.1), Load(weight=0.1)),
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda spec: random.normal(size=spec.shape), moe.specs(Dims(MODEL_DIM)))
    x = random.normal(size=(BATCH, LENGTH, MODEL_DIM)).astype(np.float32)

    def total(params, rng):
        aux = moe_block(params, x, moe, Call(rng=rng))[1]
        said = {name: loss_named(aux, moe, name) for name in ("importance_loss", "load_loss")}
        return said["importance_loss"] + said["load_loss"], said

    grads, said = jax.jit(jax.grad(total, has_aux=True))(params, jax.random.key(0))
    assert said["importance_loss"] > 0.01 and said["load_loss"] > 0.01
    router = grads["router"]
    assert np.abs(router["weight"]).max() > 0.01
    assert np.abs(router["noise"]["learned"]["weight"]).max() > 0.001
    assert total(params, None)[1]["load_loss"] == 0


def test_what_a_mean_distribution_lacks_in_entropy():
    half = np.log(2)
    table = [  # distribution, target, loss
        ([0.25, 0.25, 0.25, 0.25], 0.0, 0),
        ([0.5, 0.5, 0, 0], 0.0, half),
        ([1, 0, 0, 0], 0.0, 2 * half),
        ([0.5, 0.5, 0, 0], half / 2, 0),
        ([1, 0, 0, 0], half / 2, half / 2),
    ]
    for probs, target, loss in table:
        routing = make_routing(np.array(probs)[None, None], np.zeros((1, 1, 1), int))
        got = mean_of(BatchEntropy(target=target), routing, jnp.ones((1, 1), bool))
        np.testing.assert_allclose(got, loss, atol=FLOAT32)


def test_the_mean_entropy_of_the_distributions_of_tokens():
    uniform, half, certain = [0.25] * 4, [0.5, 0.5, 0, 0], [0, 0, 1, 0]
    table = [  # distributions, whether each is a token, loss
        ([uniform], [1], np.log(4)),
        ([certain], [1], 0),
        ([uniform, half, certain], [1, 1, 1], np.log(2)),
        ([uniform, half, uniform], [0, 1, 0], np.log(2)),  # padding is left out
    ]
    for probs, valid, loss in table:
        routing = make_routing(np.array(probs)[None], np.zeros((1, len(probs), 1), int))
        got = mean_of(TokenEntropy(), routing, jnp.array([valid], bool))
        np.testing.assert_allclose(got, loss, atol=FLOAT32)


def test_entropy_has_a_finite_gradient_where_a_probability_underflows():
    grad = jax.grad(lambda logits: balance.entropy(jax.nn.softmax(logits)))(jnp.array([0.0, 300.0]))
    np.testing.assert_array_equal(grad, 0)


def test_z_loss_is_the_mean_square_of_the_log_normalizer():
    # logsumexp of four equal logits a is a + log 4; padding (logit 50) is left out.
    logits = jnp.array([[[1.0] * 4, [-2.0] * 4, [50.0] * 4]])
    valid = jnp.array([[True, True, False]])
    expected = ((1 + np.log(4)) ** 2 + (-2 + np.log(4)) ** 2) / 2
    assert float(z_loss(logits, valid)) == pytest.approx(expected, rel=FLOAT32)


def z_loss(logits, valid):
    index = jnp.zeros((*logits.shape[:2], 1), jnp.int32)
    routing = make_routing(jax.nn.softmax(logits), index, logits_GSE=logits)
    return mean_of(RouterZ(), routing, valid)


def test_z_loss_survives_large_logits():
    loss = z_loss(jnp.array([[[1000.0, 0.0]]]), jnp.array([[True]]))
    assert float(loss) == pytest.approx(1e6)


def test_z_loss_of_padding_alone_is_zero():
    assert float(z_loss(jnp.ones((1, 2, 4)), jnp.zeros((1, 2), bool))) == 0


def test_z_loss_gradient_equals_the_oracle():
    moe, params, x = make_block("megatron", "global")
    loss, (grads, dx) = loss_and_gradient(params, x, VALID, moe, "router_z_loss")
    decided = moe_oracle.moe_block(params, x, moe, valid_BL=VALID)
    _, expected, expected_dx = moe_oracle.gradients(params, x, moe, decided, 0 * x, 0.0, 1.0)
    assert float(loss) == pytest.approx(decided.router_z_loss, rel=FLOAT32)
    scale = np.abs(router_of(expected)).max()
    np.testing.assert_allclose(router_of(grads) / scale, router_of(expected) / scale, atol=FLOAT32)
    np.testing.assert_allclose(dx / scale, expected_dx / scale, atol=FLOAT32)


@pytest.mark.parametrize(
    ("counts", "violation"),
    [([5, 5, 5, 5], 0.0), ([20, 0, 0, 0], 3.0), ([6, 5, 5, 4], 0.2), ([0, 0, 0, 0], 0.0)],
)
def test_max_violation_is_the_largest_load_over_the_mean_minus_one(counts, violation):
    assert float(balance.max_violation(jnp.asarray(counts))) == pytest.approx(violation)


def test_max_violation_is_taken_layer_by_layer():
    loads = balance.max_violation(jnp.array([[2, 2], [4, 0]]))
    np.testing.assert_allclose(loads, [0.0, 1.0])
