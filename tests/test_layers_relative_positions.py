"""Biases of scores by T5's buckets of relative positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checks import Trial, check
from moe_jax.layers.attention import Attention
from moe_jax.layers.relative_positions import RelativePositions
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, Dims, Own

FLOAT32 = 1e-5


def firsts(causal, **settings):
    """The smallest backward distance in each bucket."""
    part = RelativePositions(**settings)
    buckets = part.buckets(-jnp.arange(400), causal=causal)
    assert (np.diff(buckets) >= 0).all()
    return np.unique(buckets, return_index=True)[1].tolist()


def test_buckets_by_hand():
    """Half the buckets hold one distance each; the rest grow by a constant ratio up to 128."""
    behind = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert firsts(causal=True) == list(range(16)) + behind
    # An encoder has half as many buckets per direction: 8 times 16^(k / 8).
    assert firsts(causal=False) == list(range(8)) + [8, 12, 16, 23, 32, 46, 64, 91]
    # The last two start at 2 times 4^(k / 2).
    assert firsts(causal=True, num_buckets=4, max_distance=8) == [0, 1, 2, 4]


def test_what_is_ahead():
    part = RelativePositions(num_buckets=8, max_distance=16)
    relative = jnp.array([-40, -1, 0, 1, 2, 40])
    assert part.buckets(relative, causal=True).tolist() == [7, 1, 0, 0, 0, 0]
    assert part.buckets(relative, causal=False).tolist() == [3, 1, 0, 5, 6, 7]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 256), (33, 100), (4, 1000)]
)
@pytest.mark.slow
def test_buckets_equal_those_of_transformers(num_buckets, max_distance, causal):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = np.arange(-1500, 1501)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(relative), not causal, num_buckets, max_distance
    )
    part = RelativePositions(num_buckets=num_buckets, max_distance=max_distance)
    np.testing.assert_array_equal(part.buckets(jnp.asarray(relative), causal=causal), expected)


def test_settings_without_far_buckets_are_refused():
    message = r"max_distance must be above num_buckets / 2.*max_distance=16, num_buckets=32"
    with pytest.raises(ValueError, match=message):
        RelativePositions(max_distance=16)


def test_the_table_starts_as_that_of_t5():
    specs = RelativePositions(num_heads=64, num_buckets=64).specs(Dims(16))
    table = init_parameters(jax.random.key(0), specs)["table"]
    assert table.shape == (64, 64)
    assert np.std(table) == pytest.approx(1 / 4, rel=0.05)


PART = RelativePositions(num_heads=2, num_buckets=8, max_distance=12)
TABLE = {"table": jnp.arange(16.0).reshape(8, 2)}


def test_a_bias_is_an_entry_of_the_table():
    x = jnp.zeros((3, 5, 4))
    call = Call(causal=True).with_defaults(x)
    bias, _, _ = PART.apply(TABLE, x, call, Own())
    assert bias.shape == (1, 2, 5, 5) and bias.dtype == jnp.float32
    # Distances 0 to 4 are in buckets 0 to 4; head 1 has the odd numbers.
    assert bias[0, 0, 4].tolist() == [8, 6, 4, 2, 0]
    assert bias[0, 1, 4].tolist() == [9, 7, 5, 3, 1]
    bias, _, _ = PART.apply(TABLE, x, dataclasses.replace(call, causal=False), Own())
    assert bias[0, 0, 2].tolist() == [4, 2, 0, 10, 12]


def test_queries_behind_cached_keys_have_the_rows_of_the_square():
    places = jnp.arange(7)[None]
    square = PART.bias(TABLE, places, places, causal=True)
    rows = jnp.array([[3], [6]])
    some = PART.bias(TABLE, rows, jnp.tile(places, (2, 1)), causal=True)
    np.testing.assert_array_equal(some[:, :, 0], square[0].swapaxes(0, 1)[np.array([3, 6])])


def model(causal=True, **settings):
    attention = Attention(
        num_heads=2, head_dim=4, rotary=None, scale=1.0, position_bias="position", **settings
    )
    return LanguageModel(
        vocab_size=16,
        model_dim=8,
        parts={"attention": attention, "position": PART},
        stack=StackLayout(unit=(("attention",),), repeats=2, shared=("position",), causal=causal),
    )


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_packed_and_padded_documents_give_what_they_give_alone(causal):
    random = np.random.default_rng(0)
    one = model(causal)
    params = jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), one.specs())
    tokens = random.integers(0, 16, (2, 10)).astype(np.int32)
    # Row 0: four tokens, five tokens, padding. Row 1: padding, six tokens.
    segments = np.array([[1] * 4 + [2] * 5 + [0], [0] * 4 + [1] * 6], np.int32)
    positions = np.array([[*range(4), *range(5), 0], [0] * 4 + [*range(6)]], np.int32)

    def logits(tokens, **where):
        return one.run(params, Call(tokens_BL=jnp.asarray(tokens), **where)).logits_BLV

    together = logits(tokens, positions_BL=positions, segments_BL=segments)
    for row, start, end in ((0, 0, 4), (0, 4, 9), (1, 4, 10)):
        alone = logits(tokens[row : row + 1, start:end])[0]
        np.testing.assert_allclose(together[row, start:end], alone, rtol=FLOAT32, atol=1e-4)
    flat = jax.tree.map(jnp.zeros_like, params["stack"]["shared"])
    changed = params | {"stack": params["stack"] | {"shared": flat}}
    moved = one.run(changed, Call(tokens_BL=jnp.asarray(tokens))).logits_BLV - logits(tokens)
    assert np.abs(moved).max() > 0.1, "the bias matters"


def test_it_cannot_be_a_branch():
    message = r"does not add to the residual cannot be a branch.*\['position'\].*stack\.shared"
    with pytest.raises(ValueError, match=message):
        LanguageModel(
            parts={"attention": Attention(), "position": RelativePositions()},
            stack=StackLayout(unit=(("attention", "position"),), repeats=2),
        )


@pytest.mark.parametrize("name", ["serialises", "specs"])
def test_the_checks_of_parts_put_it_beside_the_layers(name):
    result = check(name, Trial(RelativePositions(num_heads=2)))
    assert result.passed, result.text
