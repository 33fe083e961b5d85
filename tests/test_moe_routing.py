"""Token-choice routing, by hand-worked tables and by invariants."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from moe_jax.moe.block import moe_block
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import Choices, Options, RouterInputs, top_k
from moe_jax.moe.routing.assignment import Sinkhorn
from moe_jax.moe.routing.cosine import Cosine
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.moe.routing.logits import Linear, Sigmoid, Softmax, SoftmaxOverSelected
from moe_jax.moe.routing.noise import Gaussian, Jitter, Learned
from moe_jax.moe.routing.selection import (
    ExpertGroups,
    FirstChoice,
    RandomChoices,
    Sampled,
    SampledRest,
    Threshold,
)
from moe_jax.moe.routing.soft import Soft
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.part import Call, Dims
from tests import moe_oracle

# One softmax of a few float32 numbers near 1.
FLOAT32 = 1e-6
PROPERTIES = settings(max_examples=30)

# With identity router weights a token is its own logits. Token 0 has probabilities 1/10, 2/10,
# 3/10, 4/10; token 1 ties experts 0, 1 and 2.
PROBS = np.array([[0.1, 0.2, 0.3, 0.4], [0.3, 0.3, 0.3, 0.1]])
LOGITS = np.log(PROBS).astype(np.float32)


def route(x, params, num_selected, router, **arguments):
    """Routes groups of tokens without padding."""
    x, num_experts = jnp.asarray(x), params["weight"].shape[-1]
    options = Options(num_experts, num_experts, num_selected, x.shape[1])
    valid, positions = jnp.ones(x.shape[:2], jnp.bool_), jnp.zeros(x.shape[:2], jnp.int32)
    return router.route(params, x, RouterInputs(options, valid, positions, **arguments))


def route_logits(logits, num_selected, router=None, **arguments):
    """Routes one group of tokens that are their own logits."""
    x = jnp.asarray(logits)[None]
    params = {"weight": jnp.eye(x.shape[-1])}
    return route(x, params, num_selected, router or TokenChoice(), **arguments)


def indices(routing):
    return np.asarray(routing.expert_index_GSK[0]).tolist()


def gates(routing):
    return np.asarray(routing.gate_GSK[0])


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=FLOAT32, atol=FLOAT32)


def test_choices_come_best_first_and_ties_go_to_the_lower_index():
    assert indices(route_logits(LOGITS, 1)) == [[3], [0]]
    assert indices(route_logits(LOGITS, 2)) == [[3, 2], [0, 1]]
    assert indices(route_logits(LOGITS, 4)) == [[3, 2, 1, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The probabilities of the two choices, unchanged ...
        ({}, [[0.4, 0.3], [0.3, 0.3]]),
        # ... divided by their sums, .7 and .6 ...
        ({"renormalize": True}, [[4 / 7, 3 / 7], [1 / 2, 1 / 2]]),
        # ... which equals a softmax over two logits.
        ({"score": SoftmaxOverSelected()}, [[4 / 7, 3 / 7], [1 / 2, 1 / 2]]),
        ({"score": SoftmaxOverSelected(), "renormalize": True}, [[4 / 7, 3 / 7], [1 / 2, 1 / 2]]),
        # Scaling comes last, after renormalisation.
        ({"scaling_factor": 2.5}, [[1.0, 0.75], [0.75, 0.75]]),
        ({"renormalize": True, "scaling_factor": 7.0}, [[4, 3], [3.5, 3.5]]),
        # sigmoid(log p) = p / (1 + p).
        ({"score": Sigmoid()}, [[4 / 14, 3 / 13], [3 / 13, 3 / 13]]),
        ({"score": Sigmoid(), "renormalize": True}, [[52 / 94, 42 / 94], [1 / 2, 1 / 2]]),
    ],
)
def test_gates_of_two_choices_by_hand(options, expected):
    routing = route_logits(LOGITS, 2, TokenChoice(**options))
    assert indices(routing) == [[3, 2], [0, 1]]
    close(gates(routing), expected)


@pytest.mark.parametrize("score", [Sigmoid(), Softmax()], ids=["sigmoid", "softmax"])
def test_experts_whose_scores_round_to_the_same_number_are_selected_by_their_logits(score):
    # In float32, sigmoids of 30 and more are 1, those of -200 are 0, and so are such softmaxes.
    logits = np.array([[30.0, 31.0, 60.0, 32.0], [0.0, -202.0, -201.0, -200.0]], np.float32)
    routing = route_logits(logits, 3, TokenChoice(score=score))
    assert indices(routing) == [[2, 3, 1], [0, 3, 2]]


def test_probabilities_are_the_full_softmax_whatever_the_gates():
    for options in ({}, {"renormalize": True}, {"score": SoftmaxOverSelected()}):
        close(route_logits(LOGITS, 2, TokenChoice(**options)).probs_GSE[0], PROBS)


def test_probabilities_of_sigmoid_scores_are_normalized():
    scores = PROBS / (1 + PROBS)
    routing = route_logits(LOGITS, 2, TokenChoice(score=Sigmoid()))
    close(routing.probs_GSE[0], scores / scores.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("score", [Sigmoid(), Softmax()], ids=["sigmoid", "softmax"])
def test_normalizing_scores_that_underflowed_is_exact_and_so_is_its_gradient(score):
    """Far below 0 a sigmoid is exp; the softmax case chooses two experts of probability 0."""
    config = TokenChoice(score=score, renormalize=True)
    logits = jnp.array([[-200.0, -201.0, -202.0, -200.0 if score == Sigmoid() else 0.0]])
    taken = Choices(jnp.array([[[0, 1]]]), jnp.ones((1, 1, 2), jnp.bool_))

    def first(logits):
        routing = route_logits(logits, 2, config, replay=taken)
        return routing.gate_GSK[0, 0, 0] + routing.probs_GSE[0, 0, 0], routing

    (_, routing), grad = jax.value_and_grad(first, has_aux=True)(logits)
    gate = 1 / (1 + np.exp(-1))
    close(gates(routing), [[gate, 1 - gate]])
    probs = np.exp(np.asarray(logits[0], np.float64) - np.max(logits))
    probs /= probs.sum()
    close(routing.probs_GSE[0, 0], probs)
    expected = probs[0] * (np.eye(4)[0] - probs)
    expected[:2] += gate * (1 - gate) * np.array([1, -1])
    close(grad[0], expected)


def test_bias_changes_the_selection_and_not_the_gates():
    # Scores .1 .2 .3 .4 plus .35 for expert 0 give .45, .2, .3, .4. Expert 0's gate stays .1.
    routing = route_logits(LOGITS[:1], 2, bias_E=jnp.array([0.35, 0, 0, 0]))
    assert indices(routing) == [[0, 3]]
    close(gates(routing), [[0.1, 0.4]])
    close(routing.probs_GSE[0], PROBS[:1])
    close(routing.logits_GSE[0], LOGITS[:1])


def test_bias_is_added_to_the_scores_that_select():
    # Sigmoid scores are 1/11, 2/12, 3/13, 4/14. A bias of .2 lifts expert 0 to .291, above .286.
    bias = jnp.array([0.2, 0, 0, 0])
    routing = route_logits(LOGITS[:1], 1, TokenChoice(score=Sigmoid()), bias_E=bias)
    assert indices(routing) == [[0]]
    close(gates(routing), [[1 / 11]])


def test_bias_gets_no_gradient():
    def total(bias_E):
        return jnp.sum(route_logits(LOGITS, 2, bias_E=bias_E).gate_GSK)

    assert not np.any(jax.grad(total)(jnp.array([0.35, 0, 0, 0])))


# Six experts in three groups of two, with one token's scores:
#   group 0: .30 .01   group 1: .20 .17   group 2: .16 .16
# Best expert per group: .30, .20, .16. Sum of the best two: .31, .37, .32.
GROUPED = np.log(np.array([[0.30, 0.01, 0.20, 0.17, 0.16, 0.16]], np.float32))


@pytest.mark.parametrize(
    ("worth", "groups", "expected"),
    [
        ("max", 1, [[0, 1]]),  # group 0 only, although .01 is the worst of all
        ("max", 2, [[0, 2]]),  # groups 0 and 1
        ("max", 3, [[0, 2]]),  # no limit
        ("top2_sum", 1, [[2, 3]]),  # group 1 only, without the best expert of all
        ("top2_sum", 2, [[2, 3]]),  # groups 1 and 2: .20, .17, .16, .16
        ("top2_sum", 3, [[0, 2]]),
    ],
)
def test_group_limited_selection_by_hand(worth, groups, expected):
    limit = ExpertGroups(num_groups=3, num_selected=groups, worth=worth)
    config = TokenChoice(groups=limit)
    routing = route_logits(GROUPED, 2, config)
    assert indices(routing) == expected
    # The limit changes neither gates nor probabilities.
    close(gates(routing), np.exp(GROUPED)[:, expected[0]])
    close(routing.probs_GSE[0], np.exp(GROUPED))


def test_bias_takes_part_in_the_choice_of_groups():
    config = TokenChoice(groups=ExpertGroups(num_groups=3, num_selected=1))
    bias = jnp.array([0, 0, 0, 0, 0, 0.2])  # expert 5: .36, the best
    assert indices(route_logits(GROUPED, 2, config, bias_E=bias)) == [[5, 4]]


def test_ties_between_groups_go_to_the_lower_index():
    config = TokenChoice(groups=ExpertGroups(num_groups=2, num_selected=1))
    assert indices(route_logits(np.zeros((1, 4), np.float32), 2, config)) == [[0, 1]]


@PROPERTIES
@given(
    seed=st.integers(0, 10_000),
    num_selected=st.sampled_from([2, 3]),
    score=st.sampled_from([Softmax(), SoftmaxOverSelected(), Sigmoid()]),
    renormalize=st.booleans(),
    groups=st.sampled_from([None, ExpertGroups(3, 2, "max"), ExpertGroups(3, 2, "top2_sum")]),
    biased=st.booleans(),
)
def test_router_equals_the_oracle(seed, num_selected, score, renormalize, groups, biased):
    config = TokenChoice(score=score, renormalize=renormalize, scaling_factor=2.0, groups=groups)
    random = np.random.default_rng(seed)
    x, router = random.normal(size=(1, 4, 5)), random.normal(size=(5, 6))
    bias = random.normal(size=6) / 4 if biased else None
    x, router = x.astype(np.float32), router.astype(np.float32)
    routing = route(
        x,
        {"weight": router},
        num_selected,
        config,
        bias_E=None if bias is None else jnp.asarray(bias, jnp.float32),
    )
    for s in range(4):
        logits, probs, chosen, gate = moe_oracle.route_token(
            x[0, s].astype(float), router.astype(float), num_selected, config, bias
        )
        close(routing.logits_GSE[0, s] / 4, np.array(logits) / 4)  # logits are up to about 4
        close(routing.probs_GSE[0, s], probs)
        assert routing.expert_index_GSK[0, s].tolist() == list(chosen)
        close(routing.gate_GSK[0, s], gate)


def chosen(routing):
    return np.asarray(routing.chosen_GSK[0]).tolist()


def test_temperature_divides_the_logits():
    # exp(log p / 2) is the square root of p.
    root = np.sqrt(PROBS)
    routing = route_logits(LOGITS, 2, TokenChoice(projection=Linear(temperature=2.0)))
    close(routing.probs_GSE[0], root / root.sum(axis=1, keepdims=True))
    close(routing.logits_GSE[0], LOGITS / 2)
    assert indices(routing) == [[3, 2], [0, 1]]


@pytest.mark.parametrize(
    ("top_p", "count"),
    [
        # Sorted: .4 .3 .2 .1 with sums .4 .7 .9 1, and .3 .3 .3 .1 with sums .3 .6 .9 1.
        (0.25, [1, 1]),
        (0.35, [1, 2]),
        (0.55, [2, 2]),
        (0.65, [2, 3]),
        (0.8, [3, 3]),
        (0.95, [4, 4]),
    ],
)
def test_top_p_takes_as_few_experts_as_reach_p(top_p, count):
    routing = route_logits(LOGITS, 4, TokenChoice(top_p=top_p))
    assert indices(routing) == [[3, 2, 1, 0], [0, 1, 2, 3]]
    assert chosen(routing) == [[k < n for k in range(4)] for n in count]
    close(gates(routing), np.where(chosen(routing), -np.sort(-PROBS, axis=1), 0))
    # num_selected limits the number of choices.
    assert chosen(route_logits(LOGITS, 1, TokenChoice(top_p=top_p))) == [[True], [True]]


def test_top_p_of_one_is_top_k():
    routing = route_logits(LOGITS, 2, TokenChoice(top_p=1.0))
    assert np.all(routing.chosen_GSK) and np.all(routing.gate_GSK > 0)


@pytest.mark.parametrize("options", [{"renormalize": True}, {"score": SoftmaxOverSelected()}])
def test_gates_are_renormalized_over_the_choices_that_top_p_leaves(options):
    routing = route_logits(LOGITS, 3, TokenChoice(top_p=0.55, **options))
    close(gates(routing), [[4 / 7, 3 / 7, 0], [1 / 2, 1 / 2, 0]])
    gradient = jax.grad(
        lambda x: jnp.sum(route_logits(x, 3, TokenChoice(top_p=0.55, **options)).gate_GSK[0, :, 0])
    )(jnp.asarray(LOGITS))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.1


@pytest.mark.parametrize(
    ("options", "gate", "expected"),
    [
        # The renormalised gates are 4/7 and 3/7, or 1/2 and 1/2. The first choice keeps its gate.
        ({"eval_choices": FirstChoice()}, [[4 / 7, 0], [1 / 2, 0]], [[1, 0], [1, 0]]),
        ({"eval_choices": Threshold()}, [[4 / 7, 3 / 7], [1 / 2, 1 / 2]], [[1, 1], [1, 1]]),
        (
            {"eval_choices": Threshold(0.45)},
            [[4 / 7, 0], [1 / 2, 1 / 2]],
            [[1, 0], [1, 1]],
        ),
        # The threshold spares first choices, and precedes the scaling factor.
        (
            {"eval_choices": Threshold(0.9), "scaling_factor": 7.0},
            [[4, 0], [3.5, 0]],
            [[1, 0], [1, 0]],
        ),
    ],
)
def test_later_choices_by_policy(options, gate, expected):
    routing = route_logits(LOGITS, 2, TokenChoice(renormalize=True, **options))
    assert np.asarray(chosen(routing), int).tolist() == expected
    close(gates(routing), gate)


def test_random_later_choices_count_in_proportion_to_their_gates():
    # Gates .4 .3 .2 .1 at threshold .25 count with probability 1, 1, 4/5 and 2/5.
    config = TokenChoice(choices=RandomChoices(0.25))
    many = np.tile(LOGITS[:1], (4000, 1))
    routing = route_logits(many, 4, config, rng=jax.random.key(0))
    share = np.mean(chosen(routing), axis=0)
    assert share[:2].tolist() == [1, 1]
    np.testing.assert_allclose(share[2:], [0.8, 0.4], atol=4 * 0.5 / 4000**0.5)
    np.testing.assert_array_equal(gates(routing) > 0, chosen(routing))
    assert np.all(route_logits(many, 4, config).chosen_GSK)  # in evaluation all count


def test_sampling_draws_by_probability_without_replacement():
    many = np.tile(LOGITS[:1], (6000, 1))
    config = TokenChoice(selection=Sampled())
    routing = route_logits(many, 2, config, rng=jax.random.key(0))
    first, second = np.asarray(indices(routing)).T
    atol = 4 * 0.5 / 6000**0.5
    np.testing.assert_allclose(np.bincount(first) / 6000, PROBS[0], atol=atol)
    # The second draw excludes the first: sum over first f of p_f p_e / (1 - p_f).
    pairs = PROBS[0][:, None] * PROBS[0] / (1 - PROBS[0][:, None]) * (1 - np.eye(4))
    np.testing.assert_allclose(np.bincount(second) / 6000, pairs.sum(axis=0), atol=atol)
    assert (first != second).all()
    close(gates(routing), np.take_along_axis(PROBS[:1], np.asarray(indices(routing)), axis=1))
    assert indices(route_logits(LOGITS, 2, config)) == [[3, 2], [0, 1]]  # the best in evaluation


def test_the_rest_is_drawn_after_the_best():
    many = np.tile(LOGITS[:1], (6000, 1))
    routing = route_logits(many, 2, TokenChoice(selection=SampledRest()), rng=jax.random.key(0))
    first, second = np.asarray(indices(routing)).T
    assert (first == 3).all()
    share = np.bincount(second, minlength=4) / 6000
    np.testing.assert_allclose(share, [1 / 6, 2 / 6, 3 / 6, 0], atol=4 * 0.5 / 6000**0.5)


def test_sampling_stays_within_the_selected_groups():
    config = TokenChoice(groups=ExpertGroups(num_groups=3, num_selected=1), selection=Sampled())
    many = np.tile(GROUPED, (200, 1))
    drawn = np.asarray(indices(route_logits(many, 2, config, rng=jax.random.key(0))))
    assert set(drawn.ravel()) == {0, 1}


def test_learned_noise_has_the_deviation_that_the_token_asks_for():
    # Two tokens, each with 3000 copies; softplus(x W_noise) is softplus(0) and softplus(3).
    x = np.repeat(np.eye(2, dtype=np.float32), 3000, axis=0)[None]
    learned = {"weight": jnp.array([[0.0, 0.0], [3.0, 3.0]])}
    params = {"weight": jnp.eye(2), "noise": {"learned": learned}}
    config = TokenChoice(noise=(Learned(),))
    routing = route(x, params, 1, config, rng=jax.random.key(0))
    noise = np.asarray(routing.logits_GSE - x).reshape(2, -1)
    np.testing.assert_allclose(noise.std(axis=1), np.log(1 + np.exp([0.0, 3.0])), rtol=0.05)
    close(routing.clean_GSE, x)
    # With additional noise of a fixed deviation, variances add up.
    both = TokenChoice(noise=(Gaussian(stddev=2.0), Learned()))
    noise = np.asarray(route(x, params, 1, both, rng=jax.random.key(0)).logits_GSE - x)
    np.testing.assert_allclose(noise[0, :3000].std(), (np.log(2) ** 2 + 4) ** 0.5, rtol=0.05)
    # Without a key, as in evaluation, there is no noise.
    calm = route(x, params, 1, config)
    close(calm.logits_GSE, x)
    assert calm.clean_GSE is None and calm.noise_std_GSE is None


def test_cosine_logits_by_hand():
    # Tokens (3, 4, 0) and (0, 0, 2), projected to (3, 4) and (0, 2): cosines with (1, 0), (0, 5).
    x = jnp.array([[[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]])
    params = {
        "weight": jnp.array([[1.0, 0.0], [0.0, 5.0]]),
        "projection": jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
        "log_scale": jnp.zeros(1),
    }
    config = TokenChoice(projection=Cosine(dim=2, temperature=0.25))
    close(route(x, params, 1, config).logits_GSE[0], 4 * np.array([[0.6, 0.8], [0.0, 1.0]]))
    # The length of a token does not matter; a zero token gives 0 and a finite gradient.
    close(route(9 * x, params, 1, config).logits_GSE, route(x, params, 1, config).logits_GSE)
    zero, gradient = jax.value_and_grad(lambda x: jnp.sum(route(x, params, 1, config).logits_GSE))(
        jnp.zeros((1, 1, 3))
    )
    assert zero == 0 and np.isfinite(gradient).all()
    # The temperature is learned, and is at least 1 / 100.
    params["log_scale"] = jnp.full(1, np.log(2.0))
    close(route(x, params, 1, config).logits_GSE[0, 0], [4.8, 6.4])
    params["log_scale"] = jnp.full(1, 9.0)
    np.testing.assert_allclose(route(x, params, 1, config).logits_GSE[0, 0], [60, 80], rtol=1e-5)


def test_two_learned_noises_have_parameters_of_their_own_and_their_variances_add_up():
    x = np.repeat(np.eye(2, dtype=np.float32), 3000, axis=0)[None]
    router = TokenChoice(noise=(Learned(), Learned()))
    specs = router.specs(Dims(2), Options(2, 2, 1, 1))
    assert sorted(specs["noise"]) == ["learned", "learned__2"]
    weights = [jnp.array([[1.0, 1.0], [0.0, 0.0]]), jnp.array([[2.0, 2.0], [-1.0, -1.0]])]
    params = {
        "weight": jnp.eye(2),
        "noise": {name: {"weight": w} for name, w in zip(specs["noise"], weights, strict=True)},
    }
    rng = jax.random.key(0)
    routing = route(x, params, 1, router, rng=rng)
    softplus = np.log(1 + np.exp(np.array([[1.0, 2.0], [0.0, -1.0]])))
    expected = np.sqrt((softplus**2).sum(axis=1))
    np.testing.assert_allclose(routing.noise_std_GSE[0, ::3000, 0], expected, rtol=1e-6)
    noise = np.asarray(routing.logits_GSE - x).reshape(2, -1)
    np.testing.assert_allclose(noise.std(axis=1), expected, rtol=0.05)
    grad = jax.grad(lambda p: jnp.sum(route(x, p, 1, router, rng=rng).noise_std_GSE))(params)
    first, second = (grad["noise"][name]["weight"] for name in specs["noise"])
    assert np.abs(first).min() > 0.01 and np.abs(second - first).max() > 0.01


@pytest.mark.parametrize(
    ("options", "number"), [({"noise": (Learned(),)}, 2), ({"projection": Cosine(dim=3)}, 3)]
)
def test_every_parameter_of_a_router_learns_from_the_task(options, number):
    moe = MoE(num_experts=3, expert_dim=5, run_experts="einsum", router=TokenChoice(**options))
    params, x = block(moe)
    call = Call(rng=jax.random.key(0))
    grad = jax.jit(jax.grad(lambda p: jnp.sum(moe_block(p, x, moe, call)[0] ** 2)))(params)
    leaves = jax.tree.leaves(grad["router"])
    assert len(leaves) == number
    for leaf in leaves:
        assert np.abs(leaf).max() > 1e-3


def test_a_bias_of_the_logits_is_in_everything_that_the_router_says():
    """Unlike a selection bias it enters logits, probabilities and gates, and it learns."""
    router = TokenChoice(projection=Linear(use_bias=True, temperature=2.0))
    bias = np.array([np.log(6.0), 0, 0, 0], np.float32)
    params = {"weight": jnp.eye(4), "bias": jnp.asarray(bias)}
    routing = route(2 * LOGITS[None], params, 2, router)
    root = PROBS[:1] ** 2 * np.exp(bias)  # the temperature divides the bias too
    expected = np.sqrt(root) / np.sqrt(root).sum()
    close(routing.logits_GSE[0], LOGITS + bias / 2)
    close(routing.probs_GSE[0, :1], expected)
    assert indices(routing)[0] == [3, 2]
    close(gates(routing)[0], expected[0, [3, 2]])

    router = TokenChoice(projection=Linear(use_bias=True), score=SoftmaxOverSelected())
    moe = MoE(num_experts=3, num_selected_experts=2, expert_dim=5, run_experts="einsum",
              router=router)  # fmt: skip
    specs = moe.specs(Dims(4))["router"]
    assert specs["bias"].shape == (3,) and not specs["bias"].decays
    params, x = block(moe)
    decided = moe_oracle.moe_block(params, x, moe)
    dy = np.random.default_rng(1).normal(size=x.shape)
    value, expected, _ = moe_oracle.gradients(params, x, moe, decided, dy)

    def total(params):
        return jnp.sum(moe_block(params, x, moe, Call(capacity=1.25))[0] * dy)

    got, grad = jax.jit(jax.value_and_grad(total))(params)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    assert np.abs(expected["router"]["bias"]).max() > 0.01
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grad, expected
    )


@pytest.mark.parametrize("jit", [False, True])
def test_ties_of_zero_and_minus_zero_go_to_the_lower_index(jit):
    """A token of zeros times [-1, 1, 1] is [-0, 0, 0]."""

    def choose(router):
        params = {"weight": jnp.array([[-1.0, 1.0, 1.0, -1.0]])[:, : 4 if router.groups else 3]}
        return route(jnp.zeros((1, 1, 1)), params, 2, router).expert_index_GSK

    choose = jax.jit(choose, static_argnums=0) if jit else choose
    groups = ExpertGroups(num_groups=2, num_selected=1)
    for score in (Softmax(), SoftmaxOverSelected(), Sigmoid()):
        assert choose(TokenChoice(score=score)).tolist() == [[[0, 1]]], score
        assert choose(TokenChoice(score=score, groups=groups)).tolist() == [[[0, 1]]], score
    minus = jnp.array([[-0.0, 0.0, 1.0, -0.0, 0.0]])[None]
    values, index = (jax.jit(top_k, static_argnums=1) if jit else top_k)(minus, 4)
    assert index.tolist() == [[[2, 0, 1, 3]]] and values.tolist() == [[[1, 0, 0, 0]]]


def test_router_computes_in_float32_when_tokens_are_bfloat16():
    # 256 + 1 is 256 in bfloat16: experts 0 and 1 would tie, and expert 0 would win.
    x = jnp.array([[[256.0, 1.0]]], jnp.bfloat16)
    router = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    routing = route(x, {"weight": router}, 2, TokenChoice())
    assert routing.logits_GSE.tolist() == [[[256.0, 257.0, 0.0]]]
    assert indices(routing) == [[1, 0]]
    assert {a.dtype for a in jax.tree.leaves(routing)} == {
        jnp.dtype(name) for name in ("float32", "int32", "bool")
    }


def test_router_dtype_is_for_studies():
    x = jnp.array([[[256.0, 1.0]]], jnp.bfloat16)
    router = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    routing = route(x, {"weight": router}, 2, TokenChoice(dtype="bfloat16"))
    assert routing.logits_GSE.dtype == routing.gate_GSK.dtype == jnp.bfloat16
    assert indices(routing) == [[0, 1]]  # the tie, resolved wrongly


def block(moe, seed=0, tokens=6, dim=4):
    """Random parameters and tokens, with logits near 1."""
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda spec: random.normal(size=spec.shape).astype(np.float32), moe.specs(Dims(dim))
    )
    return params, random.normal(size=(1, tokens, dim)).astype(np.float32)


def test_tokens_in_bfloat16_get_noise_in_float32():
    """In bfloat16 each factor between 0.999 and 1.001 would round to 0.996, 1 or 1.008."""
    x = jnp.full((1, 200, 4), 2.0, jnp.bfloat16)
    params = {"weight": jnp.eye(4)}
    router = TokenChoice(noise=(Jitter(epsilon=1e-3),))
    logits = route(x, params, 1, router, rng=jax.random.key(0)).logits_GSE
    assert logits.dtype == jnp.float32
    factors = np.unique(logits / 2)
    assert len(factors) > 300 and factors.min() >= 0.999 and factors.max() <= 1.001


def products(jaxpr):
    """The parameters of every matrix product, including those of inner programs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.parametrize(
    "router",
    [
        TokenChoice(),
        TokenChoice(projection=Cosine(dim=3)),
        TokenChoice(noise=(Learned(),)),
        ExpertChoice(predictor_loss_weight=0.1),
        Sinkhorn(),
        Soft(),
    ],
    ids=["linear", "cosine", "learned noise", "predictor", "Sinkhorn", "soft"],
)
def test_a_router_multiplies_float32_at_the_highest_precision(router):
    """By default a TPU multiplies float32 in bfloat16, which no number on a CPU shows."""
    moe = MoE(num_experts=4, num_selected_experts=1, group_size=6, router=router)
    params, x = block(moe)
    options = moe.options(x.shape[1], training=True)
    valid = jnp.ones(x.shape[:2], jnp.bool_)
    inputs = RouterInputs(options, valid, jnp.zeros(x.shape[:2], jnp.int32), rng=jax.random.key(0))

    def learned_from(params, x):
        routing = router.route(params, x, inputs)
        return sum(jnp.sum(a) for a in jax.tree.leaves(routing) if a.dtype == jnp.float32)

    program = jax.make_jaxpr(jax.grad(learned_from, (0, 1)))(params["router"], jnp.asarray(x))
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    found = [product["precision"] for product in products(program.jaxpr)]
    assert len(found) >= 3 and set(found) == {highest}  # forward, and backward to each operand


