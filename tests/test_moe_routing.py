"""Token-choice routing, by hand-worked tables and by its invariants."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.moe.block import moe_block
from moe_jax.moe.parameters import moe_specs
from moe_jax.moe.routing import route
from moe_jax.moe.routing.token_choice import Replay
from tests import moe_oracle

# One softmax of a few float32 numbers near 1.
FLOAT32 = 1e-6
PROPERTIES = settings(deadline=None, max_examples=30, derandomize=True)

# With the identity as router weights a token is its own logits.
# Token 0 has probabilities 1/10, 2/10, 3/10, 4/10; token 1 ties experts 0, 1 and 2.
PROBS = np.array([[0.1, 0.2, 0.3, 0.4], [0.3, 0.3, 0.3, 0.1]])
LOGITS = np.log(PROBS).astype(np.float32)


def route_logits(logits, num_selected, config=None, **arguments):
    """Routes one group of tokens that are their own logits."""
    x = jnp.asarray(logits)[None]
    router = jnp.eye(x.shape[-1])
    return route(x, {"router": router}, num_selected, config or RouterConfig(), **arguments)


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
        # The probabilities of the two choices as they are ...
        ({}, [[0.4, 0.3], [0.3, 0.3]]),
        # ... over their sum, .7 and .6 ...
        ({"renormalize": True}, [[4 / 7, 3 / 7], [1 / 2, 1 / 2]]),
        # ... which is what a softmax over two logits gives.
        ({"score_before_topk": False}, [[4 / 7, 3 / 7], [1 / 2, 1 / 2]]),
        ({"score_before_topk": False, "renormalize": True}, [[4 / 7, 3 / 7], [1 / 2, 1 / 2]]),
        # Scaling comes last, after renormalisation.
        ({"scaling_factor": 2.5}, [[1.0, 0.75], [0.75, 0.75]]),
        ({"renormalize": True, "scaling_factor": 7.0}, [[4, 3], [3.5, 3.5]]),
        # sigmoid(log p) = p / (1 + p).
        ({"score": "sigmoid"}, [[4 / 14, 3 / 13], [3 / 13, 3 / 13]]),
        ({"score": "sigmoid", "renormalize": True}, [[52 / 94, 42 / 94], [1 / 2, 1 / 2]]),
    ],
)
def test_gates_of_two_choices_by_hand(options, expected):
    routing = route_logits(LOGITS, 2, RouterConfig(**options))
    assert indices(routing) == [[3, 2], [0, 1]]
    close(gates(routing), expected)


def test_probabilities_are_the_full_softmax_whatever_the_gates():
    for options in ({}, {"renormalize": True}, {"score_before_topk": False}):
        close(route_logits(LOGITS, 2, RouterConfig(**options)).probs_GSE[0], PROBS)


def test_probabilities_of_sigmoid_scores_are_normalized():
    scores = PROBS / (1 + PROBS)
    routing = route_logits(LOGITS, 2, RouterConfig(score="sigmoid"))
    close(routing.probs_GSE[0], scores / scores.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_normalizing_scores_that_underflowed_is_exact_and_so_is_its_gradient(score):
    """Far below 0 a sigmoid is exp; two experts of a softmax are chosen that have no part in it."""
    config = RouterConfig(score=score, renormalize=True)
    logits = jnp.array([[-200.0, -201.0, -202.0, -200.0 if score == "sigmoid" else 0.0]])
    taken = Replay(jnp.array([[[0, 1]]]), None)

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
    # Scores .1 .2 .3 .4 plus .35 for expert 0: .45, .2, .3, .4. Its gate stays .1.
    routing = route_logits(LOGITS[:1], 2, bias_E=jnp.array([0.35, 0, 0, 0]))
    assert indices(routing) == [[0, 3]]
    close(gates(routing), [[0.1, 0.4]])
    close(routing.probs_GSE[0], PROBS[:1])
    close(routing.logits_GSE[0], LOGITS[:1])


def test_bias_is_added_to_the_scores_that_select():
    # sigmoid scores 1/11, 2/12, 3/13, 4/14; a bias of .2 lifts expert 0 to .291, above .286.
    bias = jnp.array([0.2, 0, 0, 0])
    routing = route_logits(LOGITS[:1], 1, RouterConfig(score="sigmoid"), bias_E=bias)
    assert indices(routing) == [[0]]
    close(gates(routing), [[1 / 11]])


def test_bias_gets_no_gradient():
    def total(bias_E):
        return jnp.sum(route_logits(LOGITS, 2, bias_E=bias_E).gate_GSK)

    assert not np.any(jax.grad(total)(jnp.array([0.35, 0, 0, 0])))


# Six experts in three groups of two; scores of one token, softmax of their logs:
#   group 0: .30 .01   group 1: .20 .17   group 2: .16 .16
# Best expert of a group: .30, .20, .16. Sum of its best two: .31, .37, .32.
GROUPED = np.log(np.array([[0.30, 0.01, 0.20, 0.17, 0.16, 0.16]], np.float32))


@pytest.mark.parametrize(
    ("group_score", "groups", "expected"),
    [
        ("max", 1, [[0, 1]]),  # group 0 alone, although .01 is the worst of all
        ("max", 2, [[0, 2]]),  # groups 0 and 1
        ("max", 3, [[0, 2]]),  # no limit
        ("top2_sum", 1, [[2, 3]]),  # group 1 alone, without the best expert of all
        ("top2_sum", 2, [[2, 3]]),  # groups 1 and 2: .20, .17, .16, .16
        ("top2_sum", 3, [[0, 2]]),
    ],
)
def test_group_limited_selection_by_hand(group_score, groups, expected):
    config = RouterConfig(num_expert_groups=3, num_selected_groups=groups, group_score=group_score)
    routing = route_logits(GROUPED, 2, config)
    assert indices(routing) == expected
    # Gates and probabilities know nothing of the limit.
    close(gates(routing), np.exp(GROUPED)[:, expected[0]])
    close(routing.probs_GSE[0], np.exp(GROUPED))


def test_bias_takes_part_in_the_choice_of_groups():
    config = RouterConfig(num_expert_groups=3, num_selected_groups=1)
    bias = jnp.array([0, 0, 0, 0, 0, 0.2])  # expert 5: .36, the best
    assert indices(route_logits(GROUPED, 2, config, bias_E=bias)) == [[5, 4]]


def test_ties_between_groups_go_to_the_lower_index():
    config = RouterConfig(num_expert_groups=2, num_selected_groups=1)
    assert indices(route_logits(np.zeros((1, 4), np.float32), 2, config)) == [[0, 1]]


@PROPERTIES
@given(
    seed=st.integers(0, 10_000),
    num_selected=st.sampled_from([2, 3]),
    score=st.sampled_from([("softmax", True), ("softmax", False), ("sigmoid", True)]),
    renormalize=st.booleans(),
    groups=st.sampled_from([(1, 1, "max"), (3, 2, "max"), (3, 2, "top2_sum")]),
    biased=st.booleans(),
)
def test_router_equals_the_oracle(seed, num_selected, score, renormalize, groups, biased):
    config = RouterConfig(
        score=score[0], score_before_topk=score[1], renormalize=renormalize, scaling_factor=2.0,
        num_expert_groups=groups[0], num_selected_groups=groups[1], group_score=groups[2],
    )  # fmt: skip
    random = np.random.default_rng(seed)
    x, router = random.normal(size=(1, 4, 5)), random.normal(size=(5, 6))
    bias = random.normal(size=6) / 4 if biased else None
    x, router = x.astype(np.float32), router.astype(np.float32)
    routing = route(
        x,
        {"router": router},
        num_selected,
        config,
        bias_E=None if bias is None else jnp.asarray(bias, jnp.float32),
    )
    for s in range(4):
        logits, probs, chosen, gate = moe_oracle.route_token(
            x[0, s].astype(float), router.astype(float), num_selected, config, bias
        )
        close(routing.logits_GSE[0, s] / 4, np.array(logits) / 4)  # up to about 4
        close(routing.probs_GSE[0, s], probs)
        assert routing.expert_index_GSK[0, s].tolist() == list(chosen)
        close(routing.gate_GSK[0, s], gate)


def chosen(routing):
    return np.asarray(routing.chosen_GSK[0]).tolist()


def test_temperature_divides_the_logits():
    # exp(log p / 2) is the square root of p.
    root = np.sqrt(PROBS)
    routing = route_logits(LOGITS, 2, RouterConfig(temperature=2.0))
    close(routing.probs_GSE[0], root / root.sum(axis=1, keepdims=True))
    close(routing.logits_GSE[0], LOGITS / 2)
    assert indices(routing) == [[3, 2], [0, 1]]


@pytest.mark.parametrize(
    ("top_p", "count"),
    [
        # Sorted: .4 .3 .2 .1, sums .4 .7 .9 1; and .3 .3 .3 .1, sums .3 .6 .9 1.
        (0.25, [1, 1]),
        (0.35, [1, 2]),
        (0.55, [2, 2]),
        (0.65, [2, 3]),
        (0.8, [3, 3]),
        (0.95, [4, 4]),
    ],
)
def test_top_p_takes_as_few_experts_as_reach_p(top_p, count):
    routing = route_logits(LOGITS, 4, RouterConfig(top_p=top_p))
    assert indices(routing) == [[3, 2, 1, 0], [0, 1, 2, 3]]
    assert chosen(routing) == [[k < n for k in range(4)] for n in count]
    close(gates(routing), np.where(chosen(routing), -np.sort(-PROBS, axis=1), 0))
    # num_selected bounds the number.
    assert chosen(route_logits(LOGITS, 1, RouterConfig(top_p=top_p))) == [[True], [True]]


def test_top_p_of_one_is_top_k():
    assert route_logits(LOGITS, 2, RouterConfig(top_p=1.0)).chosen_GSK is None


@pytest.mark.parametrize("options", [{"renormalize": True}, {"score_before_topk": False}])
def test_gates_are_renormalized_over_the_choices_that_top_p_leaves(options):
    routing = route_logits(LOGITS, 3, RouterConfig(top_p=0.55, **options))
    close(gates(routing), [[4 / 7, 3 / 7, 0], [1 / 2, 1 / 2, 0]])
    gradient = jax.grad(
        lambda x: jnp.sum(route_logits(x, 3, RouterConfig(top_p=0.55, **options)).gate_GSK[0, :, 0])
    )(jnp.asarray(LOGITS))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.1


@pytest.mark.parametrize(
    ("options", "gate", "expected"),
    [
        # Renormalised gates 4/7 and 3/7; 1/2 and 1/2; the first keeps its own.
        ({"eval_choice_policy": "none"}, [[4 / 7, 0], [1 / 2, 0]], [[1, 0], [1, 0]]),
        ({"eval_choice_policy": "threshold"}, [[4 / 7, 3 / 7], [1 / 2, 1 / 2]], [[1, 1], [1, 1]]),
        (
            {"eval_choice_policy": "threshold", "choice_threshold": 0.45},
            [[4 / 7, 0], [1 / 2, 1 / 2]],
            [[1, 0], [1, 1]],
        ),
        # Of a first choice nothing is asked, and the scaling factor comes after the threshold.
        (
            {"eval_choice_policy": "threshold", "choice_threshold": 0.9, "scaling_factor": 7.0},
            [[4, 0], [3.5, 0]],
            [[1, 0], [1, 0]],
        ),
    ],
)
def test_later_choices_by_policy(options, gate, expected):
    routing = route_logits(LOGITS, 2, RouterConfig(renormalize=True, **options))
    assert np.asarray(chosen(routing), int).tolist() == expected
    close(gates(routing), gate)


def test_random_later_choices_count_in_proportion_to_their_gates():
    # Gates .4 .3 .2 .1 at threshold .25: certain, certain, 4 of 5, 2 of 5.
    config = RouterConfig(choice_policy="random", choice_threshold=0.25)
    many = np.tile(LOGITS[:1], (4000, 1))
    routing = route_logits(many, 4, config, rng=jax.random.key(0))
    share = np.mean(chosen(routing), axis=0)
    assert share[:2].tolist() == [1, 1]
    np.testing.assert_allclose(share[2:], [0.8, 0.4], atol=4 * 0.5 / 4000**0.5)
    np.testing.assert_array_equal(gates(routing) > 0, chosen(routing))
    assert route_logits(many, 4, config).chosen_GSK is None  # in evaluation all count


def test_sampling_draws_by_probability_without_replacement():
    many = np.tile(LOGITS[:1], (6000, 1))
    config = RouterConfig(selection="sampled")
    routing = route_logits(many, 2, config, rng=jax.random.key(0))
    first, second = np.asarray(indices(routing)).T
    atol = 4 * 0.5 / 6000**0.5
    np.testing.assert_allclose(np.bincount(first) / 6000, PROBS[0], atol=atol)
    # The second draw is from what the first leaves: sum over first f of p_f p_e / (1 - p_f).
    pairs = PROBS[0][:, None] * PROBS[0] / (1 - PROBS[0][:, None]) * (1 - np.eye(4))
    np.testing.assert_allclose(np.bincount(second) / 6000, pairs.sum(axis=0), atol=atol)
    assert (first != second).all()
    close(gates(routing), np.take_along_axis(PROBS[:1], np.asarray(indices(routing)), axis=1))
    assert indices(route_logits(LOGITS, 2, config)) == [[3, 2], [0, 1]]  # the best, in evaluation


def test_the_rest_is_drawn_after_the_best():
    many = np.tile(LOGITS[:1], (6000, 1))
    routing = route_logits(many, 2, RouterConfig(selection="sampled_rest"), rng=jax.random.key(0))
    first, second = np.asarray(indices(routing)).T
    assert (first == 3).all()
    share = np.bincount(second, minlength=4) / 6000
    np.testing.assert_allclose(share, [1 / 6, 2 / 6, 3 / 6, 0], atol=4 * 0.5 / 6000**0.5)


def test_sampling_stays_within_the_selected_groups():
    config = RouterConfig(num_expert_groups=3, num_selected_groups=1, selection="sampled")
    many = np.tile(GROUPED, (200, 1))
    drawn = np.asarray(indices(route_logits(many, 2, config, rng=jax.random.key(0))))
    assert set(drawn.ravel()) == {0, 1}


def test_learned_noise_has_the_deviation_that_the_token_asks_for():
    # Two tokens of 3000 copies each; softplus(x W_noise) is softplus(0) and softplus(3).
    x = np.repeat(np.eye(2, dtype=np.float32), 3000, axis=0)[None]
    params = {"router": jnp.eye(2), "router_noise": jnp.array([[0.0, 0.0], [3.0, 3.0]])}
    config = RouterConfig(learned_noise=True)
    routing = route(x, params, 1, config, rng=jax.random.key(0))
    noise = np.asarray(routing.logits_GSE - x).reshape(2, -1)
    np.testing.assert_allclose(noise.std(axis=1), np.log(1 + np.exp([0.0, 3.0])), rtol=0.05)
    close(routing.clean_GSE, x)
    # With noise of a fixed deviation besides, variances add up.
    both = RouterConfig(learned_noise=True, logit_noise_std=2.0)
    noise = np.asarray(route(x, params, 1, both, rng=jax.random.key(0)).logits_GSE - x)
    np.testing.assert_allclose(noise[0, :3000].std(), (np.log(2) ** 2 + 4) ** 0.5, rtol=0.05)
    # Without a key, in evaluation, there is none.
    calm = route(x, params, 1, config)
    close(calm.logits_GSE, x)
    assert calm.clean_GSE is None and calm.noise_std_GSE is None


def test_cosine_logits_by_hand():
    # Tokens (3, 4, 0) and (0, 0, 2), projected to (3, 4) and (0, 2): cosines with (1, 0), (0, 5).
    x = jnp.array([[[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]])
    params = {
        "router": jnp.array([[1.0, 0.0], [0.0, 5.0]]),
        "router_projection": jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
        "router_log_scale": jnp.zeros(1),
    }
    config = RouterConfig(cosine_dim=2, temperature=0.25)
    close(route(x, params, 1, config).logits_GSE[0], 4 * np.array([[0.6, 0.8], [0.0, 1.0]]))
    # The length of a token changes nothing; 0 gives 0 and a finite gradient.
    close(route(9 * x, params, 1, config).logits_GSE, route(x, params, 1, config).logits_GSE)
    zero, gradient = jax.value_and_grad(lambda x: jnp.sum(route(x, params, 1, config).logits_GSE))(
        jnp.zeros((1, 1, 3))
    )
    assert zero == 0 and np.isfinite(gradient).all()
    # The temperature is learned, and does not fall below 1 / 100.
    params["router_log_scale"] = jnp.full(1, np.log(2.0))
    close(route(x, params, 1, config).logits_GSE[0, 0], [4.8, 6.4])
    params["router_log_scale"] = jnp.full(1, 9.0)
    np.testing.assert_allclose(route(x, params, 1, config).logits_GSE[0, 0], [60, 80], rtol=1e-5)


@pytest.mark.parametrize("options", [{"learned_noise": True}, {"cosine_dim": 3}])
def test_every_parameter_of_a_router_learns_from_the_task(options):
    config = MoEConfig(num_experts=3, expert_dim=5, dispatch="einsum",
                       router=RouterConfig(**options))  # fmt: skip
    params, x = block(config)
    rng = jax.random.key(0)
    grad = jax.jit(jax.grad(lambda p: jnp.sum(moe_block(p, x, config, rng=rng)[0] ** 2)))(params)
    names = [name for name in params if name.startswith("router")]
    assert len(names) == (2 if "learned_noise" in options else 3)
    for name in names:
        assert np.abs(grad[name]).max() > 1e-3, name


def test_router_computes_in_float32_when_tokens_are_bfloat16():
    # 256 + 1 rounds to 256 in bfloat16: experts 0 and 1 would tie, and 0 would win.
    x = jnp.array([[[256.0, 1.0]]], jnp.bfloat16)
    router = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    routing = route(x, {"router": router}, 2, RouterConfig())
    assert routing.logits_GSE.tolist() == [[[256.0, 257.0, 0.0]]]
    assert indices(routing) == [[1, 0]]
    assert {a.dtype for a in jax.tree.leaves(routing)} == {jnp.dtype("float32"), jnp.dtype("int32")}


def test_router_dtype_is_for_studies():
    x = jnp.array([[[256.0, 1.0]]], jnp.bfloat16)
    router = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    routing = route(x, {"router": router}, 2, RouterConfig(dtype="bfloat16"))
    assert routing.logits_GSE.dtype == routing.gate_GSK.dtype == jnp.bfloat16
    assert indices(routing) == [[0, 1]]  # the tie, gone wrong


def block(config, seed=0, tokens=6, dim=4):
    """Random parameters with logits near 1, and tokens."""
    random = np.random.default_rng(seed)
    specs = moe_specs(config, dim)
    params = {n: random.normal(size=s.shape).astype(np.float32) for n, s in specs.items()}
    return params, random.normal(size=(1, tokens, dim)).astype(np.float32)


def test_jitter_reaches_the_router_and_never_the_experts():
    # With every expert chosen, renormalised to sum 1, and all experts alike, the output does not
    # depend on the routing at all: it would only move if the experts saw jittered tokens.
    router = RouterConfig(input_jitter=0.5, renormalize=True)
    config = MoEConfig(num_experts=2, num_selected_experts=2, expert_dim=5, router=router,
                       dispatch="einsum")  # fmt: skip
    params, x = block(config)
    params = {n: v if n == "router" else np.broadcast_to(v[:1], v.shape) for n, v in params.items()}
    run = jax.jit(lambda x, rng: moe_block(params, x, config, capacity_factor=0, rng=rng))
    calm, calm_aux = run(x, None)
    y, aux = run(x, jax.random.key(0))
    close(y, calm)
    assert np.abs(aux.mean_prob_E - calm_aux.mean_prob_E).max() > 1e-3


def test_jitter_multiplies_the_input_by_one_plus_minus_epsilon():
    config = RouterConfig(input_jitter=0.25)
    x, router = jnp.ones((1, 500, 2)), jnp.eye(2)
    logits = np.asarray(route(x, {"router": router}, 1, config, rng=jax.random.key(0)).logits_GSE)
    assert logits.min() >= 0.75 and logits.max() <= 1.25
    # U(.75, 1.25): mean 1, standard deviation .5 / sqrt(12); 1000 draws, four standard errors.
    np.testing.assert_allclose(logits.mean(), 1.0, atol=4 * 0.5 / 12**0.5 / 1000**0.5)
    np.testing.assert_allclose(logits.std(), 0.5 / 12**0.5, rtol=0.1)


def test_noise_is_gaussian_of_the_given_deviation_on_the_logits():
    config = RouterConfig(logit_noise_std=0.3)
    calm = np.zeros((500, 2), np.float32)
    logits = np.asarray(route_logits(calm, 1, config, rng=jax.random.key(1)).logits_GSE)
    np.testing.assert_allclose(logits.mean(), 0, atol=4 * 0.3 / 1000**0.5)
    np.testing.assert_allclose(logits.std(), 0.3, rtol=0.1)
    # About 4.6% of a Gaussian lies beyond two deviations, and none of a uniform.
    assert 0.02 < np.mean(np.abs(logits) > 0.6) < 0.08


def test_jitter_and_noise_are_independent_draws():
    ones, key = np.ones((500, 2), np.float32), jax.random.key(2)
    drawn = [
        np.ravel(route_logits(ones, 1, RouterConfig(**options), rng=key).logits_GSE)
        for options in ({"input_jitter": 0.5}, {"logit_noise_std": 0.5})
    ]
    assert abs(np.corrcoef(*drawn)[0, 1]) < 4 / 1000**0.5


@pytest.mark.parametrize("options", [{"input_jitter": 0.5}, {"logit_noise_std": 1.0}])
def test_randomness_needs_a_key_and_depends_on_it(options):
    config = RouterConfig(**options)
    first, second = jax.random.split(jax.random.key(0))
    calm = route_logits(LOGITS, 1).logits_GSE
    np.testing.assert_array_equal(route_logits(LOGITS, 1, config).logits_GSE, calm)
    one = route_logits(LOGITS, 1, config, rng=first).logits_GSE
    assert np.abs(one - calm).max() > 0.01
    np.testing.assert_array_equal(route_logits(LOGITS, 1, config, rng=first).logits_GSE, one)
    assert np.abs(route_logits(LOGITS, 1, config, rng=second).logits_GSE - one).max() > 0.01


SCORES = [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)]


@pytest.mark.parametrize(("score", "before"), SCORES)
@pytest.mark.parametrize(("choices", "renormalize"), [(1, False), (2, False), (2, True)])
def test_router_learns_from_the_task_alone_or_is_refused(score, before, choices, renormalize):
    router = RouterConfig(score=score, score_before_topk=before, renormalize=renormalize)
    options = {"num_experts": 3, "num_selected_experts": choices, "expert_dim": 5,
                "dispatch": "einsum", "router": router}  # fmt: skip
    if choices == 1 and (score, before) == ("softmax", False):
        with pytest.raises(ValueError, match="the router gets no gradient from the task"):
            MoEConfig(**options)
        return
    config = MoEConfig(**options)
    params, x = block(config)
    grad = jax.jit(jax.grad(lambda p: jnp.sum(moe_block(p, x, config)[0] ** 2)))(params)
    assert np.abs(grad["router"]).max() > 1e-2


@pytest.mark.parametrize(("score", "before"), SCORES)
def test_one_renormalized_choice_is_refused(score, before):
    router = RouterConfig(score=score, score_before_topk=before, renormalize=True)
    with pytest.raises(ValueError, match="it is always 1 and the router gets no gradient"):
        MoEConfig(num_selected_experts=1, router=router)


def test_the_refused_gates_would_be_constant():
    for options in ({"renormalize": True}, {"score_before_topk": False}):
        grad = jax.grad(
            lambda x, s=options: jnp.sum(route_logits(x, 1, RouterConfig(**s)).gate_GSK)
        )(jnp.asarray(LOGITS))
        assert np.abs(grad).max() < FLOAT32


def test_every_choice_of_a_token_is_another_expert():
    x = np.random.default_rng(0).normal(size=(3, 7, 6)).astype(np.float32)
    router = np.eye(6, dtype=np.float32)
    for choices in range(1, 7):
        index = np.asarray(route(x, {"router": router}, choices, RouterConfig()).expert_index_GSK)
        for g, s in itertools.product(range(3), range(7)):
            assert len(set(index[g, s])) == choices
