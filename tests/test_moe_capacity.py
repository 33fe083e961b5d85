"""How many slots an expert has, and which choices get them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity, assign_slots
from moe_jax.moe.capacity_presets import PRESETS
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import Options, Routing
from moe_jax.part import Call, Dims
from tests import moe_oracle

RANKED_ORDERS = ("token_major", "choice_major", "batch_prioritized", "probability")
QUEUES = {name: load_kind("queue", name)() for name in KINDS["queue"]}
PROPERTIES = settings(max_examples=40)

# Each system's rule for 100 tokens, 8 experts, 2 choices and factor 1.25. The mean load is 25
# choices; systems that ignore K use 12.5 tokens.
OF_25 = {
    "vmoe": 32,  # ceil(31.25) = 32, a multiple of 4
    "maxtext": 31,  # floor(ceil(25) * 1.25)
    "megatron": 32,  # ceil(31.25)
    "deepspeed": 32,  # ceil(31.25)
    "tutel": 32,  # 2 * floor(1.25 * ceil(12.5)) = 2 * 16
    "megablocks": 31,  # floor(31.25)
    "olmo_core": 32,  # floor(31.25) = 31, up to a multiple of 8
    "flaxformer": 16,  # round(15.625)
    "mesh_tensorflow": 15,  # floor(15.625)
    "simply": 15,  # floor(15.625)
    "axlearn": 16,  # floor(15.625) = 15, up to a multiple of 4
}

# preset, tokens, experts, choices, factor, slots
BY_HAND = [
    ("vmoe", 64, 8, 2, 1.05, 20),  # ceil(16.8) = 17, up to a multiple of 4
    ("maxtext", 10, 8, 1, 1.5, 3),  # the mean 1.25 is first rounded up to 2; 2 * 1.5
    ("maxtext", 10, 8, 1, 1.25, 2),  # floor(2 * 1.25)
    ("megatron", 10, 8, 1, 1.5, 2),  # ceil(1.875); MaxText, which rounds the mean, gives 3
    ("deepspeed", 8, 8, 1, 1.0, 4),  # 1, but no fewer than 4
    ("tutel", 10, 8, 2, 1.5, 6),  # 2 * floor(1.5 * ceil(1.25))
    ("tutel", 10, 8, 1, 1.5, 3),
    ("megablocks", 100, 8, 1, 1.25, 15),  # floor(15.625)
    ("olmo_core", 72, 8, 1, 1.25, 16),  # floor(11.25) = 11, up to 16
    ("olmo_core", 64, 8, 1, 1.0, 8),
    ("flaxformer", 36, 8, 1, 1.0, 4),  # 4.5 rounds to the even 4
    ("flaxformer", 44, 8, 2, 1.0, 6),  # 5.5 rounds to the even 6; K is ignored
    ("flaxformer", 8, 8, 2, 1.0, 4),  # 1, but no fewer than 4
    ("mesh_tensorflow", 100, 8, 2, 1.0, 12),  # floor(12.5)
    ("mesh_tensorflow", 16, 8, 2, 1.0, 4),  # 2, but no fewer than 4
    ("simply", 4, 8, 2, 1.0, 1),  # floor(0.5) = 0, but no fewer than 1
    ("axlearn", 64, 8, 2, 1.0, 8),
    ("axlearn", 8, 8, 2, 1.0, 4),  # 1, up to a multiple of 4
]


def test_every_preset_has_its_row_in_the_table():
    assert sorted(OF_25) == sorted(PRESETS)


@pytest.mark.parametrize(("preset", "slots"), OF_25.items())
def test_preset_gives_the_slots_of_its_system(preset, slots):
    assert Capacity(preset=preset).num_slots(100, 8, 2, 1.25) == slots


@pytest.mark.parametrize(("preset", "tokens", "experts", "choices", "factor", "slots"), BY_HAND)
def test_preset_by_hand(preset, tokens, experts, choices, factor, slots):
    assert Capacity(preset=preset).num_slots(tokens, experts, choices, factor) == slots


def test_default_rule_is_factor_times_mean_load_rounded_up():
    rule = Capacity()
    assert rule.num_slots(100, 8, 1, 1.25) == 16  # ceil(15.625)
    assert rule.num_slots(100, 8, 2, 1.25) == 32  # ceil(31.25)
    assert rule.num_slots(100, 8, 2, 0.01) == 1  # at least one


@pytest.mark.parametrize(
    ("tokens", "factor", "rounding", "slots"),
    [(1000, 1.1, "ceil", 110), (1000, 0.29, "floor", 29)],
)
def test_rounding_ignores_float_noise(tokens, factor, rounding, slots):
    # In floating point, 100 * 1.1 = 110.00000000000001 and 100 * 0.29 = 28.999999999999996.
    assert Capacity(rounding=rounding).num_slots(tokens, 10, 1, factor) == slots


def test_there_are_no_more_slots_than_tokens():
    assert Capacity().num_slots(4, 2, 2, 8.0) == 4
    assert Capacity(minimum=100).num_slots(4, 2, 2, 8.0) == 4
    assert Capacity(multiple_of=8).num_slots(4, 2, 2, 8.0) == 8


def test_factor_zero_has_room_for_every_token():
    assert Capacity().num_slots(7, 4, 2, 0) == 7
    assert Capacity(multiple_of=4).num_slots(7, 4, 2, 0) == 8


def test_slots_can_be_given_as_a_number():
    """At most the number of tokens, whatever the factor; dropless stays dropless."""
    rule = Capacity(slots=6)
    assert [rule.num_slots(100, 8, 2, factor) for factor in (0.1, 1.25, 9.0)] == [6, 6, 6]
    assert rule.num_slots(4, 8, 2, 1.25) == 4
    assert rule.num_slots(100, 8, 2, 0) == 100
    assert rule.num_slots(100, 64, 1, 1.25) == rule.num_slots(100, 2, 1, 1.25) == 6


def test_a_block_of_six_slots_keeps_what_the_oracle_keeps():
    moe = MoE(num_experts=3, num_selected_experts=2, expert_dim=3, run_experts="einsum",
              capacity=Capacity(slots=6))  # fmt: skip
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: random.normal(size=spec.shape).astype(np.float32), moe.specs(Dims(4))
    )
    x = random.normal(size=(2, 12, 4)).astype(np.float32)
    decided = moe_oracle.moe_block(params, x, moe)
    assert decided.kept_KE.sum(axis=0).max() == 12 < decided.assigned_KE.sum(axis=0).max()
    for rng in (None, jax.random.key(0)):  # in evaluation and in training
        y, aux = moe_block(params, x, moe, Call(rng=rng))
        np.testing.assert_array_equal(aux.sums["kept_KE"], decided.kept_KE)
        np.testing.assert_allclose(y, decided.y_BLM, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 6, "train_factor": 0}, r"slots replaces .*: slots=6, train_factor=0"),
        ({"slots": 6, "eval_factor": 1}, r"slots replaces .*eval_factor=1"),
        ({"slots": -1}, r"slots lies in \[0, inf\): slots=-1"),
        ({"queue": QUEUES["random"]}, r"a random queue needs a random key.*eval_factor=2\.0"),
        ({"preset": "vmoe", "multiple_of": 8}, r"preset='vmoe' sets multiple_of=4: multiple_of=8"),
        ({"preset": "best"}, r"preset is one of \['axlearn', .*: preset='best'"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Capacity(**settings)


def test_a_number_of_slots_may_stand_beside_dropless_evaluation():
    capacity = Capacity(slots=6, eval_factor=0, queue=QUEUES["random"])
    assert [capacity.num_slots(20, 4, 2, factor) for factor in (1.25, 0)] == [6, 20]


@PROPERTIES
@given(
    tokens=st.integers(1, 300),
    experts=st.integers(1, 64),
    choices=st.integers(1, 8),
    factor=st.sampled_from([0.1, 0.29, 0.5, 1.0, 1.1, 1.25, 2.0, 7.0]),
    per=st.sampled_from(["assignment", "token", "choice"]),
    rounding=st.sampled_from(["ceil", "floor", "nearest"]),
    round_mean_up=st.booleans(),
    multiple_of=st.sampled_from([1, 4, 8]),
    minimum=st.sampled_from([1, 4]),
)
def test_rule_equals_exact_arithmetic(tokens, experts, choices, factor, **rule):
    config = Capacity(**rule)
    exact = moe_oracle.capacity(tokens, experts, choices, factor, config)
    enough = -(-tokens // config.multiple_of) * config.multiple_of
    assert config.num_slots(tokens, experts, choices, factor) == min(exact, enough)


# Three tokens (rows), their probabilities for experts A, B and C, and their two choices:
#   token 0  A .50  B .45  C .05   chooses A, then B
#   token 1  A .60  C .30  B .10   chooses A, then C
#   token 2  B .40  A .35  C .25   chooses B, then A
A, B, C = 0, 1, 2
PROBS = np.array([[0.50, 0.45, 0.05], [0.60, 0.10, 0.30], [0.35, 0.40, 0.25]], np.float32)
CHOICES = np.array([[A, B], [A, C], [B, A]], np.int32)


def routing_of(probs, choices):
    probs, choices = jnp.asarray(probs)[None], jnp.asarray(choices)[None]
    gates = jnp.take_along_axis(probs, choices, axis=-1)
    return Routing(jnp.log(probs), probs, choices, gates, jnp.ones(choices.shape, jnp.bool_))


def serve(routing, order, factor, valid=None, rng=None):
    """Assigns slots by the default rule; a factor of 0 is dropless."""
    _, tokens, choices = routing.expert_index_GSK.shape
    experts = routing.probs_GSE.shape[-1]
    slots = Capacity().num_slots(tokens, experts, choices, factor)
    options = Options(experts, experts, choices, slots, factor == 0)
    return assign_slots(routing, QUEUES[order], options, valid, rng)


def assign(order, factor, probs=PROBS, choices=CHOICES, valid=None, rng=None):
    """Kept choices and slots as lists. Factor 0.5 gives one slot per expert, 1.0 two, 1.5 three."""
    valid = None if valid is None else jnp.asarray(valid)[None]
    out = serve(routing_of(probs, choices), order, factor, valid, rng)
    return np.asarray(out.kept_GSK[0], int).tolist(), np.asarray(out.slot_GSK[0]).tolist()


@pytest.mark.parametrize(
    ("order", "kept"),
    [
        # Token 0 gets both choices, which fills A and B. Token 1 still finds C, token 2 nothing.
        ("token_major", [[1, 1], [0, 1], [0, 0]]),
        # First choices: token 0 gets A, token 1 is too late, token 2 gets B. Then only C is free.
        ("choice_major", [[1, 0], [0, 1], [1, 0]]),
        # The same in the token order 1 (.60), 0 (.50), 2 (.40): 1 gets A, 2 gets B, then 1 gets C.
        ("batch_prioritized", [[0, 0], [1, 1], [1, 0]]),
        # Each expert takes its largest gate: A .60 of token 1, B .45 of token 0 (a second choice
        # before the .40 of a first choice), C .30 of token 1.
        ("probability", [[0, 1], [1, 1], [0, 0]]),
    ],
)
def test_one_slot_an_expert_goes_by_the_queue(order, kept):
    assert assign(order, 0.5)[0] == kept


@pytest.mark.parametrize(
    ("order", "slots"),
    [
        # Tokens 0, 1 and 2 want A, which has two slots. Tokens 0 and 2 want B, token 1 wants C.
        ("token_major", [[0, 0], [1, 0], [1, 2]]),
        ("choice_major", [[0, 1], [1, 0], [0, 2]]),
        ("batch_prioritized", [[1, 1], [0, 0], [0, 2]]),
        ("probability", [[1, 0], [0, 0], [1, 2]]),
    ],
)
def test_slots_are_handed_out_in_the_order_of_the_queue(order, slots):
    # Token 2's choice of A is third in every order, and finds no slot.
    assert assign(order, 1.0) == ([[1, 1], [1, 1], [1, 0]], slots)


@pytest.mark.parametrize(
    ("order", "kept"),
    [
        ("batch_prioritized", [[1, 0], [0, 1], [1, 0]]),  # as choice_major
        ("probability", [[1, 1], [0, 1], [0, 0]]),  # as token_major
    ],
)
def test_equal_probabilities_are_served_in_the_order_of_the_tokens(order, kept):
    assert assign(order, 0.5, probs=np.full((3, 3), 1 / 3, np.float32))[0] == kept


@pytest.mark.parametrize(
    ("order", "kept"),
    [
        # Without token 1, tokens 0 and 2 compete for A and B, and no token wants C.
        ("token_major", [[1, 1], [0, 0], [0, 0]]),
        ("choice_major", [[1, 0], [0, 0], [1, 0]]),
        ("batch_prioritized", [[1, 0], [0, 0], [1, 0]]),
        ("probability", [[1, 1], [0, 0], [0, 0]]),
    ],
)
def test_padding_takes_no_slot(order, kept):
    assert assign(order, 0.5, valid=[True, False, True])[0] == kept


@pytest.mark.parametrize(
    ("order", "kept"),
    [
        # Token 0's A and token 2's B do not count: token 1 gets A and C, token 0 gets B.
        ("token_major", [[0, 1], [1, 1], [0, 0]]),
        ("choice_major", [[0, 1], [1, 1], [0, 0]]),
        ("batch_prioritized", [[0, 1], [1, 1], [0, 0]]),
        ("probability", [[0, 1], [1, 1], [0, 0]]),
    ],
)
def test_a_choice_that_does_not_count_takes_no_slot(order, kept):
    chosen = jnp.array([[[False, True], [True, True], [False, True]]])
    routing = routing_of(PROBS, CHOICES)._replace(chosen_GSK=chosen)
    out = serve(routing, order, 0.5)
    assert np.asarray(out.kept_GSK[0], int).tolist() == kept
    # With room for all, exactly the choices that count are kept.
    for factor in (0.0, 1.5):
        out = serve(routing, order, factor)
        np.testing.assert_array_equal(out.kept_GSK, chosen)
        np.testing.assert_array_equal(out.gate_GSK, np.where(chosen, routing.gate_GSK, 0))


def test_an_overflowing_choice_keeps_no_slot_for_a_later_one():
    # Token 0 fills A. Token 1 gets only C, token 2 nothing.
    choices = np.array([[A, B], [A, C], [A, C]])
    assert assign("token_major", 0.5, choices=choices)[0] == [[1, 1], [0, 1], [0, 0]]


def test_gates_of_kept_choices_stay_and_of_dropped_ones_are_exactly_zero():
    routing = routing_of(PROBS, CHOICES)
    out = serve(routing, "token_major", 0.5)
    # Gates are not renormalised after a drop: token 1 keeps 0.30 for C, not 1.
    expected = np.array([[0.50, 0.45], [0, 0.30], [0, 0]], np.float32)
    np.testing.assert_array_equal(out.gate_GSK[0], expected)


@pytest.mark.parametrize("order", [*RANKED_ORDERS, "random"])
def test_dropless_keeps_every_valid_choice_whatever_the_queue(order):
    # All tokens choose one expert: five times the mean load. "random" needs no key if dropless.
    probs, choices = np.full((5, 5), 0.2, np.float32), np.full((5, 1), 3, np.int32)
    valid = [True, True, False, True, True]
    kept, slots = assign(order, 0.0, probs, choices, valid)
    assert kept == [[1], [1], [0], [1], [1]]
    assert len({slot for (slot,), (k,) in zip(slots, kept, strict=True) if k}) == 4


def test_random_order_needs_a_key():
    with pytest.raises(ValueError, match=r"queue='random' needs a random key: rng=None"):
        assign("random", 0.5)


def test_random_order_gives_every_token_a_chance_and_depends_on_the_key_alone():
    routing = routing_of(np.full((4, 4), 0.25, np.float32), np.full((4, 1), 2, np.int32))

    def kept(key):
        return serve(routing, "random", 1.0, rng=key).kept_GSK[0, :, 0]

    draws = np.asarray(jax.vmap(kept)(jax.random.split(jax.random.key(0), 400)))
    assert (draws.sum(axis=1) == 1).all()  # one slot, one winner
    # 400 draws with probability 1/4; the tolerance is four standard deviations of 0.022.
    np.testing.assert_allclose(draws.mean(axis=0), 0.25, atol=0.087)
    np.testing.assert_array_equal(kept(jax.random.key(7)), kept(jax.random.key(7)))


SHAPES = ((1, 6, 4, 1), (2, 9, 5, 3), (1, 8, 3, 3))  # G, S, E, K
FACTORS = (0.4, 1.0, 3.0)


@functools.partial(jax.jit, static_argnames=("order", "factor"))
def assign_jit(routing, valid, key, order, factor):
    return serve(routing, order, factor, valid, key)


@pytest.mark.parametrize("order", [*RANKED_ORDERS, "random"])
@PROPERTIES
@given(
    shape=st.sampled_from(SHAPES),
    factor=st.sampled_from(FACTORS),
    padding=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_slots_have_one_owner_and_go_to_whom_the_oracle_serves(order, shape, factor, padding, seed):
    groups, tokens, experts, choices = shape
    random = np.random.default_rng(seed)
    # Multiples of 1/16, so equal probabilities occur.
    probs = random.integers(1, 16, size=(groups, tokens, experts)).astype(np.float32) / 16
    index = np.argsort(-probs, axis=-1, kind="stable")[..., :choices].astype(np.int32)
    gate = np.take_along_axis(probs, index, axis=-1)
    valid = random.random((groups, tokens)) >= padding
    routing = Routing(np.log(probs), probs, index, gate, np.ones(index.shape, bool))
    out = assign_jit(routing, valid, jax.random.key(seed), order, factor)
    kept, slot, capacity = np.asarray(out.kept_GSK), np.asarray(out.slot_GSK), int(out.capacity)
    assert capacity == Capacity().num_slots(tokens, experts, choices, factor)

    assert not kept[~valid].any()
    np.testing.assert_array_equal(out.gate_GSK, np.where(kept, gate, 0))
    for g in range(groups):
        owners = [
            (index[g, s, k], slot[g, s, k]) for s, k in zip(*np.nonzero(kept[g]), strict=True)
        ]
        assert len(set(owners)) == len(owners)
        assert all(0 <= c < capacity for _, c in owners)
        for e in range(experts):
            wanted = np.sum((index[g] == e) & valid[g][:, None])
            assert np.sum(kept[g][index[g] == e]) == min(wanted, capacity)
        if order != "random":
            pairs = moe_oracle.queue(order, probs[g], gate[g])
            expected_kept, expected_slot = moe_oracle.serve(index[g], pairs, capacity, valid[g])
            np.testing.assert_array_equal(kept[g], expected_kept)
            np.testing.assert_array_equal(slot[g][kept[g]], expected_slot[kept[g]])
    if capacity >= tokens:
        assert kept[valid].all()


@pytest.mark.parametrize("order", RANKED_ORDERS)
def test_groups_do_not_see_each_other(order):
    random = np.random.default_rng(0)
    probs = random.random((2, 9, 5)).astype(np.float32)
    index = np.argsort(-probs, axis=-1)[..., :3].astype(np.int32)
    gate = np.take_along_axis(probs, index, axis=-1)
    routing = Routing(np.log(probs), probs, index, gate, np.ones(index.shape, bool))
    valid = np.ones((2, 9), bool)
    both = assign_jit(routing, valid, jax.random.key(0), order, 0.4)
    swapped = jax.tree.map(lambda a: a[::-1], routing)
    back = assign_jit(swapped, valid, jax.random.key(0), order, 0.4)
    np.testing.assert_array_equal(both.slot_GSK, back.slot_GSK[::-1])
    np.testing.assert_array_equal(both.kept_GSK, back.kept_GSK[::-1])


def test_fixed_slots_stand_in_place_of_every_factor_but_0():
    moe = MoE(num_experts=4, num_selected_experts=1, capacity=Capacity(slots=2))
    assert moe.options(16, training=True).slots == 2
    assert moe.options(16, training=False, factor=1.0).slots == 2
    assert moe.options(16, training=False, factor=0.0).dropless


@pytest.mark.parametrize("unused", [{"multiple_of": 8}, {"per": "token"}, {"train_factor": 3.0}])
def test_settings_that_fixed_slots_would_ignore_are_refused(unused):
    with pytest.raises(ValueError, match=rf"slots=6, {next(iter(unused))}="):
        Capacity(slots=6, **unused)
