"""The language model: layers in order, attention, and what a position may see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import LayerNorm, RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import SEGMENTS, StackLayout
from moe_jax.moe.activations import GeGLU, Gelu, SwiGLU
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.noise import Gaussian, Jitter
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.moe.statistics import dropped_fraction
from moe_jax.part import Call
from moe_jax.planning.arithmetic import count_flops, count_parameters

# Logits near 1 after a few layers of float32 sums, in two orders of the same operations.
FLOAT32 = 1e-5
# bfloat16 keeps 8 bits; logits near 1 are rounded about ten times.
BFLOAT16 = 0.1

BATCH, LENGTH, VOCAB = 2, 8, 17
DENSE, ROUTED = ("attention", "mlp"), ("attention", "moe")


def make_model(layers=(ROUTED, ROUTED), *, moe=None, attention=None, mlp=None, stack=None, **model):
    """A model of these layers, with only the parts that they use."""
    parts = {
        "attention": Attention(**{"num_heads": 2, "head_dim": 4} | (attention or {})),
        "mlp": Mlp(**{"dim": 12} | (mlp or {})),
        "moe": MoE(
            **{"num_experts": 4, "num_selected_experts": 2, "expert_dim": 6}
            | {"run_experts": "einsum"}
            | (moe or {})
        ),
    }
    used = {name for layer in layers for name in layer}
    model = {"vocab_size": VOCAB, "model_dim": 8, "scan_layers": False} | model
    return LanguageModel(
        parts={name: part for name, part in parts.items() if name in used},
        stack=StackLayout.of(layers, **(stack or {})),
        **model,
    )


TOKENS = np.random.default_rng(1).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
POSITIONS = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
ONE_SEGMENT = np.ones((BATCH, LENGTH), np.int32)


def init(model, seed=0):
    """Random parameters of deviation 1 / sqrt(fan-in); scales have mean 1, routers are tripled."""
    random = np.random.default_rng(seed)

    def draw(path, spec):
        names = [entry.key for entry in path]
        fan_in = spec.shape[-2] if len(spec.shape) > 1 else 4
        values = random.normal(size=spec.shape) / fan_in**0.5
        values += 1.0 if names[-1] == "scale" else 0.0
        return (values * (3 if "router" in names else 1)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, model.specs())


def state_of(bias):
    return None if bias is None else {"moe": {"bias_E": bias}}


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def run(
    params, model, tokens=TOKENS, positions=POSITIONS, segments=ONE_SEGMENT, bias=None, key=None,
    capacity=0.0,
):  # fmt: skip
    call = Call(
        tokens_BL=tokens, positions_BL=positions, segments_BL=segments, rng=key, capacity=capacity
    )
    return model.run(params, call, state=state_of(bias))


def in_order(model, params):
    """The parameters of each layer, in layer order."""
    stack, layout = params["stack"], model.stack
    layers = [stack["first"][str(i)] for i in range(len(layout.first))]
    for repeat in range(layout.repeats):
        for i in range(len(layout.unit)):
            layers.append(jax.tree.map(lambda a, at=repeat: a[at], stack["unit"][str(i)]))
    return layers + [stack["last"][str(i)] for i in range(len(layout.last))]


def each_layer(change, params):
    """Applies `change` to each layer's parameters; repeated layers have a leading dim."""
    stack = {
        segment: {i: change(layer) for i, layer in params["stack"][segment].items()}
        for segment in SEGMENTS
    }
    return params | {"stack": stack}


def dropped(out):
    """The fraction of dropped choices per layer, [X, K]."""
    sums = out.aux["moe"].sums
    return dropped_fraction(sums["assigned_KE"], sums["kept_KE"])


def close(got, expected, tolerance=FLOAT32):
    def one(path, a, b):
        scale = max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(
            np.asarray(a, np.float64) / scale, np.asarray(b, np.float64) / scale,
            atol=tolerance, err_msg=jax.tree_util.keystr(path),
        )  # fmt: skip

    jax.tree_util.tree_map_with_path(one, got, expected)


