"""Every family against transformers: logits, experts, gradients, files, padding.

The quick tests read oracles saved by `python -m tests.save_oracles`. The slow tests run
transformers itself.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.interchange.family import FAMILIES, Reader, load_family
from moe_jax.interchange.leaves import leaves_of
from moe_jax.interchange.tensor_files import TensorFiles, ToWrite, write_tensors
from moe_jax.moe.load_balance import HuggingFaceLoadBalance
from moe_jax.part import Call
from tests.hf_families import CASES, ORACLES, Case, write_model
from tests.save_oracles import at, load_in_torch, run_in_torch, saved_gradients

LOGITS = {"rtol": 2e-4, "atol": 2e-4}
NAMES = [
    name if CASES[name].quick else pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(CASES)
]


def slow(*names):
    """These cases as parameters of slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Products in float32, as in transformers."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns the directory, config and parameters of a case by name; each is read once."""
    made = {}

    def model(name: str):
        if name not in made:
            path = write_model(tmp_path_factory.mktemp(name) / "hf", CASES[name])
            made[name] = (path, *moe_jax.from_hf(path))
        return made[name]

    return model


@pytest.fixture(scope="module")
def outputs(models):
    """Returns the logits and the record of a case by name; each is computed once."""

    @functools.cache
    def output(name: str):
        _, config, params = models(name)
        encoder = CASES[name].encoder_tokens()
        return logits_of(config, params, CASES[name].tokens(), record=True, **encoder)

    return output


def logits_of(config, params, tokens, **settings):
    """Logits of a batch, jitted."""
    apply = jax.jit(lambda p, t: moe_jax.build(config).apply({"params": p}, t, **settings))
    return apply(params, tokens)


def test_every_family_has_a_quick_case():
    quick = {case.family.name for case in CASES.values() if case.quick}
    elsewhere = {"grok-1"}  # tests/test_interchange_grok1.py
    assert quick | elsewhere == {load_family(name).name for name in FAMILIES}


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_experts_are_those_of_transformers(name, models, outputs):
    config = models(name)[1]
    oracle = np.load(ORACLES / f"{name}.npz")
    logits, recorded = outputs(name)
    np.testing.assert_allclose(logits[:, -4:], oracle["logits"], **LOGITS)
    assert recorded.residual_XBLM.shape[0] == config.model.stack.num_layers
    if config.model.has_encoder:
        layers = config.model.layouts["encoder"].num_layers
        assert recorded.encoder_residual_XBTM.shape[0] == layers
    assert bool(config.model.moe_layers) == ("experts" in oracle)
    if "experts" in oracle:
        np.testing.assert_array_equal(experts_in_order(config, recorded), oracle["experts"])


def experts_in_order(config, recorded) -> np.ndarray:
    """Experts of every token, [MoE layers in order, B * L, K], sorted per token."""
    by_layer = {}
    for part, layers in config.model.moe_layers.items():
        for layer, index in zip(layers, recorded.choices[part].expert_index, strict=True):
            by_layer[layer] = np.sort(np.asarray(index).reshape(-1, index.shape[-1]), axis=-1)
    return np.stack([by_layer[layer] for layer in sorted(by_layer)])


@pytest.mark.parametrize("name", NAMES)
def test_an_unchanged_model_is_written_as_it_was_read(name, models, tmp_path):
    path, config, params = models(name)
    moe_jax.to_hf(config, params, tmp_path / "hf")
    old, new = TensorFiles(path), TensorFiles(tmp_path / "hf")
    assert set(old.tensors) == set(new.tensors)
    for tensor in old.tensors:
        assert old.read(tensor).tobytes() == new.read(tensor).tobytes(), tensor
    again, _ = moe_jax.from_hf(tmp_path / "hf")
    assert again.model == config.model


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name, models, outputs):
    _, config, params = models(name)
    sides = ((5, 0), (0, 5))  # a row padded on the left, one on the right

    def padded_rows(tokens):
        return np.stack([np.pad(tokens[0], side) for side in sides])

    tokens = CASES[name].tokens()
    mask = padded_rows(np.ones_like(tokens))
    settings = {"mask_BL": mask}
    for key, encoder in CASES[name].encoder_tokens().items():
        settings |= {key: padded_rows(encoder), "encoder_mask_BT": mask}
    padded = np.asarray(logits_of(config, params, padded_rows(tokens), **settings))
    alone = outputs(name)[0][0]
    for i in range(2):
        np.testing.assert_allclose(padded[i][mask[i] > 0], alone, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_transformers(name, models, tmp_path):
    torch = pytest.importorskip("torch")
    path, config, params = models(name)
    tokens, encoder = CASES[name].tokens(), CASES[name].encoder_tokens()
    weights = np.random.RandomState(3).normal(size=(*tokens.shape, config.model.vocab_size))
    weights = weights.astype(np.float32)

    def loss(params):
        logits = moe_jax.build(config).apply({"params": params}, tokens, **encoder)
        return jnp.sum(logits * weights) / tokens.size

    ours = jax.jit(jax.grad(loss))(params)
    theirs = gradients_in_torch(torch, path, CASES[name], weights, tmp_path / "gradients")
    _, theirs = moe_jax.from_hf(theirs)
    for leaf in leaves_of(config.model):
        if leaf.path[0] in ("state", "multi_token"):
            continue
        a, b = (np.asarray(at(tree, leaf.path), np.float64) for tree in (ours, theirs))
        assert np.linalg.norm(b) > 0, leaf.path
        if name == "llama4_maverick" and leaf.key == "nope/bk":
            # Without positions it adds the same to all scores of a query: only rounding is left.
            assert max(np.linalg.norm(a), np.linalg.norm(b)) < 1e-6
            continue
        assert np.linalg.norm(a - b) <= 5e-4 * np.linalg.norm(b), leaf.path


def gradients_in_torch(torch, path, case: Case, weights, folder):
    """A directory whose tensors are the gradients of the parameters."""
    model = load_in_torch(path)
    logits = run_in_torch(model, case).logits
    (logits * torch.from_numpy(weights)).sum().div(case.tokens().size).backward()
    return saved_gradients(torch, model, folder)


def has_router_loss(case: Case) -> bool:
    """Whether transformers has a router loss for this family."""
    parts = case.family.model(Reader(case.settings)).moe_parts.values()
    return any(isinstance(loss, HuggingFaceLoadBalance) for part in parts for loss in part.losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if has_router_loss(CASES[name])])
