"""Where every array of a run is placed: parameters by a hand-made table, the rest like them."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.models.model import LanguageModel
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.parameters import Weight
from moe_jax.training.placement import (
    axes_of_moment,
    compile_train_step,
    compiler_options,
    new_state,
    of_any_seed,
    quick_to_compile,
    state_shardings,
)
from moe_jax.training.state import init_state
from tests.tiny_run import tiny_config, tiny_moe

# Parameters by part (norms by kind) and name. Vectors added along the model dim are placed like it;
# norms and the router's experts are on every device.
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
    ("mlp", "wi"): ("model", "hidden"),
    ("mlp", "wg"): ("model", "hidden"),
    ("mlp", "wo"): ("hidden", "model"),
    ("mlp", "bi"): ("hidden",),
    ("mlp", "bg"): ("hidden",),
    ("mlp", "bo"): ("model",),
    ("router", "weight"): ("model", None),
    ("experts", "wi"): ("expert", "model", "hidden"),
    ("experts", "wg"): ("expert", "model", "hidden"),
    ("experts", "wo"): ("expert", "hidden", "model"),
    ("experts", "bi"): ("expert", "hidden"),
    ("experts", "bg"): ("expert", "hidden"),
    ("experts", "bo"): ("expert", "model"),
    ("shared", "wi"): ("model", "hidden"),
    ("shared", "wg"): ("model", "hidden"),
    ("shared", "wo"): ("hidden", "model"),
    ("shared", "bi"): ("hidden",),
    ("shared", "bg"): ("hidden",),
    ("shared", "bo"): ("model",),
    ("shared", "gate"): ("model", None),
}
MIXED = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)


def everything(head_dim=8, hidden_dim=32, **changed):
    """One dense and three MoE layers with every kind of parameter."""
    parts = {
        "attention": {
            "head_dim": head_dim, "biases": tuple("qkvo"), "qk_norm": "rmsnorm",
        },
        "mlp": {"kind": "mlp", "dim": hidden_dim, "activation": "swiglu", "use_bias": True},
        "moe": {
            "expert_dim": hidden_dim, "activation": "geglu", "use_bias": True,
            "shared_expert_dim": 2 * hidden_dim, "shared_expert_gate": True,
            "bias": {"kind": "sign", "rate": 0.1},
        },
    }  # fmt: skip
    model = {
        "model_dim": changed.pop("model_dim", 16),
        "tie_embeddings": False,
        "norm": "layernorm",
        "parts": parts,
        "stack": {"first": [["attention", "mlp"]], "unit": [["attention", "moe"]], "repeats": 3},
    }
    return tiny_config({"model": model, **changed})


def abstract_state(config):
    return jax.eval_shape(functools.partial(init_state, config))


def keys_of(path):
    """The dict keys in a path: those of the parameter, also in its moments."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def axes_by_hand(path):
    """The names of a parameter's dims, and its row in the table."""
    part = path[-2] if len(path) > 1 else ""
    row = ("norm" if part.endswith("norm") else part, path[-1])
    stacked = (None,) if "unit" in path else ()
    return stacked + AXES[row], row


def test_the_axes_of_every_parameter():
    config = everything()
    seen = set()
    abstract = jax.tree.leaves(abstract_state(config).params)
    specs = jax.tree.leaves_with_path(config.model.specs())
    for (path, spec), leaf in zip(specs, abstract, strict=True):
        expected, row = axes_by_hand(keys_of(path))
        assert spec.axes == expected, path
        assert len(expected) == leaf.ndim, path
        assert (spec.shape, spec.dtype) == (leaf.shape, leaf.dtype), path
        seen.add(row)
    assert seen == set(AXES)


def test_parameters_lie_as_the_table_says_and_adams_moments_with_them():
    config, mesh = everything(), make_mesh(MIXED)
    placed = state_shardings(config, mesh)
    adam = placed.opt_state[1]
    for tree in (placed.params, adam.mu, adam.nu):
        assert jax.tree.structure(tree) == jax.tree.structure(placed.params)
        for path, sharding in jax.tree.leaves_with_path(tree):
            expected, _ = axes_by_hand(keys_of(path))
            assert sharding == named_sharding(expected, mesh), path
    # One of them in numbers: all layers, half the experts, half of M, half of H.
    wi = placed.params["stack"]["unit"]["0"]["moe"]["experts"]["wi"]
    assert wi.shard_shape((3, 4, 16, 32)) == (3, 2, 8, 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Weight):
    """base + a b."""

    base: object
    a: object
    b: object


class LowRankModel(LanguageModel):
    """A model whose attention matrices are `LowRank`."""

    def specs(self):
        def wrap(spec):
            if spec.component != "attention" or not spec.decays:
                return spec
            *stacked, inward, outward = zip(spec.shape, spec.axes, strict=True)

            def factor(*dims):
                shape, axes = zip(*stacked, *dims, strict=True)
                return dataclasses.replace(spec, shape=shape, axes=axes)

            return LowRank(spec, factor(inward, (2, None)), factor((2, None), outward))

        return jax.tree.map(wrap, super().specs())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_moments_of_the_arrays_of_a_weight_lie_with_their_arrays(optimizer):
    config, mesh = everything(optimizer={"name": optimizer}), make_mesh(MIXED)
    fields = {
        field.name: getattr(config.model, field.name) for field in dataclasses.fields(LanguageModel)
    }
    config = dataclasses.replace(config, model=LowRankModel(**fields))
    placed = state_shardings(config, mesh)
    wq = placed.params["stack"]["unit"]["0"]["attention"]["wq"]
    expected = LowRank(
        named_sharding((None, "model", "heads"), mesh),
        named_sharding((None, "model", None), mesh),
        named_sharding((None, None, "heads"), mesh),
    )
    assert wq == expected
    found = 0
    moments = jax.tree.leaves_with_path(placed.opt_state)
    sizes = jax.tree.leaves(abstract_state(config).opt_state)
    for (path, sharding), leaf in zip(moments, sizes, strict=True):
        keys, names = keys_of(path), [getattr(entry, "name", "") for entry in path]
        of_wq = keys[1:] == ("unit", "0", "attention", "wq")
        if of_wq and ("v" in names or "mu" in names or "nu" in names):
            (array,) = {"base", "a", "b"} & set(names)
            assert sharding.is_equivalent_to(getattr(expected, array), leaf.ndim), path
            found += 1
    assert found == {"adamw": 6, "adafactor": 3, "muon": 3}[optimizer]


