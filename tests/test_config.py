"""Settings: round trips, and every way to be refused."""

import dataclasses

import ml_collections
import pytest

from configs import base
from moe_jax.config import (
    CAPACITY_PRESETS,
    BalanceConfig,
    CapacityConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    config_dict,
    difference,
    from_config_dict,
)


def changed():
    """A config with a value different from its default in every section."""
    config = config_dict(ExperimentConfig())
    config.name, config.seed = "other", 3
    config.model.moe.num_selected_experts = 2
    config.model.moe.router.renormalize = True
    config.model.moe.balance.load_balance_convention = "switch"
    config.model.moe.capacity.preset = "maxtext"
    config.model.moe.layers = (1, 3)
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
    assert config.model.moe.layers == (1, 3)
    assert config.data.domain_weights == (("en", 0.5), ("code", 2.0))
    assert from_config_dict(config_dict(config)) == config
    assert from_config_dict(dataclasses.asdict(config)) == config


def test_configs_are_hashable_so_that_jit_can_tell_them_apart():
    assert hash(from_config_dict(changed())) == hash(from_config_dict(changed()))
    assert len({from_config_dict(changed()), ExperimentConfig()}) == 2


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ExperimentConfig().model.num_layers = 3


def test_a_config_dict_is_locked():
    with pytest.raises(AttributeError, match="num_expert"):
        config_dict(ExperimentConfig()).model.moe.num_expert = 4


def test_absent_fields_keep_their_defaults():
    config = from_config_dict({"model": {"moe": {"num_experts": 4}}})
    assert config.model.moe == MoEConfig(num_experts=4)
    assert config.training == ExperimentConfig().training


