"""Balance losses by their limits, the selection bias by its arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import BalanceConfig, CapacityConfig, MoEConfig, RouterConfig
from moe_jax.config.balance import LOAD_BALANCE_CONVENTIONS
from moe_jax.moe import balance
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import assign_slots
from moe_jax.moe.parameters import moe_specs
from moe_jax.moe.routing import Routing
from moe_jax.moe.statistics import describe
from tests import moe_oracle

# A few float32 sums and one softmax.
FLOAT32 = 2e-6

E, K = 8, 2


def loss_of(counts_KE, prob_sum_E, tokens, convention):
    """The loss of one unit."""
    counts, probs = jnp.asarray(counts_KE), jnp.asarray(prob_sum_E, jnp.float32)
    return float(
        balance.load_balance_loss(counts[None], probs[None], jnp.asarray([tokens]), convention)
    )


@pytest.mark.parametrize(
    ("convention", "value"),
    [("megatron", 1), ("switch", 1), ("flaxformer", K), ("huggingface", K)],
)
def test_uniform_routing_gives_the_value_of_the_convention(convention, value):
    # 80 tokens, 10 a choice and expert; every probability 1/8, so that 80/8 is the sum.
    counts = np.full((K, E), 10)
    assert loss_of(counts, np.full(E, 10.0), 80, convention) == pytest.approx(value, rel=FLOAT32)


@pytest.mark.parametrize("convention", LOAD_BALANCE_CONVENTIONS)
def test_uniform_routing_to_one_expert_a_token_gives_one(convention):
    assert loss_of(np.full((1, E), 10), np.full(E, 10.0), 80, convention) == pytest.approx(1)


@pytest.mark.parametrize(
    ("convention", "value"),
    [
        # All 80 tokens choose experts 0 and 1, with probabilities .75 and .25:
        # 8 * (1/2 * .75 + 1/2 * .25) = 4 = E / K, the most that K choices can be collapsed,
        ("megatron", 4.0),
        # 8 * (1 * .75) of first choices,
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
    for convention in LOAD_BALANCE_CONVENTIONS:
        assert loss_of(counts, prob_sum, 80, convention) == pytest.approx(E)


def test_units_are_weighted_by_their_tokens():
    # One unit collapsed (8) with 30 tokens, one balanced (1) with 10, one of padding: 6.25.
    counts, probs = np.zeros((3, 1, E), int), np.zeros((3, E), np.float32)
    counts[0, 0, 0], probs[0, 0] = 30, 30
    counts[1, 0], probs[1] = [2, 2, 1, 1, 1, 1, 1, 1], 10 / 8
    loss = balance.load_balance_loss(counts, probs, jnp.array([30, 10, 0]), "switch")
    assert float(loss) == pytest.approx((8 * 30 + 1 * 10) / 40, rel=FLOAT32)


@pytest.mark.parametrize("convention", LOAD_BALANCE_CONVENTIONS)
def test_no_tokens_at_all_give_zero_and_no_nan(convention):
    assert loss_of(np.zeros((K, E), int), np.zeros(E), 0, convention) == 0


BATCH, LENGTH, MODEL_DIM = 2, 6, 4
VALID = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)
SCOPES = {"group": 3, "sequence": 0, "microbatch": 0, "global": 12}  # and a group size


def make_block(convention, scope, choices=K):
    config = MoEConfig(
        num_experts=5, num_selected_experts=choices, expert_dim=3, dispatch="einsum",
        group_size=SCOPES[scope],
        balance=BalanceConfig(load_balance_convention=convention, load_balance_scope=scope),
    )  # fmt: skip
    random = np.random.default_rng(0)
    specs = moe_specs(config, MODEL_DIM)
    params = {n: random.normal(size=s.shape).astype(np.float32) for n, s in specs.items()}
    return config, params, random.normal(size=(BATCH, LENGTH, MODEL_DIM)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("config", "field"))
def loss_and_gradient(params, x, valid, config, field):
    def loss(params, x):
        return getattr(moe_block(params, x, config, valid_BL=valid)[1], field)

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)


ALL = [
    (convention, scope)
    for convention in LOAD_BALANCE_CONVENTIONS
    for scope in SCOPES
    if convention != "huggingface" or scope in ("microbatch", "global")
]


@pytest.mark.parametrize(("convention", "scope"), ALL)
def test_every_convention_and_scope_equals_the_oracle(convention, scope):
    config, params, x = make_block(convention, scope)
    loss, (grads, dx) = loss_and_gradient(params, x, VALID, config, "load_balance_loss")
    decided = moe_oracle.moe_block(params, x, config, valid_BL=VALID)
    assert float(loss) == pytest.approx(decided.load_balance_loss, rel=FLOAT32)
    # The oracle's gradient is that of sum(f * P) with f a constant.
    _, expected, expected_dx = moe_oracle.gradients(params, x, config, decided, 0 * x, 1.0)
    assert np.abs(expected["router"]).max() > 0.01
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected[name], atol=FLOAT32)
    np.testing.assert_allclose(dx, expected_dx, atol=FLOAT32)


def test_scopes_differ_where_sequences_do():
    values = set()
    for scope in ("group", "sequence", "microbatch"):
        config, params, x = make_block("megatron", scope)
        loss, _ = loss_and_gradient(params, x, VALID, config, "load_balance_loss")
        values.add(round(float(loss), 4))
    assert len(values) == 3


@pytest.mark.parametrize("field", ["load_balance_loss", "router_z_loss"])
@pytest.mark.parametrize("scope", SCOPES)
def test_padding_has_no_part_in_a_loss_or_its_gradient(field, scope):
    config, params, x = make_block("megatron", scope)
    loss, (grads, dx) = loss_and_gradient(params, x, VALID, config, field)
    other = np.where(VALID[..., None], x, 3.0).astype(np.float32)
    changed, (changed_grads, _) = loss_and_gradient(params, other, VALID, config, field)
    assert float(loss) == float(changed)
    np.testing.assert_array_equal(grads["router"], changed_grads["router"])
    assert not np.asarray(dx)[~VALID].any()
    assert np.asarray(dx)[VALID].any(axis=-1).all()


def test_losses_do_not_reach_the_experts():
    config, params, x = make_block("megatron", "global")
    for field in ("load_balance_loss", "router_z_loss"):
        _, (grads, _) = loss_and_gradient(params, x, VALID, config, field)
        assert not any(np.any(grad) for name, grad in grads.items() if name != "router")


def test_loads_are_counted_before_drops():
    # Descending the loss must not be cheaper because an overloaded expert is cut off.
    config, params, x = make_block("megatron", "global")
    run = jax.jit(lambda f: moe_block(params, x, config, capacity_factor=f)[1], static_argnums=0)
    tight, dropless = run(0.3), run(0.0)
    assert tight.dropped_fraction_K.max() > 0.2 and not np.any(dropless.dropped_fraction_K)
    assert float(tight.load_balance_loss) == float(dropless.load_balance_loss)


def test_choices_that_do_not_count_are_in_no_statistic():
    # Two tokens, three experts: token 0 chooses 0 and 1, token 1 chooses 1 and, not counting, 2.
    probs = jnp.array([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]])
    routing = Routing(
        jnp.log(probs),
        probs,
        jnp.array([[[0, 1], [1, 2]]]),
        jnp.array([[[0.5, 0.3], [0.6, 0.0]]]),
        jnp.array([[[True, True], [True, False]]]),
    )
    config = MoEConfig(num_experts=3, num_selected_experts=2, capacity=CapacityConfig())
    assignment = assign_slots(routing, 0.75, config.capacity)  # one slot: 1 loses expert 1
    aux = describe(routing, assignment.kept_GSK, jnp.ones((1, 2), jnp.bool_), (1, 2), config)
    assert aux.assigned_KE.tolist() == [[1, 1, 0], [0, 1, 0]]
    assert aux.kept_KE.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert aux.assigned_BE.tolist() == [[1, 2, 0]]
    np.testing.assert_allclose(aux.dropped_fraction_K, [0.5, 0.0])
    # Loads 1, 2, 0 of 3 choices; mean probabilities .3, .45, .25: 3 * (.3 / 3 + .45 * 2 / 3).
    np.testing.assert_allclose(aux.load_balance_loss, 1.2, rtol=FLOAT32)
    np.testing.assert_allclose(aux.max_violation, 2 / 1 - 1, rtol=FLOAT32)


@pytest.mark.parametrize(
    ("router", "bias", "made"),
    [
        ({"score": "sigmoid"}, [0, 0, 0.9, 0.9], [[0, 0, 3, 0], [0, 0, 0, 3]]),
        ({"num_expert_groups": 2, "num_selected_groups": 1, "group_score": "top2_sum"}, None,
         [[1, 0, 2, 0], [0, 1, 0, 2]]),
    ],
)  # fmt: skip
def test_megatrons_loss_counts_the_best_scores_whatever_bias_and_groups_select(router, bias, made):
    """Experts 0 and 1 score best with one token of three, 0 and 2 with the others."""
    logits = np.log(np.array([[0.5, 0.3, 0.12, 0.08], [0.4, 0.05, 0.3, 0.25]], np.float32))
    x = logits[[0, 1, 1]][None]
    bias = None if bias is None else jnp.array(bias)
    for convention, counted in (("megatron", [[3, 0, 0, 0], [0, 1, 2, 0]]), ("flaxformer", made)):
        settings = BalanceConfig(load_balance_convention=convention, load_balance_scope="sequence")
        config = MoEConfig(
            num_experts=4, num_selected_experts=2, expert_dim=1, dispatch="einsum",
            router=RouterConfig(**router), balance=settings,
        )  # fmt: skip
        params = {n: jnp.zeros(s.shape) for n, s in moe_specs(config, 4).items()}
        aux = moe_block(params | {"router": jnp.eye(4)}, x, config, bias_E=bias)[1]
        assert aux.assigned_KE.tolist() == made and aux.balanced_KE.tolist() == counted
        share = np.sum(counted, axis=0) / (6 if convention == "megatron" else 3)
        expected = 4 * share @ np.asarray(aux.mean_prob_E)
        np.testing.assert_allclose(aux.load_balance_loss, expected, rtol=FLOAT32)


def test_importance_loss_is_the_squared_variation_of_the_gates():
    # Gates by expert .5 + 0, .3 + .6, .1 of three experts; the third token is padding.
    routing = Routing(
        jnp.zeros((1, 3, 3)),
        jnp.full((1, 3, 3), 1 / 3),
        jnp.array([[[0, 1], [1, 2], [0, 1]]]),
        jnp.array([[[0.5, 0.3], [0.6, 0.1], [0.9, 0.9]]]),
    )
    valid = jnp.array([[True, True, False]])
    sums = np.array([0.5, 0.9, 0.1])
    expected = sums.var() / sums.mean() ** 2
    np.testing.assert_allclose(balance.importance_loss(routing, valid), expected, rtol=FLOAT32)
    assert balance.importance_loss(routing, jnp.zeros((1, 3), bool)) == 0


def noisy_routing(clean, std, num_selected, key=0):
    """Top-K routing of logits with noise of this deviation."""
    clean = jnp.asarray(clean)
    noisy = clean + std * jax.random.normal(jax.random.key(key), clean.shape)
    gate, index = jax.lax.top_k(jax.nn.softmax(noisy), num_selected)
    std = jnp.full((1, 1, 1), std)
    return Routing(noisy, jax.nn.softmax(noisy), index, gate, None, clean, std)


def test_smooth_load_is_the_chance_of_an_expert_to_be_chosen_with_new_noise():
    clean, std, choices = np.array([[[0.3, -0.2, 0.9, 0.1]]], np.float32), 0.7, 2
    routing = noisy_routing(clean, std, choices)
    noisy = np.asarray(routing.logits_GSE[0, 0])
    draws = clean[0, 0] + std * np.random.default_rng(0).normal(size=(20_000, 4))
    chance = [  # anew for one expert, as they are for the others
        np.mean(np.sum(np.delete(noisy, e) > draws[:, e, None], axis=1) < choices) for e in range(4)
    ]
    expected = np.var(chance) / np.mean(chance) ** 2
    loss = balance.load_loss(routing, jnp.ones((1, 1), bool))
    np.testing.assert_allclose(loss, expected, rtol=0.05)


def test_load_loss_gradient_equals_finite_differences():
    clean = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
    valid = jnp.arange(5) < jnp.array([[5], [3]])

    @jax.jit
    def loss(clean):
        return balance.load_loss(noisy_routing(clean, 0.8, 2), valid)

    grad = np.asarray(jax.grad(loss)(clean))
    assert not grad[1, 3:].any() and np.abs(grad[0]).max() > 0.01
    for place in ((0, 0, 1), (0, 4, 3), (1, 2, 0)):
        step = np.zeros_like(clean)
        step[place] = 1e-2  # changes nobody's rank
        difference = (loss(clean + step) - loss(clean - step)) / 2e-2
        np.testing.assert_allclose(grad[place], difference, rtol=0.02, atol=1e-4)


def test_load_loss_has_a_finite_gradient_where_a_deviation_underflows():
    clean = jnp.array([[[0.3, -0.2, 0.9, 0.1]]])

    def loss(std):
        routing = noisy_routing(clean, 0.5, 2)._replace(noise_std_GSE=std)
        return balance.load_loss(routing, jnp.ones((1, 1), bool))

    assert np.isfinite(jax.grad(loss)(jnp.array([[[0.5, 1e-25, 1e-30, 0.0]]]))).all()


def test_load_loss_is_zero_without_noise_and_where_all_are_chosen():
    valid = jnp.ones((1, 3), bool)
    clean = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    assert balance.load_loss(noisy_routing(clean, 0.5, 2), valid) == 0
    calm = noisy_routing(clean, 0.5, 1)._replace(clean_GSE=None, noise_std_GSE=None)
    assert balance.load_loss(calm, valid) == 0


def test_a_block_says_the_variation_losses_that_are_weighted():
    settings = BalanceConfig(importance_loss_weight=0.1, load_loss_weight=0.1)
    router = RouterConfig(learned_noise=True, score_before_topk=False)
    config = MoEConfig(
        num_experts=4, num_selected_experts=2, expert_dim=3, dispatch="einsum", router=router,
        balance=settings,
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = {n: random.normal(size=s.shape) for n, s in moe_specs(config, MODEL_DIM).items()}
    x = random.normal(size=(BATCH, LENGTH, MODEL_DIM)).astype(np.float32)

    def total(params, rng):
        aux = moe_block(params, x, config, rng=rng)[1]
        return aux.importance_loss + aux.load_loss, aux

    grads, aux = jax.grad(total, has_aux=True)(params, jax.random.key(0))
    assert aux.importance_loss > 0.01 and aux.load_loss > 0.01
    assert np.abs(grads["router"]).max() > 0.01 and np.abs(grads["router_noise"]).max() > 0.001
    assert total(params, None)[1].load_loss == 0


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
        got = balance.batch_entropy_loss(jnp.array(probs, jnp.float32), target)
        np.testing.assert_allclose(got, loss, atol=FLOAT32)


def test_entropy_has_a_finite_gradient_where_a_probability_underflows():
    grad = jax.grad(lambda logits: balance.entropy(jax.nn.softmax(logits)))(jnp.array([0.0, 300.0]))
    np.testing.assert_array_equal(grad, 0)


def test_z_loss_is_the_mean_square_of_the_log_normalizer():
    # logsumexp of four equal logits a is a + log 4; padding (logit 50) is left out.
    logits = jnp.array([[[1.0] * 4, [-2.0] * 4, [50.0] * 4]])
    valid = jnp.array([[True, True, False]])
    expected = ((1 + np.log(4)) ** 2 + (-2 + np.log(4)) ** 2) / 2
    assert float(balance.router_z_loss(logits, valid)) == pytest.approx(expected, rel=FLOAT32)


def test_z_loss_survives_large_logits():
    loss = balance.router_z_loss(jnp.array([[[1000.0, 0.0]]]), jnp.array([[True]]))
    assert float(loss) == pytest.approx(1e6)


def test_z_loss_of_padding_alone_is_zero():
    assert float(balance.router_z_loss(jnp.ones((1, 2, 4)), jnp.zeros((1, 2), bool))) == 0


def test_z_loss_gradient_equals_the_oracle():
    config, params, x = make_block("megatron", "global")
    loss, (grads, dx) = loss_and_gradient(params, x, VALID, config, "router_z_loss")
    decided = moe_oracle.moe_block(params, x, config, valid_BL=VALID)
    _, expected, expected_dx = moe_oracle.gradients(params, x, config, decided, 0 * x, 0.0, 1.0)
    assert float(loss) == pytest.approx(decided.router_z_loss, rel=FLOAT32)
    scale = np.abs(expected["router"]).max()
    np.testing.assert_allclose(grads["router"] / scale, expected["router"] / scale, atol=FLOAT32)
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
