"""Only in DeepSeek's files: multi-token modules, selection biases, scales of blocks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import moe_jax
from moe_jax.interchange.block_scales import dequantise
from moe_jax.interchange.family import load_family
from moe_jax.interchange.tensor_files import TensorFiles, ToWrite, write_tensors
from moe_jax.part import Call
from tests.hf_families import CASES, ORACLES, write_model, written_by_rules
from tests.save_oracles import later_logits, load_in_torch, modules_in_torch

NAME = "deepseek_v3_multi_token"
CASE = CASES[NAME]


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Products in float32, as in transformers."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The files of a model with multi-token modules."""
    return write_model(tmp_path_factory.mktemp("multi_token") / "hf", CASE)


def later_of(config, params, tokens):
    """Logits of the multi-token modules, [D, B, L, V]."""
    params = dict(params)
    state = params.pop("state")
    call = Call(tokens_BL=jnp.asarray(tokens), capacity=0.0)
    return jnp.stack(config.model.run(params, call, state=state, multi_token=True).later_BLV)


def rewritten(directory, tmp_path, change=lambda name, values: values, **settings):
    """The model with other tensors and settings; drops a tensor if `change` returns None."""
    files, path = TensorFiles(directory), tmp_path / "hf"
    path.mkdir()
    values = {name: change(name, files.read(name)) for name in files.tensors}
    tensors = [
        ToWrite(name, own.dtype, own.shape, lambda own=own: own)
        for name, own in values.items()
        if own is not None
    ]
    write_tensors(path, tensors)
    known = json.loads((directory / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**known, **settings}))
    return path


def test_modules_predict_what_transformers_predicts(directory):
    later = jax.jit(later_of, static_argnums=0)(*moe_jax.from_hf(directory), CASE.tokens())
    oracle = np.load(ORACLES / f"{NAME}.npz")["later"]
    for k, wanted in enumerate(oracle, 1):
        own = later[k - 1][:, :-k][:, -4:]  # the last k positions have no token k later
        np.testing.assert_allclose(own, wanted, rtol=2e-4, atol=2e-4)


def test_files_without_the_modules_are_read_without_them(directory, tmp_path, caplog):
    """Such files are what transformers writes, whatever config.json states."""

    def left_out(name, values):
        return None if name.startswith(("model.layers.2.", "model.layers.3.")) else values

    config, params = moe_jax.from_hf(rewritten(directory, tmp_path, left_out))
    assert config.model.multi_token is None and "multi_token" not in params
    assert "model.layers.2.eh_proj.weight: read without" in caplog.text


def test_a_module_with_a_head_of_its_own_is_refused(directory, tmp_path):
    def changed(name, values):
        return values + (name == "model.layers.3.shared_head.head.weight")

    with pytest.raises(ValueError, match=r"layers\.3\.shared_head\.head.* must repeat lm_head"):
        moe_jax.from_hf(rewritten(directory, tmp_path, changed))


def test_selection_biases_stay_in_float32(directory, tmp_path):
    """bfloat16 would lose their steps of 0.001; transformers keeps float32 too."""
    config, params = moe_jax.from_hf(directory, dtype="bfloat16")
    assert params["head"].dtype == jnp.bfloat16
    assert params["state"]["moe"]["bias_E"].dtype == jnp.float32
    assert params["state"]["multi_token_moe"]["bias_E"].shape == (2, 8)
    moe_jax.to_hf(config, params, tmp_path / "hf", dtype="bfloat16")
    written = TensorFiles(tmp_path / "hf").tensors
    dtypes = {one.dtype.name for name, one in written.items() if name.endswith("correction_bias")}
    assert dtypes == {"float32"}


def test_a_scale_is_of_128_rows_and_columns():
    values = np.ones((130, 200), ml_dtypes.float8_e4m3fn) * ml_dtypes.float8_e4m3fn(3)
    scales = np.array([[1.0, 0.5], [2.0, 0.25]], np.float32)
    whole = dequantise(values, scales).astype(np.float32)
    assert (whole[:128, :128] == 3).all() and (whole[:128, 128:] == 1.5).all()
    assert (whole[128:, :128] == 6).all() and (whole[128:, 128:] == 0.75).all()