LAYERS = {
    "all MoE": (ROUTED,) * 3,
    "every second": (DENSE, ROUTED) * 2,
    "first dense": (DENSE,) + (ROUTED,) * 3,
    "prefix, unit and suffix": (DENSE, ROUTED, ROUTED, DENSE, ROUTED, DENSE, ROUTED),
    "MoE in front only": (ROUTED,) + (DENSE,) * 3,
    "all dense": (DENSE,) * 3,
}


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_are_where_the_layout_says(name):
    model = make_model(LAYERS[name], scan_layers=True)
    layers = in_order(model, init(model))
    is_moe = tuple(layer == ROUTED for layer in LAYERS[name])
    assert tuple("moe" in layer for layer in layers) == is_moe
    assert tuple("mlp" not in layer for layer in layers) == is_moe
    moe_layers = tuple(i for i, routed in enumerate(is_moe) if routed)
    assert model.moe_layers == ({"moe": moe_layers} if moe_layers else {})
    assert model.layers_of["attention"] == tuple(range(len(is_moe)))


def test_shared_key_and_value_heads_equal_repeated_ones():
    shared = make_model(attention={"num_heads": 4, "num_kv_heads": 2})
    full = make_model(attention={"num_heads": 4})
    params = init(shared)

    def repeat(layer):
        attention = dict(layer["attention"])
        for name in ("wk", "wv"):
            stacked, model_dim = attention[name].shape[:2]
            weight = attention[name].reshape(stacked, model_dim, 2, 4)
            attention[name] = np.repeat(weight, 2, axis=2).reshape(stacked, model_dim, 16)
        return layer | {"attention": attention}

    repeated = each_layer(repeat, params)
    close(run(params, shared).logits_BLV, run(repeated, full).logits_BLV)


def test_a_tied_head_is_the_embedding_transposed():
    tied, untied = make_model(), make_model(tie_embeddings=False)
    params = init(tied)
    assert "head" not in params and "head" in init(untied)
    both = params | {"head": params["embedding"].T}
    close(run(params, tied).logits_BLV, run(both, untied).logits_BLV)


def test_embedded_tokens_are_multiplied_as_the_config_says():
    params = init(make_model())
    for multiplier, factor in ((None, 8**0.5), (1.0, 1.0), (12.0, 12.0)):
        embedded = make_model(embedding_multiplier=multiplier).embed(params, TOKENS)
        np.testing.assert_allclose(embedded, factor * params["embedding"][TOKENS], rtol=1e-6)


def test_the_embedding_starts_with_the_deviation_that_the_config_says():
    specs = (make_model(embedding_stddev=stddev).specs()["embedding"] for stddev in (None, 1.0))
    default, unit = (spec.init(jax.random.key(0), (100, 100), jnp.float32) for spec in specs)
    np.testing.assert_allclose(default * 8**0.5, unit, rtol=1e-5)
    np.testing.assert_allclose(np.std(unit), 1, atol=0.03)


def test_a_tied_head_has_no_initial_scale_of_its_own():
    with pytest.raises(ValueError, match=r"0\.1 with tie_embeddings=True"):
        make_model(head_init_scale=0.1)


