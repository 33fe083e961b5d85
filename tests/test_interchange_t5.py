"""What differs between T5 or Switch and other families: two lengths, older files, heads, losses.

The cases of `hf_families` check both like all other families.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.interchange.family import OtherFamilyError, load_family
from moe_jax.interchange.leaves import leaves_of
from moe_jax.interchange.tensor_files import TensorFiles, ToWrite, write_tensors
from moe_jax.moe.activations import GeGLU, GeGLUTanh, Gelu, Relu, SwiGLU
from moe_jax.moe.balance import RouterZ
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import HuggingFaceSwitchLoadBalance
from moe_jax.moe.queues import BatchPrioritized
from moe_jax.part import Call, EncoderInputs
from tests.hf_families import CASES, Case, write_model, written_by_rules
from tests.hf_t5 import SWITCH, T5
from tests.save_oracles import at, load_in_torch, run_in_torch, saved_gradients
from tests.t5_oracle import CASES as SHORT
from tests.t5_oracle import SAVED, SIZES, batch, values

TABLE = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def write(directory, arrays, settings):
    """Writes a directory with these tensors and settings."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(settings))
    tensors = [
        ToWrite(name, array.dtype, array.shape, lambda array=array: array)
        for name, array in arrays.items()
    ]
    write_tensors(directory, tensors)


def arrays_of(directory):
    """The tensors of a directory, by name."""
    files = TensorFiles(directory)
    return {name: files.read(name) for name in files.tensors}


@pytest.mark.slow
def test_sides_of_two_lengths_drop_the_tokens_that_transformers_drops(tmp_path):
    settings = {**SIZES, **SHORT["switch"].settings, "model_type": "switch_transformers"}
    names = [one.name for one in written_by_rules(Case(settings))]
    write(tmp_path / "hf", {name: values(name) for name in names}, settings)
    config, params = moe_jax.from_hf(tmp_path / "hf")
    arrays = batch()
    with np.load(SAVED) as saved:
        assert not saved["kept_encoder"][:, arrays["attention_mask"] > 0].all()
        wanted = saved["logits"]
    got = moe_jax.build(config).apply(
        {"params": params}, arrays["decoder_input_ids"],
        mask_BL=arrays["decoder_attention_mask"], encoder_tokens_BT=arrays["input_ids"],
        encoder_mask_BT=arrays["attention_mask"],
    )  # fmt: skip
    valid = arrays["decoder_attention_mask"] > 0
    np.testing.assert_allclose(got[valid], wanted[valid], atol=2e-4, rtol=2e-4)


def test_copies_and_dead_tables_of_older_files_are_read_and_not_written(tmp_path):
    new = write_model(tmp_path / "new", CASES["switch"])
    arrays = arrays_of(new)
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    older = dict.fromkeys(names, arrays["shared.weight"]) | {TABLE: np.zeros((8, 4), np.float32)}
    write(tmp_path / "old", arrays | older, CASES["switch"].settings)
    config, params = moe_jax.from_hf(tmp_path / "old")
    moe_jax.to_hf(config, params, tmp_path / "again")
    again = arrays_of(tmp_path / "again")
    assert set(again) == set(arrays)
    for name in again:
        np.testing.assert_array_equal(again[name], arrays[name])
    spoiled = {"encoder.embed_tokens.weight": arrays["shared.weight"] + 1}
    write(tmp_path / "spoiled", arrays | spoiled, CASES["switch"].settings)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight must repeat shared\.weight"):
        moe_jax.from_hf(tmp_path / "spoiled")


def test_an_older_untied_switch_has_one_table_for_both_stacks(tmp_path):
    settings = CASES["switch_untied"].settings
    arrays = arrays_of(write_model(tmp_path / "new", CASES["switch_untied"]))
    del arrays["encoder.embed_tokens.weight"]
    arrays["shared.weight"] = arrays.pop("decoder.embed_tokens.weight")
    write(tmp_path / "old", arrays, settings)
    _, params = moe_jax.from_hf(tmp_path / "old")
    np.testing.assert_array_equal(params["embedding"], params["encoder_embedding"])


@pytest.mark.parametrize(
    ("settings", "tensors", "tied", "scaled"),
    [
        ({}, None, True, True),
        ({"tie_word_embeddings": False}, None, False, False),
        ({"tie_word_embeddings": False}, {"lm_head.weight"}, False, False),
        # transformers 5 ties a head that the files lack, and then never scales it ...
        ({"tie_word_embeddings": False}, set(), True, False),
        # ... and writes version 1.1 this way, with or without its own head.
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, set(), True, False),
        (
            {"tie_word_embeddings": True, "scale_decoder_outputs": False},
            {"lm_head.weight"}, False, False,
        ),
    ],
)  # fmt: skip
def test_a_head_of_t5_is_tied_or_scaled(settings, tensors, tied, scaled):
    model = load_family("t5").read({**T5, **settings}, tensors)
    assert (model.tie_embeddings, model.logits_multiplier != 1) == (tied, scaled)
    assert load_family("t5").read(load_family("t5").written(model)) == model


