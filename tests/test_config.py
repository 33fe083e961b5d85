"""Settings: round trips, and every reason for refusal."""

import dataclasses
import json

import ml_collections
import pytest

from configs import base
from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    build,
    config_dict,
    difference,
    from_config_dict,
    parse_mesh,
    read_config,
    to_dict,
    write_config,
)
from moe_jax.config.kinds import KINDS, kind_of, load_kind
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import LayerNorm, RMSNorm
from moe_jax.models.layer import Layer
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.balance import BatchEntropy, Importance, Load, RouterZ, TokenEntropy
from moe_jax.moe.bias import QuantileUpdate, SignUpdate
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.capacity_presets import PRESETS
from moe_jax.moe.load_balance import HuggingFaceLoadBalance, LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import BatchPrioritized, ByProbability, ChoiceMajor, RandomOrder
from moe_jax.moe.routing.cosine import Cosine
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.moe.routing.fixed import Hash
from moe_jax.moe.routing.logits import Linear, Sigmoid, SoftmaxOverSelected
from moe_jax.moe.routing.noise import Gaussian, Jitter, Learned
from moe_jax.moe.routing.selection import (
    ExpertGroups,
    RandomChoices,
    Sampled,
    SampledRest,
    Threshold,
)
from moe_jax.moe.routing.soft import Soft
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.parallel.mesh import make_mesh
from moe_jax.planning.parameters import abstract_mesh
from moe_jax.training.placement import check_run


def changed():
    """A config with a non-default value in every section."""
    config = config_dict(ExperimentConfig())
    config.name, config.seed = "other", 3
    moe = config.model.parts.moe
    moe.num_selected_experts = 2
    moe.activation = "swiglu"
    moe.router.renormalize = True
    moe.router.noise = {"jitter": {"epsilon": 0.1}, "learned": {}}
    moe.router.groups = {"num_groups": 4}
    moe.losses.load_balance.weight = 0.5
    moe.bias = "sign"
    moe.capacity.preset = "maxtext"
    config.model.stack.first, config.model.stack.repeats = (("attention", "moe"),), 2
    config.data.domain_weights = (("en", 0.5), ("code", 2.0))
    config.optimizer.learning_rate = 3e-4
    config.training.batch_size = 32
    config.mesh.data, config.mesh.expert = 2, -1
    return config


def test_defaults_survive_the_round_trip():
    assert from_config_dict(config_dict(ExperimentConfig())) == ExperimentConfig()
    assert from_config_dict({}) == ExperimentConfig()


def test_changes_survive_the_round_trip():
    config = from_config_dict(changed())
    assert config != ExperimentConfig()
    moe = config.model.part["moe"]
    assert moe == MoE(
        num_selected_experts=2,
        activation=SwiGLU(),
        router=TokenChoice(
            renormalize=True, noise=(Jitter(epsilon=0.1), Learned()), groups=ExpertGroups(4)
        ),
        losses=(LoadBalance(weight=0.5), RouterZ()),
        bias=SignUpdate(),
        capacity=Capacity(preset="maxtext"),
    )
    assert config.model.moe_layers == {"moe": (0, 1, 2)}
    assert config.data.domain_weights == (("en", 0.5), ("code", 2.0))
    assert from_config_dict(config_dict(config)) == config
    assert from_config_dict(to_dict(config)) == config


ALL = [(family, kind) for family, kinds in KINDS.items() for kind in kinds]


@pytest.mark.parametrize(("family", "kind"), ALL)
def test_every_registered_kind_is_built_by_its_name_and_goes_back(family, kind):
    cls = load_kind(family, kind)
    part = cls()
    assert kind_of(part) == kind_of(cls) == kind
    assert cls.family == family
    assert build(cls, kind, "config") == build(cls, {"kind": kind}, "config") == part
    assert build(cls, to_dict(part), "config") == part
    assert build(cls, json.loads(json.dumps(to_dict(part))), "config") == part
    assert len({part, cls()}) == 1  # hashable, so that jit can distinguish parts


def test_configs_are_hashable_so_that_jit_can_tell_them_apart():
    assert hash(from_config_dict(changed())) == hash(from_config_dict(changed()))
    assert len({from_config_dict(changed()), ExperimentConfig()}) == 2


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExperimentConfig().model.model_dim = 3


def test_a_config_dict_is_locked():
    with pytest.raises(AttributeError, match="num_expert"):
        config_dict(ExperimentConfig()).model.parts.moe.num_expert = 4


def test_absent_fields_keep_their_defaults():
    parts = {"attention": "attention", "moe": {"kind": "moe", "num_experts": 4}}
    config = from_config_dict({"model": {"kind": "language_model", "parts": parts}})
    assert config.model.part["moe"] == MoE(num_experts=4)
    assert config.model.part["attention"] == Attention()
    assert config.training == ExperimentConfig().training