def quantised(tensors):
    """Quantises matrices of attention and experts to float8, with scales that are powers of two."""
    for one in tensors:
        values = one.make()
        if "_proj" not in one.name or values.ndim != 2:
            yield one
            continue
        scale = np.float32(2**-7)
        small = (values / scale).astype(ml_dtypes.float8_e4m3fn)
        scales = np.full(tuple(-(-size // 128) for size in values.shape), scale)
        yield ToWrite(one.name, small.dtype, small.shape, lambda small=small: small)
        yield ToWrite(f"{one.name}_scale_inv", scales.dtype, scales.shape, lambda s=scales: s)


def test_published_float8_weights_are_read_dequantised(tmp_path, caplog):
    path = write_model(tmp_path / "hf", CASE, quantization_config={"quant_method": "fp8"})
    exact = moe_jax.from_hf(path)[1]
    write_tensors(path, quantised(written_by_rules(CASE)))
    config, params = moe_jax.from_hf(path)
    assert not caplog.text
    own, wanted = (tree["stack"]["unit"]["0"]["attention"]["wo"] for tree in (params, exact))
    assert own.dtype == jnp.bfloat16
    np.testing.assert_allclose(own.astype(jnp.float32), wanted, rtol=2**-4, atol=2**-9)
    assert params["head"].dtype == jnp.float32, "not quantised"
    moe_jax.to_hf(config, params, tmp_path / "again")
    names = {name for name in TensorFiles(path).tensors if not name.endswith("_scale_inv")}
    assert set(TensorFiles(tmp_path / "again").tensors) == names


def test_other_blocks_are_refused(tmp_path):
    path = write_model(tmp_path / "hf", CASE)
    name = "model.layers.0.self_attn.o_proj.weight"
    shape = TensorFiles(path).tensors[name].shape
    ones = ToWrite(f"{name}_scale_inv", np.dtype(np.float32), shape, lambda: np.ones(shape))
    write_tensors(path, [*written_by_rules(CASE), ones])
    with pytest.raises(
        ValueError, match=r"each scale must cover 128 rows and columns.*layers\.0\.self"
    ):
        moe_jax.from_hf(path)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_no_shared_expert_is_written_as_none_of_them(name):
    """With null, transformers refuses to load the file."""
    family = load_family(name)
    model = family.read({**CASES[name].settings, "n_shared_experts": None})
    assert model.part["moe"].shared_expert_dim == family.written(model)["n_shared_experts"] == 0


@pytest.mark.parametrize(("value", "renormalize"), [(None, False), (True, True)])
def test_null_renormalises_no_gates(value, renormalize):
    settings = {**CASES["deepseek_v3"].settings, "norm_topk_prob": value}
    router = load_family("deepseek_v3").read(settings).part["moe"].router
    assert router.renormalize == renormalize


def test_a_deepseek_v2_is_always_interleaved():
    settings = {**CASES["deepseek_v2"].settings, "rope_interleave": False}
    assert load_family("deepseek_v2").read(settings).part["attention"].rotary.interleaved


def test_dense_layers_may_be_between(tmp_path):
    """moe_layer_freq of the published code, in addition to the first dense layers."""
    family = load_family("deepseek_v3")
    settings = {**CASE.settings, "num_nextn_predict_layers": 0, "num_hidden_layers": 6}
    model = family.read({**settings, "first_k_dense_replace": 1, "moe_layer_freq": 2})
    assert model.layers_of["moe"] == (2, 4) and model.layers_of["mlp"] == (0, 1, 3, 5)
    written = family.written(model)
    assert written["first_k_dense_replace"] == 2 and written["moe_layer_freq"] == 2


@pytest.mark.parametrize(
    ("setting", "value"),
    [("scoring_func", "softmax"), ("topk_method", "greedy"), ("num_key_value_heads", 2)],
)
def test_settings_without_a_counterpart_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be .* in a model that can be read"):
        load_family("deepseek_v3").read({**CASE.settings, setting: value})


def test_what_the_family_cannot_say_is_refused(directory):
    model = moe_jax.from_hf(directory)[0].model
    attention = dataclasses.replace(model.part["attention"], norm_epsilon=1e-5)
    parts = {**dict(model.parts), "attention": attention}
    with pytest.raises(ValueError, match="norm_epsilon"):
        load_family("deepseek_v3").written(dataclasses.replace(model, parts=parts))


@pytest.mark.slow
def test_gradients_of_the_modules_are_those_of_transformers(directory):
    torch = pytest.importorskip("torch")
    config, params = moe_jax.from_hf(directory)
    tokens = CASE.tokens()
    weights = np.random.RandomState(3).normal(size=(2, *tokens.shape, 64)).astype(np.float32)

    def loss(params):
        later = later_of(config, params, tokens)
        return sum(jnp.sum(later[k][:, : -k - 1] * weights[k][:, : -k - 1]) for k in range(2))

    ours = jax.grad(loss)(params)["multi_token"]
    model = load_in_torch(directory)
    modules = modules_in_torch(model)
    later = later_logits(modules, model, torch.from_numpy(tokens).long())
    sum(
        (one * torch.from_numpy(weights[k][:, : -k - 1])).sum() for k, one in enumerate(later)
    ).backward()
    for k, module in enumerate(modules.layers):
        block = module.mtp_block
        pairs = (
            (ours["project"], module.eh_proj.weight.grad.T),
            (ours["embedding_norm"]["scale"], module.enorm.weight.grad),
            (ours["hidden_norm"]["scale"], module.hnorm.weight.grad),
            (ours["final_norm"]["scale"], module.post_norm.weight.grad),
            (
                ours["stack"]["unit"]["0"]["attention"]["wkv_b"],
                block.self_attn.kv_b_proj.weight.grad.T,
            ),
            (ours["stack"]["unit"]["0"]["moe"]["router"]["weight"], block.mlp.gate.weight.grad.T),
        )
        for own, wanted in pairs:
            wanted = wanted.numpy()
            assert np.linalg.norm(own[k] - wanted) <= 5e-4 * np.linalg.norm(wanted) > 0
