"""Parameters before they exist: specs, initial draws, and how weights are read."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.parameters import (
    SAME_WEIGHTS,
    ParameterSpec,
    Weight,
    dense,
    ffn_specs,
    grouped,
    init_parameters,
    linear,
    normal_init,
    ones,
    rows,
    scaled_init,
    truncated_normal_init,
    weight_axes,
    zeros,
)

KEY = jax.random.key(0)
PINNED = [[0.3674694, -0.23590402], [-1.5201972, -1.4549596], [-0.23961718, 0.96261352]]
SPEC = ParameterSpec((3, 2), ("model", "hidden"), normal_init(1.0), "experts")


def test_a_spec_is_a_leaf_of_a_tree():
    tree = {"a": SPEC, "b": {"c": SPEC}}
    assert jax.tree.leaves(tree) == [SPEC, SPEC]
    assert jax.tree.map(lambda spec: spec.shape, tree) == {"a": (3, 2), "b": {"c": (3, 2)}}
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.shape = (1,)


def test_a_stacked_spec_has_a_dim_in_front_and_draws_each_entry_by_itself():
    stacked = SPEC.stack(4)
    assert stacked.shape == (4, 3, 2) and stacked.size == 24
    assert stacked.axes == (None, "model", "hidden")
    assert (SPEC.num_stacked, stacked.num_stacked, stacked.stack(5).num_stacked) == (0, 1, 2)
    kept = ("component", "decays", "dtype")
    assert all(getattr(stacked, name) == getattr(SPEC, name) for name in kept)
    values = stacked.init(KEY, stacked.shape, stacked.dtype)
    each = [SPEC.init(key, SPEC.shape, SPEC.dtype) for key in jax.random.split(KEY, 4)]
    np.testing.assert_array_equal(values, np.stack(each))
    assert len(np.unique(values)) == 24
    twice = stacked.stack(5)
    assert twice.init(KEY, twice.shape, twice.dtype).shape == (5, 4, 3, 2)


def test_a_stack_of_experts_draws_each_layer_by_itself():
    spec = ffn_specs(
        3, 2, "experts", gated=False, use_bias=False, init_scale=1.0, num_experts=4,
        identical_init=True,
    )["wi"]  # fmt: skip
    values = np.asarray(init_parameters(KEY, {"wi": spec.stack(5)})["wi"])
    assert values.shape == (5, 4, 3, 2) and spec.stack(5).num_stacked == 2
    np.testing.assert_array_equal(values, np.broadcast_to(values[:, :1], values.shape))
    assert len(np.unique(values)) == 5 * 3 * 2


def test_a_parameter_is_drawn_from_a_key_of_its_path():
    """The same values in every process and release, by CRC-32 and not by Python's `hash`."""
    values = init_parameters(KEY, {"experts": {"wi": SPEC}})["experts"]["wi"]
    own = jax.random.fold_in(KEY, zlib.crc32(b"['experts']['wi']"))
    np.testing.assert_array_equal(values, SPEC.init(own, (3, 2), jnp.float32))
    np.testing.assert_allclose(values, PINNED, rtol=1e-6)


def test_draws_depend_on_the_path_alone():
    alone = init_parameters(KEY, {"experts": {"wi": SPEC}})
    among = init_parameters(KEY, {"experts": {"wi": SPEC, "a": SPEC}, "router": {"wi": SPEC}})
    np.testing.assert_array_equal(among["experts"]["wi"], alone["experts"]["wi"])
    drawn = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(among)]
    assert len(set(drawn)) == 3
    # Below another root the path differs.
    elsewhere = init_parameters(KEY, {"moe": {"experts": {"wi": SPEC}}})["moe"]["experts"]["wi"]
    assert np.abs(elsewhere - alone["experts"]["wi"]).min() > 0
    other = init_parameters(jax.random.key(1), {"experts": {"wi": SPEC}})["experts"]["wi"]
    assert np.abs(other - alone["experts"]["wi"]).min() > 0


def test_a_parameter_has_the_dtype_of_its_spec():
    for init in (normal_init(1.0), truncated_normal_init(1.0), scaled_init(1.0, 4), ones, zeros):
        spec = ParameterSpec((2, 3, 4), (None,) * 3, init, "head", dtype=jnp.bfloat16)
        values = init_parameters(KEY, {"w": spec})["w"]
        assert values.dtype == jnp.bfloat16 and values.shape == (2, 3, 4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Scaled(Weight):
    """A matrix [I, O] with one factor per column."""

    base: jax.Array
    factor: jax.Array

    def product(self, x, layout):
        return layout.matmul(x, self.base.astype(x.dtype)) * layout.expand(self.factor)

    def dense(self):
        return self.base * self.factor

    def axes_of(self, axes):
        return Scaled(axes, axes[-1:])


def test_what_a_weight_wraps_as_its_base_keeps_the_values_that_it_had_unwrapped():
    factor = ParameterSpec((2,), ("hidden",), normal_init(1.0), "experts", decays=False)
    wrapped = init_parameters(KEY, {"wi": Scaled(SPEC, factor)})["wi"]
    plain = init_parameters(KEY, {"wi": SPEC})["wi"]
    assert isinstance(wrapped, Scaled)
    np.testing.assert_array_equal(wrapped.base, plain)
    assert len(np.unique(np.concatenate([wrapped.factor, plain[0]]))) == 4


def test_a_weight_of_several_arrays_passes_every_door():
    random = np.random.default_rng(0)
    weight = Scaled(*(jnp.asarray(random.normal(size=s), jnp.float32) for s in ((3, 2), 2)))
    x = jnp.asarray(random.normal(size=(5, 3)), jnp.float32)
    whole = np.asarray(weight.base) * np.asarray(weight.factor)
    np.testing.assert_array_equal(dense(weight), whole)
    np.testing.assert_allclose(linear(x, weight), x @ whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grouped(x, weight, SAME_WEIGHTS), x @ whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rows(weight, jnp.array([[2, 0]])), whole[[[2, 0]]])
    assert weight_axes(("model", "hidden"), weight) == Scaled(("model", "hidden"), ("hidden",))
    assert weight_axes(("model", "hidden"), weight.base) == ("model", "hidden")


def test_an_array_passes_every_door():
    weight, x = jnp.arange(6.0).reshape(3, 2), jnp.ones((4, 3), jnp.bfloat16)
    assert dense(weight) is weight
    assert linear(x, weight).dtype == grouped(x, weight, SAME_WEIGHTS).dtype == jnp.bfloat16
    np.testing.assert_array_equal(linear(x, weight), np.full((4, 2), [6, 9]))
    picked = rows(weight, jnp.array([1, 1, 2]))
    assert picked.dtype == jnp.float32
    np.testing.assert_array_equal(picked, [[2, 3], [2, 3], [4, 5]])