def test_integers_may_stand_for_floats_and_lists_for_tuples():
    config = from_config_dict(
        {
            "optimizer": {"learning_rate": 1},
            "model": {"moe": {"layers": [1, 3]}},
            "data": {"domain_weights": [["en", 1]]},
        }
    )
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.model.moe.layers == (1, 3)
    assert config.data.domain_weights == (("en", 1.0),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sed": 1}, r"config has the fields .*: config\.sed\. Did you mean 'seed'\?"),
        (
            {"model": {"moe": {"num_expert": 4}}},
            r"config\.model\.moe\.num_expert\. Did you mean 'num_experts'\?",
        ),
        ({"zzz": 1}, r"config\.zzz\. Remove the field\."),
        ({"seed": "1"}, r"config\.seed is of type int: '1' of type str\. Pass a int\."),
        ({"seed": 1.0}, r"config\.seed is of type int: 1\.0 of type float"),
        ({"seed": True}, r"config\.seed is of type int: True of type bool"),
        ({"name": 3}, r"config\.name is of type str: 3 of type int"),
        ({"optimizer": {"b1": True}}, r"optimizer\.b1 is of type float: True of type bool"),
        ({"optimizer": {"b1": "x"}}, r"optimizer\.b1 is of type float: 'x' of type str"),
        (
            {"model": {"moe": {"router": {"renormalize": 1}}}},
            r"router\.renormalize is of type bool: 1 of type int",
        ),
        ({"model": {"moe": {"layers": 3}}}, r"moe\.layers is a tuple: 3\. Pass a tuple"),
        ({"model": {"moe": {"layers": [1, "3"]}}}, r"moe\.layers\[1\] is of type int: '3'"),
        ({"data": {"domain_weights": [["en"]]}}, r"domain_weights\[0\] has 2 items: \['en'\]"),
        ({"model": 3}, r"config\.model is a section of settings: 3\. Set its fields"),
    ],
)
def test_a_wrong_field_or_type_is_refused_by_its_path(settings, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "tanh"}, r"router\.score is one of \['sigmoid', 'softmax'\]: .*'tanh'"),
        ({"group_score": "sum"}, r"router\.group_score is one of .*'sum'"),
        ({"dtype": "float16"}, r"router\.dtype is one of \['bfloat16', 'float32'\]"),
        ({"input_jitter": 1.0}, r"router\.input_jitter lies in \[0, 1\): .*=1\.0"),
        ({"input_jitter": -0.1}, r"router\.input_jitter lies in \[0, 1\)"),
        ({"logit_noise_std": -1.0}, r"router\.logit_noise_std is at least 0"),
        ({"num_selected_groups": 0}, r"router\.num_selected_groups is at least 1"),
        ({"temperature": 0.0}, r"router\.temperature is positive"),
        ({"cosine_dim": -1}, r"router\.cosine_dim is at least 0"),
        ({"anneal_steps": 5}, r"with router\.anneal_steps > 0: anneal_from=\(\), anneal_steps=5"),
        ({"anneal_from": (("temperature", 2.0),)}, r"names each field once, .*anneal_steps=0"),
        ({"anneal_from": (("top_p", 0.5),), "anneal_steps": 5}, r"anneal_from is one of .*'top_p'"),
        (
            {"anneal_from": (("temperature", 0.0),), "anneal_steps": 5},
            r"router\.temperature in router\.anneal_from is positive",
        ),
        (
            {"anneal_from": (("input_jitter", 1.0),), "anneal_steps": 5},
            r"router\.input_jitter in router\.anneal_from lies in \[0, 1\)",
        ),
        (
            {"anneal_from": (("temperature", 2.0),), "anneal_steps": 5, "cosine_dim": 4},
            r"learns its temperature.*cosine_dim=4",
        ),
        ({"top_p": 0.0}, r"router\.top_p lies in \(0, 1\]: router\.top_p=0\.0\. Set it to 1"),
        ({"top_p": 1.5}, r"router\.top_p lies in \(0, 1\]"),
        ({"selection": "worst"}, r"router\.selection is one of \['best', 'sampled', "),
        ({"choice_policy": "most"}, r"router\.choice_policy is one of \['all', 'none', 'random'"),
        ({"eval_choice_policy": "random"}, r"\.eval_choice_policy is one of .*='random'\. Use"),
        ({"choice_threshold": 0.0}, r"router\.choice_threshold is positive"),
        ({"choice_threshold": 0.5}, r"choice_threshold is of .*=0\.5, choice_policy='all'"),
        ({"group_score": "top2_sum"}, r"group_score is of .*='top2_sum', .*_expert_groups=1"),
        ({"max_experts": 2}, r"'token_choice' does not use router\.max_experts: max_experts=2\. D"),
        (
            {"num_expert_groups": 2, "num_selected_groups": 3},
            r"num_selected_groups is at most router\.num_expert_groups: 3 of 2",
        ),
        ({"scaling_factor": 0.0}, r"router\.scaling_factor is positive and finite: .*=0\.0"),
    ],
)
def test_router_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_balance_convention": "gshard"}, r"balance\.load_balance_convention is one of"),
        ({"load_balance_scope": "layer"}, r"balance\.load_balance_scope is one of"),
        ({"load_balance_weight": -1.0}, r"balance\.load_balance_weight is at least 0"),
        ({"importance_loss_weight": -1.0}, r"balance\.importance_loss_weight is at least 0"),
        ({"load_loss_weight": -1.0}, r"balance\.load_loss_weight is at least 0"),
        ({"router_z_loss_weight": -1.0}, r"balance\.router_z_loss_weight is at least 0"),
        ({"bias_update_rate": -1.0}, r"balance\.bias_update_rate is at least 0"),
        ({"bias_update": "median"}, r"balance\.bias_update is one of"),
        ({"bias_update": "error"}, r"needs a selection bias that moves: bias_update='error'"),
        ({"bias_frozen_fraction": 0.1}, r"moves: bias_frozen_fraction=0\.1, bias_update_rate=0"),
        ({"bias_update_rate": 1.0, "bias_frozen_fraction": 1.0}, r"lies in \[0, 1\)"),
        ({"bias_update_rate": 1.0, "bias_update_schedule": "rsqrt"}, r"schedule is one of"),
        (
            {"bias_update_rate": 2.0, "bias_update": "quantile"},
            r"of the way to the quantile: bias_update_rate=2\.0",
        ),
        (
            {"bias_update_rate": 1.0, "bias_update": "quantile", "bias_update_centered": True},
            r"centres its biases by itself",
        ),
        ({"token_entropy_weight": -1.0}, r"balance\.token_entropy_weight is at least 0"),
        ({"batch_entropy_target": 1.0}, r"batch_entropy_target=1\.0, batch_entropy_weight=0"),
        (
            {"load_balance_convention": "huggingface", "load_balance_scope": "sequence"},
            r"its scope is 'microbatch' or 'global': load_balance_scope='sequence'",
        ),
    ],
)
def test_balance_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        BalanceConfig(**settings)


