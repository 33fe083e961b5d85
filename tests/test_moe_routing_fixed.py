"""Routers with fixed experts: by hash, at random, in turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import build
from moe_jax.layers.attention import Attention
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.balance import max_violation, named_losses
from moe_jax.moe.block import moe_block, router_inputs
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import Router, RouterInputs
from moe_jax.moe.routing.fixed import Hash, Random, Uniform, balanced_table
from moe_jax.moe.run_experts.plan import IMPLEMENTATIONS
from moe_jax.moe.statistics import dropped_fraction
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, Dims, Own

E, K, LENGTH, MODEL_DIM = 4, 2, 8, 3
TABLE = (3, 3, 0, 1, 2, 0)  # for six token ids
ROUTERS = {
    "token": Hash(),
    "modulo": Hash(by="modulo"),
    "table": Hash(by="table", table=TABLE),
    "position": Hash(by="position"),
    "bigram": Hash(by="bigram"),
    "random": Random(),
    "uniform": Uniform(),
}
TOKENS = np.array([[0, 1, 2, 3, 0, 1, 5, 4]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3]])  # two documents


def make_moe(router, choices=K, experts=E, **settings):
    return MoE(
        num_experts=experts, num_selected_experts=choices, expert_dim=5, router=router, **settings
    )


def choices_of(moe, tokens=TOKENS, positions=POSITIONS, previous=None, rng=None):
    """Experts of one group, [S, K]."""
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    if previous is None:
        previous = jnp.where(positions == 0, -1, jnp.roll(tokens, 1, axis=1))
    valid = jnp.ones(tokens.shape, jnp.bool_)
    options = moe.options(LENGTH, training=rng is not None)
    inputs = RouterInputs(options, valid, positions, tokens, previous, rng=rng)
    x = jnp.zeros((*tokens.shape, MODEL_DIM))
    return np.asarray(moe.router.route({}, x, inputs).expert_index_GSK[0])


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("choices", [1, 2, 4])
def test_a_token_gets_different_experts_and_equal_gates(name, choices):
    router = dataclasses.replace(ROUTERS[name], scaling_factor=3.0)
    moe = make_moe(router, choices)
    assert "router" not in moe.specs(Dims(MODEL_DIM))
    for row in choices_of(moe, rng=jax.random.key(0)):
        assert len(set(row)) == choices and set(row) <= set(range(E))
    places = (jnp.asarray(a) for a in (POSITIONS, TOKENS, TOKENS))
    options = moe.options(LENGTH, training=False)
    inputs = RouterInputs(options, jnp.ones((1, LENGTH), jnp.bool_), *places)
    routing = router.route({}, jnp.zeros((1, LENGTH, MODEL_DIM)), inputs)
    np.testing.assert_allclose(routing.gate_GSK, 3 / choices, rtol=1e-6)
    np.testing.assert_allclose(routing.probs_GSE.sum(axis=-1), 1, rtol=1e-6)


def test_what_is_given_is_what_is_taken():
    assert choices_of(make_moe(ROUTERS["modulo"])).tolist() == [
        [0, 1], [1, 2], [2, 3], [3, 0], [0, 1], [1, 2], [1, 2], [0, 1],
    ]  # fmt: skip
    first = [TABLE[token] for token in TOKENS[0]]
    expected = [[e, (e + 1) % E] for e in first]
    assert choices_of(make_moe(ROUTERS["table"])).tolist() == expected
    # In turn: 0 1, 2 3, 0 1, ... With three of five experts per token: 0 1 2, 3 4 0, 1 2 3, 4 0 1.
    assert choices_of(make_moe(ROUTERS["uniform"])).tolist() == [[0, 1], [2, 3]] * 4
    thirds = choices_of(make_moe(ROUTERS["uniform"], choices=3, experts=5))
    assert thirds[:4].tolist() == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_equal_keys_get_equal_experts_and_nothing_else_counts():
    by_token = choices_of(make_moe(ROUTERS["token"]))
    np.testing.assert_array_equal(by_token[[0, 1]], by_token[[4, 5]])
    by_position = choices_of(make_moe(ROUTERS["position"]))
    np.testing.assert_array_equal(by_position[:4], by_position[4:])
    by_bigram = choices_of(make_moe(ROUTERS["bigram"], choices=1, experts=64))
    assert by_bigram[0] == by_bigram[4] and by_bigram[1] == by_bigram[5]  # start, 0; then 0, 1
    other = choices_of(
        make_moe(ROUTERS["bigram"], choices=1, experts=64), previous=jnp.full((1, LENGTH), 2)
    )
    assert np.mean(other != by_bigram) > 0.5


@pytest.mark.parametrize(("before", "expected"), [(None, [-1, 7, -1, 9]), (4, [4, 7, -1, 9])])
def test_the_first_token_of_a_call_follows_that_of_the_call_before(before, expected):
    """The third token begins a document."""
    call = Call(
        tokens_BL=jnp.array([[7, 8, 9, 3]]), positions_BL=jnp.array([[5, 6, 0, 1]]),
        segments_BL=jnp.ones((1, 4), jnp.int32),
        previous_B=None if before is None else jnp.array([before]),
    )  # fmt: skip
    x_BLM = jnp.zeros((1, 4, MODEL_DIM))
    inputs = router_inputs(x_BLM, make_moe(ROUTERS["bigram"]), call, Own(), None)[1]
    np.testing.assert_array_equal(inputs.previous_GS[0], expected)


@pytest.mark.parametrize("name", ["token", "position", "bigram", "random"])
def test_experts_of_a_hash_are_uniform_and_its_seed_is_another_table(name):
    many = np.arange(4000)[None]
    rng = jax.random.key(0) if name == "random" else None
    moe = make_moe(ROUTERS[name])
    drawn = choices_of(moe, many, many, rng=rng)
    # 4000 draws with probability 1/4, for second choices too: four standard errors.
    for column in drawn.T:
        np.testing.assert_allclose(np.bincount(column) / 4000, 1 / E, atol=4 * 0.433 / 4000**0.5)
    if name == "random":
        again = choices_of(moe, many, many, rng=jax.random.key(1))
    else:
        seeded = make_moe(dataclasses.replace(ROUTERS[name], seed=1))
        again = choices_of(seeded, many, many)
    assert 0.2 < np.mean(drawn[:, 0] == again[:, 0]) < 0.3
    # Nor is it the same table with swapped keys: ids 2 n and 2 n + 1 differ in the bit of the seed.
    swapped = drawn.reshape(-1, 2, K)[:, ::-1].reshape(-1, K)
    assert 0.2 < np.mean(swapped[:, 0] == again[:, 0]) < 0.3


def test_a_balanced_table_levels_the_counts():
    counts = [50, 1, 20, 10, 19, 0, 0, 0]
    table = balanced_table(counts, 2)
    assert np.bincount(table, weights=counts).tolist() == [50, 50]
    assert set(table) == {0, 1} and len(table) == 8
    # Frequencies by Zipf's law: the largest load is within a hundredth of the mean.
    counts = 10_000 // np.arange(1, 500) + 1
    counts[0] = counts[1]
    loads = np.bincount(balanced_table(counts, 8), weights=counts)
    assert loads.max() / loads.mean() < 1.01
    # Ids that never occurred are spread too.
    assert np.bincount(balanced_table([0] * 12, 4)).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("way", IMPLEMENTATIONS[1:])
def test_a_block_with_fixed_experts_is_balanced_in_turn(way):
    moe = make_moe(ROUTERS["uniform"], run_experts=way)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda spec: random.normal(size=spec.shape), moe.specs(Dims(MODEL_DIM)))
    x = random.normal(size=(2, LENGTH, MODEL_DIM)).astype(np.float32)
    call = Call(capacity=moe.capacity.train_factor)
    y, aux = jax.jit(lambda p, x: moe_block(p, x, moe, call))(params, x)
    assigned_KE, kept_KE = aux.sums["assigned_KE"], aux.sums["kept_KE"]
    assert assigned_KE.sum(axis=0).tolist() == [8] * E
    assert max_violation(assigned_KE.sum(axis=0)) == 0
    assert dropped_fraction(assigned_KE, kept_KE).tolist() == [0, 0]
    loss = dict(named_losses(moe.losses))["load_balance_loss"]
    sums = jax.tree.map(lambda leaf: leaf[None], aux.sums["losses"]["load_balance_loss"])
    np.testing.assert_allclose(loss.by_layer(sums, aux.sums["num_tokens"]), 1, rtol=1e-6)
    s, weights = 3, {n: np.asarray(v, np.float64) for n, v in params["experts"].items()}
    expected = sum(
        0.5 * np.maximum(x[1, s] @ weights["wi"][e], 0) @ weights["wo"][e] for e in (2, 3)
    )
    np.testing.assert_allclose(y[1, s], expected, rtol=1e-5, atol=1e-5)


def test_a_hash_needs_the_token_ids():
    moe = make_moe(ROUTERS["token"], run_experts="einsum")
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), moe.specs(Dims(MODEL_DIM)))
    with pytest.raises(ValueError, match=r"needs the token ids: tokens_BL=None\. Pass tokens_BL"):
        moe_block(params, jnp.zeros((1, LENGTH, MODEL_DIM)), moe)


def make_model(moe, vocab_size=6):
    return LanguageModel(
        vocab_size=vocab_size,
        model_dim=8,
        parts={"attention": Attention(num_heads=2, head_dim=4), "moe": moe},
        stack=StackLayout(unit=(("attention", "moe"),), repeats=2),
    )


@pytest.mark.parametrize("name", ["token", "table", "position", "bigram", "random", "uniform"])
def test_a_model_passes_what_its_routers_need_and_sees_nothing_later(name):
    model = make_model(make_moe(ROUTERS[name], run_experts="einsum"))
    params = init_parameters(jax.random.key(1), model.specs())

    @jax.jit
    def run(tokens):
        call = Call(
            tokens_BL=jnp.asarray(tokens),
            positions_BL=jnp.asarray(POSITIONS),
            segments_BL=jnp.ones((1, LENGTH), jnp.int32),
            rng=jax.random.key(2),
            capacity=0.5,
        )
        return model.run(params, call)

    output = run(TOKENS)
    for seed in range(8):
        other = TOKENS.copy()
        other[0, 5:] = np.random.default_rng(seed).integers(0, 6, 3)
        moved = np.abs(run(other).logits_BLV - output.logits_BLV)
        assert moved[:, :5].max() < 1e-5
    if name == "table":
        first = np.bincount([TABLE[token] for token in TOKENS[0]], minlength=E)
        assigned_XKE = output.aux["moe"].sums["assigned_KE"]
        np.testing.assert_array_equal(assigned_XKE[:, 0], [first, first])


def of_dict(**values):
    return build(Router, values, "config.router")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: of_dict(kind="best"),
            r"a kind of router is one of \['base', 'expert_choice', 'hash'.*: kind='best'",
        ),
        (lambda: Hash(by="name"), r"by is one of \['token', 'modulo'.*: by='name'"),
        (lambda: Hash(seed=-1), r"seed lies in \[0, .*: seed=-1"),
        (
            lambda: Hash(by="table"),
            r"must be set together: by='table', 0 entries",
        ),
        (
            lambda: of_dict(kind="hash", renormalize=True),
            r"config\.router has the fields \[.*\]: config\.router\.renormalize\.",
        ),
        (
            lambda: of_dict(kind="token_choice", by="modulo"),
            r"config\.router has the fields \[.*\]: config\.router\.by\.",
        ),
        (lambda: of_dict(kind="uniform", seed=1), r"config\.router\.seed\."),
        (
            lambda: Hash(by="modulo", seed=1),
            r"seed has no effect with .*: seed=1, by='modulo'",
        ),
        (
            lambda: make_moe(ROUTERS["table"], experts=3),
            r"router\.table must hold experts in 0\.\.num_experts - 1: num_experts=3",
        ),
        (
            lambda: make_model(make_moe(ROUTERS["table"]), vocab_size=7),
            r"router\.table must have one expert per token id: 6 entries, vocab_size=7",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
