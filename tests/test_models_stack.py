"""Stacks: trees by position and by part, scans, ties, caches, and what a layout refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import ExperimentConfig
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import LayerNorm, RMSNorm
from moe_jax.models.layer import Layer, ParallelLayer
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import SEGMENTS, Stack, StackLayout
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.soft import Soft
from moe_jax.parameters import ParameterSpec, zeros
from moe_jax.part import Call, Dims, Own, Part

# Residuals near 1 after a few layers of float32 sums, in two orders of the same operations.
FLOAT32 = 1e-5

BATCH, LENGTH, MODEL_DIM = 2, 6, 4
DIMS = Dims(MODEL_DIM)
SEGMENTS_BL = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 0]], np.int32)


def moe(num_experts, num_selected):
    return MoE(
        num_experts=num_experts,
        num_selected_experts=num_selected,
        expert_dim=3,
        bias=SignUpdate(),
        run_experts="einsum",
    )


PARTS = {
    "attention": Attention(num_heads=2, head_dim=2),
    "mlp": Mlp(dim=5),
    "small": moe(4, 2),
    "large": moe(6, 1),
}
# Two MoE parts of different sizes across all three segments. One layer uses a part twice.
LAYOUT = StackLayout(
    first=(("mlp", "small"),),
    unit=(("attention", "small"), ("large", "small", "small")),
    repeats=2,
    last=(("large",),),
)
SMALL, LARGE = (0, 1, 2, 2, 3, 4, 4), (2, 4, 5)  # the layer of each use


def make_model(layout=LAYOUT, parts=PARTS, **options):
    used = {name: part for name, part in parts.items() if name in layout.names}
    return LanguageModel(vocab_size=7, model_dim=MODEL_DIM, parts=used, stack=layout, **options)


def draw(specs, seed=0):
    """Random arrays of deviation 1 / sqrt(fan-in); scales have mean 1, routers are tripled."""
    random = np.random.default_rng(seed)

    def one(path, spec):
        names = [entry.key for entry in path]
        fan_in = spec.shape[-2] if len(spec.shape) > 1 else 4
        values = random.normal(size=spec.shape) / fan_in**0.5
        values += 1.0 if names[-1] == "scale" else 0.0
        return (values * (3 if "router" in names else 1)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, specs)


def close(got, expected, tolerance=FLOAT32):
    assert jax.tree.structure(got) == jax.tree.structure(expected)

    def one(path, a, b):
        scale = max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(
            np.asarray(a, np.float64) / scale, np.asarray(b, np.float64) / scale,
            atol=tolerance, err_msg=jax.tree_util.keystr(path),
        )  # fmt: skip

    jax.tree_util.tree_map_with_path(one, got, expected)


# Trees by position and by part.


def test_layer_indices_by_hand():
    model = make_model()
    assert model.layers_of == {"attention": (1, 3), "mlp": (0,), "small": SMALL, "large": LARGE}
    assert model.moe_layers == {"small": SMALL, "large": LARGE}


def numbered(stack):
    """Numbers each branch, by position: ten times its layer's index, plus its place in it."""
    tree, start = {segment: {} for segment in SEGMENTS}, 0
    for segment, layers in stack.segments():
        rounds = stack.repeats if segment == "unit" else 1
        for i, layer in enumerate(layers):
            numbers = 10 * (start + i + len(layers) * np.arange(rounds))
            tree[segment][str(i)] = {
                name: {"number": numbers + place if segment == "unit" else numbers[0] + place}
                for place, (name, _) in enumerate(layer.named)
            }
        start += rounds * len(layers)
    return tree


