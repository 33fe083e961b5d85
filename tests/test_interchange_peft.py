"""Adapters in the layout of PEFT: by hand, against PEFT's own results, and the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import convert
from moe_jax.__main__ import main
from moe_jax.config import InitFrom
from moe_jax.interchange.leaves import STATE
from moe_jax.interchange.peft import CONFIG, TENSORS, to_peft
from moe_jax.interchange.tensor_files import read_header
from moe_jax.parameters import init_parameters
from moe_jax.training.imported import save_imported
from moe_jax.weights.low_rank import ADAPTERS, Adapters, LowRank
from tests.hf_families import CASES, write_model

# Every family with a layout for PEFT. DBRX's experts have none.
FAMILIES = (
    "mixtral", "gpt_oss", "switch", "t5_gated", "llama", "qwen2_moe", "qwen3_moe", "olmoe",
    "deepseek_v2", "deepseek_v3", "granitemoe", "granitemoeshared", "jamba", "phimoe",
    "llama4_scout",
)  # fmt: skip


def adapted(directory, name, names=("all",), per_expert=True):
    """A tiny model with non-zero adapters: its config and parameters."""
    config, params = moe_jax.from_hf(write_model(directory, CASES[name]))
    state = params.pop(STATE, None)
    adapters = Adapters(names, rank=2, alpha=3.0, per_expert=per_expert)
    optimizer = dataclasses.replace(config.optimizer, trainable=(ADAPTERS,))
    model = dataclasses.replace(config.model, adapters=adapters)
    drawn = init_parameters(jax.random.key(0), model.specs())
    random = np.random.default_rng(2)

    def joined(own, base):
        if not isinstance(own, LowRank):
            return base
        b = jnp.asarray(random.normal(size=own.b.shape) / 4, jnp.float32)
        return dataclasses.replace(own, base=base, b=b)

    params = jax.tree.map(joined, drawn, params, is_leaf=lambda leaf: isinstance(leaf, LowRank))
    config = dataclasses.replace(config, model=model, optimizer=optimizer)
    return config, params | ({} if state is None else {STATE: state})


def delta(config, a, b, name, shape):
    """What PEFT adds to a tensor, by its documented formulas, in float64."""
    rank = config["rank_pattern"].get(name, config["r"])
    scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / rank
    a, b = a.astype(np.float64), b.astype(np.float64)
    if len(shape) == 2:
        return scale * b @ a
    experts = shape[0]
    a, b = a.reshape(experts, rank, -1), b.reshape(-1, rank, experts)
    return scale * np.einsum("ore,eri->eoi", b, a)


def tensors(path):
    """Every tensor of a file."""
    found = {}
    for name, one in read_header(path).items():
        count = int(np.prod(one.shape))
        found[name] = np.fromfile(path, one.dtype, count, offset=one.start).reshape(one.shape)
    return found


@pytest.mark.parametrize(
    ("name", "per_expert"),
    [("mixtral", True), pytest.param("mixtral", False, marks=pytest.mark.slow),
     pytest.param("qwen2_moe", True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_an_adapter_adds_what_merging_adds(name, per_expert, tmp_path):
    """It equals the merged model minus the plain one, in the Hugging Face layout."""
    config, params = adapted(tmp_path / "hf", name, ("attention", "experts"), per_expert)
    to_peft(config, params, tmp_path / "peft", base="hf")
    said = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert (said["peft_type"], said["task_type"], said["base_model_name_or_path"]) == (
        "LORA", "CAUSAL_LM", "hf",
    )  # fmt: skip
    found = tensors(tmp_path / "peft" / TENSORS)
    layer = params["stack"]["unit"]["0"]
    names = {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}
    for i in range(2):
        for one, key in names.items():
            module = f"model.layers.{i}.self_attn.{one}_proj"
            assert module in said["target_modules"]
            a, b = (found.pop(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
            weight = layer["attention"][key]
            expected = (weight.dense() - weight.base)[i].T
            np.testing.assert_allclose(delta(said, a, b, module, (1, 1)), expected, atol=1e-5)
        experts = f"model.layers.{i}.mlp.experts"
        # Gate and up share one tensor. The adapter of down wraps the adapter of that tensor.
        wg, wi, wo = (layer["moe"]["experts"][key] for key in ("wg", "wi", "wo"))
        plus = [np.swapaxes((w.dense() - w.base)[i], 1, 2) for w in (wg, wi, wo)]
        places = (
            ("base_layer.", "gate_up_proj", np.concatenate(plus[:2], 1)),
            ("", "down_proj", plus[2]),
        )
        for place, one, expected in places:
            assert f"{experts}.{one}" in said["target_parameters"]
            a, b = (found.pop(f"base_model.model.{experts}.{place}lora_{x}.weight") for x in "AB")
            added = delta(said, a, b, f"{experts}.{one}", expected.shape)
            np.testing.assert_allclose(added, expected, atol=1e-5)
    assert not found and said["rank_pattern"] == {
        f"model.layers.{i}.mlp.experts.gate_up_proj": 4 for i in range(2)
    }


@pytest.mark.slow
# PEFT compares patterns only with modules. They apply to parameters too, as the logits show.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_gives_the_logits_of_the_adapted_model(name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    case = CASES[name]
    names = ("all",) if name != "jamba" else ("attention", "experts", "dense_ffn", "wx", "x_proj")
    config, params = adapted(tmp_path / "hf", name, names)
    to_peft(config, params, tmp_path / "peft")
    inputs = case.encoder_tokens()
    ours = moe_jax.build(config).apply({"params": params}, case.tokens(), **inputs)
    plain = dataclasses.replace(config.model, adapters=None)
    _, before = moe_jax.from_hf(tmp_path / "hf")
    without = moe_jax.build(plain).apply({"params": before}, case.tokens(), **inputs)
    classes = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
    base = classes[case.has_encoder].from_pretrained(tmp_path / "hf", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    tokens = torch.tensor(case.tokens(), dtype=torch.long)
    read = [torch.tensor(one, dtype=torch.long) for one in inputs.values()]
    with torch.no_grad():
        theirs = model(*read, **{"decoder_input_ids" if read else "input_ids": tokens}).logits
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2e-4)
    assert np.abs(ours - without).max() > 0.1 * np.abs(ours).max()


def test_a_family_that_cannot_say_the_model_is_refused(tmp_path):
    """Like convert --to-hf, it drops nothing silently."""
    config, params = adapted(tmp_path / "hf", "mixtral", ("attention",))
    for family in ("llama", "olmoe"):
        with pytest.raises(ValueError, match=f"written as {family} only if"):
            to_peft(config, params, tmp_path / "peft", family=family)
    capped = dataclasses.replace(
        config, model=dataclasses.replace(config.model, logits_softcap=3.0)
    )
    with pytest.raises(ValueError, match="logits_softcap"):
        to_peft(capped, params, tmp_path / "peft")


@pytest.mark.slow
def test_what_an_adapter_cannot_say_is_refused(tmp_path):
    config, params = adapted(tmp_path / "hf", "dbrx", ("experts",))
    with pytest.raises(
        ValueError, match=r"ffn\.experts\.mlp\.w1 has another layout\. Leave it out"
    ):
        to_peft(config, params, tmp_path / "peft")
    more = dataclasses.replace(config.optimizer, trainable=(ADAPTERS, "norms"))
    with pytest.raises(ValueError, match=r"trained \['norms'\] too\. Write the merged model"):
        to_peft(dataclasses.replace(config, optimizer=more), params, tmp_path / "peft")
    mamba = adapted(tmp_path / "jamba", "jamba", ("mamba",))
    with pytest.raises(
        ValueError,
        match=r"\['mamba/dt_proj'\] are read without calling their module\. Leave them out",
    ):
        to_peft(*mamba, tmp_path / "peft")
    plain, before = moe_jax.from_hf(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"needs a run with adapters: model\.adapters=None"):
        to_peft(plain, before, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.slow
def test_the_command_writes_the_adapters_of_a_run(tmp_path, capsys):
    hf, base, run, out = (tmp_path / one for one in ("hf", "base", "run", "peft"))
    config, params = adapted(hf, "mixtral", ("attention",))
    assert main(["convert", f"--from-hf={hf}", f"--workdir={base}"]) == 0
    run.mkdir()
    given = InitFrom(str(base), fresh=(ADAPTERS,))
    save_imported(run, dataclasses.replace(config, init_from=given), params, {}, {}, {})
    assert main(["convert", f"--workdir={run}", f"--to-peft={out}"]) == 0
    said = json.loads((out / CONFIG).read_text())
    assert said["base_model_name_or_path"] == str(hf)
    assert len(tensors(out / TENSORS)) == 2 * 4 * 2
    assert "the adapters of step 0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["convert", f"--workdir={run}", f"--to-peft={out}"])
    assert "is there already" in capsys.readouterr().err
    # Adapters on the quantised import belong to the same model. Those on an upcycled one do not.
    for made_by, base in (("quantise", str(hf)), ("upcycle", None)):
        save_imported(tmp_path / made_by, config, params, {}, {}, {
            "made_by": made_by, "source": str(tmp_path / "base")
        })  # fmt: skip
        again = dataclasses.replace(config, init_from=InitFrom(str(tmp_path / made_by)))
        save_imported(tmp_path / f"on_{made_by}", again, params, {}, {}, {})
        out = tmp_path / f"peft_{made_by}"
        how = ["--family=mixtral", f"--workdir={tmp_path / f'on_{made_by}'}", f"--to-peft={out}"]
        assert main(["convert", *how]) == 0
        assert json.loads((out / CONFIG).read_text())["base_model_name_or_path"] == base
    # A copy quantised after the training has the adapters of that run, and no `init_from`.
    origin = {"made_by": "quantise", "source": str(run)}
    save_imported(tmp_path / "copy", config, params, {}, {}, origin)
    assert convert.model_under(config, tmp_path / "copy") == tmp_path / "base"
