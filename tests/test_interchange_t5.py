"""T5 and Switch read and written: the tensors and settings that transformers names.

What transformers says of the Switch model is saved; `tests/t5_oracle.py` draws its values.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.interchange.family import Reader, load_family
from moe_jax.interchange.leaves import leaves_of
from moe_jax.interchange.tensor_files import TensorFiles, ToWrite, write_tensors
from moe_jax.interchange.write import tensors_of
from tests.t5_oracle import CASES, SAVED, SIZES, batch, load_in_torch, said_by_torch, values

BATCH = batch()
MASKS = {name: BATCH[name] for name in ("attention_mask", "decoder_attention_mask")}
DECODER = MASKS["decoder_attention_mask"] > 0
FAMILY = {"switch": "switch_transformers", "t5": "t5", "t5 v1.1": "t5"}


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def write_case(directory, name):
    """The directory of a case, and the config and parameters that are read from it."""
    settings = {**SIZES, **CASES[name].settings, "model_type": FAMILY[name]}
    family = load_family(FAMILY[name])
    model = family.model(Reader(settings))
    leaves = leaves_of(model)
    empty = {leaf.path: np.empty(0, np.float32) for leaf in leaves}
    copies = family.copies(model)
    names = {one.name: one for one in tensors_of(family, model, leaves, empty, None)}
    arrays = {name: values(copies.get(name, name)) for name in names}
    tensors = [
        ToWrite(name, np.dtype(np.float32), names[name].shape, lambda array=array: array)
        for name, array in arrays.items()
    ]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(settings))
    write_tensors(directory, tensors)
    return moe_jax.from_hf(directory)


def logits(config, params, arrays):
    """Of a batch under the names of transformers."""
    return moe_jax.build(config).apply(
        {"params": params}, arrays["decoder_input_ids"],
        mask_BL=arrays["decoder_attention_mask"], encoder_tokens_BT=arrays["input_ids"],
        encoder_mask_BT=arrays["attention_mask"],
    )  # fmt: skip


def test_a_switch_that_drops_tokens_says_what_transformers_says(tmp_path):
    config, params = write_case(tmp_path / "hf", "switch")
    with np.load(SAVED) as saved:
        kept = saved["kept_encoder"][:, MASKS["attention_mask"] > 0]
        assert not kept.all(), "the capacity binds"
        got = logits(config, params, BATCH)
        np.testing.assert_allclose(got[DECODER], saved["logits"][DECODER], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_written_as_it_was_read(name, tmp_path):
    config, params = write_case(tmp_path / "hf", name)
    moe_jax.to_hf(config, params, tmp_path / "again")
    old, new = TensorFiles(tmp_path / "hf"), TensorFiles(tmp_path / "again")
    assert set(old.tensors) == set(new.tensors)
    for tensor in old.tensors:
        assert old.read(tensor).tobytes() == new.read(tensor).tobytes(), tensor
    assert moe_jax.from_hf(tmp_path / "again")[0].model == config.model


def test_padding_on_either_side_changes_nothing(tmp_path):
    config, params = write_case(tmp_path / "hf", "switch")
    alone = {key: value[:1, : MASKS[key.replace("input_ids", "attention_mask")][0].sum()]
             for key, value in BATCH.items()}  # fmt: skip
    expected = logits(config, params, alone)
    length = expected.shape[1]
    for side, where in (((3, 0), slice(3, None)), ((0, 3), slice(0, length))):
        padded = {key: jnp.pad(value, ((0, 0), side)) for key, value in alone.items()}
        got = logits(config, params, padded)[:, where]
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_a_head_that_is_tied_and_not_scaled_is_read_and_written():
    """What transformers 5 writes of a version 1.1 without a head of its own."""
    family = load_family("t5")
    settings = {**SIZES, "scale_decoder_outputs": False, "tie_word_embeddings": True}
    model = family.read(settings)
    assert model.tie_embeddings and model.logits_multiplier == 1
    assert family.written(model)["scale_decoder_outputs"] is False
    assert not family.read(settings, {"lm_head.weight"}).tie_embeddings


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    config, params = write_case(tmp_path / "hf", name)
    theirs = said_by_torch(load_in_torch(CASES[name]), BATCH).logits.detach().numpy()
    got = logits(config, params, BATCH)
    np.testing.assert_allclose(got[DECODER], theirs[DECODER], atol=2e-4, rtol=2e-4)