def test_logits_are_biased_then_multiplied_then_capped():
    model = make_model()
    params = init(model)
    x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, 8)).astype(np.float32)
    plain = np.asarray(model.logits(params, x))
    bias = np.linspace(-1, 1, VOCAB).astype(np.float32)

    def logits(**settings):
        changed = make_model(**settings)
        spec = changed.specs().get("head_bias")
        assert (spec is not None) == changed.head_bias
        assert spec is None or (spec.shape, spec.axes) == ((VOCAB,), ("vocab",))
        return changed.logits(params | {"head_bias": bias}, x)

    np.testing.assert_allclose(logits(logits_multiplier=0.25), plain / 4, rtol=1e-6)
    np.testing.assert_allclose(logits(logits_softcap=0.5), np.tanh(2 * plain) / 2, rtol=1e-5)
    np.testing.assert_allclose(logits(head_bias=True), plain + bias, rtol=1e-5, atol=1e-6)
    every = logits(head_bias=True, logits_multiplier=2.0, logits_softcap=3.0)
    expected = 3 * np.tanh(2 * (plain + bias) / 3)
    np.testing.assert_allclose(every, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [RMSNorm(), LayerNorm()], ids=["rmsnorm", "layernorm"])
@pytest.mark.parametrize("bias", [False, True])
def test_norms_and_biases_are_where_the_config_says(norm, bias):
    model = make_model(
        (DENSE, ROUTED), norm=norm, mlp={"use_bias": bias},
        attention={"biases": tuple("qkvo") if bias else ()},
    )  # fmt: skip
    params = init(model)
    dense, moe = in_order(model, params)
    scales = {"scale", "bias"} if isinstance(norm, LayerNorm) else {"scale"}
    for layer, name in ((dense, "mlp"), (moe, "moe")):
        assert set(layer) == {"attention", "attention_norm", name, f"{name}_norm"}
        assert set(layer["attention_norm"]) == set(layer[f"{name}_norm"]) == scales
        assert ("bq" in layer["attention"]) == ("bo" in layer["attention"]) == bias
    assert set(params["final_norm"]) == scales
    assert ("bi" in dense["mlp"]) == bias and "bi" not in moe["moe"]["experts"]
    assert np.isfinite(run(params, model).logits_BLV).all()


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def influence(params, model, segments, positions, capacity):
    """The largest gradient of the logits at t with respect to the token at s, [L, L].

    Every position has its own token, so rows of the embedding correspond to positions.
    """
    call = Call(
        tokens_BL=jnp.arange(LENGTH)[None],
        positions_BL=positions[None],
        segments_BL=segments[None],
        capacity=capacity,
    )

    def logits(embedding):
        out = model.run(params | {"embedding": embedding}, call)
        return out.logits_BLV[0, :, :3]

    jacobian = jax.jacrev(logits)(params["embedding"])  # [L, 3, V, M]
    return jnp.max(jnp.abs(jacobian), axis=(1, 3))[:, :LENGTH]


@pytest.mark.parametrize("capacity", [0.0, 0.5])
def test_a_position_sees_every_earlier_one_and_no_later_one(capacity):
    model = make_model(tie_embeddings=False)
    seen = influence(init(model), model, np.ones(LENGTH, int), np.arange(LENGTH), capacity)
    np.testing.assert_array_equal(np.asarray(seen) > 0, np.tri(LENGTH, dtype=bool))


DOCUMENTS = np.array([1, 1, 1, 2, 2, 3, 0, 0]), np.array([0, 1, 2, 0, 1, 0, 0, 1])


@pytest.mark.parametrize("causal", [True, False])
def test_documents_of_a_sequence_do_not_see_each_other(causal):
    """In an encoder, whose stack is not causal, a position also sees the rest of its document."""
    model = make_model(tie_embeddings=False, stack={"causal": causal})
    segments, positions = DOCUMENTS
    seen = influence(init(model), model, segments, positions, 0.0)
    same = segments[:, None] == segments[None]
    expected = np.tri(LENGTH, dtype=bool) & same if causal else same
    np.testing.assert_array_equal(np.asarray(seen) > 0, expected)


def test_a_document_gives_the_same_logits_wherever_it_stands():
    model = make_model()
    params = init(model)
    alone = run(params, model).logits_BLV
    tokens = np.concatenate([TOKENS[:, :5], TOKENS[:, :3]], axis=1)
    segments = np.array([[1] * 5 + [2] * 3] * BATCH, np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2]] * BATCH, np.int32)
    packed = run(params, model, tokens, positions, segments).logits_BLV
    close(packed[:, :5], alone[:, :5])
    close(packed[:, 5:], alone[:, :3])