def test_jitter_reaches_the_router_and_never_the_experts():
    # All experts are chosen and identical, and gates sum to 1, so the output does not depend on the
    # routing. It would move only if the experts saw jittered tokens.
    router = TokenChoice(noise=(Jitter(epsilon=0.5),), renormalize=True)
    moe = MoE(num_experts=2, num_selected_experts=2, expert_dim=5, router=router,
              run_experts="einsum")  # fmt: skip
    params, x = block(moe)
    experts = {n: np.broadcast_to(v[:1], v.shape) for n, v in params["experts"].items()}
    params = params | {"experts": experts}
    run = jax.jit(lambda x, rng: moe_block(params, x, moe, Call(capacity=0.0, rng=rng)))
    calm, calm_aux = run(x, None)
    y, aux = run(x, jax.random.key(0))
    close(y, calm)
    prob_E, calm_E = (said.sums["prob_sum_E"] / said.sums["num_tokens"] for said in (aux, calm_aux))
    assert np.abs(prob_E - calm_E).max() > 1e-3


def test_jitter_multiplies_the_input_by_one_plus_minus_epsilon():
    config = TokenChoice(noise=(Jitter(epsilon=0.25),))
    x, router = jnp.ones((1, 500, 2)), jnp.eye(2)
    logits = np.asarray(route(x, {"weight": router}, 1, config, rng=jax.random.key(0)).logits_GSE)
    assert logits.min() >= 0.75 and logits.max() <= 1.25
    # U(.75, 1.25): mean 1, standard deviation .5 / sqrt(12). 1000 draws, four standard errors.
    np.testing.assert_allclose(logits.mean(), 1.0, atol=4 * 0.5 / 12**0.5 / 1000**0.5)
    np.testing.assert_allclose(logits.std(), 0.5 / 12**0.5, rtol=0.1)