def test_the_rest_of_the_state_is_on_every_device():
    placed = state_shardings(everything(), make_mesh(MIXED))
    bias_XE = placed.model_state["moe"]["bias_E"]
    rest = (placed.step, bias_XE, placed.key_data, placed.opt_state[1].count)
    assert all(sharding.is_fully_replicated for sharding in rest)


def test_adafactors_factored_moments_lie_with_the_dims_that_they_keep():
    """Each kind of dim has its own sizes, which identify it and are large enough to be factored."""
    sizes = {128: "model", 160: "heads", 256: "hidden", 512: "hidden", 384: "vocab", 4: "expert"}
    config = everything(model_dim=128, head_dim=80, hidden_dim=256, optimizer={"name": "adafactor"})
    mesh = make_mesh(MIXED)
    abstract = abstract_state(config)
    shapes = {keys_of(path): p.shape for path, p in jax.tree.leaves_with_path(abstract.params)}
    moments = jax.tree.leaves_with_path(abstract.opt_state)
    shardings = jax.tree.leaves(state_shardings(config, mesh).opt_state)
    factored = set()
    for (path, moment), sharding in zip(moments, shardings, strict=True):
        name, kind = keys_of(path), getattr(path[-1], "name", "")
        if kind not in ("v_row", "v_col", "v"):
            continue
        axes, row = axes_by_hand(name)
        if moment.shape != shapes[name]:
            axes = (None,) * moment.ndim  # a placeholder
        if kind != "v" and moment.shape[-1] > 1:
            factored.add((row, kind))
            layers = 1 if "unit" in name else 0
            axes = (None,) * layers + tuple(sizes[size] for size in moment.shape[layers:])
        assert sharding.is_equivalent_to(named_sharding(axes, mesh), moment.ndim), path
    small = {("router", "weight"), ("shared", "gate")}  # one dim is too small to be factored
    matrices = {
        row for row, axes in AXES.items()
        if len(axes) > 1 and row[1][0] in "ehw" and row not in small
    }  # fmt: skip
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
        (
            MeshConfig(data=1, fsdp=3),
            r"embedding \(384, 16\) with dims \('vocab', 'model'\) over",
        ),
        (
            MeshConfig(data=1, expert=8),
            r"params/stack/unit/0/moe/experts/bg \(3, 4, 32\) .*'expert': 8.*Change",
        ),
        (
            MeshConfig(data=1, tensor=5),
            r"every parameter evenly: params/embedding \(384, 16\)",
        ),
    ],
)
def test_a_parameter_that_is_not_split_evenly_is_named(mesh, message):
    """Whatever the config's checks have let through."""
    with pytest.raises(ValueError, match=message):
        state_shardings(everything(), make_mesh(mesh))


def test_runs_that_differ_only_in_seeds_share_their_programs():
    config = tiny_config()
    data = dataclasses.replace(config.data, seed=5)
    other = dataclasses.replace(config, name="other", seed=4, data=data)
    assert of_any_seed(other) == of_any_seed(config)
    mesh = make_mesh(config.mesh)
    step = compile_train_step(config, mesh)
    assert compile_train_step(other, mesh) is step
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.5)
    changed = dataclasses.replace(config, optimizer=optimizer)
    assert compile_train_step(changed, mesh) is not step


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_a_new_state_has_the_seed_of_its_run(seed):
    config = dataclasses.replace(tiny_config(), seed=seed)
    expected = jax.jit(init_state, static_argnums=0)(config)
    state = new_state(config, make_mesh(config.mesh))
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_program_that_runs_once_compiles_quickly_unless_xla_flags_choose(monkeypatch):
    mesh = make_mesh(MeshConfig(data=1))
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    assert quick_to_compile(mesh) == {"xla_backend_optimization_level": "1"}
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=2")
    assert quick_to_compile(mesh) is None


@pytest.mark.slow
def test_initial_values_are_those_of_full_optimization():
    program = jax.jit(functools.partial(init_state, tiny_config())).lower(np.uint32(3))
    quick, full = (
        program.compile({"xla_backend_optimization_level": level})(np.uint32(3))
        for level in ("1", "3")
    )
    jax.tree.map(np.testing.assert_array_equal, quick, full)


@pytest.fixture(scope="module")
def of_one_device():
    config = everything()
    return jax.tree.map(np.asarray, new_state(config, make_mesh(config.mesh)))


@pytest.mark.parametrize(
    "mesh",
    [
        MIXED,
        pytest.param(
            MeshConfig(slices=2, data=1, fsdp=2, expert=2, experts_span_slices=True),
            marks=pytest.mark.slow,
        ),
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
    """The all-to-alls that libtpu compiles wait for each other unless an option says otherwise."""
    config = tiny_config(tiny_moe(exchange_chunks=num_chunks))
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    assert compiler_options(config, mesh) == options