def test_a_tree_by_part_has_its_layers_in_order_and_goes_back():
    stack = make_model().decoder
    tree = numbered(stack)
    assert set(tree["unit"]["1"]) == {"large", "small_0", "small_1"}
    parts = stack.by_part(tree)
    for name, indices in stack.layer_indices().items():
        numbers = parts[name]["number"]
        assert tuple(np.asarray(numbers) // 10) == indices
    # Two uses in one layer keep their order.
    assert parts["small"]["number"].tolist() == [1, 11, 21, 22, 31, 41, 42]
    back = stack.by_position(parts)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    again = stack.by_part(back)
    jax.tree.map(np.testing.assert_array_equal, again, parts)


def test_parts_that_are_absent_are_absent_by_position():
    stack = make_model().decoder
    large = {"large": {"bias_E": jnp.arange(18).reshape(3, 6)}}
    tree = stack.by_position(large)
    assert set(tree["first"]) == set() and set(tree["unit"]) == {"1"} and set(tree["last"]) == {"0"}
    assert tree["unit"]["1"]["large"]["bias_E"].shape == (2, 6)
    jax.tree.map(np.testing.assert_array_equal, stack.by_part(tree), large)
    assert stack.by_position(None) == {"first": {}, "unit": {}, "last": {}}


def test_state_is_by_part_and_steers_its_own_layer():
    model = make_model()
    shapes = {name: specs["bias_E"].shape for name, specs in model.state_specs().items()}
    assert shapes == {"small": (7, 4), "large": (3, 6)}
    # The sixth use of `small` is the first one in layer 4. There all tokens get experts 3 and 1.
    biases = {name: {"bias_E": np.zeros(shape, np.float32)} for name, shape in shapes.items()}
    biases["small"]["bias_E"][5] = [0, 50, 0, 100]
    biases["large"]["bias_E"][2, 5] = 100
    _, aux, *_ = outputs(draw(model.specs())["stack"], biases, model.decoder)
    valid = (SEGMENTS_BL > 0).sum()
    small_XKE, large_XKE = (aux[name].sums["assigned_KE"] for name in ("small", "large"))
    assert small_XKE[5, 0, 3] == small_XKE[5, 1, 1] == valid
    assert (small_XKE[:, 0, 3] == valid).sum() == 1
    assert large_XKE[2, 0, 5] == valid and (large_XKE[:, 0, 5] == valid).sum() == 1


# Scanned and unrolled.

X = np.random.default_rng(5).normal(size=(BATCH, LENGTH, MODEL_DIM)).astype(np.float32)
DY = np.random.default_rng(6).normal(size=X.shape).astype(np.float32)
CALL = Call(segments_BL=SEGMENTS_BL, capacity=1.0).with_defaults(X)


@functools.partial(jax.jit, static_argnames="stack")
def outputs(params, state, stack):
    return stack.apply(params, X, CALL, state=state)


@functools.partial(jax.jit, static_argnames="stack")
def run(params, state, stack, key=None):
    """Gradients of a loss that depends on all outputs, and the outputs."""

    def loss(params, x):
        call = dataclasses.replace(CALL, rng=key)
        y, aux, *_ = stack.apply(params, x, call, state=state)
        balance = sum(jnp.sum(one.sums["prob_sum_E"] ** 2) for one in aux.values())
        return jnp.sum(y * DY) + 0.01 * balance, (y, aux)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, X)


def inputs_of(model):
    params = draw(model.specs())["stack"]
    # Each layer has its own bias, so a bias that reached another layer would show.
    return params, draw(model.state_specs(), seed=2)


@functools.cache
def unrolled():
    model = make_model(scan_layers=False)
    return run(*inputs_of(model), model.decoder)


