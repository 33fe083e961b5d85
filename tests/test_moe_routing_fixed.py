"""Routers whose experts are fixed beforehand: by hash, at random, in turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ModelConfig, MoEConfig, RouterConfig
from moe_jax.models import Decoder
from moe_jax.moe.block import moe_block
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.parameters import moe_specs
from moe_jax.moe.routing import RouterInputs, route_tokens
from moe_jax.moe.routing.fixed import balanced_table

E, K, LENGTH, MODEL_DIM = 4, 2, 8, 3
TABLE = (3, 3, 0, 1, 2, 0)  # of six token ids
ROUTERS = {
    "token": RouterConfig(kind="hash"),
    "modulo": RouterConfig(kind="hash", hash_by="modulo"),
    "table": RouterConfig(kind="hash", hash_by="table", hash_table=TABLE),
    "position": RouterConfig(kind="hash", hash_by="position"),
    "bigram": RouterConfig(kind="hash", hash_by="bigram"),
    "random": RouterConfig(kind="random"),
    "uniform": RouterConfig(kind="uniform"),
}
TOKENS = np.array([[0, 1, 2, 3, 0, 1, 5, 4]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3]])  # two documents


def make_config(router, choices=K, experts=E, **settings):
    return MoEConfig(
        num_experts=experts, num_selected_experts=choices, expert_dim=5, router=router, **settings
    )


def choices_of(config, tokens=TOKENS, positions=POSITIONS, previous=None, rng=None):
    """Experts of one group, [S, K]."""
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    if previous is None:
        previous = jnp.where(positions == 0, -1, jnp.roll(tokens, 1, axis=1))
    valid = jnp.ones(tokens.shape, jnp.bool_)
    inputs = RouterInputs(None, rng, valid, LENGTH, positions, tokens, previous)
    x = jnp.zeros((*tokens.shape, MODEL_DIM))
    return np.asarray(route_tokens(x, {}, config, inputs).expert_index_GSK[0])


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("choices", [1, 2, 4])
def test_a_token_gets_different_experts_and_equal_gates(name, choices):
    router = dataclasses.replace(ROUTERS[name], scaling_factor=3.0)
    config = make_config(router, choices)
    assert not any(key.startswith("router") for key in moe_specs(config, MODEL_DIM))
    for row in choices_of(config, rng=jax.random.key(0)):
        assert len(set(row)) == choices and set(row) <= set(range(E))
    places = (jnp.asarray(a) for a in (POSITIONS, TOKENS, TOKENS))
    inputs = RouterInputs(None, None, jnp.ones((1, LENGTH), jnp.bool_), LENGTH, *places)
    routing = route_tokens(jnp.zeros((1, LENGTH, MODEL_DIM)), {}, config, inputs)
    np.testing.assert_allclose(routing.gate_GSK, 3 / choices, rtol=1e-6)
    np.testing.assert_allclose(routing.probs_GSE.sum(axis=-1), 1, rtol=1e-6)


def test_what_is_given_is_what_is_taken():
    assert choices_of(make_config(ROUTERS["modulo"])).tolist() == [
        [0, 1], [1, 2], [2, 3], [3, 0], [0, 1], [1, 2], [1, 2], [0, 1],
    ]  # fmt: skip
    first = [TABLE[token] for token in TOKENS[0]]
    expected = [[e, (e + 1) % E] for e in first]
    assert choices_of(make_config(ROUTERS["table"])).tolist() == expected
    # In turn: 0 1, 2 3, 0 1, ...; three of five experts a token: 0 1 2, 3 4 0, 1 2 3, 4 0 1.
    assert choices_of(make_config(ROUTERS["uniform"])).tolist() == [[0, 1], [2, 3]] * 4
    thirds = choices_of(make_config(ROUTERS["uniform"], choices=3, experts=5))
    assert thirds[:4].tolist() == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_equal_keys_get_equal_experts_and_nothing_else_counts():
    by_token = choices_of(make_config(ROUTERS["token"]))
    np.testing.assert_array_equal(by_token[[0, 1]], by_token[[4, 5]])
    by_position = choices_of(make_config(ROUTERS["position"]))
    np.testing.assert_array_equal(by_position[:4], by_position[4:])
    by_bigram = choices_of(make_config(ROUTERS["bigram"], choices=1, experts=64))
    assert by_bigram[0] == by_bigram[4] and by_bigram[1] == by_bigram[5]  # start 0, then 0 1
    other = choices_of(
        make_config(ROUTERS["bigram"], choices=1, experts=64), previous=jnp.full((1, LENGTH), 2)
    )
    assert np.mean(other != by_bigram) > 0.5


@pytest.mark.parametrize("name", ["token", "position", "bigram", "random"])
def test_experts_of_a_hash_are_uniform_and_its_seed_is_another_table(name):
    many = np.arange(4000)[None]
    rng = jax.random.key(0) if name == "random" else None
    config = make_config(ROUTERS[name])
    drawn = choices_of(config, many, many, rng=rng)
    # 4000 draws at 1/4 and, for second choices, too: four standard errors.
    for column in drawn.T:
        np.testing.assert_allclose(np.bincount(column) / 4000, 1 / E, atol=4 * 0.433 / 4000**0.5)
    if name == "random":
        again = choices_of(config, many, many, rng=jax.random.key(1))
    else:
        seeded = make_config(dataclasses.replace(ROUTERS[name], hash_seed=1))
        again = choices_of(seeded, many, many)
    assert 0.2 < np.mean(drawn[:, 0] == again[:, 0]) < 0.3
    # Nor the same table with its keys swapped: ids 2 n and 2 n + 1 differ by the bit of the seed.
    swapped = drawn.reshape(-1, 2, K)[:, ::-1].reshape(-1, K)
    assert 0.2 < np.mean(swapped[:, 0] == again[:, 0]) < 0.3


def test_a_balanced_table_levels_the_counts():
    counts = [50, 1, 20, 10, 19, 0, 0, 0]
    table = balanced_table(counts, 2)
    assert np.bincount(table, weights=counts).tolist() == [50, 50]
    assert set(table) == {0, 1} and len(table) == 8
    # Natural frequencies: the load of the fullest expert is within a hundredth of the mean.
    counts = 10_000 // np.arange(1, 500) + 1
    counts[0] = counts[1]
    loads = np.bincount(balanced_table(counts, 8), weights=counts)
    assert loads.max() / loads.mean() < 1.01
    # Ids that never occurred are spread as well.
    assert np.bincount(balanced_table([0] * 12, 4)).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("dispatch", DISPATCHERS)
def test_a_block_with_fixed_experts_is_balanced_in_turn(dispatch):
    config = make_config(ROUTERS["uniform"], dispatch=dispatch)
    random = np.random.default_rng(0)
    params = {n: random.normal(size=s.shape) for n, s in moe_specs(config, MODEL_DIM).items()}
    x = random.normal(size=(2, LENGTH, MODEL_DIM)).astype(np.float32)
    y, aux = jax.jit(lambda p, x: moe_block(p, x, config))(params, x)
    assert aux.assigned_KE.sum(axis=0).tolist() == [8] * E and aux.max_violation == 0
    assert aux.dropped_fraction_K.tolist() == [0, 0]
    np.testing.assert_allclose(aux.load_balance_loss, 1, rtol=1e-6)
    s, weights = 3, {n: np.asarray(v, np.float64) for n, v in params.items()}
    expected = sum(
        0.5 * np.maximum(x[1, s] @ weights["wi"][e], 0) @ weights["wo"][e] for e in (2, 3)
    )
    np.testing.assert_allclose(y[1, s], expected, rtol=1e-5, atol=1e-5)


def test_a_hash_needs_the_token_ids():
    config = make_config(ROUTERS["token"], dispatch="einsum")
    params = {n: jnp.zeros(s.shape) for n, s in moe_specs(config, MODEL_DIM).items()}
    with pytest.raises(ValueError, match=r"needs the token ids: tokens_BL=None\. Pass tokens_BL"):
        moe_block(params, jnp.zeros((1, LENGTH, MODEL_DIM)), config)


@pytest.mark.parametrize("name", ["token", "table", "position", "bigram", "random", "uniform"])
def test_a_decoder_passes_what_its_routers_need_and_sees_nothing_later(name):
    model = ModelConfig(
        vocab_size=6, num_layers=2, model_dim=8, num_heads=2, head_dim=4, ffn_dim=8,
        moe=make_config(ROUTERS[name], dispatch="einsum"),
    )  # fmt: skip
    decoder, segments = Decoder(model), jnp.ones((1, LENGTH), jnp.int32)
    params = decoder.init(jax.random.key(1), TOKENS, POSITIONS, segments)

    @jax.jit
    def run(tokens):
        rngs = {"dropout": jax.random.key(2), "router": jax.random.key(3)}
        return decoder.apply(
            params, tokens, POSITIONS, segments, train=True, capacity_factor=0.5, rngs=rngs
        )

    output = run(TOKENS)
    for seed in range(8):
        other = TOKENS.copy()
        other[0, 5:] = np.random.default_rng(seed).integers(0, 6, 3)
        moved = np.abs(run(other).logits_BLV - output.logits_BLV)
        assert moved[:, :5].max() < 1e-5
    if name == "table":
        first = np.bincount([TABLE[token] for token in TOKENS[0]], minlength=E)
        np.testing.assert_array_equal(output.aux.assigned_KE[:, 0], [first, first])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RouterConfig(kind="best"),
            r"router\.kind is one of \['base', 'expert_choice', 'hash'",
        ),
        (lambda: RouterConfig(hash_by="name"), r"router\.hash_by is one of \['bigram', 'modulo'"),
        (lambda: RouterConfig(hash_seed=-1), r"router\.hash_seed is at least 0"),
        (
            lambda: RouterConfig(kind="hash", hash_by="table"),
            r"hash_table goes with .*: kind='hash', hash_by='table', 0 entries",
        ),
        (
            lambda: RouterConfig(kind="hash", renormalize=True),
            r"kind='hash' does not use router\.renormalize: renormalize=True\. Drop",
        ),
        (
            lambda: RouterConfig(hash_by="modulo"),
            r"kind='token_choice' does not use router\.hash_by: .* a router\.kind of \['hash'\]",
        ),
        (
            lambda: RouterConfig(kind="uniform", hash_seed=1),
            r"kind='uniform' does not use router\.hash_seed: .* of \['hash', 'random'\]",
        ),
        (
            lambda: RouterConfig(kind="hash", hash_by="modulo", hash_seed=1),
            r"hash_seed is of hashes that are drawn, .*: hash_seed=1, .*hash_by='modulo'",
        ),
        (
            lambda: make_config(ROUTERS["table"], experts=3),
            r"hash_table has experts in 0\.\.num_experts - 1: num_experts=3",
        ),
        (
            lambda: ModelConfig(vocab_size=7, moe=make_config(ROUTERS["table"])),
            r"hash_table has the expert of every token id: 6 entries, vocab_size=7",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