def test_noise_is_gaussian_of_the_given_deviation_on_the_logits():
    config = TokenChoice(noise=(Gaussian(stddev=0.3),))
    calm = np.zeros((500, 2), np.float32)
    logits = np.asarray(route_logits(calm, 1, config, rng=jax.random.key(1)).logits_GSE)
    np.testing.assert_allclose(logits.mean(), 0, atol=4 * 0.3 / 1000**0.5)
    np.testing.assert_allclose(logits.std(), 0.3, rtol=0.1)
    # About 4.6% of a Gaussian is beyond two deviations, but nothing of a uniform distribution.
    assert 0.02 < np.mean(np.abs(logits) > 0.6) < 0.08


def test_jitter_and_noise_are_independent_draws():
    ones, key = np.ones((500, 2), np.float32), jax.random.key(2)
    drawn = [
        np.ravel(route_logits(ones, 1, TokenChoice(noise=(noise,)), rng=key).logits_GSE)
        for noise in (Jitter(epsilon=0.5), Gaussian(stddev=0.5))
    ]
    assert abs(np.corrcoef(*drawn)[0, 1]) < 4 / 1000**0.5


@pytest.mark.parametrize("noise", [Jitter(epsilon=0.5), Gaussian(stddev=1.0)])
def test_randomness_needs_a_key_and_depends_on_it(noise):
    config = TokenChoice(noise=(noise,))
    first, second = jax.random.split(jax.random.key(0))
    calm = route_logits(LOGITS, 1).logits_GSE
    np.testing.assert_array_equal(route_logits(LOGITS, 1, config).logits_GSE, calm)
    one = route_logits(LOGITS, 1, config, rng=first).logits_GSE
    assert np.abs(one - calm).max() > 0.01
    np.testing.assert_array_equal(route_logits(LOGITS, 1, config, rng=first).logits_GSE, one)
    assert np.abs(route_logits(LOGITS, 1, config, rng=second).logits_GSE - one).max() > 0.01