@pytest.mark.parametrize(
    ("scan", "remat"),
    [
        (True, "none"),
        pytest.param(True, "dots", marks=pytest.mark.slow),
        pytest.param(True, "full", marks=pytest.mark.slow),
        pytest.param(False, "full", marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_neither_values_nor_gradients(scan, remat):
    model = make_model(scan_layers=scan, remat=remat)
    grads, (y, aux) = run(*inputs_of(model), model.decoder)
    plain_grads, (plain_y, plain_aux) = unrolled()
    close(y, plain_y)
    close(aux, plain_aux)
    close(grads, plain_grads)
    assert aux["small"].sums["assigned_KE"].shape == (7, 2, 4)
    assert aux["large"].sums["assigned_KE"].shape == (3, 1, 6)
    # No two layers report the same. Counts are outputs, so recomputing does not double them.
    for name, choices in (("small", 2), ("large", 1)):
        probs_XE = np.asarray(aux[name].sums["prob_sum_E"])
        assert len({probs.tobytes() for probs in probs_XE}) == len(probs_XE)
        counted_X = np.sum(aux[name].sums["assigned_KE"], axis=(1, 2))
        np.testing.assert_array_equal(counted_X, choices * (SEGMENTS_BL > 0).sum())


@pytest.mark.parametrize(
    "layout",
    [
        StackLayout(first=(("small",),), unit=(("attention", "mlp"),), repeats=2),
        pytest.param(StackLayout(unit=(("attention", "mlp"),), repeats=2), marks=pytest.mark.slow),
    ],
    ids=["MoE in front only", "all dense"],
)
def test_scanned_layers_equal_the_same_layers_unrolled(layout):
    results = []
    for scan in (True, False):
        model = make_model(layout, scan_layers=scan)
        results.append(run(*inputs_of(model), model.decoder))
    close(*results)
    assert set(results[0][1][1]) == {"small"} & layout.names


def test_branches_draw_their_own_randomness_scanned_or_not():
    layout = StackLayout(unit=(("mlp", "mlp"),), repeats=2)
    results = []
    for scan in (True, False):
        model = make_model(layout, scan_layers=scan, dropout_rate=0.5)
        results.append(run(*inputs_of(model), model.decoder, jax.random.key(0)))
    close(*results)
    # Equal branches of equal layers drop different entries, and double the ones that they keep.
    outputs = [with_dropout(index, branch) for index in (0, 1) for branch in (0, 1)]
    assert all(set(y.flat) == {0, 2} for y in outputs)
    assert len({y.tobytes() for y in outputs}) == 4


def with_dropout(index, branch):
    """A layer's output at dropout rate 0.5, where one branch adds 1 and the other adds 0."""
    layer = Layer(branches=(("one", Constant(0.0)),) * 2, dropout_rate=0.5)
    one = Constant(1.0)
    branches = tuple(("one", one if i == branch else part) for i, (_, part) in
                     enumerate(layer.branches))  # fmt: skip
    layer = dataclasses.replace(layer, branches=branches)
    call = dataclasses.replace(CALL, rng=jax.random.key(0))
    params = draw(layer.specs(DIMS))
    y, *_ = layer.apply(params, jnp.zeros(X.shape), call, Own(index=jnp.int32(index)))
    return np.asarray(y)


@dataclasses.dataclass(frozen=True)
class Constant(Part):
    """Adds a constant."""

    value: float = 0.0

    def looks_ahead(self, training):
        return False

    def apply(self, params, x_BLM, call, own):
        return jnp.full_like(x_BLM, self.value), None, None


# Tied branches.


def test_tied_branches_are_copies_of_one():
    layers = {"unit": (("attention", "mlp"), ("attention",)), "repeats": 2}
    tied = make_model(StackLayout(**layers, tied=("attention",)))
    free = make_model(StackLayout(**layers))
    params, state = inputs_of(tied)
    assert "attention" in params["tied"]
    unit = params["unit"]
    assert all("attention" not in unit[i] and "attention_norm" in unit[i] for i in ("0", "1"))

    def copied(layer):
        repeated = jax.tree.map(lambda a: np.stack([a] * 2), params["tied"]["attention"])
        return layer | {"attention": repeated}

    copies = {"first": {}, "unit": {i: copied(layer) for i, layer in unit.items()}, "last": {}}
    (grads, dx), said = run(params, state, tied.decoder)
    (free_grads, free_dx), free_said = run(copies, state, free.decoder)
    close((said, dx), (free_said, free_dx))
    summed = jax.tree.map(
        lambda *copies: sum(np.sum(copy, axis=0) for copy in copies),
        *(free_grads["unit"][i]["attention"] for i in ("0", "1")),
    )
    close(grads["tied"]["attention"], summed)
    unrolled = make_model(StackLayout(**layers, tied=("attention",)), scan_layers=False)
    close(run(params, state, unrolled.decoder), ((grads, dx), said))


def test_a_tie_that_names_no_branch_of_the_unit_is_refused():
    layout = StackLayout(first=(("mlp",),), unit=(("attention",),), repeats=2, tied=("mlp",))
    with pytest.raises(ValueError, match=r"tied must name branches of the unit: tied=\('mlp',\)"):
        make_model(layout)


# The layout of a list of layers.


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["mlp", "moe"]), min_size=1, max_size=14).map(tuple))
def test_a_layout_reproduces_its_layers_and_compiles_no_more_of_them(layers):
    layout = StackLayout.of(layers)
    assert layout.layers == layout.first + layout.unit * layout.repeats + layout.last == layers
    assert layout.repeats >= 1 and layout.num_layers == len(layers)
    compiled = len(layout.first) + len(layout.unit) + len(layout.last)
    # No other cut of the list compiles fewer layers.
    for start in range(len(layers)):
        for period in range(1, len(layers) - start + 1):
            unit, repeats = layers[start : start + period], 1
            while layers[start + repeats * period :][:period] == unit:
                repeats += 1
            assert compiled <= len(layers) - (repeats - 1) * period


