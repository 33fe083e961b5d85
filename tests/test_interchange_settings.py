"""Settings of a config.json other than sizes: lengths, rotary bases, and later training."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.__main__ import main
from moe_jax.convert import check_annealed
from moe_jax.interchange.family import FAMILIES, Reader, family_of, load_family
from moe_jax.interchange.rope import LONGEST, read_rotary
from moe_jax.interchange.write import config_json
from moe_jax.layers.rotary import Rotary
from moe_jax.layers.rotary_scaling import LinearScaling
from moe_jax.models.model import LanguageModel
from moe_jax.moe.activations import Relu
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Linear
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.part import Call
from tests.hf_families import CASES, Case, write_model
from tests.hf_others import LONGROPE

# Not in transformers.
OF_OTHERS = {"grok-1", "kimi_k2"}
# No rotary positions, another name for the length, or not in transformers.
WITHOUT_LENGTH = {"jamba", "dbrx", "t5", "switch_transformers"} | OF_OTHERS
LINEAR = {"rope_type": "linear", "factor": 2.0}


def written_of(case):
    """The config.json of a tiny model, before other settings are added."""
    return case.family.written(case.family.model(Reader(case.settings)))


@pytest.mark.parametrize(
    ("settings", "base", "scaling"),
    [
        ({"rope_theta": 3e5}, 3e5, None),
        ({"rope_scaling": {**LINEAR, "rope_theta": 5e5}}, 5e5, LinearScaling(2.0)),
        ({"rope_scaling": {**LINEAR, "rope_theta": 5e5}, "rope_theta": 3e5}, 5e5, LinearScaling(2)),
        ({"rope_scaling": LINEAR, "rope_theta": 3e5}, 3e5, LinearScaling(2.0)),
        ({"rope_parameters": {"rope_theta": 7e5}, "rope_theta": 3e5}, 7e5, None),
        (  # of both, only the older one counts
            {"rope_parameters": {"rope_theta": 7e5}, "rope_scaling": LINEAR}, 1e4, LinearScaling(2)
        ),
        ({"rope_parameters": None, "rope_scaling": {}}, 1e4, None),
    ],
)  # fmt: skip
def test_the_base_and_scaling_of_positions_are_those_of_transformers(settings, base, scaling):
    transformers = pytest.importorskip("transformers")
    rotary = read_rotary(Reader(settings), 8)
    assert (rotary.base, rotary.scaling) == (base, scaling)
    theirs = transformers.LlamaConfig(**json.loads(json.dumps(settings))).rope_parameters
    assert theirs["rope_theta"] == base and theirs.get("factor") == (scaling and scaling.factor)


@pytest.mark.parametrize(
    ("family", "scaling", "longest"),
    [
        ("mistral", {"type": "yarn", "factor": 4.0}, 131_072),
        ("qwen2", {"type": "dynamic", "factor": 2.0}, 32_768),
        ("llama", {"type": "dynamic", "factor": 2.0}, 2048),
    ],
)
def test_a_file_without_a_length_has_that_of_its_family(family, scaling, longest):
    rotary = read_rotary(Reader({"model_type": family, "rope_scaling": scaling}), 8)
    assert rotary.scaling.original_length == longest


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITHOUT_LENGTH))
def test_the_lengths_of_families_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[family]()
    assert LONGEST.get(family, 2048) == config.get_text_config().max_position_embeddings


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - OF_OTHERS))
def test_what_a_file_leaves_out_is_as_in_transformers_or_named_in_an_error(name):
    transformers = pytest.importorskip("transformers")
    theirs = json.loads(transformers.CONFIG_MAPPING[name]().to_json_string(use_diff=False))
    if name == "deepseek_v2":
        theirs["num_experts_per_tok"] = 6  # null there, but no model runs with null
    family = load_family(name)
    model = family.read(theirs)
    # The default of dt_rank depends on the width: "auto" here, a number there.
    for setting in set(theirs) - ({"mamba_dt_rank"} if name == "jamba" else set()):
        rest = {one: value for one, value in theirs.items() if one != setting}
        try:
            assert family.read(rest) == model, setting
        except ValueError as error:
            assert "is not in it. Add it" in str(error), setting


def test_a_size_that_is_null_is_missing():
    settings = CASES["deepseek_v2"].settings
    with pytest.raises(ValueError, match="'num_experts_per_tok' is null in it"):
        load_family("deepseek_v2").read({**settings, "num_experts_per_tok": None})


def test_files_that_transformers_refuses_are_not_written():
    llama = load_family("llama")
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4}
    uneven = llama.read({**CASES["llama"].settings, **heads})
    with pytest.raises(ValueError, match="multiple of num_attention_heads"):
        llama.written(uneven)
    assert load_family("mistral").written(uneven)["head_dim"] == 4
    olmoe = load_family("olmoe")
    with pytest.raises(ValueError, match="together are as wide as the model"):
        olmoe.written(olmoe.read({**CASES["olmoe"].settings, "head_dim": 2}))


def test_the_original_length_of_phimoe_is_that_of_its_scaling():
    """`PhimoeConfig.validate_rope` sets the outer length to that one, or to the maximum."""
    beside = {"max_position_embeddings": 64, "original_max_position_embeddings": 12}
    for inner, expected in ((16, 16), (None, 64)):
        scaling = {**LONGROPE, "long_factor": [2.0] * 6, "original_max_position_embeddings": inner}
        settings = {**CASES["phimoe"].settings, **beside, "rope_scaling": scaling}
        rotary = load_family("phimoe").read(settings).part["attention"].rotary
        assert rotary.scaling.original_length == expected


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, r"\['high_freq_factor'\]"),
        ({"rope_type": "longrope", "long_factor": [1.0] * 4}, r"\['short_factor'\]"),
    ],
)
def test_a_scaling_without_its_factors_is_refused_by_name(scaling, said):
    with pytest.raises(ValueError, match=rf"lacks {said}\. Add them"):
        read_rotary(Reader({"rope_scaling": scaling}), 8)


@pytest.mark.parametrize(
    ("name", "settings", "unread"),
    [
        ("dbrx", {}, {"attn_config.made_up": 3, "ffn_config.other": 1}),
        ("llama4_scout", {"text_config": {}}, {"made_up": 3, "text_config.other": 1}),
    ],
)
def test_settings_in_a_setting_that_nobody_reads_are_named(name, settings, unread, caplog):
    """Nested settings have a Reader of their own, and no code asked it for them."""
    given = dict(CASES[name].settings)
    if "text_config" in settings:
        given = {"model_type": "llama4", "text_config": given}
    given = json.loads(json.dumps(given))
    for path, value in unread.items():
        outer, _, inner = path.rpartition(".")
        (given[outer] if outer else given)[inner] = value
    load_family(given["model_type"]).read(given)
    [record] = caplog.records
    assert record.args == unread and "If the model's outputs depend on them" in record.msg


def test_kimi_k2_is_a_deepseek_v3(caplog):
    """Its config.json names that class of transformers, but another model_type."""
    settings = {**CASES["deepseek_v3"].settings, "model_type": "kimi_k2", "ep_size": 1}
    family = load_family("kimi_k2")
    assert family is load_family("deepseek_v3")
    assert family.read(settings) == family.read(CASES["deepseek_v3"].settings)
    assert not caplog.records


def test_a_fraction_of_a_head_turns_only_if_frequencies_are_scaled():
    """With rope_type "default", transformers turns all dims, whatever the fraction."""
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5"):
        read_rotary(Reader({"partial_rotary_factor": 0.5}), 8)
    assert read_rotary(Reader({"partial_rotary_factor": 0.5, "rope_scaling": LINEAR}), 8).dim == 4
    family = load_family("mixtral")
    model = family.read(CASES["mixtral"].settings)
    attention = dataclasses.replace(model.part["attention"], rotary=Rotary(1e6, 4))
    model = dataclasses.replace(model, parts={**dict(model.parts), "attention": attention})
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        family.written(model)


def test_a_model_of_no_family_is_told_what_the_nearest_cannot_say():
    model = load_family("mixtral").read(CASES["mixtral"].settings)
    moe = dataclasses.replace(model.part["moe"], activation=Relu())
    model = dataclasses.replace(model, parts={**dict(model.parts), "moe": moe})
    with pytest.raises(
        ValueError, match=r"22 families .* as mixtral only if .* it is Relu\(\)"
    ) as no:
        family_of(model)
    assert "Error(" not in str(no.value) and len(str(no.value)) < 1000


@pytest.mark.parametrize("name", ["mixtral", "phimoe", "switch"])
def test_the_weights_of_router_losses_are_written(name):
    settings = {**CASES[name].settings, "router_aux_loss_coef": 0.02}
    model = load_family(settings["model_type"]).read(settings)
    assert load_family(settings["model_type"]).written(model)["router_aux_loss_coef"] == 0.02


@pytest.mark.parametrize(
    ("name", "length", "setting"),
    [
        ("llama_biases", 131072, "max_position_embeddings"),  # llama3: factor 8 of 16
        ("llama_yarn", 40, "max_position_embeddings"),
        ("dbrx", 32768, "max_seq_len"),
        ("llama4_scout", 10485760, "max_position_embeddings"),
    ],
)
def test_the_length_of_a_context_comes_out_as_it_came_in(name, length, setting, tmp_path):
    case = Case({**CASES[name].settings, setting: length}, quick=False)
    hf = write_model(tmp_path / "hf", case)
    if name == "llama4_scout":  # as published: an object holds the text model's settings
        text = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": text}))
    assert main(["convert", f"--from-hf={hf}", f"--workdir={tmp_path / 'run'}"]) == 0
    assert main(["convert", f"--workdir={tmp_path / 'run'}", f"--to-hf={tmp_path / 'again'}"]) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())[setting] == length


def test_dynamic_scaling_sets_the_length_itself():
    model = {"max_position_embeddings": 12, "rope_parameters": {"rope_type": "dynamic"}}
    assert config_json(model, {"max_position_embeddings": 99, "pad_token_id": 0}) == {
        **model, "rope_scaling": {"rope_type": "dynamic"}, "pad_token_id": 0,
    }  # fmt: skip


ROTARY = [name for name, case in CASES.items() if "rope_parameters" in written_of(case)]


@pytest.mark.parametrize("name", ROTARY)
def test_positions_are_written_for_transformers_4_too(name):
    """It reads "rope_theta" and "rope_scaling" alone, and defaults without a warning."""
    family, of_model = CASES[name].family, written_of(CASES[name])
    written = config_json(of_model, {})
    assert set(written) - set(of_model) >= {"rope_theta"}
    older = {name: value for name, value in written.items() if name != "rope_parameters"}
    models = [family.read(one) for one in (of_model, written, older)]
    assert models[0] == models[1] == models[2]
    if (kind := written["model_type"]) in OF_OTHERS:
        return
    transformers = pytest.importorskip("transformers")
    read = [
        transformers.CONFIG_MAPPING[kind](**copy.deepcopy(one))
        for one in (of_model, written, older)
    ]
    positions = [dict(one.rope_parameters) for one in read]
    assert positions[0] == positions[1] == positions[2]


def test_files_that_are_not_written_are_not_named():
    given = {"auto_map": {"AutoConfig": "a.Config"}, "torch_dtype": "float16", "dtype": "float16"}
    given["transformers_version"] = "4.40.0"
    assert config_json({"vocab_size": 3}, given) == {"vocab_size": 3}


SPARSE = [
    name for name, case in CASES.items() if case.family.model(Reader(case.settings)).moe_parts
]


@pytest.mark.parametrize("name", SPARSE)
def test_an_import_is_dropless_if_the_published_model_is(name):
    """Switch and its successors have a capacity as part of the model."""
    case = CASES[name]
    for part in case.family.model(Reader(case.settings)).moe_parts.values():
        dropless = [part.capacity_factor(training) == 0 for training in (True, False)]
        assert dropless == [not case.has_encoder] * 2


def test_training_goes_on_with_the_published_forward_pass(tmp_path):
    """Skewed routers would overload experts with a capacity."""
    config, params = moe_jax.from_hf(write_model(tmp_path / "hf", CASES["mixtral"]))
    router = params["stack"]["unit"]["0"]["moe"]["router"]
    router["weight"] = router["weight"].at[..., 0].mul(20.0)
    tokens = jnp.asarray(CASES["mixtral"].tokens())

    @jax.jit
    def logits(rng):
        return config.model.run(params, Call(tokens_BL=tokens, rng=rng)).logits_BLV

    evaluated = jax.jit(lambda: config.model.run(params, Call(tokens_BL=tokens)).logits_BLV)()
    np.testing.assert_array_equal(logits(jax.random.key(0)), evaluated)


def weights(name, **settings):
    model = CASES[name].family.model(Reader({**CASES[name].settings, **settings}))
    return [loss.weight for part in model.moe_parts.values() for loss in part.losses]


def test_a_gpt_oss_without_windows_says_nothing_of_them():
    """With a window of null, the forward pass of transformers fails."""
    family, settings = load_family("gpt_oss"), CASES["gpt_oss"].settings
    full = ["full_attention"] * settings["num_hidden_layers"]
    assert "sliding_window" not in family.written(family.read({**settings, "layer_types": full}))


def test_gpt_oss_is_balanced_only_where_transformers_balances_it():
    assert weights("gpt_oss", router_aux_loss_coef=0.9, output_router_logits=False) == [0.0]
    assert weights("gpt_oss", router_aux_loss_coef=0.9) == [0.0]
    assert weights("gpt_oss", router_aux_loss_coef=0.9, output_router_logits=True) == [0.9]
    assert weights("mixtral", router_aux_loss_coef=0.02, output_router_logits=False) == [0.02]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mixtral", ["--config.model.parts.moe.losses.huggingface_load_balance.weight=0.001"]),
        ("switch", ["parts.encoder_moe.losses.router_z.weight=0.001", "parts.moe.losses.router_z"]),
        ("gpt_oss", []),
    ],
)
def test_an_import_says_the_losses_that_training_adds(name, said, tmp_path, capsys):
    hf = write_model(tmp_path / "hf", CASES[name])
    assert main(["convert", f"--from-hf={hf}", f"--workdir={tmp_path / 'run'}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "training adds" in line]
    assert len(lines) == bool(said) and all(one in lines[0] for one in said)


def test_how_a_model_runs_is_no_setting_of_a_file():
    family = load_family("mixtral")
    model = family.read(CASES["mixtral"].settings)
    parts = {
        "attention": dataclasses.replace(model.part["attention"], kernel="xla"),
        "moe": dataclasses.replace(
            model.part["moe"],
            run_experts="ragged",
            grouped_matmul="loop",
            buffer_factor=1.5,
            stop_at_overflow=True,
        ),
    }
    changed = dataclasses.replace(model, parts={**model.part, **parts}, remat="full")
    assert family.written(changed) == family.written(model)


def test_a_temperature_that_is_still_annealed_is_not_written():
    projection = Linear(anneal_from=4.0, anneal_steps=1000)
    model = LanguageModel(
        parts={**LanguageModel().part, "moe": MoE(router=TokenChoice(projection=projection))}
    )
    check_annealed(model, 1000)
    with pytest.raises(ValueError, match=r"'moe' is annealed until step 1000, this is step 999"):
        check_annealed(model, 999)


def test_gates_of_dbrx_over_another_norm_than_their_sum_are_refused():
    settings = copy.deepcopy(CASES["dbrx"].settings)
    settings["ffn_config"]["moe_normalize_expert_weights"] = 2.0
    with pytest.raises(
        ValueError, match=r"the L_1 norm.*moe_normalize_expert_weights=2\.0\. Use 1"
    ):
        load_family("dbrx").read(settings)