SCORES = [Softmax(), SoftmaxOverSelected(), Sigmoid()]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("choices", "renormalize"), [(1, False), (2, False), (2, True)])
def test_router_learns_from_the_task_alone_or_is_refused(score, choices, renormalize):
    router = TokenChoice(score=score, renormalize=renormalize)
    options = {"num_experts": 3, "num_selected_experts": choices, "expert_dim": 5,
                "run_experts": "einsum", "router": router}  # fmt: skip
    if choices == 1 and score == SoftmaxOverSelected():
        with pytest.raises(ValueError, match="the router gets no gradient from the task"):
            MoE(**options)
        return
    moe = MoE(**options)
    params, x = block(moe)
    grad = jax.jit(jax.grad(lambda p: jnp.sum(moe_block(p, x, moe)[0] ** 2)))(params)
    assert np.abs(grad["router"]["weight"]).max() > 1e-2


@pytest.mark.parametrize("score", SCORES)
def test_one_renormalized_choice_is_refused(score):
    router = TokenChoice(score=score, renormalize=True)
    with pytest.raises(ValueError, match="is always 1, and the router gets no gradient"):
        MoE(num_selected_experts=1, router=router)


@pytest.mark.parametrize("norm", [{"renormalize": True}, {"score": SoftmaxOverSelected()}])
def test_a_top_p_that_the_first_choice_always_reaches_is_refused_with_renormalized_gates(norm):
    """The first of E probabilities is at least 1 / E."""
    options = {"num_experts": 8, "num_selected_experts": 2}
    with pytest.raises(ValueError, match=r"top_p=0\.125, .* 8\. Set top_p above 0\.125, or"):
        MoE(**options, router=TokenChoice(top_p=0.125, **norm))
    MoE(**options, router=TokenChoice(top_p=0.126, **norm))
    MoE(**options, router=TokenChoice(top_p=0.125))  # the gate is the probability
    allowed = TokenChoice(top_p=0.25, allow_constant_gate=True, **norm)
    MoE(num_experts=4, num_selected_experts=2, router=allowed)
    close(gates(route_logits(LOGITS, 2, allowed)), [[1, 0], [1, 0]])