def test_positions_and_segments_default_to_one_document_without_padding():
    model = make_model()
    params = init(model)
    plain = jax.jit(lambda p: model.run(p, Call(tokens_BL=TOKENS, capacity=0.0)))(params)
    jax.tree.map(np.testing.assert_array_equal, plain, run(params, model))


def test_padding_is_not_routed():
    model = make_model()
    segments = np.where(np.arange(LENGTH) < 5, ONE_SEGMENT, 0)
    params = init(model)
    out = run(params, model, TOKENS, POSITIONS, segments)
    assert out.aux["moe"].sums["num_tokens"].tolist() == [10, 10]
    # The content of padding changes nothing before it.
    other = np.where(segments > 0, TOKENS, 0)
    same = run(params, model, other, POSITIONS, segments)
    close(same.logits_BLV[:, :5], out.logits_BLV[:, :5])
    close(same.aux, out.aux)


def test_bfloat16_computes_with_float32_parameters_router_and_logits():
    model = make_model(compute_dtype="bfloat16")
    assert {spec.dtype for spec in jax.tree.leaves(model.specs())} == {jnp.float32}

    # Experts are identical, so a choice that flips at a near-tie does not matter.
    def alike(layer):
        experts = {
            name: np.broadcast_to(weight[:, :1], weight.shape)
            for name, weight in layer["moe"]["experts"].items()
        }
        return layer | {"moe": layer["moe"] | {"experts": experts}}

    params = each_layer(alike, init(model))
    out, exact = run(params, model), run(params, make_model())
    assert out.logits_BLV.dtype == jnp.float32
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(out.aux)}
    assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32")}
    close(out.logits_BLV, exact.logits_BLV, BFLOAT16)
    assert np.abs(out.logits_BLV - exact.logits_BLV).max() > 1e-4  # the computation was in bfloat16
    grads = jax.jit(jax.grad(lambda p: jnp.mean(run(p, model).logits_BLV[..., 3])))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


NOISY = {"router": TokenChoice(noise=(Jitter(epsilon=0.2),)), "expert_dropout_rate": 0.2}


@pytest.mark.parametrize("source", ["dropout", "router"])
@pytest.mark.parametrize("scan", [False, True])
def test_randomness_is_for_training_only(source, scan):
    options = {"dropout_rate": 0.2} if source == "dropout" else {"moe": NOISY}
    model = make_model(**options, scan_layers=scan)
    params, keys = init(model), jax.random.split(jax.random.key(0))
    calm = run(params, model).logits_BLV
    plain = run(params, make_model(scan_layers=scan)).logits_BLV
    np.testing.assert_array_equal(calm, plain)
    first, second, again = (run(params, model, key=keys[i]).logits_BLV for i in (0, 1, 0))
    assert np.abs(first - calm).max() > 0.01 and np.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(again, first)


def test_embeddings_are_dropped_and_the_rest_scaled_up():
    model = make_model((("mlp",),), dropout_rate=0.2)
    params = init(model)
    params |= {"stack": jax.tree.map(np.zeros_like, params["stack"])}  # the layer adds nothing
    x_BLM = model.embed(params, jnp.asarray(TOKENS))
    y_BLM = model.through("stack", params, x_BLM, Call(rng=jax.random.key(0))).x_BLM
    kept = np.asarray(y_BLM) != 0
    np.testing.assert_allclose(y_BLM, np.where(kept, x_BLM / 0.8, 0), rtol=1e-6)
    assert 0.7 < kept.mean() < 0.9


