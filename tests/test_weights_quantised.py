"""Quantised weights: the numbers, and a model that has them on disk, on a mesh, in commands."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.__main__ import main
from moe_jax.config import MeshConfig
from moe_jax.inference.decoding import Prompts, Serving, decode, for_inference, prefill
from moe_jax.inference.sampling import Sampling
from moe_jax.models.wrapping import dense_params, quantised_params
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parameters import init_parameters
from moe_jax.part import Call
from moe_jax.planning.serving import PRECISIONS, serving_costs, stored_bytes
from moe_jax.training.saved import load_run
from moe_jax.weights.quantised import MATRIX, TABLE, Quantisation, quantise, unpacked
from tests.hf_families import CASES, Case, write_model
from tests.tiny_run import tiny_config, tiny_state


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_four_bits_by_hand():
    """The largest weight is -8 steps, so steps are -1/2 and 1/4; 3.9 is -7.8 steps, so -8."""
    weight = jnp.asarray([[4.0, -2.0], [-1.0, 0.3], [0.6, 1.99], [3.9, 0.0]])
    found = quantise(weight, 4, 0)
    np.testing.assert_array_equal(found.scales, jnp.float16([[-0.5, 0.25]]))
    integers = unpacked(found.values, MATRIX)
    np.testing.assert_array_equal(integers, [[-8, -8], [2, 1], [-1, 7], [-8, 0]])
    # A byte holds two rows, the first in its low half, each with 8 added.
    np.testing.assert_array_equal(found.values, jnp.uint8([[0xA0, 0x90], [0x07, 0x8F]]))


def test_eight_bits_by_hand():
    found = quantise(jnp.asarray([[127.0], [-3.4], [254.0], [1.0]]), 8, 2)
    np.testing.assert_array_equal(found.scales, jnp.float16([[1], [2]]))
    np.testing.assert_array_equal(found.values, jnp.int8([[127], [-3], [127], [0]]))


@pytest.mark.parametrize("axis", [MATRIX, TABLE])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.5), (4, 1.0)])
def test_no_weight_is_further_away_than_its_step_allows(bits, most, axis):
    """Half a step; with 4 bits a whole step, where a weight is cut to 7 steps."""
    weight = drawn(3, 64, 32)
    found = quantise(weight, bits, 16, axis)
    steps = jnp.repeat(jnp.abs(found.scales.astype(jnp.float32)), 16, axis)
    assert jnp.all(jnp.abs(found.dense() - weight) <= (most + 0.01) * steps)
    assert found.values.nbytes * 8 == weight.size * bits
    again = quantise(found.dense(), bits, 16, axis)  # loses nothing more
    np.testing.assert_array_equal(again.dense(), found.dense())


def test_the_sign_of_the_scale_is_worth_a_bit_of_precision():
    """Compared with symmetric integers -7..7 for the largest magnitude, as in qwix."""
    weight = drawn(4096, 32)
    grouped = weight.reshape(128, 32, 32)
    steps = jnp.abs(grouped).max(1, keepdims=True) / 7
    symmetric = (jnp.round(grouped / steps) * steps).reshape(weight.shape)
    ours, theirs = (
        jnp.mean((w - weight) ** 2) for w in (quantise(weight, 4, 32).dense(), symmetric)
    )
    assert ours < 0.85 * theirs


def test_a_group_of_zeros_stays_zero():
    weight = drawn(8, 2).at[:4].set(0)
    for bits in (8, 4):
        assert not quantise(weight, bits, 4).dense()[:4].any()


@pytest.mark.parametrize(("bits", "block"), [(8, "Q8_0"), (4, "Q4_0")])
def test_blocks_of_gguf_are_groups_of_32(bits, block):
    """A row of gguf blocks is a column here, with the same integers and scales."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[block]
    rows = np.asarray(drawn(5, 64)) ** 3
    data = gguf.quants.quantize(rows, kind)
    theirs = gguf.quants.dequantize(data, kind)
    blocks = data.reshape(5, 2, -1)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0].T
    found = quantise(jnp.asarray(theirs.T), bits, 32)
    np.testing.assert_array_equal(found.scales, scales)
    np.testing.assert_array_equal(found.dense().T, theirs)
    integers = np.asarray(unpacked(found.values, MATRIX)).T.reshape(5, 2, 32)
    if bits == 8:
        np.testing.assert_array_equal(integers, blocks[..., 2:].view(np.int8))
    else:
        halves = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)
        np.testing.assert_array_equal(integers, halves.astype(np.int8) - 8)