def test_a_layout_of_layers_by_hand():
    dense, routed = ("attention", "mlp"), ("attention", "moe")
    layout = StackLayout.of([list(dense)] + [routed, dense] * 3 + [routed, routed], causal=False)
    assert (layout.first, layout.unit, layout.repeats) == ((), (dense, routed), 4)
    assert layout.last == (routed,) and not layout.causal


@pytest.mark.parametrize(
    "settings",
    [{"unit": ()}, {"repeats": 0}, {"unit": (), "repeats": 0}],
    ids=["no unit", "no repeats", "no layers"],
)
def test_a_unit_is_repeated_at_least_once(settings):
    with pytest.raises(
        ValueError, match=r"needs layers, and a unit needs .*Set repeats=0 without a unit"
    ):
        StackLayout(**settings)
    assert StackLayout(first=(("mlp",),), unit=(), repeats=0).num_layers == 1


# Caches.


@dataclasses.dataclass(frozen=True)
class Running(Part):
    """The running sum of tokens; the cache holds the sum so far."""

    def cache_specs(self, dims, batch, length):
        spec = ParameterSpec((batch, dims.model_dim), ("batch", None), zeros, "cache")
        return {"sum_BM": spec}

    def looks_ahead(self, training):
        return False

    def apply(self, params, x_BLM, call, own):
        y_BLM = jnp.cumsum(x_BLM, axis=1)
        if own.cache is not None:
            y_BLM += own.cache["sum_BM"][:, None]
        return y_BLM, None, {"sum_BM": y_BLM[:, -1]}


@pytest.mark.parametrize("scan", [True, False])
def test_caches_are_carried_from_call_to_call(scan):
    layout = StackLayout(
        first=(("running",),), unit=(("mlp",), ("mlp", "running")), repeats=3, last=(("running",),)
    )
    parts = {"running": Running(), "mlp": PARTS["mlp"]}
    stack = make_model(layout, parts, scan_layers=scan).decoder
    params = draw(stack.specs(DIMS))

    @jax.jit
    def apply(x, cache):
        return stack.apply(params, x, Call().with_defaults(x), cache=cache)

    whole, _, recorded, _ = apply(X, None)
    cache = jax.tree.map(
        lambda spec: jnp.zeros(spec.shape, spec.dtype), stack.cache_specs(DIMS, BATCH, LENGTH)
    )
    assert cache["unit"]["1"]["running"]["sum_BM"].shape == (3, BATCH, MODEL_DIM)
    assert cache["unit"]["0"] == {}
    pieces = []
    for piece in (X[:, :1], X[:, 1:4], X[:, 4:]):
        y, _, cache, _ = apply(piece, cache)
        pieces.append(y)
    close(jnp.concatenate(pieces, axis=1), whole)
    close(cache, recorded)
    sums = np.asarray(stack.by_part(cache)["running"]["sum_BM"])
    assert sums.shape == (5, BATCH, MODEL_DIM) and len({one.tobytes() for one in sums}) == 5


# Shared parts.


@dataclasses.dataclass(frozen=True)
class Distance(Part):
    """A learned slope times each token's position, for the layers but not for the residual."""

    def specs(self, dims):
        return {"slope": ParameterSpec((1,), (None,), zeros, "position")}

    def looks_ahead(self, training):
        return False

    def apply(self, params, x_BLM, call, own):
        return params["slope"] * call.positions_BL[..., None], None, None


@dataclasses.dataclass(frozen=True)
class AddShared(Constant):
    """Adds the shared part's output."""

    def apply(self, params, x_BLM, call, own):
        return jnp.broadcast_to(call.shared["distance"], x_BLM.shape), None, None


def test_shared_parts_run_once_before_the_layers():
    layout = StackLayout(unit=(("add",),), repeats=2, shared=("distance",))
    stack = make_model(layout, {"add": AddShared(), "distance": Distance()}).decoder
    params = draw(stack.specs(DIMS))
    assert set(params["shared"]) == {"distance"}
    y, aux, *_ = stack.apply(params, jnp.asarray(X), CALL)
    slope = params["shared"]["distance"]["slope"]
    np.testing.assert_allclose(y, X + 2 * slope * np.arange(LENGTH)[:, None], rtol=1e-5)
    assert aux == {}


