"""Where every array of a run lies: parameters by a table worked out by hand, the rest with them."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.models.parameters import key_path, parameter_axes
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.training.placement import (
    axes_of_moment,
    compiler_options,
    new_state,
    state_shardings,
)
from moe_jax.training.state import init_state
from tests.tiny_run import tiny_config

# A parameter by its module (or, of a norm, its kind) and name. Vectors that are added along the
# model dim lie as it does; norms, and the router's experts, are on every device.
AXES = {
    ("", "embedding"): ("vocab", "model"),
    ("", "head"): ("model", "vocab"),
    ("norm", "scale"): (None,),
    ("norm", "bias"): (None,),
    ("attention", "wq"): ("model", "heads"),
    ("attention", "wk"): ("model", "heads"),
    ("attention", "wv"): ("model", "heads"),
    ("attention", "wo"): ("heads", "model"),
    ("attention", "bq"): ("heads",),
    ("attention", "bk"): ("heads",),
    ("attention", "bv"): ("heads",),
    ("attention", "bo"): ("model",),
    ("ffn", "wi"): ("model", "hidden"),
    ("ffn", "wg"): ("model", "hidden"),
    ("ffn", "wo"): ("hidden", "model"),
    ("ffn", "bi"): ("hidden",),
    ("ffn", "bg"): ("hidden",),
    ("ffn", "bo"): ("model",),
    ("moe", "router"): ("model", None),
    ("moe", "wi"): ("expert", "model", "hidden"),
    ("moe", "wg"): ("expert", "model", "hidden"),
    ("moe", "wo"): ("expert", "hidden", "model"),
    ("moe", "bi"): ("expert", "hidden"),
    ("moe", "bg"): ("expert", "hidden"),
    ("moe", "bo"): ("expert", "model"),
    ("moe", "shared_wi"): ("model", "hidden"),
    ("moe", "shared_wg"): ("model", "hidden"),
    ("moe", "shared_wo"): ("hidden", "model"),
    ("moe", "shared_bi"): ("hidden",),
    ("moe", "shared_bg"): ("hidden",),
    ("moe", "shared_bo"): ("model",),
    ("moe", "shared_gate"): ("model", None),
}
EVERYTHING = {
    "model": {
        "num_layers": 4,
        "tie_embeddings": False,
        "attention_bias": True,
        "ffn_bias": True,
        "qk_norm": True,
        "norm": "layernorm",
        "activation": "swiglu",
        "moe": {
            "num_dense_first": 1,
            "activation": "geglu",
            "use_bias": True,
            "num_shared_experts": 2,
            "shared_expert_gate": True,
            "balance": {"bias_update_rate": 0.1},
        },
    }
}
MIXED = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)


def everything(scan_layers=True, **sections):
    settings = {"model": EVERYTHING["model"] | {"scan_layers": scan_layers}}
    return tiny_config(settings | sections)


def abstract_state(config):
    return jax.eval_shape(functools.partial(init_state, config))


def axes_by_hand(path):
    """The names of a parameter's dims, and the row of the table."""
    module = path[-2] if len(path) > 1 else ""
    row = ("norm" if module.endswith("norm") else module, path[-1])
    scanned = (None,) if "repeated" in path else ()
    return scanned + AXES[row], row


@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_axes_of_every_parameter(scan_layers):
    config = everything(scan_layers)
    seen = set()
    for path, leaf in jax.tree.leaves_with_path(abstract_state(config).params):
        expected, row = axes_by_hand(key_path(path))
        assert parameter_axes(key_path(path), config.model) == expected, path
        assert len(expected) == leaf.ndim, path
        seen.add(row)
    assert seen == set(AXES)


def test_parameters_lie_as_the_table_says_and_adams_moments_with_them():
    config, mesh = everything(), make_mesh(MIXED)
    placed = state_shardings(config, mesh)
    adam = placed.opt_state[1]
    for tree in (placed.params, adam.mu, adam.nu):
        assert jax.tree.structure(tree) == jax.tree.structure(placed.params)
        for path, sharding in jax.tree.leaves_with_path(tree):
            expected, _ = axes_by_hand(key_path(path))
            assert sharding == named_sharding(expected, mesh), path
    # In numbers, for one of them: layers, half the experts, half of M, half of H.
    wi = placed.params["repeated"]["layer_0"]["moe"]["wi"]
    assert wi.shard_shape((3, 4, 16, 32)) == (3, 2, 8, 16)


def test_the_rest_of_the_state_is_on_every_device():
    placed = state_shardings(everything(), make_mesh(MIXED))
    rest = (placed.step, placed.router_bias_XE, placed.key_data, placed.opt_state[1].count)
    assert all(sharding.is_fully_replicated for sharding in rest)