def test_layers_draw_their_own_randomness():
    # With zero routers only noise decides, so a key shared by layers would give equal counts.
    noisy = {"router": TokenChoice(noise=(Gaussian(stddev=1.0),))}
    model = make_model((ROUTED,) * 4, moe=noisy)
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: 0 * p if "router" in [entry.key for entry in path] else p, init(model)
    )
    for scan in (False, True):
        model = dataclasses.replace(model, scan_layers=scan)
        out = run(params, model, key=jax.random.key(0))
        assigned_XBE = np.asarray(out.aux["moe"].sequences["assigned_BE"])
        assert len({counts.tobytes() for counts in assigned_XBE}) == 4


def test_training_without_randomness_equals_evaluation_at_the_same_capacity():
    model = make_model()
    params = init(model)
    close(run(params, model, key=jax.random.key(0), capacity=1.0), run(params, model, capacity=1.0))


def test_capacity_is_the_calls_or_that_of_every_part():
    model = make_model(moe={"capacity": Capacity(train_factor=0.5, eval_factor=0.25)})
    params, key = init(model), jax.random.key(0)
    assert dropped(run(params, model)).max() == 0
    assert dropped(run(params, model, capacity=0.5)).max() > 0.1
    for rng, factor in ((key, 0.5), (None, 0.25)):
        close(run(params, model, key=rng, capacity=None), run(params, model, key=rng,
              capacity=factor))  # fmt: skip


def test_evaluation_may_select_more_experts_than_training():
    """Evaluation then equals a model of that K, its capacity and gates too. Training does not."""
    model = make_model(moe={"num_selected_experts": 1, "eval_num_selected_experts": 3})
    more, params = make_model(moe={"num_selected_experts": 3}), init(model)
    out, expected = (run(params, m, capacity=0.75) for m in (model, more))
    jax.tree.map(np.testing.assert_array_equal, out, expected)
    assert out.aux["moe"].sums["assigned_KE"].shape == (2, 3, 4) and dropped(out).max() > 0.1
    trained = run(params, model, key=jax.random.key(0))
    assert trained.aux["moe"].sums["assigned_KE"].shape == (2, 1, 4)


def test_a_selection_bias_steers_its_own_layer():
    model = make_model(moe={"bias": SignUpdate(rate=0.1)})
    assert model.state_specs()["moe"]["bias_E"].shape == (2, 4)
    bias = np.zeros((2, 4), np.float32)
    bias[1, 3] = 100.0  # in the second MoE layer all tokens get expert 3
    assigned_XKE = run(init(model), model, bias=bias).aux["moe"].sums["assigned_KE"]
    assert assigned_XKE[1, :, 3].sum() == BATCH * LENGTH
    assert assigned_XKE[0, :, 3].sum() < BATCH * LENGTH


def test_choices_are_recorded_and_replayed_by_part():
    model = make_model()
    params = init(model)

    @jax.jit
    def recorded(params, replay):
        call = Call(tokens_BL=TOKENS, capacity=0.0, record=True)
        return model.run(params, call, replay=replay)

    out = recorded(params, None)
    choices = out.aux["moe"].choices
    assert choices.expert_index.shape == choices.kept.shape == (2, BATCH, LENGTH, 2)
    turned = choices._replace(expert_index=(choices.expert_index + 1) % 4, gate=None, kept=None)
    again = recorded(params, {"moe": turned})
    np.testing.assert_array_equal(again.aux["moe"].choices.expert_index, turned.expert_index)
    assert np.abs(again.logits_BLV - out.logits_BLV).max() > 0.01
    one = jax.tree.map(lambda a: a[:1], turned)
    with pytest.raises(ValueError, match=r"'moe': .*the model has 2 layers of 'moe'"):
        recorded(params, {"moe": one})
    with pytest.raises(ValueError, match=r"'other': .*the model has 0 layers of 'other'"):
        recorded(params, {"other": turned})


