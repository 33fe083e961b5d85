"""Measures of routing: tables worked by hand, and random routing against its formulas."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.analysis.coactivation import coactivation
from moe_jax.analysis.information import (
    choice_counts,
    expected_bias,
    mutual_information,
    shuffled_information,
)
from moe_jax.analysis.load import expert_load
from moe_jax.analysis.repetition import expected_repetition, random_repetition, repetition
from moe_jax.analysis.saturation import router_saturation
from moe_jax.analysis.similarity import (
    cosine_similarity,
    expert_similarity,
    moe_weights,
    router_similarity,
)
from moe_jax.analysis.vocabulary import RoutedToken, most_frequent_ids, most_routed_tokens
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.part import MoE

# Six tokens, two choices of four experts. The fourth token has one choice, the last none.
EXPERT_JK = np.array([[0, 1], [0, 2], [1, 0], [2, -1], [2, 0], [-1, -1]])
DOMAIN_J = np.array([0, 0, 0, 1, 1, 1])
EVEN = 100_000


def random_choices(num_tokens, num_experts, num_choices, seed=0):
    """Random sets of experts, all equally likely, in random order."""
    scores = np.random.default_rng(seed).random((num_tokens, num_experts))
    return np.argsort(scores, axis=1)[:, :num_choices]


def test_load_by_hand():
    load = expert_load(EXPERT_JK, 4)
    np.testing.assert_allclose(load.share_E, [4 / 9, 2 / 9, 3 / 9, 0])
    assert load.fullest == pytest.approx(16 / 9)
    nats = -(4 / 9 * math.log(4 / 9) + 2 / 9 * math.log(2 / 9) + 1 / 3 * math.log(1 / 3))
    assert load.effective_experts == pytest.approx(math.exp(nats))
    even = expert_load(np.arange(8).reshape(4, 2), 8)
    assert even.fullest == 1 and even.effective_experts == pytest.approx(8)
    with pytest.raises(ValueError, match=r"at least one choice: 2 tokens have none\. Pass more"):
        expert_load(np.full((2, 2), -1), 4)


def test_counts_and_information_by_hand():
    counts_IE = choice_counts(DOMAIN_J, EXPERT_JK, 3, 4)
    np.testing.assert_array_equal(counts_IE, [[3, 2, 1, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
    by_hand = sum(
        n / 9 * math.log2((n / 9) / (row / 9 * column / 9))
        for n, row, column in [(3, 6, 4), (2, 6, 2), (1, 6, 3), (1, 3, 4), (2, 3, 3)]
    )
    assert mutual_information(counts_IE) == pytest.approx(by_hand)
    # A category that determines the expert tells everything; equal categories tell nothing.
    assert mutual_information(np.diag([5, 5, 5, 5])) == pytest.approx(2)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)
    # The category separates two pairs of four experts: one bit, log2(E / K).
    pairs_JK = np.tile([[0, 1], [2, 3]], (50, 1))
    counts_IE = choice_counts(np.tile([0, 1], 50), pairs_JK, 2, 4)
    assert mutual_information(counts_IE) == pytest.approx(math.log2(4 / 2))


@pytest.mark.parametrize("num_choices", [1, 2, 4])
def test_random_routing_has_the_information_that_is_expected_of_chance(num_choices):
    num_tokens, num_categories, num_experts = 4000, 40, 8
    rng = np.random.default_rng(1)
    category_J = rng.integers(num_categories, size=num_tokens)
    expert_JK = random_choices(num_tokens, num_experts, num_choices)
    sizes = (num_categories, num_experts)
    bias = expected_bias(*sizes, num_choices, num_tokens)
    shuffled = shuffled_information(category_J, expert_JK, *sizes, num_shuffles=20)
    assert shuffled.shape == (20,) and len(set(shuffled)) == 20
    assert shuffled.mean() == pytest.approx(bias, rel=0.05)
    measured = mutual_information(choice_counts(category_J, expert_JK, *sizes))
    assert measured == pytest.approx(bias, rel=0.25)
    # Real information stands out from the bias, and shuffling removes it.
    expert_JK[:, 0] = category_J % num_experts
    told = mutual_information(choice_counts(category_J, expert_JK[:, :1], *sizes))
    assert told > 2.9
    again = shuffled_information(category_J, expert_JK[:, :1], *sizes, num_shuffles=2)
    assert again.max() < 0.1


def test_shuffling_within_ids_keeps_what_the_ids_explain():
    """One expert follows the id, the other only the domain, which is independent of the id."""
    rng = np.random.default_rng(3)
    domain_J = rng.integers(4, size=4000)
    token_J = np.where(rng.random(4000) < 0.5, domain_J, rng.integers(8, size=4000))
    sizes = {"num_categories": 4, "num_experts": 8}
    by_id_J1 = token_J[:, None]
    bits = mutual_information(choice_counts(domain_J, by_id_J1, 4, 8))
    told = shuffled_information(domain_J, by_id_J1, **sizes, num_shuffles=3, within_J=token_J)
    np.testing.assert_allclose(told, bits, rtol=1e-12)
    apart_J = rng.integers(8, size=4000)
    told = shuffled_information(
        domain_J, domain_J[:, None], **sizes, num_shuffles=3, within_J=apart_J
    )
    assert mutual_information(choice_counts(domain_J, domain_J[:, None], 4, 8)) > 1.9
    assert told.max() < 0.05


def test_repetition_by_hand():
    # Pairs 0-1, 1-2 and 3-4. Another document begins between 2 and 3. Token 5 stands alone.
    found = repetition(EXPERT_JK, np.array([7, 7, 7, 3, 3, 9]))
    assert found == (3, pytest.approx(2 / 3), 1)
    # Tokens without a choice have nothing in common.
    assert repetition(np.full((3, 2), -1), np.zeros(3)) == (2, 0, 0)
    # [0, 1] and [2, 0]: different first choices, one shared expert.
    assert repetition(np.array([[0, 1], [2, 0]]), np.zeros(2)) == (1, 0, 1)
    nothing = repetition(EXPERT_JK, np.arange(6))
    assert nothing.num_pairs == 0 and math.isnan(nothing.same_first)


def test_repetition_of_random_routing_is_that_of_mixtrals_table():
    assert random_repetition(8, 2) == (1 / 8, pytest.approx(1 - 6 / 8 * 5 / 7))
    assert round(random_repetition(8, 2)[1], 3) == 0.464
    assert random_repetition(4, 1) == (1 / 4, 1 / 4)
    assert random_repetition(4, 3) == (1 / 4, 1)
    found = repetition(random_choices(EVEN, 8, 2), np.zeros(EVEN))
    sd = math.sqrt(0.25 / EVEN)
    assert found.same_first == pytest.approx(1 / 8, abs=4 * sd)
    assert found.any_shared == pytest.approx(1 - 6 / 8 * 5 / 7, abs=4 * sd)


def test_repetition_expected_of_tokens_with_fewer_choices_by_hand():
    # top_p with one choice of K = 2 per token: only the first choice can be shared.
    one_JK, same = np.tile([3, -1], (4, 1)), np.zeros(4)
    assert expected_repetition(one_JK, same, 8) == (1 / 8, pytest.approx(1 / 8))
    # Pairs with 2 and 2, 2 and 2, 1 and 2 choices of four experts; see `test_repetition_by_hand`.
    document_J = np.array([7, 7, 7, 3, 3, 9])
    assert random_repetition(4, 2) == (1 / 4, pytest.approx(1 - 2 / 4 * 1 / 3))
    assert random_repetition(4, 1, 2) == random_repetition(4, 2, 1) == (1 / 4, 1 / 2)
    expected = 1 / 4, (2 * 5 / 6 + 1 / 2) / 3
    assert expected_repetition(EXPERT_JK, document_J, 4) == pytest.approx(expected)
    # Expert choice: two of four pairs include a token without an expert.
    some_JK = np.array([[0, 1], [-1, -1], [2, -1], [1, 3], [2, -1]])
    assert expected_repetition(some_JK, np.zeros(5), 4) == pytest.approx((2 / 4 / 4, 2 / 4 / 2))
    assert np.isnan(expected_repetition(EXPERT_JK, np.arange(6), 4)).all()
    # Random tokens with two choices, one or none.
    drawn_JK = random_choices(EVEN, 8, 2)
    drawn_JK[np.random.default_rng(2).random(EVEN) < 0.5] = -1
    drawn_JK[::3, 1] = -1
    found = repetition(drawn_JK, np.zeros(EVEN))
    assert found[1:] == pytest.approx(expected_repetition(drawn_JK, np.zeros(EVEN), 8), abs=0.004)


def test_saturation_by_hand():
    last_JK = np.array([[1, 0], [3, 2], [3, 2], [2, 1], [1, 3], [0, 1]])
    # Shared choices per token: 2 of 2, 1 of 2, 0 of 2, 1 of 1, 0 of 2; the last has no choice.
    assert router_saturation(EXPERT_JK, last_JK) == pytest.approx(4 / 9)
    assert router_saturation(EXPERT_JK[:, :1], last_JK[:, :1]) == pytest.approx(1 / 5)
    assert router_saturation(EXPERT_JK, EXPERT_JK) == 1
    assert math.isnan(router_saturation(EXPERT_JK[5:], last_JK[5:]))
    a, b = random_choices(EVEN, 8, 2), random_choices(EVEN, 8, 2, seed=1)
    assert router_saturation(a, b) == pytest.approx(2 / 8, abs=0.005)
    assert router_saturation(a[:, :1], b[:, :1]) == pytest.approx(1 / 8, abs=0.005)


def test_coactivation_by_hand():
    share_EE = coactivation(EXPERT_JK, 4)
    expected = [[1, 2 / 4, 2 / 4, 0], [1, 1, 0, 0], [2 / 3, 0, 1, 0], [np.nan] * 4]
    np.testing.assert_allclose(share_EE, expected)
    share_EE = coactivation(random_choices(EVEN, 8, 3), 8)
    off_diagonal = share_EE[~np.eye(8, dtype=bool)]
    np.testing.assert_allclose(off_diagonal, (3 - 1) / (8 - 1), atol=0.01)


def test_most_routed_tokens_by_hand():
    counts_VE = np.array([[9, 1], [20, 20], [0, 5], [3, 0], [18, 2]])
    occurrences_V = np.array([10, 40, 5, 3, 20])
    found = most_routed_tokens(counts_VE, occurrences_V, min_count=4, num_tokens=2)
    # Ids 4 and 0 share first place, and 4 is more frequent. Id 3 is too rare.
    assert found[0] == [RoutedToken(4, 0.9, 20), RoutedToken(0, 0.9, 10)]
    assert found[1] == [RoutedToken(2, 1.0, 5), RoutedToken(1, 0.5, 40)]
    rare = most_routed_tokens(counts_VE, occurrences_V, min_count=50, num_tokens=2)
    assert rare == [[], []]
    # Sorted by falling count, ties by id. Ids that do not occur are left out.
    assert most_frequent_ids(occurrences_V, 2).tolist() == [1, 4]
    assert most_frequent_ids(np.array([0, 3, 5, 3]), 9).tolist() == [2, 1, 3]


def test_cosine_similarity_by_hand():
    found = cosine_similarity(np.array([[3.0, 4.0], [4.0, 3.0], [-6.0, -8.0], [0.0, 0.0]]))
    expected = [[1, 0.96, -1], [0.96, 1, -0.96], [-1, -0.96, 1]]
    np.testing.assert_allclose(found[:3, :3], expected)
    assert np.isnan(found[3]).all()


def test_expert_similarity_is_of_all_matrices_and_of_nothing_else():
    rng = np.random.default_rng(0)
    wi, wo = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 4, 3))
    weights = {"wi": wi, "wo": wo, "bi": np.full((2, 4), 1e6)}
    flat = [np.concatenate([wi[e].ravel(), wo[e].ravel()]) for e in range(2)]
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert expert_similarity(weights)[0, 1] == pytest.approx(cosine)
    np.testing.assert_array_equal(router_similarity(np.eye(3, 2)), np.eye(2))
    assert router_similarity(None) is None


def model_of(**stack):
    """A model with MoE parts of four and of two experts."""
    parts = {
        "attention": Attention(),
        "mlp": Mlp(),
        "moe": MoE(num_experts=4),
        "pair": MoE(num_experts=2),
    }
    layout = StackLayout(**stack)
    return LanguageModel(
        parts={name: part for name, part in parts.items() if name in layout.names}, stack=layout
    )


def block(value, num_experts=4):
    return {
        "experts": {"wi": np.full((num_experts, 1, 1), value)},
        "router": {"weight": np.full((1, num_experts), value)},
    }


def test_the_blocks_of_a_model_come_in_the_order_of_its_layers():
    """Layers 1, 3 and 5 are MoE: a unit of two layers repeats three times, then a dense layer."""
    dense, sparse = ("attention", "mlp"), ("attention", "moe")
    model = model_of(unit=(dense, sparse), repeats=3, last=(dense,))
    repeated = np.stack([block(v)["experts"]["wi"] for v in (10, 30, 50)])
    routers = np.stack([block(v)["router"]["weight"] for v in (10, 30, 50)])
    stack = {
        "first": {},
        "unit": {
            "0": {"mlp": {}},
            "1": {"moe": {"experts": {"wi": repeated}, "router": {"weight": routers}}},
        },
        "last": {"0": {"mlp": {}}},
    }
    blocks = moe_weights({"stack": stack}, model)
    assert list(blocks) == ["layer_01", "layer_03", "layer_05"]
    for own, value in zip(blocks.values(), (10, 30, 50), strict=True):
        assert own.num_experts == 4
        np.testing.assert_array_equal(own.experts["wi"], np.full((4, 1, 1), value))
        np.testing.assert_array_equal(own.router_IE, np.full((1, 4), value))
    # The same layers, listed one by one.
    plain = model_of(first=(dense, sparse) * 3 + (dense,), unit=(), repeats=0)
    first = {str(i): {"moe": block(10 * i)} for i in range(7)}
    same = moe_weights({"stack": {"first": first, "unit": {}, "last": {}}}, plain)
    np.testing.assert_equal(same, blocks)


def test_blocks_of_several_parts_are_named_by_layer_and_tied_ones_repeat():
    model = model_of(
        first=(("attention", "pair"),), unit=(("moe", "pair"), ("attention", "moe")), repeats=2
    )
    both, alone = block(1), block(2)
    twice = [jax.tree.map(lambda a: np.stack([a, 10 * a]), one) for one in (both, alone)]
    pair = jax.tree.map(lambda *a: np.stack(a), block(5, 2), block(6, 2))
    unit = {"0": {"moe": twice[0], "pair": pair}, "1": {"moe": twice[1]}}
    stack = {"first": {"0": {"pair": block(7, 2)}}, "unit": unit, "last": {}}
    blocks = moe_weights({"stack": stack}, model)
    values = {name: int(own.router_IE[0, 0]) for name, own in blocks.items()}
    assert values == {
        "layer_00": 7, "layer_01_moe": 1, "layer_01_pair": 5, "layer_02": 2,
        "layer_03_moe": 10, "layer_03_pair": 6, "layer_04": 20,
    }  # fmt: skip
    assert [own.num_experts for own in blocks.values()] == [2, 4, 2, 4, 4, 2, 4]
    # All repeats share one copy.
    tied = model_of(unit=(("attention", "moe"),), repeats=3, tied=("moe",))
    stack = {"first": {}, "unit": {"0": {}}, "last": {}, "tied": {"moe": block(3)}}
    blocks = moe_weights({"stack": stack}, tied)
    assert [own.router_IE[0, 0] for own in blocks.values()] == [3, 3, 3]


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_names_of_experts_and_the_order_of_tokens_do_not_matter(seed, num_choices):
    """These properties hold for any routing, even with missing choices."""
    rng = np.random.default_rng(seed)
    expert_JK = random_choices(60, 6, num_choices, seed)
    expert_JK[rng.random(expert_JK.shape) < 0.1] = -1
    expert_JK[0, 0] = 0
    category_J = rng.integers(5, size=60)
    renamed_E = np.append(rng.permutation(6), -1)  # -1 stays -1
    renamed_JK, order = renamed_E[expert_JK], rng.permutation(60)

    def told(category_J, expert_JK):
        return mutual_information(choice_counts(category_J, expert_JK, 5, 6))

    assert told(category_J, renamed_JK) == pytest.approx(told(category_J, expert_JK))
    assert told(category_J[order], expert_JK[order]) == pytest.approx(told(category_J, expert_JK))
    assert repetition(renamed_JK, category_J) == repetition(expert_JK, category_J)
    shares = coactivation(expert_JK, 6), coactivation(renamed_JK, 6)
    np.testing.assert_allclose(shares[1][np.ix_(renamed_E[:6], renamed_E[:6])], shares[0])
    other_JK = random_choices(60, 6, num_choices, seed + 1)
    saturation = router_saturation(expert_JK, other_JK)
    assert router_saturation(renamed_JK, renamed_E[other_JK]) == pytest.approx(saturation)
    assert expert_load(renamed_JK, 6).fullest == pytest.approx(expert_load(expert_JK, 6).fullest)