QUANTILE = BalanceConfig(bias_update="quantile", bias_update_rate=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "gshard"}, r"capacity\.preset is one of \['', 'axlearn'"),
        ({"per": "expert"}, r"capacity\.per is one of"),
        ({"rounding": "up"}, r"capacity\.rounding is one of"),
        ({"queue_order": "fifo"}, r"capacity\.queue_order is one of"),
        ({"multiple_of": 0}, r"capacity\.multiple_of is at least 1"),
        ({"minimum": 0}, r"capacity\.minimum is at least 1"),
        ({"train_factor": -1.0}, r"capacity\.train_factor is at least 0"),
        ({"train_factor": float("inf")}, r"train_factor is at least 0 and finite: .*=inf"),
        ({"eval_factor": -1.0}, r"capacity\.eval_factor is at least 0"),
        (
            {"queue_order": "random"},
            r"draws from a key, which an evaluation has not: capacity\.eval_factor=2\.0",
        ),
    ],
)
def test_capacity_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        CapacityConfig(**settings)


@pytest.mark.parametrize("preset", CAPACITY_PRESETS)
def test_a_capacity_preset_fills_in_its_fields_and_leaves_the_rest(preset):
    config = CapacityConfig(preset=preset, train_factor=1.5)
    for field in dataclasses.fields(config):
        default = {"preset": preset, "train_factor": 1.5}.get(field.name, field.default)
        assert getattr(config, field.name) == CAPACITY_PRESETS[preset].get(field.name, default)


def test_a_capacity_preset_may_be_repeated_but_not_contradicted():
    CapacityConfig(preset="vmoe", multiple_of=4, queue_order="choice_major")
    with pytest.raises(ValueError, match=r"preset='vmoe' sets capacity\.multiple_of=4: .*=8 as"):
        CapacityConfig(preset="vmoe", multiple_of=8)
    with pytest.raises(ValueError, match=r"preset='vmoe' sets .*queue_order='choice_major'"):
        CapacityConfig(preset="vmoe", queue_order="probability")


def test_fields_that_a_preset_leaves_alone_may_be_set():
    assert CapacityConfig(preset="megatron", minimum=4).minimum == 4