def quantised(names=("experts",), bits=4, group_size=16):
    """A tiny config with quantised parameters, those parameters, and the plain ones."""
    how = Quantisation(names, bits, group_size)
    plain, params = tiny_config(), tiny_state(tiny_config()).params
    config = dataclasses.replace(plain, model=dataclasses.replace(plain.model, quantisation=how))
    copied = jax.tree.map(jnp.copy, params)
    return config, quantised_params(copied, plain.model.specs(), how), params


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directories of an imported model, and of the same model with 4-bit experts."""
    folder = tmp_path_factory.mktemp("quantised")
    sizes = {"vocab_size": 384, "intermediate_size": 32}
    write_model(folder / "hf", Case({**CASES["mixtral"].settings, **sizes}))
    plain, small = folder / "run", folder / "int4"
    assert main(["convert", f"--from-hf={folder / 'hf'}", f"--workdir={plain}"]) == 0
    command = ["quantise", f"--workdir={plain}", f"--output={small}"]
    assert main([*command, "--bits=4", "--group-size=8"]) == 0
    return plain, small


def logits(config, params, tokens):
    return jax.jit(lambda p: config.model.run(p, Call(tokens_BL=tokens)).logits_BLV)(params)


TOKENS = np.random.default_rng(1).integers(3, 259, (8, 8), np.int32)


@pytest.mark.parametrize(
    ("names", "bits"),
    [
        pytest.param(("experts",), 8, marks=pytest.mark.slow),
        (("all", "embedding", "router"), 4),
    ],
    ids=str,
)
def test_a_model_with_quantised_weights_is_the_model_with_the_rounded_ones(names, bits):
    config, params, before = quantised(names, bits)
    plain = dataclasses.replace(config.model, quantisation=None)
    rounded = dense_params(params)
    ours = logits(config, params, TOKENS)
    theirs = logits(dataclasses.replace(config, model=plain), rounded, TOKENS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())
    differs = jax.tree.map(lambda a, b: bool((a != b).any()), rounded, before)
    layer = differs["stack"]["unit"]["0"]
    assert all(layer["moe"]["experts"].values())
    assert layer["moe"]["router"]["weight"] == ("router" in names)
    assert differs["embedding"] == ("embedding" in names)
    assert all(layer["attention"].values()) == ("all" in names)
    assert not layer["moe_norm"]["scale"]


def test_a_tree_that_is_drawn_is_the_plain_one_quantised():
    """Whatever makes states of a config also makes quantised states."""
    config, _, _ = quantised()
    key = jax.random.key(0)
    plain = dataclasses.replace(config.model, quantisation=None).specs()
    wanted = quantised_params(init_parameters(key, plain), plain, config.model.quantisation)
    jax.tree.map(np.testing.assert_array_equal, init_parameters(key, config.model.specs()), wanted)


def test_bytes_are_those_that_plan_names():
    config, params, _ = quantised()
    costs = serving_costs(config.model, 8)
    assert stored_bytes(config.model) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    experts = params["stack"]["unit"]["0"]["moe"]["experts"]
    found = sum(leaf.nbytes for leaf in jax.tree.leaves(experts))
    assert found == costs.experts * (4 + 16 / 16) / 8  # a float16 per 16 weights
    assert PRECISIONS["int4"] == (4 + 16 / 32, 4 + 16 / 32)


def test_a_directory_holds_few_bytes_and_loads_as_it_was_saved(run):
    plain, small = run
    config, state = load_run(small)
    assert config.model.quantisation == Quantisation(("experts",), 4, 8)
    before, whole = load_run(plain)
    assert dataclasses.replace(config.model, quantisation=None) == before.model
    wanted = quantised_params(whole.params, before.model.specs(), config.model.quantisation)
    jax.tree.map(np.testing.assert_array_equal, state.params, wanted)
    origin = json.loads((small / "imported.json").read_text())
    assert (origin["source"], origin["step"], origin["made_by"]) == (str(plain), 0, "quantise")
    sizes = [sum(f.stat().st_size for f in one.glob("checkpoints/0/state/**/*")) for one in run]
    assert sizes[1] < sizes[0]


@pytest.mark.slow
def test_logits_on_a_mesh_are_those_of_one_device(run):
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    expected = logits(*(lambda c, s: (c, s.params))(*load_run(run[1])), TOKENS)
    config, state = load_run(run[1], mesh)
    experts = state.params["stack"]["unit"]["0"]["moe"]["experts"]
    parts = mesh.expert * mesh.fsdp * mesh.tensor
    assert experts["wi"].values.addressable_shards[0].data.size * parts == experts["wi"].values.size
    with jax.set_mesh(make_mesh(config.mesh)):
        found = logits(config, state.params, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_commands_read_it(run, tmp_path, capsys):
    small = run[1]
    text = tmp_path / "text.txt"
    text.write_text("The king is dead. " * 9)
    for command in (
        ["generate", "--prompt=a", "--tokens=2"],
        ["evaluate", f"--text={text}"],
        ["convert", f"--to-hf={tmp_path / 'hf'}"],
    ):
        assert main([command[0], f"--workdir={small}", *command[1:]]) == 0
    assert "weights of 4 bits (experts) are written as floats" in capsys.readouterr().out
    read, params = moe_jax.from_hf(tmp_path / "hf")
    assert read.model.quantisation is None
    expected = dense_params(load_run(small)[1].params)
    jax.tree.map(np.testing.assert_array_equal, params["stack"], expected["stack"])


def memory_of_decoding(model):
    """The memory of a program that decodes four tokens for one text."""
    settings = {"model": model, "num_slots": 16, "sampling": Sampling()}
    specs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), model.specs())
    ones, number, none = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 4), (1,), (0,)))
    serving, prompts = Serving(specs), Prompts(ones, ones, number, number)
    rows, _ = jax.eval_shape(functools.partial(prefill, **settings), serving, prompts)
    lowered = decode.lower(serving, rows, none, num_tokens=4, **settings)
    return lowered.compile().memory_analysis()


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_decoding_holds_no_more_than_an_expert_in_float(scan):
    """A layer's experts are not held: in float32 they would take 8 times as much, 1 MB."""
    moe = {"num_experts": 8, "expert_dim": 256, "activation": "relu"}
    config = tiny_config({"model": {"model_dim": 64, "parts": {"moe": moe}, "scan_layers": scan}})
    hows = (None, Quantisation(bits=8), Quantisation(bits=4))
    models = [dataclasses.replace(config.model, quantisation=how) for how in hows]
    plain, *small = [memory_of_decoding(for_inference(model)) for model in models]
    matrix, experts = 4 * 64 * 256, 2 * 2 * 8 * 64 * 256
    for bits, found in zip((8, 4), small, strict=True):
        assert found.temp_size_in_bytes <= plain.temp_size_in_bytes + 2 * matrix
        saved = plain.argument_size_in_bytes - found.argument_size_in_bytes
        assert saved == experts * (4 - bits / 8 - 2 / 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, r"bits is one of \[16, 8, 4\]: bits=5"),
        ({"group_size": 24}, "moe/experts/wi .* in groups of 24. Use a divisor of 16"),
        ({"names": ("norms",)}, "names must choose at least one matrix: names=.'norms'"),
        ({"names": ("attension",)}, "'attension' chooses none"),
        ({"bits": 4, "group_size": 1}, "with 4 bits into pairs.* Use an even divisor of 16, or"),
        ({"bits": 16, "group_size": 8}, "group_size applies only to 8 and 4 bits"),
    ],
    ids=str,
)
def test_what_cannot_be_quantised_is_refused(settings, message):
    model = tiny_config().model
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(model, quantisation=Quantisation(**settings))


def test_a_dim_that_has_no_pairs_needs_8_bits_or_other_names():
    odd = tiny_config({"model": {"parts": {"moe": {"expert_dim": 15}}}}).model
    message = "Use 8 bits and a divisor of 15, or name the other components in place of 'all'"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(odd, quantisation=Quantisation(("all",), bits=4, group_size=0))
    dataclasses.replace(odd, quantisation=Quantisation(names=("attention",), bits=4, group_size=2))


def test_the_command_refuses_in_one_line(run, tmp_path, capsys):
    plain, small = run
    for flags, message in (
        (
            [f"--workdir={small}", f"--output={tmp_path / 'a'}"],
            "a model can be quantised only once",
        ),
        ([f"--workdir={plain}", f"--output={small}"], "is there already"),
        ([f"--workdir={plain}", f"--output={tmp_path / 'a'}", "--names=x"], "'x' chooses none"),
    ):
        with pytest.raises(SystemExit):
            main(["quantise", *flags])
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