def test_integers_may_stand_for_floats_and_lists_for_tuples():
    stack = {"first": [["attention", "moe"]], "repeats": 1}
    config = from_config_dict(
        {
            "optimizer": {"learning_rate": 1},
            "model": {"kind": "language_model", "stack": stack},
            "data": {"domain_weights": [["en", 1]]},
        }
    )
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.model.stack.first == (("attention", "moe"),)
    assert config.data.domain_weights == (("en", 1.0),)


def test_several_parts_of_one_family_go_by_name_whatever_their_order():
    parts = (RouterZ(weight=0.1), LoadBalance(weight=0.2), LoadBalance(weight=0.3, scope="group"))
    moe = MoE(losses=parts)
    assert moe == MoE(losses=parts[::-1])
    written = to_dict(moe)["losses"]
    assert sorted(written) == ["load_balance", "load_balance__2", "router_z"]
    assert build(MoE, to_dict(moe), "config") == moe
    # A name is the kind, unless another name is given.
    named = {"ours": {"kind": "load_balance", "weight": 0.2}, "router_z": {"weight": 0.1}}
    assert build(MoE, {"kind": "moe", "losses": named}, "config").losses == (
        MoE(losses=(RouterZ(weight=0.1), LoadBalance(weight=0.2))).losses
    )


def model(moe=None, **settings):
    """Settings of a model as a user writes them, with these settings of its block."""
    parts = {"attention": "attention", "moe": {"kind": "moe"} | (moe or {})}
    return {"model": {"kind": "language_model", "parts": parts} | settings}