def test_one_renormalized_choice_has_a_gate_of_1_where_that_is_allowed():
    router = TokenChoice(renormalize=True, allow_constant_gate=True)
    MoE(num_selected_experts=1, router=router)
    assert np.all(route_logits(LOGITS, 1, router).gate_GSK == 1)


def test_the_refused_gates_would_be_constant():
    for options in ({"renormalize": True}, {"score": SoftmaxOverSelected()}):
        grad = jax.grad(
            lambda x, s=options: jnp.sum(route_logits(x, 1, TokenChoice(**s)).gate_GSK)
        )(jnp.asarray(LOGITS))
        assert np.abs(grad).max() < FLOAT32


def test_every_choice_of_a_token_is_another_expert():
    x = np.random.default_rng(0).normal(size=(3, 7, 6)).astype(np.float32)
    router = np.eye(6, dtype=np.float32)
    for choices in range(1, 7):
        index = np.asarray(route(x, {"weight": router}, choices, TokenChoice()).expert_index_GSK)
        for g, s in itertools.product(range(3), range(7)):
            assert len(set(index[g, s])) == choices


def test_noises_on_tokens_are_independent():
    x = np.ones((1, 2000, 4), np.float32)
    router = TokenChoice(noise=(Jitter(0.1), Jitter(0.1)))
    params = {"weight": jnp.eye(4)}
    once = route(x, params, 1, TokenChoice(noise=(Jitter(0.1),)), rng=jax.random.key(0))
    twice = route(x, params, 1, router, rng=jax.random.key(0)).logits_GSE
    first = np.asarray(once.logits_GSE)
    second = np.asarray(twice) / first
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


def test_an_annealed_router_stays_in_its_dtype():
    linear = Linear(anneal_from=2.0, anneal_steps=10)
    router = TokenChoice(dtype="bfloat16", projection=linear)
    options = Options(3, 3, 2, 4)
    params = {"weight": jnp.ones((5, 3))}
    x = jnp.ones((1, 4, 5))
    inputs = RouterInputs(
        options, jnp.ones((1, 4), bool), jnp.zeros((1, 4), jnp.int32), step=jnp.int32(3)
    )
    routing = router.route(params, x, inputs)
    assert routing.logits_GSE.dtype == routing.gate_GSK.dtype == jnp.bfloat16


@pytest.mark.parametrize("given", [{"anneal_from": 0.1}, {"anneal_steps": 10}])
def test_annealing_has_a_start_and_steps(given):
    for kind in (Jitter, Gaussian, Linear):
        with pytest.raises(ValueError, match=r"anneal_from=.*, anneal_steps=.*Set both or none"):
            kind(**given)
