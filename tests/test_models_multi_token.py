"""Multi-token modules: by hand, against NumPy and transformers, in the loss and in plans."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import Call
from moe_jax.config import MeshConfig, from_config_dict, to_dict
from moe_jax.models.multi_token import MultiToken, later_call, later_weights, shift
from moe_jax.parallel.batches import from_whole
from moe_jax.parallel.mesh import make_mesh
from moe_jax.planning.flops import count_flops
from moe_jax.planning.parameters import count_parameters
from moe_jax.training.loss import batch_totals, call_of_batch, partial_loss
from moe_jax.training.placement import BATCH_AXES, compile_train_step, state_shardings
from moe_jax.training.rows import metrics_row
from moe_jax.training.step import StepMetrics, gradient, make_train_step
from tests.tiny_run import cut, quick_jit, tiny_batch, tiny_config, tiny_state

FLOAT32 = {"rtol": 2e-5, "atol": 2e-6}
DEPTH = 2
NAMES = ("embedding_norm", "hidden_norm", "project", "final_norm")
MODULES = {"depth": DEPTH, "layer": ("attention", "moe"), "weight": 0.3}
DROPLESS = {
    "capacity": {"train_factor": 0.0},
    "bias": {"kind": "sign", "rate": 0.01},
    "losses": {"load_balance": {"kind": "load_balance", "weight": 0.01}},
}


@pytest.mark.parametrize(("k", "tokens", "previous"), [(1, [12, 13, 14, 0], 11), (4, [0] * 4, 14)])
def test_the_first_token_of_a_module_has_the_token_before_it(k, tokens, previous):
    """Routers that hash two tokens read it."""
    call = Call(tokens_BL=jnp.array([[11, 12, 13, 14]])).with_defaults(jnp.zeros((1, 4, 8)))
    later = later_call(call, k)
    assert (later.tokens_BL.tolist(), later.previous_B.tolist()) == ([tokens], [previous])


def make(model=None, **moe):
    """A config with two modules, and its state."""
    settings = {"multi_token": MODULES, "vocab_size": 300, "parts": {"moe": {**DROPLESS, **moe}}}
    config = tiny_config({"model": settings | (model or {})})
    return config, tiny_state(config)


def make_dense():
    """The same with MLPs only."""
    model = {
        "multi_token": {"depth": DEPTH, "layer": ("mlp",)}, "vocab_size": 300,
        "parts": {"attention": None, "moe": None, "mlp": {"kind": "mlp", "dim": 8}},
        "stack": {"unit": [["mlp"]], "repeats": 1}, "embedding_multiplier": 1.0,
    }  # fmt: skip
    config = tiny_config({"model": model})
    return config, tiny_state(config)


def loss_of(params, batch, config, state):
    totals = batch_totals(batch, config.model)
    rng = jax.random.key(1)
    return partial_loss(params, batch, totals, config.model, model_state=state.model_state, rng=rng)


def later(config, state, call):
    """The logits of the modules, [D, B, L, V]."""
    run = quick_jit(
        lambda params, call: (
            config.model.run(params, call, state=state.model_state, multi_token=True).later_BLV
        )
    )
    return np.stack(run(state.params, call))


def test_weights_and_targets_by_hand():
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    weights = jnp.array([[1, 1, 0, 0.5, 1, 1, 0, 0]], jnp.float32)
    # Module 1 at j predicts the target of j + 1, if both are in one document and both count.
    assert later_weights(weights, segments, 1).tolist() == [[1, 0, 0, 0, 1, 0, 0, 0]]
    assert later_weights(weights, segments, 2).tolist() == [[0, 0.5, 0, 0, 0, 0, 0, 0]]
    assert later_weights(weights, segments, 9).tolist() == [[0] * 8]
    assert shift(jnp.array([5, 6, 7]), 1).tolist() == [6, 7, 0]
    assert shift(jnp.array([5, 6, 7]), 4).tolist() == [0, 0, 0]


def test_modules_of_one_mlp_equal_numpy():
    """Without attention, positions are independent."""
    config, state = make_dense()
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), state.params)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 7))

    def norm(x, params):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"]

    def layer(x, params):
        normed = norm(x, params["mlp_norm"])
        return x + np.maximum(normed @ params["mlp"]["wi"], 0) @ params["mlp"]["wo"]

    def row(tree, k):
        return jax.tree.map(lambda a: a[k], tree)

    table = params["embedding"]
    hidden = layer(table[tokens], row(params["stack"]["unit"]["0"], 0))
    hidden = norm(hidden, params["final_norm"])
    ours = later(config, state, Call(tokens_BL=jnp.asarray(tokens)))
    for k in range(DEPTH):
        own = {name: row(tree, k) for name, tree in params["multi_token"].items() if name in NAMES}
        embedded = table[np.roll(tokens, -(k + 1), axis=1)]
        both = [norm(embedded, own["embedding_norm"]), norm(hidden, own["hidden_norm"])]
        x = np.concatenate(both, -1) @ own["project"]
        hidden = norm(
            layer(x, row(params["multi_token"]["stack"]["unit"]["0"], k)), own["final_norm"]
        )
        expected = hidden @ table.T
        np.testing.assert_allclose(ours[k, :, : -(k + 1)], expected[:, : -(k + 1)], **FLOAT32)


def test_module_k_sees_k_tokens_ahead_and_no_more():
    config, state = make()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (1, 8)))
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % 300)
    one, other = (later(config, state, Call(tokens_BL=t)) for t in (tokens, changed))
    for k in range(DEPTH):
        moved = np.abs(one[k, 0] - other[k, 0]).max(-1) > 1e-4
        first = 5 - (k + 1)
        assert not moved[:first].any() and moved[first]


@pytest.mark.slow
def test_packed_documents_are_as_single_ones():
    config, state = make()
    documents = [np.arange(3, 10), np.arange(40, 45)]
    packed = Call(
        tokens_BL=jnp.asarray(np.concatenate([[0], *documents])[None]),
        positions_BL=jnp.asarray([[0, *range(7), *range(5)]]),
        segments_BL=jnp.asarray([[0] + [1] * 7 + [2] * 5]),
    )
    together = later(config, state, packed)
    for start, document in zip((1, 8), documents, strict=True):
        alone = later(config, state, Call(tokens_BL=jnp.asarray(document[None])))
        for k in range(DEPTH):
            length = len(document) - k - 1
            np.testing.assert_allclose(
                together[k, 0, start : start + length], alone[k, 0, :length], **FLOAT32
            )


@pytest.mark.slow
def test_the_loss_is_the_mean_over_modules_and_the_cross_entropy_is_reported_alone():
    config, state = make()
    batch = tiny_batch()
    loss, parts = loss_of(state.params, batch, config, state)
    segments, weights = np.asarray(batch["segment_ids"]), np.asarray(batch["loss_weights"])
    targets, nats, balance = np.asarray(batch["targets"]), [], []
    balance_loss, of_modules = config.model.part["moe"].loss, parts.aux["multi_token_moe"]
    for k, logits in enumerate(later(config, state, call_of_batch(batch)), 1):
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        total = count = tokens = 0.0
        for b, j in np.ndindex(*segments.shape):
            i = j + k
            tokens += i < 16 and segments[b, i] == segments[b, j] > 0
            if i < 16 and segments[b, i] == segments[b, j] > 0 and weights[b, j] > 0:
                total -= weights[b, i] * log_probs[b, j, targets[b, i]]
                count += weights[b, i]
        nats.append(total / count)
        own = jax.tree.map(lambda a, k=k: a[k - 1 : k], of_modules)
        balance.append(balance_loss(own, jnp.float32(tokens), None))
    np.testing.assert_allclose(parts.aux["multi_token"].sums["loss_D"], nats, **FLOAT32)
    trunk = balance_loss(parts.aux["moe"], batch_totals(batch).tokens, None)
    modules = np.mean(balance)
    assert modules > 0
    expected = parts.cross_entropy + trunk + 0.3 * np.mean(nats) + modules
    np.testing.assert_allclose(loss, expected, **FLOAT32)

    # Two layers, then two modules with metrics and a bias of their own.
    metrics = StepMetrics(0, 0, 0, 0, config.model.metrics(parts.aux))
    row = metrics_row(metrics, config.model.layers_of)
    assert row["multi_token/layer_03/loss"] == pytest.approx(nats[1], rel=1e-5)
    assert "multi_token_moe/layer_03/expert_load" in row
    sums = {name: aux.sums for name, aux in parts.aux.items()}
    new = config.model.next_state(state.model_state, sums, jnp.int32(0), 100)
    assert set(new) == {"moe", "multi_token_moe"}
    for biases in new.values():
        assert biases["bias_E"].shape == (2, 4)
        assert np.all(np.max(np.abs(biases["bias_E"]), axis=-1) > 0)


def test_shares_of_the_modules_add_up_over_parts_of_a_batch():
    config, state = make_dense()
    batch = tiny_batch()
    totals = batch_totals(batch, config.model)

    def losses(part):
        settings = {"model_state": {}, "rng": jax.random.key(1)}
        _, parts = partial_loss(state.params, part, totals, config.model, **settings)
        return parts.aux["multi_token"].sums["loss_D"]

    halves = [{n: v[rows] for n, v in batch.items()} for rows in (slice(2), slice(2, 4))]
    shares = [quick_jit(losses)(half) for half in halves]
    assert all(np.all(share > 0) for share in shares)
    np.testing.assert_allclose(sum(shares), quick_jit(losses)(batch), **FLOAT32)


@pytest.mark.slow
def test_microbatches_add_up():
    config, state = make({"multi_token": MODULES | {"depth": 1}, "stack": {"repeats": 1}})
    batch, keys = tiny_batch(), jax.random.split(jax.random.key(0), 2)
    totals = batch_totals(batch, config.model)
    whole, halves = (
        quick_jit(gradient, static_argnames="model")(
            state, cut(batch, n), keys[:n], totals, model=config.model
        )
        for n in (1, 2)
    )
    np.testing.assert_allclose(whole[0], halves[0], **FLOAT32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **FLOAT32), whole[1], halves[1])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 1, "expert": 2}, {"fsdp": 2, "tensor": 2}])
def test_a_step_on_a_mesh_is_that_of_one_device(sizes):
    config, state = make()
    expected = jax.jit(make_train_step(config))(state, cut(tiny_batch()))
    config = dataclasses.replace(config, mesh=MeshConfig(**{"data": 1, **sizes}))
    mesh = make_mesh(config.mesh)
    placed = jax.tree.map(jax.device_put, state, state_shardings(config, mesh))
    with jax.set_mesh(mesh):
        step = compile_train_step(config, mesh)
        got = step(placed, from_whole(cut(tiny_batch()), mesh, BATCH_AXES))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = max(1e-6, np.abs(theirs).max(initial=0))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5 * scale)


@pytest.mark.slow
def test_modules_equal_those_of_transformers():
    """Two modules with Mixtral's layer on a one-layer model; each reads the previous output."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    theirs = transformers.MixtralConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    theirs.num_mtp_layers = DEPTH
    main = transformers.MixtralForCausalLM(theirs).eval()
    modules = MtpModel(main, DEPTH).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for value in {*main.parameters(), *modules.parameters()}:
            value.copy_(torch.randn(value.shape) * 0.3 + (1.0 if value.ndim == 1 else 0.0))
    tensors = {f"main.{n}": v.detach().numpy() for n, v in main.named_parameters()}
    tensors |= {n: v.detach().numpy() for n, v in modules.named_parameters()}

    def layer(prefix):
        gate, up = np.split(tensors[f"{prefix}.mlp.experts.gate_up_proj"], 2, axis=1)
        down = tensors[f"{prefix}.mlp.experts.down_proj"]
        return {
            "attention": {
                f"w{n}": tensors[f"{prefix}.self_attn.{n}_proj.weight"].T for n in "qkvo"
            },
            "attention_norm": {"scale": tensors[f"{prefix}.input_layernorm.weight"]},
            "moe": {
                "router": {"weight": tensors[f"{prefix}.mlp.gate.weight"].T},
                "experts": {
                    "wg": gate.swapaxes(1, 2),
                    "wi": up.swapaxes(1, 2),
                    "wo": down.swapaxes(1, 2),
                },
            },
            "moe_norm": {"scale": tensors[f"{prefix}.post_attention_layernorm.weight"]},
        }

    def module(k):
        names = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "final_norm": "post_norm"}
        own = {
            ours: {"scale": tensors[f"layers.{k}.{name}.weight"]} for ours, name in names.items()
        }
        own["project"] = tensors[f"layers.{k}.eh_proj.weight"].T
        stack = {"first": {}, "unit": {"0": layer(f"layers.{k}.mtp_block")}, "last": {}}
        return own | {"stack": stack}

    def stacked(*trees):
        return jax.tree.map(lambda *a: np.stack(a), *trees)

    config, _ = make(
        {
            "tie_embeddings": False, "embedding_multiplier": 1.0,
            "norm": {"kind": "rmsnorm", "epsilon": 1e-5}, "stack": {"repeats": 1},
        },
        activation="swiglu", bias=None,
        router={"kind": "token_choice", "renormalize": True},
    )  # fmt: skip
    params = {
        "embedding": tensors["main.model.embed_tokens.weight"],
        "head": tensors["main.lm_head.weight"].T,
        "final_norm": {"scale": tensors["main.model.norm.weight"]},
        "stack": {"first": {}, "unit": {"0": stacked(layer("main.model.layers.0"))}, "last": {}},
        "multi_token": stacked(*(module(k) for k in range(DEPTH))),
    }
    tokens = np.random.default_rng(0).integers(0, 300, (1, 12))
    call = Call(tokens_BL=jnp.asarray(tokens), capacity=0.0)
    with jax.default_matmul_precision("highest"):
        output = config.model.run(params, call, multi_token=True)
    with torch.no_grad():
        found = main(torch.tensor(tokens), output_hidden_states=True)
        np.testing.assert_allclose(output.logits_BLV, found.logits.numpy(), rtol=2e-4, atol=2e-4)
        hidden, cache = found.hidden_states[-1], MtpCache(config=modules.config)
        for k in range(DEPTH):
            ids = torch.tensor(np.asarray(shift(jnp.asarray(tokens), k + 1)))
            positions = torch.arange(12)[None] + k + 1
            hidden = modules.forward_layer(k, hidden, positions, cache, input_ids=ids)
            logits = modules.shared_head(hidden).numpy()[:, : 11 - k]
            ours = output.later_BLV[k][:, : 11 - k]
            np.testing.assert_allclose(ours, logits, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_gradients_of_the_modules_alone_reach_embedding_head_and_layers():
    config, state = make({"tie_embeddings": False})

    def later_loss(params):
        return loss_of(params, tiny_batch(), config, state)[1].aux["multi_token"].sums["loss_D"][1]

    grads = quick_jit(jax.grad(later_loss))(state.params)
    grads.pop("final_norm")
    norms = jax.tree.map(lambda a: float(jnp.linalg.norm(a)), grads)
    assert all(norm > 0 for norm in jax.tree.leaves(norms)), norms


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"scan_layers": True}, {"remat": "full"}])
def test_how_the_layers_run_changes_nothing(change):
    config, state = make()
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    batch = tiny_batch()
    (one, _), (two, _) = (loss_of(state.params, batch, c, state) for c in (config, other))
    np.testing.assert_allclose(one, two, **FLOAT32)