def test_the_router_loss_and_its_gradients_are_those_of_transformers(name, models, tmp_path):
    torch = pytest.importorskip("torch")
    path, config, params = models(name)
    tokens = CASES[name].tokens()
    whole = (HuggingFaceLoadBalance(weight=1.0),)
    model = config.model.map_parts(
        lambda part: dataclasses.replace(part, losses=whole) if part.routes else part
    )

    def loss(params):
        aux = model.run(params, Call(tokens_BL=jnp.asarray(tokens))).aux
        return model.loss(aux, jnp.float32(tokens.size), None)

    ours, gradients = jax.jit(jax.value_and_grad(loss))(params)
    theirs = load_in_torch(path)
    aux_loss = theirs(torch.from_numpy(tokens).long(), output_router_logits=True).aux_loss
    np.testing.assert_allclose(ours, aux_loss.item(), rtol=2e-5)
    aux_loss.backward()
    _, wanted = moe_jax.from_hf(saved_gradients(torch, theirs, tmp_path / "gradients"))
    for leaf in leaves_of(model):
        a, b = (np.asarray(at(tree, leaf.path), np.float64) for tree in (gradients, wanted))
        assert np.linalg.norm(a - b) <= 5e-4 * np.linalg.norm(b) + 1e-9, leaf.path
        assert "router" not in leaf.path or np.linalg.norm(b) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_is_written(name, models, tmp_path):
    torch = pytest.importorskip("torch")
    path, config, params = models(name)
    moe_jax.to_hf(config, params, tmp_path / "hf")
    with torch.no_grad():
        old, new = (
            run_in_torch(load_in_torch(one), CASES[name]).logits for one in (path, tmp_path / "hf")
        )
    assert torch.equal(old, new)
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["model_type"] == CASES[name].settings["model_type"]


@pytest.mark.parametrize(
    "name",
    slow("mixtral", "qwen3_moe", "olmoe_renormalized", "granitemoe", "gpt_oss", "deepseek_v3",
         "dbrx"),
)  # fmt: skip
def test_one_renormalized_expert_has_a_gate_of_1(name, tmp_path):
    torch = pytest.importorskip("torch")
    case = CASES[name]
    settings = {"num_experts_per_tok": 1}
    if name == "dbrx":
        settings = {"ffn_config": {**case.settings["ffn_config"], "moe_top_k": 1}}
    case = dataclasses.replace(case, settings={**case.settings, **settings})
    path = write_model(tmp_path / "hf", case)
    config, params = moe_jax.from_hf(path)
    logits = logits_of(config, params, case.tokens())
    with torch.no_grad():
        theirs = run_in_torch(load_in_torch(path), case).logits.numpy()
    np.testing.assert_allclose(logits, theirs, **LOGITS)
    moe_jax.to_hf(config, params, tmp_path / "again")
    assert moe_jax.from_hf(tmp_path / "again")[0].model == config.model


def test_the_text_model_of_a_multimodal_llama4_is_read(models, tmp_path):
    path, config, params = models("llama4_scout")
    files = TensorFiles(path)
    values = {f"language_model.{name}": files.read(name) for name in files.tensors}
    values["vision_model.class_embedding"] = np.zeros(8, np.float32)
    to_write = [
        ToWrite(name, value.dtype, value.shape, lambda value=value: value)
        for name, value in values.items()
    ]
    text = json.loads((path / "config.json").read_text())
    settings = {"model_type": "llama4", "text_config": text, "vision_config": {}}
    write_tensors(tmp_path, to_write)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    again, read = moe_jax.from_hf(tmp_path)
    assert again.model == config.model
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, read))
    moe_jax.to_hf(again, read, tmp_path / "hf")
    assert set(TensorFiles(tmp_path / "hf").tensors) == set(files.tensors)