def router(**settings):
    return model({"router": {"kind": "token_choice"} | settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sed": 1}, r"config has the fields .*: config\.sed\. Did you mean 'seed'\?"),
        (
            model({"num_expert": 4}),
            r"config\.model\.parts\.moe\.num_expert\. Did you mean 'num_experts'\?",
        ),
        ({"zzz": 1}, r"config\.zzz\. Remove the field\."),
        ({"seed": "1"}, r"config\.seed is of type int: '1' of type str\. Pass a int\."),
        ({"seed": 1.0}, r"config\.seed is of type int: 1\.0 of type float"),
        ({"seed": True}, r"config\.seed is of type int: True of type bool"),
        ({"name": 3}, r"config\.name is of type str: 3 of type int"),
        ({"optimizer": {"b1": True}}, r"optimizer\.b1 is of type float: True of type bool"),
        ({"optimizer": {"b1": "x"}}, r"optimizer\.b1 is of type float: 'x' of type str"),
        (router(renormalize=1), r"moe\.router\.renormalize is of type bool: 1 of type int"),
        ({"data": {"domain_weights": 3}}, r"domain_weights must be a tuple: 3\. Pass a tuple"),
        (
            {"data": {"domain_weights": [["en"]]}},
            r"domain_weights\[0\] must have 2 items: \['en'\]",
        ),
        (
            model(stack={"shared": ["a", 3]}),
            r"config\.model\.stack\.shared\[1\] is of type str: 3 of type int",
        ),
        ({"model": 3}, r"config\.model must be a section of settings: 3\. Set its fields"),
        (
            {"model": {"model_dim": 8}},
            r"config\.model must name its kind: kind=None\. Set the kind",
        ),
        (model({"router": 3}), r"parts\.moe\.router must be a section of settings: 3"),
        (model({"losses": 3}), r"parts\.moe\.losses must have parts by name: 3\. Pass a dict"),
        (
            router(kind="token_chioce"),
            r"parts\.moe\.router: a kind of router is one of \['base', .*\], or 'package\.module:"
            r"Class': kind='token_chioce'",
        ),
        (
            router(kind="no_such_module:Router"),
            r"router: a kind .* must be importable: kind='no_such_module:Router' gives Module",
        ),
        (
            router(kind="moe_jax.moe.activations:Relu"),
            r"router: a kind of router must be a class derived from .*moe\.activations:Relu' is ",
        ),
        (
            router(kind="__main__:Router"),
            r"which '__main__' does not allow: .*Move the class to a module",
        ),
        (
            router(top_p=2.0),
            r"config\.model\.parts\.moe\.router: top_p lies in \(0, 1\]: top_p=2\.0\. The",
        ),
        (
            model({"losses": {"load_balance": {"weight": -1.0}}}),
            r"config\.model\.parts\.moe\.losses\.load_balance: weight lies in \[0, inf\)",
        ),
    ],
)
def test_a_wrong_field_or_type_is_refused_by_its_path(settings, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(settings)


def refuses(cases):
    """Parametrizes a test with classes, refused settings and the expected messages."""
    return pytest.mark.parametrize(("cls", "settings", "message"), cases)


@refuses(
    [
        (TokenChoice, {"dtype": "float16"}, r"dtype is one of \['float32', 'bfloat16'\]: .*16'"),
        (ExpertGroups, {"worth": "sum"}, r"worth is one of .*'sum'"),
        (Jitter, {"epsilon": 1.0}, r"epsilon lies in \[0, 1\): epsilon=1\.0"),
        (Jitter, {"epsilon": -0.1}, r"epsilon lies in \[0, 1\)"),
        (Gaussian, {"stddev": -1.0}, r"stddev lies in \[0, inf\)"),
        (ExpertGroups, {"num_selected": 0}, r"num_selected lies in \[1, inf\)"),
        (Linear, {"temperature": 0.0}, r"temperature lies in \(0, inf\): temperature=0\.0"),
        (Cosine, {"dim": 0}, r"dim lies in \[1, inf\)"),
        (Cosine, {"temperature": 0.0}, r"temperature lies in \(0, inf\)"),
        (
            Linear,
            {"anneal_from": 2.0},
            r"must be set together: anneal_from=2\.0, anneal_steps=0\. Set both or none",
        ),
        (Linear, {"anneal_from": 0.0, "anneal_steps": 5}, r"anneal_from lies in \(0, inf\)"),
        (Jitter, {"anneal_from": 0.5}, r"anneal_from=0\.5, anneal_steps=0"),
        (Jitter, {"anneal_from": 1.0, "anneal_steps": 5}, r"anneal_from lies in \[0, 1\)"),
        (Gaussian, {"anneal_from": -1.0, "anneal_steps": 5}, r"anneal_from lies in \[0, inf\)"),
        (TokenChoice, {"top_p": 0.0}, r"top_p lies in \(0, 1\]: top_p=0\.0"),
        (TokenChoice, {"top_p": 1.5}, r"top_p lies in \(0, 1\]"),
        (TokenChoice, {"top_p": float("nan")}, r"top_p lies in \(0, 1\]: top_p=nan"),
        (TokenChoice, {"eval_choices": RandomChoices()}, r"has no random key: eval_choices=Random"),
        (Threshold, {"threshold": 0.0}, r"threshold lies in \(0, inf\)"),
        (
            ExpertGroups,
            {"num_groups": 2, "num_selected": 3},
            r"num_selected must be at most num_groups: 3 of 2",
        ),
        (TokenChoice, {"scaling_factor": 0.0}, r"scaling_factor lies in \(0, inf\): .*=0\.0"),
        (ExpertChoice, {"max_experts": -1}, r"max_experts lies in \[0, inf\)"),
    ]
)
def test_router_refuses(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


@refuses(
    [
        (LoadBalance, {"scope": "layer"}, r"scope is one of \['group', 'sequence', "),
        (LoadBalance, {"weight": -1.0}, r"weight lies in \[0, inf\)"),
        (Importance, {"weight": -1.0}, r"weight lies in \[0, inf\)"),
        (Load, {"weight": -1.0}, r"weight lies in \[0, inf\)"),
        (RouterZ, {"weight": -1.0}, r"weight lies in \[0, inf\)"),
        (TokenEntropy, {"weight": -1.0}, r"weight lies in \[0, inf\)"),
        (SignUpdate, {"rate": -1.0}, r"rate lies in \(0, inf\)"),
        (SignUpdate, {"frozen_fraction": 1.0}, r"frozen_fraction lies in \[0, 1\)"),
        (SignUpdate, {"schedule": "rsqrt"}, r"schedule is one of"),
        (QuantileUpdate, {"rate": 2.0}, r"rate lies in \(0, 1\]: rate=2\.0"),
        (
            HuggingFaceLoadBalance,
            {"scope": "sequence"},
            r"its scope must be 'microbatch' or 'global': scope='sequence'",
        ),
    ]
)
def test_balance_refuses(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "gshard"}, r"preset is one of \['axlearn'"),
        ({"per": "expert"}, r"per is one of"),
        ({"rounding": "up"}, r"rounding is one of"),
        ({"multiple_of": 0}, r"multiple_of lies in \[1, inf\)"),
        ({"minimum": 0}, r"minimum lies in \[1, inf\)"),
        ({"train_factor": -1.0}, r"train_factor lies in \[0, inf\)"),
        ({"train_factor": float("inf")}, r"train_factor lies in \[0, inf\): .*=inf"),
        ({"eval_factor": -1.0}, r"eval_factor lies in \[0, inf\)"),
        ({"slots": -1}, r"slots lies in \[0, inf\)"),
        ({"slots": 6, "train_factor": 0}, r"slots=6, train_factor=0\. Leave"),
        (
            {"queue": RandomOrder()},
            r"needs a random key, and an evaluation has none: queue=Random.*, eval_factor=2\.0",
        ),
    ],
)
def test_capacity_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Capacity(**settings)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_capacity_preset_fills_in_its_fields_and_leaves_the_rest(preset):
    capacity = Capacity(preset=preset, train_factor=1.5)
    for field in dataclasses.fields(capacity):
        default = {"preset": preset, "train_factor": 1.5}.get(field.name, field.default)
        value = getattr(capacity, field.name)
        value = kind_of(value) if field.name == "queue" else value
        default = kind_of(default) if field.name == "queue" else default
        assert value == PRESETS[preset].get(field.name, default)