def test_adafactors_factored_moments_lie_with_the_dims_that_they_keep():
    """Every kind of dim has a size of its own, large enough to be factored, that tells it."""
    sizes = {128: "model", 160: "heads", 256: "hidden", 512: "hidden", 384: "vocab", 4: "expert"}
    config = everything(optimizer={"name": "adafactor"})
    model = dataclasses.replace(
        config.model,
        model_dim=128,
        head_dim=80,
        ffn_dim=256,
        moe=dataclasses.replace(config.model.moe, expert_dim=256),
    )
    config, mesh = dataclasses.replace(config, model=model), make_mesh(MIXED)
    abstract = abstract_state(config)
    shapes = {key_path(path): p.shape for path, p in jax.tree.leaves_with_path(abstract.params)}
    moments = jax.tree.leaves_with_path(abstract.opt_state)
    shardings = jax.tree.leaves(state_shardings(config, mesh).opt_state)
    factored = set()
    for (path, moment), sharding in zip(moments, shardings, strict=True):
        name, kind = key_path(path), getattr(path[-1], "name", "")
        if kind not in ("v_row", "v_col", "v"):
            continue
        axes, row = axes_by_hand(name)
        if moment.shape != shapes[name]:
            axes = (None,) * moment.ndim  # a stand-in for nothing
        if kind != "v" and moment.shape[-1] > 1:
            factored.add((row, kind))
            layers = 1 if "repeated" in name else 0
            axes = (None,) * layers + tuple(sizes[size] for size in moment.shape[layers:])
        assert sharding.is_equivalent_to(named_sharding(axes, mesh), moment.ndim), path
    matrices = {row for row, axes in AXES.items() if len(axes) > 1 and row[1][0] in "ehw"}
    matrices |= {("moe", f"shared_{name}") for name in ("wi", "wg", "wo")}
    assert factored == {(row, kind) for row in matrices for kind in ("v_row", "v_col")}


@pytest.mark.parametrize(
    ("moment_shape", "axes"),
    [
        ((3, 4, 16, 32), (None, "expert", "model", "hidden")),
        ((3, 4, 16), (None, "expert", "model")),
        ((3, 4, 32), (None, "expert", "hidden")),
        ((3, 16, 32), (None, "model", "hidden")),
        ((3, 4, 1), (None, None, None)),
        ((3, 4), (None, None)),
        ((1,), (None,)),
        ((), ()),
    ],
)
def test_the_axes_of_a_moment(moment_shape, axes):
    assert axes_of_moment((None, "expert", "model", "hidden"), (3, 4, 16, 32), moment_shape) == axes


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=1, fsdp=3), r"embedding \(384, 16\) with dims \('vocab', 'model'\) over"),
        (
            MeshConfig(data=1, expert=8),
            r"repeated/layer_0/moe/bg \(3, 4, 32\) .*'expert': 8.*Change",
        ),
        (MeshConfig(data=1, tensor=5), r"splits every parameter evenly: embedding \(384, 16\)"),
    ],
)
def test_a_parameter_that_is_not_split_evenly_is_named(mesh, message):
    """Whatever the checks of the config have let through."""
    with pytest.raises(ValueError, match=message):
        state_shardings(everything(), make_mesh(mesh))


@pytest.fixture(scope="module")
def of_one_device():
    config = everything()
    return jax.tree.map(np.asarray, new_state(config, make_mesh(config.mesh)))


@pytest.mark.parametrize(
    "mesh",
    [
        MIXED,
        MeshConfig(slices=2, data=1, fsdp=2, expert=2, experts_span_slices=True),
        pytest.param(MeshConfig(data=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, expert=4), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
    ],
)
def test_a_new_state_is_the_same_on_every_mesh(mesh, of_one_device):
    config = everything()
    mesh = make_mesh(mesh)
    state = new_state(config, mesh)
    assert jax.tree.structure(state) == jax.tree.structure(of_one_device)
    leaves = zip(
        jax.tree.leaves_with_path(state),
        jax.tree.leaves(of_one_device),
        jax.tree.leaves(state_shardings(config, mesh)),
        strict=True,
    )
    for (path, leaf), expected, sharding in leaves:
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(leaf, expected, strict=True, err_msg=name)
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), name


@pytest.mark.parametrize(
    ("platform", "num_chunks", "options"),
    [
        ("tpu", 2, {"xla_tpu_enable_async_all_to_all": "true"}),
        ("tpu", 1, None),
        ("cpu", 2, None),
    ],
)
def test_chunks_may_overlap_on_a_tpu(platform, num_chunks, options):
    """All-to-alls that libtpu compiles wait for each other unless it is told otherwise."""
    config = tiny_config({"model": {"moe": {"exchange_chunks": num_chunks}}})
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    assert compiler_options(config, mesh) == options
