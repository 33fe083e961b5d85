"""Encoder-decoder models: what each side sees, packed pairs, and a training step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis.routed import route_batches
from moe_jax.analysis.similarity import moe_weights
from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    config_dict,
    from_config_dict,
    to_dict,
)
from moe_jax.data.objectives.pairs import EncoderPrefixLM
from moe_jax.inference import generate_tokens
from moe_jax.layers.attention import Attention
from moe_jax.layers.cross_attention import CrossAttention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.relative_positions import RelativePositions
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.linen import LinenModel
from moe_jax.models.model import LanguageModel
from moe_jax.models.routing_record import load_record, record_routing, save_record
from moe_jax.models.stack import StackLayout
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import BatchPrioritized
from moe_jax.moe.routing.fixed import Hash
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.part import Call, Dims, EncoderInputs, Own, merge_aux
from moe_jax.training.loss import batch_totals, call_of_batch, replayed_choices
from moe_jax.training.state import init_state
from moe_jax.training.step import (
    depends_on_microbatches,
    gradient,
    make_train_step,
)
from tests.slow import slow_but
from tests.tiny_run import cut, quick_jit

# The same float32 sums in another order, of numbers near 1.
FLOAT32 = 2e-5
# A dependence on a token shows as a far larger change.
MOVED = 1e-3
VOCAB, LENGTH, ENCODER_LENGTH = 20, 6, 8

BLOCK = MoE(num_experts=4, num_selected_experts=1, expert_dim=6, run_experts="einsum")
PARTS = {
    "attention": Attention(num_heads=2, head_dim=4),
    "cross_attention": CrossAttention(num_heads=2, head_dim=4),
    "encoder_moe": dataclasses.replace(
        BLOCK, capacity=Capacity(train_factor=1.0, eval_factor=1.0, queue=BatchPrioritized())
    ),
    "moe": dataclasses.replace(BLOCK, bias=SignUpdate()),
}
ENCODER = StackLayout(unit=(("attention", "encoder_moe"),), repeats=2, causal=False)
DECODER = StackLayout(unit=(("attention", "cross_attention", "moe"),), repeats=2)
MODEL = EncoderDecoder(vocab_size=VOCAB, model_dim=8, parts=PARTS, encoder=ENCODER, stack=DECODER)


def values_of(specs, seed=0):
    """Random parameters of deviation 1 / sqrt(fan-in); scales have mean 1, routers are tripled."""
    random = np.random.default_rng(seed)

    def draw(path, spec):
        names = [entry.key for entry in path]
        fan_in = spec.shape[-2] if len(spec.shape) > 1 else 4
        values = random.normal(size=spec.shape) / fan_in**0.5 + (names[-1] == "scale")
        return (values * (3 if "router" in names else 1)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, specs)


PARAMS = values_of(MODEL.specs())
STATE = {"moe": {"bias_E": jnp.zeros((2, 4))}}


def batch_of(*rows, length=LENGTH, encoder_length=ENCODER_LENGTH, left=False):
    """A batch of packed rows, each a list of pairs (encoder tokens, decoder tokens)."""

    def packed(texts, size):
        tokens = np.concatenate(texts)
        segments = np.repeat(np.arange(len(texts)) + 1, [len(text) for text in texts])
        positions = np.concatenate([np.arange(len(text)) for text in texts])
        around = (size - len(tokens), 0) if left else (0, size - len(tokens))
        return [np.pad(a, around).astype(np.int32) for a in (tokens, positions, segments)]

    names = ("inputs", "positions", "segment_ids")
    columns = {}
    for side, size, prefix in ((0, encoder_length, "encoder_"), (1, length, "")):
        arrays = zip(*(packed([pair[side] for pair in row], size) for row in rows), strict=True)
        for name, column in zip(names, arrays, strict=True):
            columns[prefix + name] = jnp.asarray(np.stack(column))
    columns["targets"] = (columns["inputs"] * 7 + 3) % VOCAB
    return columns | {"loss_weights": (columns["segment_ids"] > 0).astype(jnp.float32)}


def text(length, seed=0):
    return np.random.default_rng(seed).integers(1, VOCAB, length)


PAIRS = [(text(n, n), text(m, 10 * n + m)) for n, m in ((3, 2), (4, 4), (5, 3))]
# Rows with one and two pairs, padded in encoder and decoder; one row is empty.
BATCH = batch_of([PAIRS[1], PAIRS[0]], [PAIRS[2]], [(text(0), text(0))], [PAIRS[1]])


@functools.partial(quick_jit, static_argnames=("model", "capacity"))
def logits_of(params, batch, model=MODEL, capacity=0.0):
    return model.run(params, call_of_batch(batch, capacity=capacity), state=STATE).logits_BLV


def test_cross_attention_is_softmax_over_the_memory_of_the_same_segment():
    part = CrossAttention(num_heads=2, head_dim=4, scale=1.0, biases=tuple("qkvo"))
    random = np.random.default_rng(0)
    params = values_of(part.specs(Dims(8)))
    x, memory = random.normal(size=(1, 4, 8)), random.normal(size=(1, 5, 8))
    segments, memory_segments = np.array([[1, 2, 3, 0]]), np.array([[2, 1, 1, 2, 0]])
    call = Call(segments_BL=segments, memory=memory, memory_segments_BT=memory_segments)
    got, aux, cache = part.apply(params, jnp.asarray(x), call.with_defaults(x), Own())
    assert aux is None and cache is None

    q, k, v = (
        (rows[0] @ params[f"w{n}"] + params[f"b{n}"]).reshape(-1, 2, 4)
        for n, rows in (("q", x), ("k", memory), ("v", memory))
    )
    for token, its_memory in ((0, [1, 2]), (1, [0, 3]), (3, [4])):
        scores = np.einsum("nd,tnd->nt", q[token], k[its_memory])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        heads = np.einsum("nt,tnd->nd", weights, v[its_memory]).reshape(-1)
        expected = heads @ params["wo"] + params["bo"]
        np.testing.assert_allclose(got[0, token], expected, atol=FLOAT32)
    # The third text has no memory, so it reads nothing rather than everything.
    np.testing.assert_allclose(got[0, 2], params["bo"], atol=FLOAT32)


def test_a_decoder_sees_no_later_token_of_its_own_and_every_token_of_the_encoder():
    batch = batch_of([(text(ENCODER_LENGTH), text(LENGTH))])
    before = logits_of(PARAMS, batch)
    other = {name: (batch[name] + 5) % VOCAB for name in ("inputs", "encoder_inputs")}
    for place in range(LENGTH):
        changed = batch["inputs"].at[0, place].set(other["inputs"][0, place])
        moved = np.abs(logits_of(PARAMS, batch | {"inputs": changed}) - before)[0].max(-1)
        assert moved[:place].max(initial=0) < FLOAT32 and moved[place] > MOVED
    for place in range(ENCODER_LENGTH):
        changed = batch["encoder_inputs"].at[0, place].set(other["encoder_inputs"][0, place])
        moved = np.abs(logits_of(PARAMS, batch | {"encoder_inputs": changed}) - before)[0].max(-1)
        assert moved.min() > MOVED
    assert not MODEL.looks_ahead(training=True)  # only the encoder has a batch-prioritised queue


@pytest.mark.parametrize("left", slow_but([False], [False, True]))
def test_packed_and_padded_pairs_give_the_logits_of_the_pairs_alone(left):
    rows = [[PAIRS[1], PAIRS[0]]]
    packed = batch_of(*rows, length=LENGTH + 1, encoder_length=ENCODER_LENGTH + 1, left=left)
    got = logits_of(PARAMS, packed)
    for row, pairs in enumerate(rows):
        for number, (source, target) in enumerate(pairs):
            alone = batch_of([(source, target)], length=len(target), encoder_length=len(source))
            place = np.asarray(packed["segment_ids"][row]) == number + 1
            np.testing.assert_allclose(
                got[row][place], logits_of(PARAMS, alone)[0], atol=FLOAT32, rtol=FLOAT32
            )


def config_of(model=MODEL, **training):
    return ExperimentConfig(
        model=model,
        data=DataConfig(sequence_length=ENCODER_LENGTH, objective=EncoderPrefixLM()),
        optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-2),
        training=TrainingConfig(**{"batch_size": 4, "num_steps": 20} | training),
        mesh=MeshConfig(data=1),
    )


def state_of(model=MODEL):
    return jax.jit(init_state, static_argnums=0)(config_of(model))._replace(
        params=PARAMS, model_state=STATE
    )


@functools.partial(quick_jit, static_argnames=("model", "logits_chunks"))
def loss_and_gradient(state, batch, model=MODEL, **settings):
    """Loss, gradient and metrics of a batch [P, B, ...] of P microbatches."""
    keys = jax.random.split(jax.random.key(0), batch["inputs"].shape[0])
    loss, grads, said = gradient(state, batch, keys, batch_totals(batch), model, **settings)
    return loss, grads, model.metrics(merge_aux(said.aux))


def assert_close(got, expected):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(
            a / scale, b / scale, atol=FLOAT32, err_msg=jax.tree_util.keystr(path)
        )


@pytest.fixture(scope="module")
def whole():
    """Loss, gradient and metrics of the batch in one piece."""
    return loss_and_gradient(state_of(), cut(BATCH))


@pytest.mark.slow
def test_two_microbatches_give_the_gradient_of_one(whole):
    assert_close(loss_and_gradient(state_of(), cut(BATCH, 2)), whole)


@pytest.mark.slow
def test_scanned_layers_give_the_gradient_of_unrolled_ones(whole):
    model = dataclasses.replace(MODEL, scan_layers=False, remat="full")
    assert_close(loss_and_gradient(state_of(), cut(BATCH), model), whole)


@pytest.mark.slow
def test_eight_devices_give_the_gradient_of_one(whole):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    params = jax.tree.map(
        lambda spec, value: jax.device_put(value, named_sharding(spec.axes, mesh)),
        MODEL.specs(), PARAMS,
    )  # fmt: skip
    state = jax.device_put(state_of(), named_sharding((), mesh))._replace(params=params)
    batch = jax.device_put(cut(BATCH), named_sharding((None, "batch", None), mesh))
    with jax.set_mesh(mesh):
        got = loss_and_gradient(state, batch)
    assert_close(jax.device_get(got), whole)


def test_balance_losses_are_per_token_of_their_own_stack():
    totals = batch_totals(BATCH)
    assert (totals.tokens, totals.encoder_tokens) == (2 + 4 + 3 + 4, 3 + 4 + 5 + 4)
    output = quick_jit(MODEL.run)(PARAMS, call_of_batch(BATCH), state=STATE)
    sums = {name: aux.sums for name, aux in output.aux.items()}
    assert sums["moe"]["num_tokens"].tolist() == [13, 13]
    assert sums["encoder_moe"]["num_tokens"].tolist() == [16, 16]
    got = MODEL.loss(output.aux, totals.tokens, sums, totals.encoder_tokens)
    by_part = [
        PARTS[name].loss(output.aux[name], jnp.float32(count), sums[name])
        for name, count in (("moe", 13), ("encoder_moe", 16))
    ]
    np.testing.assert_allclose(got, sum(by_part), rtol=1e-6)

    metrics = MODEL.metrics(output.aux)
    assert metrics["encoder_moe/expert_load"].shape == metrics["moe/expert_load"].shape == (2, 4)


def test_layers_are_numbered_through_both_stacks():
    assert MODEL.layers_of["attention"] == (0, 1, 2, 3)
    assert MODEL.moe_layers == {"encoder_moe": (0, 1), "moe": (2, 3)}
    assert set(MODEL.state_specs()) == {"moe"}


@pytest.mark.slow
def test_dropout_of_the_two_stacks_is_drawn_apart():
    # Twin stacks: dropout at the same place in both must differ.
    model = dataclasses.replace(MODEL, dropout_rate=0.5)
    text_of = {"tokens_BL": jnp.ones((1, 4), jnp.int32), "rng": jax.random.key(0)}
    call = Call(**text_of, encoder=EncoderInputs(text_of["tokens_BL"]))
    memory = model.encode(PARAMS, call, state=STATE)[0].memory
    x = model.embed(PARAMS, text_of["tokens_BL"])
    same = model.through("encoder", PARAMS, x, Call(**text_of), state=STATE).x_BLM
    assert np.abs(memory - MODEL.norm.apply(PARAMS["encoder_norm"], same)).max() > MOVED


@pytest.mark.slow
def test_a_training_step_learns_the_batch():
    config = config_of()
    step = jax.jit(make_train_step(config))
    state, losses = state_of(), []
    for _ in range(16):
        state, metrics = step(state, cut(BATCH))
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.7 * losses[0]
    assert not np.array_equal(state.model_state["moe"]["bias_E"], STATE["moe"]["bias_E"])
    assert not depends_on_microbatches(config_of(MODEL.map_parts(without_losses)))


def without_losses(part):
    return dataclasses.replace(part, losses=()) if part.routes else part


@pytest.mark.slow
def test_an_own_embedding_of_the_encoder_is_read_by_it_alone():
    model = dataclasses.replace(MODEL, share_embeddings=False)
    assert model.specs()["encoder_embedding"].shape == (VOCAB, 8)
    own = PARAMS | {"encoder_embedding": PARAMS["embedding"]}
    np.testing.assert_array_equal(logits_of(own, BATCH, model), logits_of(PARAMS, BATCH))
    other = own | {"encoder_embedding": PARAMS["embedding"][::-1]}
    assert np.abs(logits_of(other, BATCH, model) - logits_of(own, BATCH, model)).max() > MOVED


@pytest.mark.slow
def test_a_memory_that_is_given_replaces_the_encoder():
    call, _ = MODEL.encode(PARAMS, call_of_batch(BATCH, capacity=0.0), state=STATE)
    given = dataclasses.replace(call, encoder=None)
    output = MODEL.run(PARAMS, given, state=STATE)
    np.testing.assert_allclose(output.logits_BLV, logits_of(PARAMS, BATCH), atol=FLOAT32)
    assert set(output.aux) == {"moe"}


def test_the_encoder_knows_nothing_of_the_decoders_cache():
    """Its relative positions and its bigram-hash router do not read the cache."""
    layout = StackLayout(
        unit=(("attention", "moe"),), repeats=1, causal=False, shared=("position",)
    )
    model = EncoderDecoder(
        vocab_size=VOCAB,
        model_dim=8,
        parts={
            "position": RelativePositions(num_heads=2),
            "attention": Attention(num_heads=2, head_dim=4, position_bias="position"),
            "moe": dataclasses.replace(BLOCK, router=Hash(by="bigram")),
            "cross_attention": PARTS["cross_attention"],
        },
        encoder=layout,
        stack=StackLayout(unit=(("cross_attention",),), repeats=1),
    )
    call = Call(jnp.zeros((1, 1), jnp.int32), encoder=EncoderInputs(jnp.array([[5, 7, 9]])))
    later = dataclasses.replace(
        call, cache_index=jnp.int32(3), cache_length=4, previous_B=jnp.array([2])
    )
    encode = quick_jit(lambda call: model.encode(values_of(model.specs()), call)[0].memory)
    np.testing.assert_array_equal(encode(later), encode(call))


@pytest.mark.slow
def test_the_linen_shell_runs_it():
    shell = LinenModel(MODEL)
    call = call_of_batch(BATCH, capacity=0.0)
    assert jax.tree.map(
        jnp.shape, jax.eval_shape(shell.init, jax.random.key(0), call)["params"]
    ) == (jax.tree.map(lambda spec: spec.shape, MODEL.specs()))
    output = quick_jit(shell.apply)({"params": PARAMS}, call, state=STATE)
    np.testing.assert_allclose(output.logits_BLV, logits_of(PARAMS, BATCH), atol=FLOAT32)


@pytest.mark.slow
def test_chunks_of_logits_change_nothing(whole):
    assert BATCH["targets"].shape[1] % 3 == 0
    assert_close(loss_and_gradient(state_of(), cut(BATCH), logits_chunks=3), whole)


@pytest.mark.slow
def test_bfloat16_gives_finite_gradients():
    model = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    _, grads, _ = loss_and_gradient(state_of(), cut(BATCH), model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_config_of_it_is_written_and_read():
    config = config_of()
    assert from_config_dict(to_dict(config)) == config
    assert config_dict(config).model.encoder.causal is False


REFUSED = {
    "a causal encoder": (
        {"encoder": dataclasses.replace(ENCODER, causal=True)},
        r"an encoder must see the tokens on both sides: encoder.causal=True. Set encoder.causal=",
    ),
    "a part that routes in both": (
        {"encoder": StackLayout(unit=(("encoder_moe", "moe"),), causal=False)},
        r"belongs to one stack: \['moe'\] in the layers of encoder and of stack",
    ),
    "a queue that looks ahead in the decoder": (
        {"stack": StackLayout(unit=(("cross_attention", "moe", "encoder_moe"),)),
         "encoder": StackLayout(unit=(("attention",),), causal=False)},
        r"must not depend on later tokens: the part 'encoder_moe' looks at them",
    ),
    "an encoder that reads itself": (
        {"encoder": StackLayout(unit=(("cross_attention", "encoder_moe"),), causal=False)},
        r"a part of the encoder cannot read the encoder's output: \['cross_attention'\]",
    ),
    "a decoder that does not read": (
        {"stack": StackLayout(unit=(("attention", "moe"),)),
         "parts": {name: part for name, part in PARTS.items() if name != "cross_attention"}},
        r"a part of the decoder must read the encoder's output: none of \['attention', 'moe'\]",
    ),
    "a part in no layer": (
        {"parts": PARTS | {"other": Mlp()}}, r"every part must be used by a layer: \['other'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_layout_is_refused_by_name(name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODEL, **settings)


def test_what_lacks_an_encoder_is_refused():
    with pytest.raises(
        ValueError, match=r"output of an encoder needs a model with one: \['cross_att"
    ):
        LanguageModel(
            parts={name: PARTS[name] for name in ("attention", "cross_attention", "moe")},
            stack=DECODER,
        )
    batch = {name: value for name, value in BATCH.items() if not name.startswith("encoder")}
    with pytest.raises(
        ValueError, match=r"needs a text for its encoder: the call has encoder=None"
    ):
        MODEL.run(PARAMS, call_of_batch(batch), state=STATE)


def test_a_record_has_the_choices_of_both_sides_and_replays_them(tmp_path):
    call = call_of_batch(BATCH)
    sides = {"positions_BL": call.positions_BL, "segments_BL": call.segments_BL}
    record = record_routing(MODEL, PARAMS, call.tokens_BL, STATE, encoder=call.encoder, **sides)
    assert set(record.parts) == {"moe"} and set(record.encoder.parts) == {"encoder_moe"}
    assert record.encoder.parts["encoder_moe"].choices.expert_index.shape == (2, 4, 8, 1)
    assert record.parts["moe"].layers == (2, 3)
    np.testing.assert_array_equal(record.encoder.tokens_BL, BATCH["encoder_inputs"])

    save_record(record, tmp_path / "record.npz")
    jax.tree.map(np.testing.assert_array_equal, load_record(tmp_path / "record.npz"), record)
    # Other parameters would choose other experts.
    other = values_of(MODEL.specs(), seed=1)
    fields = {name: jnp.asarray(a) for name, a in record.batch_fields(MODEL).items()}
    batch = BATCH | fields
    call = call_of_batch(batch, capacity=0.0, record=True)
    replayed = quick_jit(MODEL.run)(other, call, state=STATE, replay=replayed_choices(batch))
    for name, part in record.all_parts.items():
        index = replayed.aux[name].choices.expert_index
        np.testing.assert_array_equal(
            np.where(part.choices.chosen, index, 0),
            np.where(part.choices.chosen, part.choices.expert_index, 0),
        )


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [False, True])
def test_an_analysis_routes_the_tokens_of_one_side(encoder):
    batch = BATCH | {"domain": np.zeros(4, np.int32)}
    few = {"max_tokens": 1000, "of_encoder": encoder}
    state = state_of()
    routed = route_batches(state, MODEL, [batch], **few)
    noisy = route_batches(state, MODEL, [batch], input_noise=0.5, **few)
    assert routed.expert_XJK.shape == noisy.expert_XJK.shape == (2, 16 if encoder else 13, 1)
    assert (routed.expert_XJK != noisy.expert_XJK).any()
    weights = moe_weights(PARAMS, MODEL, "encoder" if encoder else "stack")
    assert list(weights) == (["layer_00", "layer_01"] if encoder else ["layer_02", "layer_03"])
    name = "encoder" if encoder else "stack"
    own = PARAMS[name]["unit"]["0"]["encoder_moe" if encoder else "moe"]["experts"]["wi"][1]
    np.testing.assert_array_equal(list(weights.values())[1].experts["wi"], own)


def test_what_the_encoder_reads_decides_what_is_written():
    prompts = [[3, 9, 4], [17, 2, 8, 11, 5]]
    both = generate_tokens(config_of(), PARAMS, prompts, 6, state=STATE)
    assert len(both[0]) == 6 and both[0] != both[1]
    for prompt, text in zip(prompts, both, strict=True):
        assert generate_tokens(config_of(), PARAMS, [prompt], 6, state=STATE) == [text]
