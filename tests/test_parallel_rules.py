"""The table from dims to mesh axes, worked out by hand, and its effect on arrays."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, PartitionSpec

from moe_jax.parallel.rules import (
    RULES,
    constrain,
    mesh_axes,
    mesh_in_use,
    named_sharding,
    num_shards,
    partition_spec,
    platform,
    without_mesh,
)

# One mesh with a copy of the model per slice, one with experts over slices, and one with fewer axes
# than the table. Nothing is split over `data`, which has one device.
SLICES = AbstractMesh((2, 1, 2, 3, 5), ("slice", "data", "fsdp", "expert", "tensor"))
SPANNED = AbstractMesh((2, 1, 2, 3, 5), ("expert_slice", "data", "fsdp", "expert", "tensor"))
DATA_ONLY = AbstractMesh((4,), ("data",))

# The whole table: name, axes and shards on SLICES, axes and shards on SPANNED.
BY_HAND = [
    ("batch", ("slice", "fsdp", "expert"), 12, ("expert_slice", "fsdp", "expert"), 12),
    ("group", ("slice", "fsdp", "expert"), 12, ("expert_slice", "fsdp", "expert"), 12),
    ("expert_group", ("slice", "fsdp"), 4, ("fsdp",), 2),
    ("expert", ("expert",), 3, ("expert_slice", "expert"), 6),
    ("hidden", ("tensor",), 5, ("tensor",), 5),
    ("heads", ("tensor",), 5, ("tensor",), 5),
    ("vocab", ("tensor",), 5, ("tensor",), 5),
    ("model", ("fsdp",), 2, ("fsdp",), 2),
]  # fmt: skip


def eight_devices():
    names = ("slice", "data", "fsdp", "expert", "tensor")
    return Mesh(np.array(jax.devices()).reshape(1, 2, 1, 2, 2), names)


@pytest.mark.parametrize(("name", "axes", "shards", "spanned_axes", "spanned_shards"), BY_HAND)
def test_the_table(name, axes, shards, spanned_axes, spanned_shards):
    assert mesh_axes(name, SLICES) == axes
    assert num_shards(name, SLICES) == shards
    assert mesh_axes(name, SPANNED) == spanned_axes
    assert num_shards(name, SPANNED) == spanned_shards


def test_every_rule_is_worked_out_by_hand():
    assert set(RULES) == {row[0] for row in BY_HAND}


def test_experts_and_the_groups_they_compute_share_no_axis():
    """Slots are split over both at once; together these are the axes that split the tokens."""
    for mesh in (SLICES, SPANNED):
        experts, groups = mesh_axes("expert", mesh), mesh_axes("expert_group", mesh)
        assert not set(experts) & set(groups)
        assert set(experts) | set(groups) == set(mesh_axes("group", mesh))


def test_a_dim_without_a_name_is_not_split():
    assert mesh_axes(None, SLICES) == ()
    assert partition_spec((None, None), SLICES) == PartitionSpec(None, None)


def test_axes_that_the_mesh_does_not_have_are_left_out():
    assert mesh_axes("batch", DATA_ONLY) == ("data",)
    assert mesh_axes("expert", DATA_ONLY) == ()
    assert num_shards("expert", DATA_ONLY) == 1
    assert partition_spec(("batch", "expert"), DATA_ONLY) == PartitionSpec("data", None)


def test_an_unknown_dim_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"must be one of \['batch', .*'vocab'\]: got 'length'\. Add"
    ):
        mesh_axes("length", DATA_ONLY)


@pytest.mark.parametrize(
    ("names", "spec"),
    [
        (("expert", "model", "hidden"), (("expert",), ("fsdp",), ("tensor",))),
        (("expert", "hidden", "model"), (("expert",), ("tensor",), ("fsdp",))),
        (("batch", None, "vocab"), (("slice", "fsdp", "expert"), None, ("tensor",))),
        ((), ()),
    ],
)
def test_specs_go_dim_by_dim(names, spec):
    assert partition_spec(names, SLICES) == PartitionSpec(*spec)


def test_a_named_sharding_cuts_each_dim_into_its_shards():
    mesh = eight_devices()
    sharding = named_sharding(("expert", "model", "hidden"), mesh)
    assert sharding.mesh == mesh
    assert sharding.shard_shape((6, 4, 10)) == (3, 4, 5)
    assert named_sharding(("batch", None), mesh).shard_shape((8, 3)) == (2, 3)


def test_without_a_mesh_nothing_is_constrained():
    assert mesh_in_use() is None
    x = jnp.arange(3.0)
    assert constrain(x, "batch") is x


def test_a_mesh_of_one_device_is_none():
    names = ("slice", "data", "fsdp", "expert", "tensor")
    with jax.set_mesh(Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1, 1), names)):
        assert mesh_in_use() is None
        x = jnp.arange(3.0)
        assert constrain(x, "batch") is x


@pytest.mark.parametrize(
    "names", [("batch", None), ("expert", "hidden"), (None, "heads"), (None, None)]
)
def test_a_constrained_array_lies_as_the_table_says(names):
    mesh = eight_devices()
    x = np.arange(64.0).reshape(8, 8)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(2 * x, *names))(x)
    assert y.sharding.is_equivalent_to(named_sharding(names, mesh), 2)
    np.testing.assert_array_equal(y, 2 * x)


def test_an_uneven_dim_is_refused_with_its_name_and_size():
    """The compiler would pad it, and would gather it where it should not."""
    with jax.set_mesh(eight_devices()):
        message = (
            r"must split a dim evenly: 'batch' of size 6 over 4 devices "
            r"\(\('data', 'expert'\)\), array \(4, 6\)\. Change the mesh"
        )
        with pytest.raises(ValueError, match=message):
            constrain(jnp.zeros((4, 6)), None, "batch")


def test_an_unknown_dim_cannot_be_constrained():
    with jax.set_mesh(eight_devices()), pytest.raises(ValueError, match="got 'length'"):
        constrain(jnp.zeros(8), "length")


def test_every_dim_is_given_a_name():
    with jax.set_mesh(eight_devices()), pytest.raises(AssertionError):
        constrain(jnp.zeros((8, 8)), "batch")


def test_a_mesh_can_be_left():
    with jax.set_mesh(eight_devices()):
        assert mesh_in_use().size == 8
        with without_mesh():
            assert mesh_in_use() is None
            x = jnp.zeros(3)
            assert constrain(x, "batch") is x
        assert mesh_in_use().size == 8


@pytest.mark.parametrize(
    ("of_device", "name"), [("cpu", "cpu"), ("tpu", "tpu"), ("cuda", "gpu"), ("rocm", "gpu")]
)
def test_the_platform_is_that_of_the_meshs_devices_wherever_they_are(of_device, name):
    device = AbstractDevice(device_kind="any", num_cores=1, platform=of_device)
    mesh = AbstractMesh((4,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == name


@pytest.mark.parametrize(
    ("backend", "name"), [("cpu", "cpu"), ("tpu", "tpu"), ("gpu", "gpu"), ("cuda", "gpu")]
)
def test_without_a_mesh_the_platform_is_the_default_one(backend, name):
    assert platform() == jax.default_backend()
    with mock.patch.object(jax, "default_backend", lambda: backend):
        assert platform() == name
        # This includes a mesh that does not declare its devices.
        with jax.sharding.use_abstract_mesh(AbstractMesh((4,), ("data",))):
            assert platform() == name