# Causality.


@dataclasses.dataclass(frozen=True)
class Mean(Part):
    """The mean over a sequence's tokens, without a `looks_ahead` of its own."""

    def apply(self, params, x_BLM, call, own):
        return jnp.broadcast_to(jnp.mean(x_BLM, axis=1, keepdims=True), x_BLM.shape), None, None


LOOKS = (
    r"in a causal stack a token's output must not depend on later tokens: the part 'mean' looks "
    r"at them in training and evaluation: Mean\(\)\. Use a causal router .*allow_lookahead=True"
)


@pytest.mark.parametrize("place", ["first", "unit", "last", "shared"])
def test_a_causal_stack_refuses_what_looks_ahead_wherever_it_is(place):
    layers = {"unit": (("mlp",),), "repeats": 2}
    layers[place] = ("mean",) if place == "shared" else (("mlp", "mean"),)
    parts = {"mlp": PARTS["mlp"], "mean": Mean()}
    with pytest.raises(ValueError, match=LOOKS):
        make_model(StackLayout(**layers), parts)
    make_model(StackLayout(**layers, causal=False), parts)
    allowed = make_model(StackLayout(**layers, allow_lookahead=True), parts)
    assert allowed.decoder.causal


def test_an_encoder_needs_no_permission_and_sees_later_tokens():
    soft = MoE(
        num_experts=2, num_selected_experts=2, expert_dim=3, router=Soft(), group_size=LENGTH,
        capacity=Capacity(train_factor=1.0),
    )  # fmt: skip
    parts = {"attention": PARTS["attention"], "soft": soft}
    layout = StackLayout(unit=(("attention", "soft"),), repeats=2, causal=False)
    stack = make_model(layout, parts).decoder
    params = draw(stack.specs(DIMS))
    changed = X.copy()
    changed[:, -1] += 1
    outputs = [
        jax.jit(lambda x: stack.apply(params, x, Call().with_defaults(x))[0])(x)
        for x in (X, changed)
    ]
    assert np.abs(outputs[0] - outputs[1])[:, 0].min() > 1e-4
    with pytest.raises(ValueError, match=r"the part 'soft' looks at them"):
        make_model(StackLayout(unit=(("attention", "soft"),), repeats=2), parts)


# Names.


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"mlp": PARTS["mlp"]},
            r"stack must be one of parts: \['attention'\], parts \['mlp'\]\. Add the",
        ),
        (
            {name: PARTS[name] for name in ("attention", "mlp", "large")},
            r"every part must be used by a layer: \['large'\] in no layer of .*\. Remove the part",
        ),
    ],
)
def test_names_and_parts_that_do_not_fit_are_refused(parts, message):
    layout = StackLayout(unit=(("attention", "mlp"),), repeats=2)
    with pytest.raises(ValueError, match=message):
        LanguageModel(parts=parts, stack=layout)


def test_a_bare_name_is_of_a_whole_layer():
    with pytest.raises(ValueError, match=r"part that is a whole layer: \['mlp'\] .*as a tuple"):
        make_model(StackLayout(unit=("mlp",), repeats=2))


# Layers.


def whole_layer(kind, *names, **settings):
    return kind(branches=tuple((name, PARTS[name]) for name in names), **settings)