@pytest.mark.parametrize(
    ("sizes", "layers"),
    [
        # Every second, every third. For 0, transformers makes layer 1 sparse; for too many, none.
        ({"num_layers": 5, "num_sparse_encoder_layers": 2}, [1, 3]),
        ({"num_layers": 7, "num_sparse_encoder_layers": 2}, [1, 4]),
        ({"num_layers": 11, "num_sparse_encoder_layers": 3}, [1, 4, 7, 10]),
        ({"num_layers": 6, "num_sparse_encoder_layers": 3, "encoder_sparse_step": 3}, [1, 4]),
        ({"num_layers": 4, "num_sparse_encoder_layers": 0}, [1]),
        ({"num_layers": 3, "num_sparse_encoder_layers": 5}, []),
        ({"num_layers": 3, "num_sparse_encoder_layers": 3}, [0, 1, 2]),
    ],
)
def test_the_sparse_layers_of_a_switch_are_those_of_transformers(sizes, layers):
    family = load_family("switch_transformers")
    model = family.read({**SWITCH, **sizes})
    sparse = [i for i, one in enumerate(model.encoder.layers) if "encoder_moe" in one]
    assert sparse == layers
    assert family.read(family.written(model)).encoder == model.encoder


def with_capacity(model, capacity, encoder=None):
    moe = {"moe": capacity, "encoder_moe": encoder or capacity}
    parts = {name: dataclasses.replace(model.part[name], capacity=moe[name]) for name in moe}
    return dataclasses.replace(model, parts={**model.part, **parts})


def test_a_switch_is_written_with_its_slots_and_without_any_as_dropless():
    """Transformers drops the tokens of a sequence beyond `expert_capacity`, in evaluation too."""
    family = load_family("switch_transformers")
    model = family.read(SWITCH)
    assert family.written(model)["expert_capacity"] == 7
    for capacity in (Capacity(train_factor=1.25), Capacity(train_factor=0.0, eval_factor=0.0)):
        written = family.written(with_capacity(model, capacity))
        again = family.read(written).part["moe"]
        assert again.options(512, training=False).slots == 512  # of one sequence: all its tokens
    with pytest.raises(ValueError, match=r"same number of slots: .* encoder: \[7, 40\]"):
        family.written(with_capacity(model, Capacity(slots=7), Capacity(slots=40)))
    by_likelihood = Capacity(slots=7, queue=BatchPrioritized())
    with pytest.raises(ValueError, match=r"in the order of its tokens: capacity\.slots=7, "):
        family.written(with_capacity(model, Capacity(slots=7), by_likelihood))


def test_a_model_without_experts_is_no_switch():
    with pytest.raises(OtherFamilyError, match=r"only if it has its parts: it has no 'moe'"):
        load_family("switch_transformers").written(load_family("t5").read(T5))


def test_a_switch_without_experts_keeps_the_names_of_a_switch():
    family = load_family("switch_transformers")
    none = {"num_sparse_encoder_layers": 5, "num_sparse_decoder_layers": 5}
    model = family.read({**SWITCH, **none})
    tensors = {rule.name for rule in family.rules(model)}
    assert "encoder.block.{layer}.layer.1.mlp.wi.weight" in tensors


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({}, Relu()),
        ({"feed_forward_proj": "gated-gelu"}, GeGLUTanh()),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}, GeGLUTanh()),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, GeGLU()),
        ({"feed_forward_proj": "relu", "dense_act_fn": "gelu"}, Gelu()),
        ({"feed_forward_proj": "gated-silu"}, SwiGLU()),
    ],
)
def test_the_activation_of_a_t5_is_that_of_transformers(settings, activation):
    transformers = pytest.importorskip("transformers")
    family = load_family("t5")
    model = family.read({**T5, **settings})
    written = family.written(model)
    assert family.read(written).part["mlp"].activation == activation
    assert model.part["mlp"].activation == activation
    theirs = transformers.T5Config(**settings), transformers.T5Config(**written)
    assert theirs[0].dense_act_fn == theirs[1].dense_act_fn == written["dense_act_fn"]
    assert theirs[0].is_gated_act == theirs[1].is_gated_act == activation.gated


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dense_act_fn": "tanh"}, "dense_act_fn"),
        ({"router_dtype": "bfloat16"}, "router_dtype"),
        ({"num_selected_experts": 2}, "num_selected_experts"),
    ],
)
def test_what_a_switch_cannot_have_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        load_family("switch_transformers").read({**SWITCH, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["aux_loss", "z_loss"])
def test_the_router_losses_and_their_gradients_are_those_of_transformers(loss, tmp_path):
    torch = pytest.importorskip("torch")
    case = CASES["switch"]
    path = write_model(tmp_path / "hf", case)
    config, params = moe_jax.from_hf(path)
    kind = HuggingFaceSwitchLoadBalance if loss == "aux_loss" else RouterZ
    model = config.model.map_parts(
        lambda part: dataclasses.replace(part, losses=(kind(weight=1.0),)) if part.routes else part
    )
    tokens = jnp.asarray(case.tokens())
    (read,) = case.encoder_tokens().values()
    call = Call(tokens_BL=tokens, encoder=EncoderInputs(jnp.asarray(read)))

    def ours(params):
        aux = model.run(params, call).aux
        return model.loss(aux, jnp.float32(tokens.size), None, jnp.float32(read.size))

    value, gradients = jax.jit(jax.value_and_grad(ours))(params)
    theirs = load_in_torch(path)
    said = run_in_torch(theirs, case, output_router_logits=True)
    wanted = said[f"encoder_{loss}"] + said[f"decoder_{loss}"]
    np.testing.assert_allclose(value, wanted.item(), rtol=2e-5)
    wanted.backward()
    _, wanted = moe_jax.from_hf(saved_gradients(torch, theirs, tmp_path / "gradients"))
    for leaf in leaves_of(model):
        a, b = (np.asarray(at(tree, leaf.path), np.float64) for tree in (gradients, wanted))
        assert np.linalg.norm(a - b) <= 5e-4 * np.linalg.norm(b) + 1e-9, leaf.path
        assert "router" not in leaf.path or np.linalg.norm(b) > 1e-3