def test_a_capacity_preset_may_be_repeated_but_not_contradicted():
    Capacity(preset="vmoe", multiple_of=4, queue=ChoiceMajor())
    with pytest.raises(ValueError, match=r"preset='vmoe' sets multiple_of=4: multiple_of=8 as"):
        Capacity(preset="vmoe", multiple_of=8)
    with pytest.raises(ValueError, match=r"preset='vmoe' sets queue=ChoiceMajor\(\)"):
        Capacity(preset="vmoe", queue=ByProbability())


def test_fields_that_a_preset_leaves_alone_may_be_set():
    assert Capacity(preset="megatron", minimum=4).minimum == 4


def stack_of(moe, **settings):
    return LanguageModel(
        parts={"moe": moe}, stack=StackLayout(unit=(("moe",),), repeats=1, **settings)
    )


def test_a_preset_with_a_queue_that_leaks_is_refused_like_the_queue():
    megatron = MoE(capacity=Capacity(preset="megatron"))
    with pytest.raises(ValueError, match=r"later tokens: .*ByProbability.*allow_lookahead=True"):
        stack_of(megatron)
    stack_of(megatron, allow_lookahead=True)
    stack_of(megatron, causal=False)
    vmoe = Capacity(preset="vmoe")  # choice-major with one choice
    stack_of(MoE(capacity=vmoe))
    with pytest.raises(ValueError, match=r"later tokens: .*num_selected_experts=2"):
        stack_of(MoE(num_selected_experts=2, capacity=vmoe))


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        (
            {"eval_num_selected_experts": 2, "capacity": Capacity(queue=ChoiceMajor())},
            r"the part 'moe' looks at them in evaluation: ",
        ),
        (
            {"capacity": Capacity(queue=BatchPrioritized())},
            r"must not depend on later tokens: .*in training and evaluation: .*BatchPrioritized",
        ),
    ],
)
def test_a_causal_stack_refuses(moe, message):
    with pytest.raises(ValueError, match=message):
        stack_of(MoE(**moe))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, r"num_experts lies in \[1, 4096\]: num_experts=0"),
        ({"num_experts": 4097}, r"num_experts lies in \[1, 4096\]"),
        ({"num_selected_experts": 0}, r"num_selected_experts lies in \[1, inf\): .*=0"),
        (
            {"num_experts": 2, "num_selected_experts": 3},
            r"lie in 1\.\.num_experts: num_selected_experts=3, num_experts=2",
        ),
        ({"run_experts": "sort"}, r"run_experts is one of"),
        ({"exchange": "all_to_all"}, r"exchange is one of \['auto', 'compiler', 'explicit'\]"),
        ({"exchange_chunks": 0}, r"exchange_chunks lies in \[1, inf\)"),
        (
            {"run_experts": "ragged", "exchange": "compiler"},
            r"'ragged' needs explicit collectives: exchange='compiler'\. Set",
        ),
        (
            {"num_selected_experts": 2, "eval_num_selected_experts": 1},
            r"lie in num_selected_experts\.\.num_experts: eval_.*=1, num_selected_experts=2",
        ),
        ({"eval_num_selected_experts": 9}, r"eval_num_selected_experts=9, .*num_experts=8"),
        ({"expert_dropout_rate": 1.0}, r"expert_dropout_rate lies in \[0, 1\)"),
        ({"expert_dim": 0}, r"expert_dim lies in \[1, inf\)"),
        ({"shared_expert_dim": -1}, r"shared_expert_dim lies in \[0, inf\)"),
        ({"group_size": -1}, r"group_size lies in \[0, inf\)"),
        ({"init_scale": -1.0}, r"init_scale lies in \(0, inf\)"),
        ({"shared_expert_gate": True}, r"shared_expert_gate needs shared_expert_dim > 0"),
        ({"router": TokenChoice(renormalize=True)}, r"always 1, .*gates renormalised: True"),
        (
            {"router": TokenChoice(score=SoftmaxOverSelected())},
            r"always 1, .*router\.score=SoftmaxOverSelected",
        ),
        (
            {"router": TokenChoice(selection=Sampled()), "bias": SignUpdate()},
            r"draws experts cannot be combined with.*selection=Sampled\(\), bias=SignUpdate.*Set",
        ),
        (
            {"losses": (Load(weight=0.1),)},
            r"a router that takes the K best of logits with noise at every step: ",
        ),
        *(
            (
                {
                    "losses": (Load(weight=0.1),),
                    "router": TokenChoice(noise=(Learned(),), **router_settings),
                }
                | moe_settings,
                rf"logits with noise at every step: .*{value}",
            )
            for moe_settings, router_settings, value in (
                ({"bias": SignUpdate(rate=0.2)}, {}, r"bias=SignUpdate\(rate=0\.2"),
                ({}, {"groups": ExpertGroups(4, 2)}, "num_groups=4"),
                ({}, {"selection": SampledRest()}, "selection=SampledRest"),
            )
        ),
        (
            {
                "losses": (Load(weight=0.1),),
                "router": TokenChoice(
                    noise=(Gaussian(stddev=0.0, anneal_from=0.5, anneal_steps=5),)
                ),
            },
            r"noise at every step: .*stddev=0\.0, anneal_from=0\.5",
        ),
        (
            {"losses": (TokenEntropy(weight=0.1),), "router": Hash()},
            r"token_entropy_loss needs a router whose probabilities learn: router=Hash",
        ),
        (
            {"bias": QuantileUpdate(rate=1.0), "num_selected_experts": 8},
            r"needs an expert that is not selected: num_selected_experts=8, 8 experts",
        ),
        (
            {"bias": QuantileUpdate(rate=1.0), "num_selected_experts": 2},
            r"too coarse for a softmax over many experts: .*score=Softmax\(\)",
        ),
        (
            {"losses": (BatchEntropy(weight=0.1, target=2.5),)},
            r"target=2\.5, 8 experts, log 2\.0794",
        ),
        (
            {"router": TokenChoice(groups=ExpertGroups(3, 1))},
            r"num_groups must divide num_experts: num_groups=3, num_experts=8",
        ),
        (
            {"num_selected_experts": 3, "router": TokenChoice(groups=ExpertGroups(4, 1))},
            r"hold at least num_selected_experts experts: 1 groups of 2 experts, .*=3",
        ),
        (
            {"router": TokenChoice(groups=ExpertGroups(8, 1, "top2_sum"))},
            r"'top2_sum' needs groups of two experts or more: groups of 1",
        ),
        (
            {"bias": SignUpdate(), "router": ExpertChoice()},
            r"needs a router that selects by scores",
        ),
    ],
)
def test_moe_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        MoE(**settings)