def test_a_whole_layer_is_the_layer_of_its_branches():
    inline = make_model(StackLayout(unit=(("attention", "small"),), repeats=2))
    whole = make_model(
        StackLayout(unit=("block",), repeats=2), {"block": whole_layer(Layer, "attention", "small")}
    )
    shapes = [jax.tree.map(lambda spec: spec.shape, model.specs()) for model in (whole, inline)]
    assert shapes[0] == shapes[1]
    assert whole.layers_of == inline.layers_of == {"attention": (0, 1), "small": (0, 1)}
    assert whole.moe_layers == {"small": (0, 1)}
    params, state = inputs_of(inline)
    results = [outputs(params, state, model.decoder) for model in (whole, inline)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    sums = {name: one.sums for name, one in results[0][1].items()}
    moved = whole.next_state(state, sums, jnp.int32(0), 10)
    assert moved["small"]["bias_E"].shape == (2, 4)


def test_two_parts_of_one_name_are_refused():
    parts = {
        "block": whole_layer(Layer, "attention", "mlp"),
        "attention": Attention(num_heads=1, head_dim=2),
    }
    layout = StackLayout(unit=("block", ("attention",)), repeats=2)
    with pytest.raises(ValueError, match=r"parts of one name .*\['attention'\] differ"):
        make_model(layout, parts)


def added(layer, params, name, x):
    """What a branch adds to the residual for this input."""
    part, own = dict(layer.branches)[name], Own(index=jnp.int32(0))
    return part.apply(params[name], x, CALL, own)[0]


@pytest.mark.parametrize("norm", [RMSNorm(), LayerNorm()], ids=["rmsnorm", "layernorm"])
@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_norms_are_before_branches_behind_or_both(placement, norm):
    layer = whole_layer(Layer, "attention", "mlp", norm=norm, placement=placement, multiplier=0.5)
    params = draw(layer.specs(DIMS))
    names = {
        "pre": {"attention_norm", "mlp_norm"},
        "post": {"attention_post_norm", "mlp_post_norm"},
    }
    names["sandwich"] = names["pre"] | names["post"]
    assert set(params) == {"attention", "mlp"} | names[placement]
    expected = jnp.asarray(X)
    for name in ("attention", "mlp"):
        inner = expected
        if placement != "post":
            inner = norm.apply(params[f"{name}_norm"], inner)
        out = added(layer, params, name, inner)
        if placement != "pre":
            out = norm.apply(params[f"{name}_post_norm"], out)
        expected = expected + 0.5 * out
    y, aux, _ = layer.apply(params, jnp.asarray(X), CALL, Own(index=jnp.int32(0)))
    close(y, expected)
    assert aux == {}


def test_branches_of_a_parallel_layer_get_the_same_normed_copy():
    layer = whole_layer(ParallelLayer, "attention", "mlp")
    params = draw(layer.specs(DIMS))
    assert set(params) == {"attention", "mlp", "norm"}
    x = jnp.asarray(X)
    normed = layer.norm.apply(params["norm"], x)
    expected = x + added(layer, params, "attention", normed) + added(layer, params, "mlp", normed)
    y, aux, _ = layer.apply(params, x, CALL, Own(index=jnp.int32(0)))
    close(y, expected)
    assert aux == {}
    with pytest.raises(ValueError, match="one norm before all branches"):
        whole_layer(ParallelLayer, "mlp", placement="post")


def test_a_layer_says_what_its_branches_say():
    layer = whole_layer(Layer, "attention", "small")
    assert layer.state_specs(DIMS) == {"small": layer.branches[1][1].state_specs(DIMS)}
    assert not layer.looks_ahead(training=True)
    assert Layer(branches=(("mean", Mean()),)).looks_ahead(training=False)
    assert isinstance(Stack(first=(layer,)).specs(DIMS)["first"]["0"], dict)


def test_a_shared_part_has_neither_state_nor_experts():
    parts = {"attention": PARTS["attention"], "moe": moe(2, 1)}
    layout = StackLayout(unit=(("attention",),), repeats=2, shared=("moe",))
    with pytest.raises(ValueError, match=r"cannot route tokens or have state: \['moe'\]"):
        make_model(layout, parts)


def test_a_whole_layer_is_no_branch_of_another():
    parts = {"attention": PARTS["attention"], "block": Layer(branches=(("mlp", PARTS["mlp"]),))}
    with pytest.raises(ValueError, match=r"adds to the residual itself.*\['block'\]"):
        make_model(StackLayout(unit=(("attention", "block"),), repeats=2), parts)


def test_a_model_that_sees_later_tokens_says_so_and_is_not_trained_to_predict_them():
    layout = StackLayout(unit=(("attention", "mlp"),), repeats=2, causal=False)
    model = make_model(layout)
    assert model.looks_ahead(training=True) and not make_model(LAYOUT).looks_ahead(training=True)
    with pytest.raises(ValueError, match=r"cannot be the objective of a model that sees it"):
        ExperimentConfig(model=model)


def test_layers_of_no_names_are_refused():
    with pytest.raises(ValueError, match=r"a layer must be a tuple of names.*unit=\(None,\)"):
        StackLayout(unit=(None,))
    for nothing in ((), ""):
        with pytest.raises(ValueError, match=r"a layer must name at least one part: last=\("):
            StackLayout(last=(nothing,))