def test_without_being_asked_nothing_runs_and_nothing_changes():
    config, state = make()
    call = call_of_batch(tiny_batch())
    output = config.model.run(state.params, call, state=state.model_state)
    assert set(output.aux) == {"moe"} and output.later_BLV == ()
    bare = dataclasses.replace(config.model, multi_token=None)
    plain = {name: own for name, own in state.params.items() if name != "multi_token"}
    assert jax.tree.structure(bare.specs()) == jax.tree.structure(plain)
    again = bare.run(plain, call, state={"moe": state.model_state["moe"]})
    np.testing.assert_array_equal(again.logits_BLV, output.logits_BLV)


def test_plans_count_the_modules_apart():
    config, _ = make({"multi_token": MODULES | {"depth": 1}})
    model, length = config.model, 16
    bare = dataclasses.replace(model, multi_token=None)
    with_modules, without = (count_parameters(m, length) for m in (model, bare))
    layer = 4 * 16 * 16 + 4 * 2 * 16 * 32 + 16 * 4 + 2 * 16  # attention, experts, router, norms
    assert with_modules.multi_token == layer + 2 * 16 * 16 + 3 * 16
    assert with_modules.total - without.total == with_modules.multi_token
    assert with_modules.active == without.active
    assert with_modules.by_convention() == without.by_convention()
    flops, plain = count_flops(model, length), count_flops(bare, length)
    assert flops.head == 2 * plain.head
    assert flops.experts == plain.experts * 1.5  # three layers instead of two
    assert flops.other == 2 * 2 * 16 * 16


def test_a_config_names_the_modules_and_says_what_does_not_fit():
    config, _ = make()
    assert from_config_dict(to_dict(config)) == config
    assert config.model.multi_token == MultiToken(**MODULES)
    for change, message in (
        (
            {"multi_token": {"layer": ("attention", "mamba")}},
            r"stack and multi_token\.layer .*\['mamba'\], parts",
        ),
        ({"stack": {"causal": False}}, r"multi_token needs a causal stack"),
    ):
        with pytest.raises(ValueError, match=message):
            make(change)
    with pytest.raises(ValueError, match=r"begin with 'multi_token'.*\['multi_token_moe'\]"):
        dataclasses.replace(
            config.model,
            parts={**dict(config.model.parts), "multi_token_moe": config.model.part["moe"]},
            stack=dataclasses.replace(
                config.model.stack, first=(("attention", "multi_token_moe"),)
            ),
        )