def test_a_preset_with_a_queue_that_leaks_is_refused_like_the_queue():
    with pytest.raises(ValueError, match=r"queue_order='probability'.*allow_noncausal_routing"):
        MoEConfig(capacity=CapacityConfig(preset="megatron"))
    MoEConfig(capacity=CapacityConfig(preset="megatron"), allow_noncausal_routing=True)
    MoEConfig(capacity=CapacityConfig(preset="vmoe"))  # choice-major with one choice
    with pytest.raises(ValueError, match=r"'choice_major' with num_selected_experts=2"):
        MoEConfig(num_selected_experts=2, capacity=CapacityConfig(preset="vmoe"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, r"moe\.num_experts lies in 1\.\.512: .*=0\. .*layer_period=0"),
        ({"num_experts": 513}, r"moe\.num_experts lies in 1\.\.512"),
        ({"num_selected_experts": 0}, r"num_selected_experts lies in 1\.\.num_experts: .*=0"),
        (
            {"num_experts": 2, "num_selected_experts": 3},
            r"lies in 1\.\.num_experts: num_selected_experts=3, num_experts=2",
        ),
        ({"activation": "silu"}, r"moe\.activation is one of"),
        ({"dispatch": "sort"}, r"moe\.dispatch is one of"),
        ({"exchange": "all_to_all"}, r"moe\.exchange is one of \['auto', 'compiler', 'explicit'\]"),
        ({"exchange_chunks": 0}, r"moe\.exchange_chunks is at least 1"),
        (
            {"dispatch": "ragged", "exchange": "compiler"},
            r"'ragged' exchanges rows by explicit collectives: moe\.exchange='compiler'\. Set",
        ),
        (
            {"num_selected_experts": 2, "eval_num_selected_experts": 1},
            r"lies in num_selected_experts\.\.num_experts: eval_.*=1, num_selected_experts=2",
        ),
        ({"eval_num_selected_experts": 9}, r"eval_num_selected_experts=9, .*num_experts=8"),
        (
            {
                "eval_num_selected_experts": 2,
                "capacity": CapacityConfig(queue_order="choice_major"),
            },
            r"with moe\.eval_num_selected_experts=2 evaluation is refused: .*later tokens",
        ),
        ({"expert_dropout_rate": 1.0}, r"moe\.expert_dropout_rate lies in \[0, 1\)"),
        ({"expert_dim": 0}, r"moe\.expert_dim is at least 1"),
        ({"num_shared_experts": -1}, r"moe\.num_shared_experts is at least 0"),
        ({"group_size": -1}, r"moe\.group_size is at least 0"),
        ({"layer_period": -1}, r"moe\.layer_period is at least 0"),
        ({"layer_offset": -1}, r"moe\.layer_offset is at least 0"),
        ({"layer_offset": 2, "layer_period": 2}, r"layer_offset is a layer of the period: .*=2,"),
        ({"init_scale": -1.0}, r"moe\.init_scale is positive and finite"),
        ({"num_dense_first": -1}, r"moe\.num_dense_first is at least 0"),
        ({"shared_expert_gate": True}, r"shared_expert_gate needs moe\.num_shared_experts > 0"),
        ({"router": RouterConfig(renormalize=True)}, r"always 1 .*router\.renormalize=True"),
        ({"router": RouterConfig(score_before_topk=False)}, r"always 1 .*before_topk=False"),
        (
            {
                "router": RouterConfig(selection="sampled"),
                "balance": BalanceConfig(bias_update_rate=0.1),
            },
            r"draws experts by their probability.*selection='sampled', .*_rate=0\.1\. Set",
        ),
        (
            {"balance": BalanceConfig(load_loss_weight=0.1)},
            r"load_loss_weight needs noise on the logits.*load_loss_weight=0\.1, .*std=0\. Set",
        ),
        *(
            (
                {
                    "balance": BalanceConfig(load_loss_weight=0.1, **balance),
                    "router": RouterConfig(learned_noise=True, **router),
                },
                rf"among the best of all by its noisy logit.*load_loss_weight=0\.1, .*{value}",
            )
            for balance, router, value in (
                ({"bias_update_rate": 0.2}, {}, r"bias_update_rate=0\.2"),
                ({}, {"num_expert_groups": 4, "num_selected_groups": 2}, "_groups=2 of 4"),
                ({}, {"selection": "sampled_rest"}, "selection='sampled_rest'"),
            )
        ),
        (
            {
                "balance": BalanceConfig(load_loss_weight=0.1),
                "router": RouterConfig(
                    logit_noise_std=0.5, anneal_from=(("logit_noise_std", 0.0),), anneal_steps=5
                ),
            },
            r"noise on the logits at every step.*least router\.logit_noise_std=0\. Set",
        ),
        (
            {
                "balance": BalanceConfig(token_entropy_weight=0.1),
                "router": RouterConfig(kind="hash"),
            },
            r"probabilities learn: router\.kind='hash', balance\.token_entropy_weight=0\.1",
        ),
        (
            {"balance": QUANTILE, "num_selected_experts": 8},
            r"best expert that is not selected: num_selected_experts=8, 8 experts",
        ),
        (
            {
                "balance": QUANTILE,
                "num_selected_experts": 2,
            },
            r"too coarse for a softmax over many: router\.score='softmax', .*=1 of 1",
        ),
        (
            {"balance": BalanceConfig(batch_entropy_weight=0.1, batch_entropy_target=2.5)},
            r"batch_entropy_target=2\.5, 8 experts, log 2\.0794",
        ),
        (
            {"router": RouterConfig(num_expert_groups=3)},
            r"num_expert_groups divides moe\.num_experts: num_expert_groups=3, num_experts=8",
        ),
        (
            {"num_selected_experts": 3, "router": RouterConfig(num_expert_groups=4)},
            r"hold at least moe\.num_selected_experts experts: 1 groups of 2 experts, .*=3",
        ),
        (
            {"router": RouterConfig(num_expert_groups=8, group_score="top2_sum")},
            r"'top2_sum' needs groups of two experts or more: groups of 1",
        ),
        (
            {"capacity": CapacityConfig(queue_order="batch_prioritized")},
            r"must not depend on later tokens: .*'batch_prioritized' with num_selected_experts=1",
        ),
    ],
)
def test_moe_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**settings)