def test_a_gate_of_one_is_allowed_where_there_is_nothing_to_learn():
    # One expert needs no router. With two choices, the gates depend on the logits.
    MoE(num_experts=1, router=TokenChoice(renormalize=True))
    MoE(num_selected_experts=2, router=TokenChoice(renormalize=True))
    MoE(router=TokenChoice(score=Sigmoid()))


@refuses(
    [
        (LanguageModel, {"vocab_size": 0}, r"vocab_size lies in \[1, inf\)"),
        (LanguageModel, {"model_dim": 0}, r"model_dim lies in \[1, inf\)"),
        (LanguageModel, {"compute_dtype": "float16"}, r"compute_dtype is one of"),
        (LanguageModel, {"remat": "all"}, r"remat is one of"),
        (LanguageModel, {"norm_placement": "behind"}, r"norm_placement is one of"),
        (LanguageModel, {"dropout_rate": 1.0}, r"dropout_rate lies in \[0, 1\)"),
        (LanguageModel, {"residual_multiplier": 0.0}, r"residual_multiplier lies in \(0, inf\)"),
        (StackLayout, {"repeats": 0}, r"a unit needs repeats of at least 1"),
        (StackLayout, {"repeats": -1}, r"repeats lies in \[0, 10000\]"),
        (RMSNorm, {"epsilon": 0.0}, r"epsilon lies in \(0, inf\)"),
        (LayerNorm, {"epsilon": 0.0}, r"epsilon lies in \(0, inf\)"),
        (Mlp, {"dim": 0}, r"dim lies in \[1, inf\)"),
        (Mlp, {"init_scale": 0.0}, r"init_scale lies in \(0, inf\)"),
        (Attention, {"num_heads": 0}, r"num_heads lies in \[1, inf\)"),
        (Attention, {"head_dim": 0}, r"head_dim lies in \[1, inf\)"),
        (
            Attention,
            {"head_dim": 5},
            r"rotary positions need an even head_dim: head_dim=5\. Use an even number",
        ),
        (Attention, {"num_kv_heads": 3}, r"num_kv_heads must divide num_heads: .*num_kv_heads=3"),
        (Attention, {"num_kv_heads": 8}, r"num_kv_heads must divide num_heads"),
        (Attention, {"num_kv_heads": -1}, r"num_kv_heads lies in \[0, inf\)"),
        (Layer, {"placement": "behind"}, r"placement is one of"),
    ]
)
def test_model_refuses(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


def test_a_table_of_another_vocabulary_is_refused():
    hashed = MoE(router=Hash(by="table", table=(0, 1, 2)))
    layout = StackLayout(unit=(("moe",),), repeats=1)
    LanguageModel(vocab_size=3, parts={"moe": hashed}, stack=layout)
    with pytest.raises(ValueError, match=r"3 entries, vocab_size=4\. Make a new one"):
        LanguageModel(vocab_size=4, parts={"moe": hashed}, stack=layout)


@refuses(
    [
        (DataConfig, {"sequence_length": 1}, r"sequence_length lies in \[2, inf\)"),
        (DataConfig, {"heldout_fraction": 0.0}, r"heldout_fraction lies in \(0, 1\)"),
        (DataConfig, {"domain_weights": (("en", 0.0),)}, r"data\.domain_weights must be positive"),
        (OptimizerConfig, {"name": "sgd"}, r"name is one of"),
        (OptimizerConfig, {"schedule": "step"}, r"schedule is one of"),
        (OptimizerConfig, {"learning_rate": 0.0}, r"learning_rate lies in \(0, inf\)"),
        (OptimizerConfig, {"warmup_steps": -1}, r"warmup_steps lies in \[0, inf\)"),
        (OptimizerConfig, {"final_fraction": -1.0}, r"final_fraction lies in \[0, 1\]"),
        (OptimizerConfig, {"weight_decay": -1.0}, r"weight_decay lies in \[0, inf\)"),
        (OptimizerConfig, {"clip_norm": -1.0}, r"clip_norm lies in \[0, inf\)"),
        (OptimizerConfig, {"schedule": "rsqrt", "warmup_steps": 0}, r"needs a warm-up"),
        (OptimizerConfig, {"name": "lion", "epsilon": 0.1}, r"epsilon is a setting of .* adamw"),
        (OptimizerConfig, {"momentum": 0.9}, r"momentum is a setting of optimizer\.name muon"),
        (OptimizerConfig, {"decay_fraction": 0.1}, r"a setting of optimizer\.schedule wsd: sch"),
        (OptimizerConfig, {"name": "schedule_free"}, r"Set optimizer\.schedule='constant'"),
        (
            OptimizerConfig,
            {"name": "schedule_free", "schedule": "constant", "ema_decay": 0.9},
            r"needs b1 above 0 for its .*, and no second average: b1=0\.9, ema_decay=0\.9",
        ),
        (DataConfig, {"domain_weights": (("en", 1.0), ("en", 2.0))}, r"must name each domain once"),
        (TrainingConfig, {"profile_steps": (3,)}, r"the first and the last step to trace"),
        (TrainingConfig, {"profile_steps": (3, 2)}, r"the first and the last step to trace"),
        (TrainingConfig, {"profile_steps": (9, 1001)}, r"profile_steps=.*, num_steps=1000"),
        *(
            (TrainingConfig, {name: 0}, rf"{name} lies in \[1, inf\)")
            for name in (
                "num_steps", "batch_size", "num_microbatches", "log_every",
                "checkpoint_every", "keep_checkpoints",
            )
        ),
        (TrainingConfig, {"num_microbatches": 3}, r"num_microbatches must divide training"),
        (TrainingConfig, {"keep_every": 300}, r"keep_every must be a multiple of .*check.*=200"),
        (ExperimentConfig, {"seed": -1}, r"seed lies in \[0, "),
    ]
)  # fmt: skip
def test_run_refuses(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(**settings)


def test_a_warm_up_ends_before_the_rate_falls_with_the_length_of_the_run():
    with pytest.raises(
        ValueError,
        match=r"config: .*schedule='cosine' must warm up within the run: warmup_steps=1001",
    ):
        from_config_dict({"optimizer": {"warmup_steps": 1001}})
    for schedule in ("constant", "rsqrt"):  # whose first steps are those of a longer run
        from_config_dict({"optimizer": {"warmup_steps": 1001, "schedule": schedule}})
    with pytest.raises(ValueError, match=r"Set optimizer\.warmup_steps to at most 50\."):
        from_config_dict({"training": {"num_steps": 50}})


def test_a_mesh_is_read_of_a_flag():
    mesh = parse_mesh("expert=2,experts_span_slices=1", "--mesh")
    assert mesh == MeshConfig(data=1, expert=2, experts_span_slices=True)
    assert not parse_mesh("experts_span_slices=False", "--mesh").experts_span_slices
    for text, message in (
        ("data=2,data=4", "'data' comes twice"),
        (
            "experts_span_slices=2",
            "--mesh must be NAME=SIZE,NAME=SIZE: got 'experts_span_slices=2'",
        ),
        ("data=two", "got 'data=two'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_mesh(text, "--mesh")


def one_device(config):
    return check_run(config, abstract_mesh(MeshConfig(data=1)))


@pytest.mark.parametrize(
    ("group_size", "fits"),
    [
        (0, True), (256, True), (64, True),  # a sequence, or a divisor of its length
        (512, True), (2048, True),  # whole sequences: two, or all eight of the microbatch
        (96, False), (384, False),  # neither divides 256 nor is a multiple of it
        (768, False),  # three sequences do not divide eight
        (4096, False),  # more tokens than a microbatch has
    ],
)  # fmt: skip
def test_groups_fit_the_tokens_of_a_microbatch(group_size, fits):
    config = from_config_dict(
        model({"group_size": group_size})
        | {
            "data": {"sequence_length": 256},
            "training": {"batch_size": 16, "num_microbatches": 2},
        }
    )
    if fits:
        one_device(config)
        return
    message = rf"group_size={group_size}, batch of 8 sequences of 256 tokens"
    with pytest.raises(ValueError, match=message):
        one_device(config)


@pytest.mark.parametrize("group_size", [96, 512])
def test_groups_of_soft_moe_fit_in_one_sequence(group_size):
    """Groups of two sequences could train but not generate."""

    def config(group_size):
        moe = {"router": "soft", "num_selected_experts": 2, "group_size": group_size}
        return from_config_dict(model(moe, stack={"allow_lookahead": True}))

    message = rf"group_size={group_size}, sequence_length=256\. Set group_size to 256, or"
    with pytest.raises(ValueError, match=message):
        one_device(config(group_size))
    one_device(config(128))
    assert config(128).model.part["moe"].router == Soft()


@pytest.mark.parametrize("way", ["auto", "einsum", "gather"])
@pytest.mark.parametrize("exchange", ["auto", "compiler", "explicit"])
def test_slots_travel_by_either_exchange(way, exchange):
    MoE(run_experts=way, exchange=exchange, exchange_chunks=4)


def test_rows_travel_by_explicit_collectives():
    MoE(run_experts="ragged", exchange="explicit")
    MoE(run_experts="ragged")


# Sizes without common factors, so that a message shows which one fails to divide.
SPLIT = {
    "attention": Attention(num_heads=42, num_kv_heads=21, head_dim=2),
    "mlp": Mlp(dim=66),
    "moe": MoE(num_experts=8, expert_dim=12),
}
DENSE, ROUTED = ("attention", "mlp"), ("attention", "moe")


def split(mesh, mlp=None, moe=None, layers=(DENSE, ROUTED)):
    """A checked experiment on a mesh, with these changed settings of its parts."""
    changes = {"mlp": mlp or {}, "moe": moe or {}}
    used = {name for layer in layers for name in layer}
    parts = {
        name: dataclasses.replace(part, **changes.get(name, {}))
        for name, part in SPLIT.items()
        if name in used
    }
    config = ExperimentConfig(
        model=LanguageModel(model_dim=10, parts=parts, stack=StackLayout.of(layers)),
        data=DataConfig(sequence_length=8),
        training=TrainingConfig(batch_size=60, num_microbatches=2),
        mesh=MeshConfig(**{"data": 1} | mesh),
    )
    check_run(config, abstract_mesh(config.mesh))
    return config


@pytest.mark.parametrize(
    "mesh",
    [
        {},
        {"data": 30},
        {"slices": 3, "fsdp": 5, "expert": 2},
        {"tensor": 3},
        {"slices": 2, "expert": 1, "experts_span_slices": True},
        {"expert": 2, "tensor": 3},
    ],
)
def test_a_mesh_that_divides_everything_is_accepted(mesh):
    config = split(mesh)
    assert config.on_devices(config.mesh.num_devices) == config


UNEVEN = "The mesh must split every parameter evenly: dim "


@pytest.mark.parametrize(
    ("mesh", "mlp", "moe", "message"),
    [
        (
            {"data": 4},
            {},
            {},
            r"over slices \* data \* fsdp \* expert devices, .*: 30 sequences \(batch_size=60, "
            r"num_microbatches=2\), over 4 devices\. Use a multiple of 4 sequences",
        ),
        ({"data": 2, "fsdp": 2, "expert": 2}, {}, {}, r"over 8 devices\. Use a multiple of 8 "),
        ({"slices": 2, "data": 30}, {}, {}, r"over 60 devices"),
        # Groups of two sequences stay whole: the mesh splits 15 groups, not 30 sequences.
        ({"data": 30}, {}, {"group_size": 16}, r"2 per group, over 30 .*multiple of 60 sequences"),
        ({"fsdp": 3}, {}, {}, rf"{UNEVEN}'model' of .* is 10, over 3 devices"),
        ({"tensor": 5}, {}, {}, rf"{UNEVEN}'vocab' of embedding \(384, 10\) is 384, over 5"),
        (
            {"tensor": 2},
            {},
            {},
            r"divide the heads \(num_kv_heads\): tensor=2, 21 heads\. Change",
        ),
        ({"tensor": 4}, {}, {}, rf"{UNEVEN}'heads' of wk \(10, 42\) is 42, over 4"),
        ({"tensor": 7}, {}, {}, rf"{UNEVEN}'vocab' of embedding .* is 384, over 7"),
        ({"tensor": 3}, {"dim": 64}, {}, rf"{UNEVEN}'hidden' of wi \(10, 64\) is 64, over 3"),
        (
            {"tensor": 3},
            {},
            {"expert_dim": 16},
            rf"{UNEVEN}'hidden' of experts/wi \(8, 10, 16\) is 16, over 3",
        ),
        (
            {"expert": 3},
            {},
            {},
            rf"{UNEVEN}'expert' of experts/wi \(8, 10, 12\) is 8, over 3 "
            r"devices\. Set config\.mesh\.expert so that they are 1, 2, or change the size",
        ),
        (
            {"slices": 3, "expert": 2, "experts_span_slices": True},
            {},
            {},
            rf"{UNEVEN}'expert' of .* is 8, over 6 devices",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_run_is_refused(mesh, mlp, moe, message):
    with pytest.raises(ValueError, match=message):
        split(mesh, mlp, moe)


def test_only_what_the_model_has_is_divided():
    split({"tensor": 3}, layers=(ROUTED, ROUTED))
    split({"expert": 3}, layers=(DENSE, DENSE))


def test_a_mesh_is_filled_before_it_is_checked():
    config = dataclasses.replace(split({}), mesh=MeshConfig(data=-1))
    assert config.on_devices(15).mesh == MeshConfig(data=15)
    with pytest.raises(ValueError, match=r"30 sequences .* over 8 devices"):
        check_run(config, make_mesh(config.on_devices(8).mesh))
    with pytest.raises(ValueError, match=r"need 30, there are 8"):
        split({"data": 30}).on_devices(8)


def test_difference_names_each_setting_that_changed():
    old, new = to_dict(ExperimentConfig()), to_dict(ExperimentConfig())
    assert difference(old, new) == []
    new["seed"] = 1
    new["model"]["parts"]["moe"]["capacity"]["train_factor"] = 2.0
    new["model"]["parts"]["moe"]["activation"] = "swiglu"
    new["data"]["domain_weights"] = (("en", 1.0),)
    assert difference(old, new) == [
        "config.data.domain_weights: () -> (('en', 1.0),)",
        "config.model.parts.moe.activation: 'relu' -> 'swiglu'",
        "config.model.parts.moe.capacity.train_factor: 1.25 -> 2.0",
        "config.seed: 0 -> 1",
    ]


def test_difference_shows_fields_that_only_one_side_has():
    assert difference({"a": 1}, {"b": {"c": 2}}) == [
        "config.a: 1 -> None",
        "config.b: None -> {'c': 2}",
    ]


@dataclasses.dataclass(frozen=True)
class DoublesGates(TokenChoice):
    """A router from outside the library."""

    factor: float = 2.0


FOREIGN = "tests.test_config:DoublesGates"


def test_a_config_is_written_and_read_again():
    config = from_config_dict(changed())
    written = json.loads(json.dumps(write_config(config)))
    assert written["format"] == 5 and written["sources"] == {}
    assert read_config(written, ExperimentConfig) == config


def test_a_config_of_the_layout_before_parts_is_refused():
    with pytest.raises(
        ValueError, match=r"formats 2 to 5 can be read: this one is of format 1\. Use the"
    ):
        read_config({"name": "old", "model": {"num_layers": 4}}, ExperimentConfig)


def test_a_foreign_kind_is_named_by_its_import_path_and_read_with_trust_only():
    config = from_config_dict(model({"router": {"kind": FOREIGN, "factor": 3}}))
    router = config.model.part["moe"].router
    assert kind_of(router) == FOREIGN and router.factor == 3.0
    written = json.loads(json.dumps(write_config(config)))
    assert list(written["sources"]) == [FOREIGN] and len(written["sources"][FOREIGN]) == 64
    assert read_config(written, ExperimentConfig, trust=True) == config
    message = r"config\.model\.parts\.moe\.router is of a kind outside this library.*Pass --trust"
    with pytest.raises(ValueError, match=message):
        read_config(written, ExperimentConfig)


def test_base_config_is_every_default():
    assert from_config_dict(base.get_config()) == ExperimentConfig()


def test_smoke_preset_makes_a_small_valid_config():
    small = from_config_dict(base.get_config("smoke"))
    assert small.name == "experiment_smoke"
    assert small.training.num_steps == 20 and small.model.model_dim == 64


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"presets of this config are \['smoke'\]: .*'smok'"):
        base.get_config("smok")


def test_a_config_dict_is_read_and_not_changed():
    config = ml_collections.ConfigDict({"seed": 5})
    assert from_config_dict(config).seed == 5
    assert config.to_dict() == {"seed": 5}