COUNTED = {
    "plain": {},
    "dense": {"layers": (DENSE, DENSE)},
    "scanned": {"scan_layers": True, "layers": (DENSE,) + (ROUTED,) * 4},
    "everything": {
        "layers": (ROUTED, DENSE) * 2,
        "attention": {"biases": tuple("qkvo"), "qk_norm": RMSNorm(), "num_kv_heads": 1},
        "mlp": {"use_bias": True, "activation": GeGLU()},
        "norm": LayerNorm(),
        "tie_embeddings": False,
        "moe": {
            "activation": SwiGLU(),
            "use_bias": True,
            "shared_expert_dim": 6,
            "shared_expert_gate": True,
        },
    },
    "one expert": {"moe": {"num_experts": 1, "num_selected_experts": 1}},
}


@pytest.mark.parametrize("name", COUNTED)
def test_counted_parameters_are_those_of_the_model(name):
    model = make_model(**COUNTED[name])
    assert count_parameters(model, LENGTH).total == sum(
        p.size for p in jax.tree.leaves(init(model))
    )


def test_parameters_by_hand():
    # M = 8, two heads of 4 with one key-value head, V = 17; layer 0 dense (GELU, 12 hidden),
    # layer 1 MoE: 4 SwiGLU experts of 6, two selected, one shared and gated.
    model = make_model(
        (DENSE, ROUTED),
        moe={"activation": SwiGLU(), "shared_expert_dim": 6, "shared_expert_gate": True},
        attention={"num_kv_heads": 1, "qk_norm": RMSNorm()}, mlp={"activation": Gelu()},
    )  # fmt: skip
    count = count_parameters(model, LENGTH)
    assert count.embedding == 17 * 8 and count.head == 0
    # Each of the two layers: queries and output 8 x 8, keys and values 8 x 4, and two norms of 4.
    assert count.attention == 2 * (2 * 64 + 2 * 32 + 2 * 4)
    assert count.dense_ffn == 2 * 8 * 12
    assert count.experts == 4 * 3 * 8 * 6 and count.active_experts == 2 * 3 * 8 * 6
    assert count.shared_experts == 3 * 8 * 6 + 8
    assert count.router == 8 * 4
    assert count.norms == 5 * 8
    assert count.total == 136 + 400 + 192 + 576 + 152 + 32 + 40
    assert count.active == count.total - 288


def test_flops_by_hand():
    model = make_model(
        (DENSE, ROUTED),
        moe={"activation": SwiGLU(), "shared_expert_dim": 6,
             "capacity": Capacity(train_factor=1.25)},
        attention={"num_kv_heads": 1}, mlp={"activation": Gelu()},
    )  # fmt: skip
    flops = count_flops(model, LENGTH)
    # A multiply-add is two FLOPs. Projections have 192 weights; scores and weighted values take 8
    # keys x 8 dims each.
    assert flops.attention == 2 * (2 * 192 + 2 * 2 * 8 * 8)
    expert = 2 * 3 * 8 * 6
    assert flops.dense_ffn == 2 * 2 * 8 * 12 + expert  # plus the shared expert
    assert flops.experts == 2 * expert
    # ceil(8 * 2 * 1.25 / 4) = 5 slots per expert, so 20 slots for 8 tokens: 2.5 per token.
    assert flops.padding == 0.5 * expert
    # Dispatch and combine each cost 8 tokens x 20 slots x 8 dims, for 8 tokens.
    assert flops.dispatch == 2 * 2 * 20 * 8
    assert flops.router == 2 * 8 * 4
    assert flops.head == 2 * 8 * 17
    assert flops.model == flops.computed - flops.padding - flops.dispatch


@pytest.mark.parametrize(("way", "padding"), [("gather", 0.5), ("ragged", 0.0)])
def test_flops_of_rows_by_index_have_no_contractions(way, padding):
    flops = count_flops(make_model((DENSE, ROUTED), moe={"run_experts": way}), LENGTH)
    assert flops.dispatch == 0
    assert flops.padding == padding * 2 * 2 * 8 * 6