def test_a_gate_of_one_is_allowed_where_there_is_nothing_to_learn():
    # One expert has no router; two choices make the gates depend on the logits.
    MoEConfig(num_experts=1, router=RouterConfig(renormalize=True))
    MoEConfig(num_selected_experts=2, router=RouterConfig(renormalize=True))
    MoEConfig(router=RouterConfig(score="sigmoid", score_before_topk=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, r"model\.vocab_size is at least 1"),
        ({"num_layers": 0}, r"model\.num_layers is at least 1"),
        ({"norm_epsilon": 0.0}, r"model\.norm_epsilon is positive"),
        ({"moe": MoEConfig(num_dense_first=4)}, r"some layer is MoE unless moe\.layer_period is 0"),
        ({"model_dim": 0}, r"model\.model_dim is at least 1"),
        ({"num_heads": 0}, r"model\.num_heads is at least 1"),
        ({"ffn_dim": 0}, r"model\.ffn_dim is at least 1"),
        ({"head_dim": 0}, r"model\.head_dim is at least 2"),
        ({"head_dim": 5}, r"rotary positions need an even model\.head_dim: head_dim=5"),
        ({"activation": "tanh"}, r"model\.activation is one of"),
        ({"norm": "batchnorm"}, r"model\.norm is one of"),
        ({"compute_dtype": "float16"}, r"model\.compute_dtype is one of"),
        ({"remat": "all"}, r"model\.remat is one of"),
        ({"dropout_rate": 1.0}, r"model\.dropout_rate lies in \[0, 1\)"),
        ({"num_kv_heads": 3}, r"num_kv_heads divides model\.num_heads: .*num_kv_heads=3"),
        ({"num_kv_heads": 8}, r"num_kv_heads divides model\.num_heads"),
        ({"num_kv_heads": -1}, r"num_kv_heads divides model\.num_heads"),
        ({"moe": MoEConfig(layers=(4,))}, r"moe\.layers=\(4,\), num_layers=4"),
        ({"moe": MoEConfig(layers=(2, 1))}, r"moe\.layers are increasing layer indices"),
        ({"moe": MoEConfig(layers=(1, 1))}, r"moe\.layers are increasing layer indices"),
    ],
)
def test_model_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("data", {"objective": "mlm"}, r"data\.objective is one of"),
        ("data", {"sequence_length": 1}, r"data\.sequence_length is at least 2"),
        ("data", {"corpus": "c4"}, r"data\.corpus is 'embedded', .*data\.corpus='c4'"),
        ("data", {"corpus": "jsonl"}, r"data\.corpus is 'embedded'"),
        ("data", {"tokenizer": "bpe"}, r"data\.tokenizer is 'byte' or"),
        ("data", {"heldout_fraction": 0.0}, r"data\.heldout_fraction lies in \(0, 1\)"),
        ("data", {"domain_weights": (("en", 0.0),)}, r"data\.domain_weights are positive"),
        ("optimizer", {"name": "sgd"}, r"optimizer\.name is one of"),
        ("optimizer", {"schedule": "step"}, r"optimizer\.schedule is one of"),
        ("optimizer", {"learning_rate": 0.0}, r"optimizer\.learning_rate is positive"),
        ("optimizer", {"warmup_steps": -1}, r"optimizer\.warmup_steps is at least 0"),
        ("optimizer", {"final_fraction": -1.0}, r"optimizer\.final_fraction is at least 0"),
        ("optimizer", {"weight_decay": -1.0}, r"optimizer\.weight_decay is at least 0"),
        ("optimizer", {"clip_norm": -1.0}, r"optimizer\.clip_norm is at least 0"),
        ("optimizer", {"schedule": "rsqrt", "warmup_steps": 0}, r"decays from the end of the"),
        ("optimizer", {"warmup_steps": 1001}, r"warmup_steps is at most training\.num_steps"),
        *(
            ("training", {name: 0}, rf"training\.{name} is at least 1")
            for name in (
                "num_steps", "batch_size", "num_microbatches", "log_every", "evaluate_every",
                "checkpoint_every", "keep_checkpoints",
            )
        ),
        ("training", {"num_microbatches": 3}, r"num_microbatches divides training\.batch_size"),
    ],
)  # fmt: skip
def test_run_refuses(section, settings, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict({section: settings})


@pytest.mark.parametrize(
    ("group_size", "fits"),
    [
        (0, True), (256, True), (64, True),  # a sequence, or a divisor of it
        (512, True), (2048, True),  # whole sequences: two, or all eight of the microbatch
        (96, False), (384, False),  # neither divides 256 nor is a multiple of it
        (768, False),  # three sequences do not divide eight
        (4096, False),  # more than a microbatch has
    ],
)  # fmt: skip
def test_groups_fit_the_tokens_of_a_microbatch(group_size, fits):
    settings = {
        "model": {"moe": {"group_size": group_size}},
        "data": {"sequence_length": 256},
        "training": {"batch_size": 16, "num_microbatches": 2},
    }
    if fits:
        assert from_config_dict(settings).model.moe.group_size == group_size
        return
    message = rf"group_size={group_size}, sequence_length=256, .*=2048 \(8 sequences\)"
    with pytest.raises(ValueError, match=message):
        from_config_dict(settings)


@pytest.mark.parametrize("group_size", [96, 512])
def test_groups_of_soft_moe_fit_in_one_sequence(group_size):
    """Two whole sequences would train, and then not generate."""
    moe = {"allow_noncausal_routing": True, "router": {"kind": "soft"}, "num_selected_experts": 2}
    message = rf"group_size={group_size}, sequence_length=256\. Set moe\.group_size to 256, or"
    with pytest.raises(ValueError, match=message):
        from_config_dict({"model": {"moe": moe | {"group_size": group_size}}})
    assert from_config_dict({"model": {"moe": moe | {"group_size": 128}}})


@pytest.mark.parametrize("dispatch", ["auto", "einsum", "gather"])
@pytest.mark.parametrize("exchange", ["auto", "compiler", "explicit"])
def test_slots_travel_by_either_exchange(dispatch, exchange):
    MoEConfig(dispatch=dispatch, exchange=exchange, exchange_chunks=4)


def test_rows_travel_by_explicit_collectives():
    MoEConfig(dispatch="ragged", exchange="explicit")
    MoEConfig(dispatch="ragged")


# Sizes that have nothing in common, so that each can be told from what divides it.
SPLIT = {
    "model": {
        "model_dim": 10, "num_heads": 42, "num_kv_heads": 21, "vocab_size": 384, "ffn_dim": 66,
        "moe": {"num_experts": 8, "expert_dim": 12, "num_dense_first": 1},
    },
    "data": {"sequence_length": 8},
    "training": {"batch_size": 60, "num_microbatches": 2},
}  # fmt: skip


def split(mesh, model=None, moe=None):
    """An experiment on a mesh, with these settings of the model changed."""
    moe = SPLIT["model"]["moe"] | (moe or {})
    return from_config_dict(
        SPLIT | {"mesh": {"data": 1} | mesh, "model": SPLIT["model"] | (model or {}) | {"moe": moe}}
    )


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


@pytest.mark.parametrize(
    ("mesh", "model", "moe", "message"),
    [
        (
            {"data": 4},
            {},
            {},
            r"over slices \* data \* fsdp \* expert devices, .*: 30 sequences \(batch_size=60, "
            r"num_microbatches=2\), 1 a group, over 4 devices\. Use a multiple of 4 sequences",
        ),
        ({"data": 2, "fsdp": 2, "expert": 2}, {}, {}, r"over 8 devices\. Use a multiple of 8 "),
        ({"slices": 2, "data": 30}, {}, {}, r"over 60 devices"),
        # Groups of two sequences are not cut: 15 of them are split, not 30 sequences.
        ({"data": 30}, {}, {"group_size": 16}, r"2 a group, over 30 .*multiple of 60 sequences"),
        ({"fsdp": 3}, {}, {}, r"mesh fsdp divides model\.model_dim: fsdp=3, model\.model_dim=10"),
        ({"tensor": 5}, {}, {}, r"mesh tensor divides model\.num_heads: tensor=5, .*=42\. Change"),
        (
            {"tensor": 2},
            {},
            {},
            r"divides key and value heads \(model\.num_kv_heads\): tensor=2, .*=21",
        ),
        ({"tensor": 7}, {}, {}, r"divides model\.vocab_size: tensor=7, model\.vocab_size=384"),
        ({"tensor": 3}, {"ffn_dim": 64}, {}, r"divides model\.ffn_dim: tensor=3, .*=64"),
        ({"tensor": 3}, {}, {"expert_dim": 16}, r"divides moe\.expert_dim: tensor=3, .*=16"),
        ({"expert": 3}, {}, {}, r"mesh expert divides moe\.num_experts: expert=3, .*=8"),
        (
            {"slices": 3, "expert": 2, "experts_span_slices": True},
            {},
            {},
            r"mesh slices \* expert divides moe\.num_experts: slices \* expert=6, .*=8",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_run_is_refused(mesh, model, moe, message):
    with pytest.raises(ValueError, match=message):
        split(mesh, model, moe)


def test_only_what_the_model_has_is_divided():
    all_moe = {"num_dense_first": 0}
    split({"tensor": 3}, {"ffn_dim": 64}, all_moe)
    dense = {"layer_period": 0, "num_dense_first": 0}
    split({"tensor": 3}, {}, dense | {"expert_dim": 16})
    split({"expert": 3}, {}, dense)
    split({"data": 30}, {}, dense | {"group_size": 16})


def test_a_mesh_is_filled_before_it_is_checked():
    config = split({"data": -1})
    assert config.on_devices(15).mesh == MeshConfig(data=15)
    with pytest.raises(ValueError, match=r"30 sequences .* over 8 devices"):
        config.on_devices(8)
    with pytest.raises(ValueError, match=r"need 30, there are 8"):
        split({"data": 30}).on_devices(8)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"layer_period": 0}, ()),
        ({"layer_period": 2}, (0, 2, 4)),
        ({"layer_period": 2, "layer_offset": 1}, (1, 3, 5)),
        ({"layer_period": 4, "layer_offset": 3}, (3,)),
        ({"num_dense_first": 1}, (1, 2, 3, 4, 5)),
        ({"num_dense_first": 1, "layer_period": 2, "layer_offset": 1}, (2, 4)),
        ({"layers": (1, 5)}, (1, 5)),
        ({"layers": (1, 5), "layer_period": 0}, (1, 5)),
    ],
)
def test_moe_layers_of_six(settings, layers):
    assert ModelConfig(num_layers=6, moe=MoEConfig(**settings)).moe_layers == layers


def test_difference_names_each_setting_that_changed():
    old, new = dataclasses.asdict(ExperimentConfig()), dataclasses.asdict(ExperimentConfig())
    assert difference(old, new) == []
    new["seed"] = 1
    new["model"]["moe"]["capacity"]["train_factor"] = 2.0
    new["data"]["domain_weights"] = (("en", 1.0),)
    assert difference(old, new) == [
        "config.data.domain_weights: () -> (('en', 1.0),)",
        "config.model.moe.capacity.train_factor: 1.25 -> 2.0",
        "config.seed: 0 -> 1",
    ]


def test_difference_shows_fields_that_only_one_side_has():
    assert difference({"a": 1}, {"b": {"c": 2}}) == [
        "config.a: 1 -> None",
        "config.b: None -> {'c': 2}",
    ]


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
