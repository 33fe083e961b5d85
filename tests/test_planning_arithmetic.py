"""Parameters and FLOPs by component, against formulas written out by hand."""

import dataclasses

import jax
import pytest

from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import LayerNorm, RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.costs import mean_experts, training_options
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.assignment import Sinkhorn
from moe_jax.moe.routing.cosine import Cosine
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.moe.routing.fixed import Hash
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.noise import Learned
from moe_jax.moe.routing.selection import FirstChoice, RandomChoices, Threshold
from moe_jax.moe.routing.soft import Soft
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.parameters import init_parameters
from moe_jax.planning.arithmetic import count_flops, count_parameters, summary

# Like Mixtral: every layer MoE, top 2 of 8, gated experts, grouped queries, an untied head.
MIXTRAL = LanguageModel(
    vocab_size=100, model_dim=16, tie_embeddings=False,
    parts={
        "attention": Attention(num_heads=4, num_kv_heads=2, head_dim=6),
        "moe": MoE(
            num_experts=8, num_selected_experts=2, expert_dim=20, activation=SwiGLU(),
            router=TokenChoice(renormalize=True), capacity=Capacity(train_factor=0.0),
            run_experts="ragged",
        ),
    },
    stack=StackLayout(repeats=3),
)  # fmt: skip
# Like DeepSeekMoE: first layer dense, shared and routed experts, tied head, biases, every norm.
DEEPSEEK = LanguageModel(
    vocab_size=100, model_dim=16, norm=LayerNorm(),
    parts={
        "attention": Attention(
            num_heads=2, head_dim=8, biases=tuple("qkvo"), qk_norm=RMSNorm()
        ),
        "mlp": Mlp(dim=40, use_bias=True),
        "moe": MoE(
            num_experts=4, num_selected_experts=2, expert_dim=20, use_bias=True,
            shared_expert_dim=40, shared_expert_gate=True,
        ),
    },
    stack=StackLayout(first=(("attention", "mlp"),), repeats=2),
)  # fmt: skip
DENSE = dataclasses.replace(
    MIXTRAL,
    parts={"attention": MIXTRAL.part["attention"], "mlp": Mlp(dim=40, activation=SwiGLU())},
    stack=StackLayout(unit=(("attention", "mlp"),), repeats=3),
)


def replace_moe(model, **changes):
    moe = dataclasses.replace(model.part["moe"], **changes)
    stack = dataclasses.replace(model.stack, allow_lookahead=True)
    return dataclasses.replace(model, parts=model.part | {"moe": moe}, stack=stack)


def slots_of_an_expert(model, length):
    return training_options(model.part["moe"], length).slots


def test_parameters_of_a_model_like_mixtral():
    count = count_parameters(MIXTRAL, 16)
    # M = 16, V = 100, 4 heads and 2 key-value heads of 6, H = 20, 3 layers.
    assert count.embedding == count.head == 100 * 16
    assert count.attention == 3 * (16 * 24 + 2 * 16 * 12 + 24 * 16)
    assert count.experts == 3 * 8 * (3 * 16 * 20)
    assert count.active_experts == 3 * 2 * (3 * 16 * 20)
    assert count.router == 3 * 16 * 8
    assert count.norms == 3 * 2 * 16 + 16
    assert count.dense_ffn == count.shared_experts == 0
    assert count.total == 3200 + 3456 + 23040 + 384 + 112
    assert count.active == 3200 + 3456 + 5760 + 384 + 112


def test_parameters_of_a_model_like_deepseek():
    count = count_parameters(DEEPSEEK, 16)
    # M = 16. An FFN of 40 in one layer; in two, experts of 20 with biases, two shared as one of 40.
    assert count.embedding == 1600 and count.head == 0
    assert count.attention == 3 * (4 * (16 * 16 + 16) + 2 * 8)
    assert count.dense_ffn == 2 * 16 * 40 + 40 + 16
    assert count.experts == 2 * 4 * (2 * 16 * 20 + 20 + 16)
    assert count.active_experts == count.experts // 2
    assert count.shared_experts == 2 * (2 * 16 * 40 + 40 + 16 + 16)
    assert count.router == 2 * 16 * 4
    assert count.norms == (3 * 2 + 1) * 2 * 16


# Numbers per layer in the router's matrices and vectors: M = 16, E = 8; 2 slots for 8 tokens.
ROUTERS = {
    "noise": (TokenChoice(noise=(Learned(),)), 2 * 16 * 8, 0),
    "cosine": (TokenChoice(projection=Cosine(dim=3)), 16 * 3 + 3 * 8, 1),
    "expert choice": (ExpertChoice(), 16 * 8, 0),
    "predictor": (ExpertChoice(predictor_loss_weight=1.0), 2 * 16 * 8, 8),
    "soft": (Soft(), 16 * 8 * 2, 1),
    "sinkhorn": (Sinkhorn(), 16 * 8, 0),
    "hash": (Hash(), 0, 0),
}


def with_router(name, **changes):
    changes = {
        "router": ROUTERS[name][0],
        "run_experts": "auto",
        "group_size": 8,
        "capacity": Capacity(train_factor=1.0),
    } | changes
    return replace_moe(MIXTRAL, **changes)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_has_its_matrices_in_parameters_and_flops(name):
    config, (_, matrices, vectors) = with_router(name), ROUTERS[name]
    assert count_parameters(config, 16).router == 3 * (matrices + vectors)
    # Soft MoE mixes 8 tokens into and out of 16 slots of 16 numbers: 2 contractions per token.
    mixing = 2 * 2 * 16 * 16 * (name == "soft")
    assert count_flops(config, 16).router == 3 * (2 * matrices + mixing)


@pytest.mark.parametrize(("factor", "experts"), [(0.5, 1), (1.0, 2), (1.25, 3)])
@pytest.mark.parametrize("name", ["expert choice", "soft"])
def test_experts_that_fill_their_slots_compute_all_of_them(name, factor, experts):
    """With 8 tokens and 8 experts, each slot is one expert per token; ceil(1.25 * 2) slots."""
    config = with_router(name, capacity=Capacity(train_factor=factor))
    count = count_flops(config, 16)
    assert count.experts == 3 * experts * (3 * 2 * 16 * 20)
    assert count.padding == count.dispatch == 0
    assert count_parameters(config, 16).active_experts == 3 * experts * (3 * 16 * 20)
    limited = ExpertChoice(max_experts=1)
    count = count_flops(with_router("expert choice", router=limited, run_experts="gather"), 16)
    assert (count.experts, count.padding) == (3 * (3 * 2 * 16 * 20),) * 2, "one slot is left empty"


def test_zero_and_copy_experts_have_their_part_of_the_choices():
    """8 experts, and 2 + 6 zero-computation ones with router columns and half the choices."""
    zero_computation = {"num_zero_experts": 2, "num_copy_experts": 6}
    config, plain = replace_moe(MIXTRAL, **zero_computation), count_flops(MIXTRAL, 16)
    count, parameters = count_flops(config, 16), count_parameters(config, 16)
    assert (count.experts, count.router) == (plain.experts / 2, plain.router * 2)
    assert parameters.experts == 8 * parameters.active_experts, "one of eight in the mean"
    assert parameters.router == 3 * 16 * 16
    # 16 tokens * 2 choices / 16 options is two slots for each of 8 experts: one expert per token.
    capacity = Capacity(train_factor=1.0)
    limited = replace_moe(MIXTRAL, **zero_computation, run_experts="gather", capacity=capacity)
    assert count_flops(limited, 16).padding == 0
    assert slots_of_an_expert(limited, 16) == 2


EVERY_ROUTER = [with_router(name) for name in ROUTERS]


@pytest.mark.parametrize("config", [MIXTRAL, DEEPSEEK, DENSE, *EVERY_ROUTER])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_parameter_is_counted_once(config, scan_layers):
    config = dataclasses.replace(config, scan_layers=scan_layers)
    abstract = jax.eval_shape(lambda: init_parameters(jax.random.key(0), config.specs()))
    total = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert count_parameters(config, 16).total == total


@pytest.mark.parametrize("group_size", [0, 1, 8, 64])
def test_parameters_do_not_depend_on_the_groups(group_size):
    config = replace_moe(MIXTRAL, group_size=group_size)
    assert count_parameters(config, 16) == count_parameters(MIXTRAL, 16)


def test_flops_of_a_model_like_mixtral():
    """A multiply-add is two FLOPs; L = 10."""
    count = count_flops(MIXTRAL, 10)
    projections = 2 * 16 * 24 + 2 * 2 * 16 * 12 + 2 * 24 * 16
    scores_and_values = 2 * (2 * 10 * 24)
    assert count.attention == 3 * (projections + scores_and_values)
    assert count.experts == 3 * 2 * (3 * 2 * 16 * 20)
    assert count.router == 3 * 2 * 16 * 8
    assert count.head == 2 * 16 * 100
    assert count.dense_ffn == count.padding == count.dispatch == 0
    assert count.model == count.computed == 3 * 3264 + 11520 + 768 + 3200


def test_flops_of_a_model_like_deepseek():
    count = count_flops(DEEPSEEK, 10)
    dense, shared, expert = 2 * 2 * 16 * 40, 2 * (2 * 2 * 16 * 20), 2 * 2 * 16 * 20
    assert count.dense_ffn == dense + 2 * shared
    assert count.experts == 2 * 2 * expert
    assert count.router == 2 * (2 * 16 * 4)
    assert count.attention == 3 * (4 * 2 * 16 * 16 + 2 * 2 * 10 * 16)


@pytest.mark.parametrize(
    ("way", "padded", "contracted"),
    [("ragged", False, False), ("gather", True, False), ("einsum", True, True)],
)
@pytest.mark.parametrize(
    ("factor", "group_size", "slots"),
    [
        (1.0, 0, 4),  # 16 tokens * 2 / 8
        (1.25, 0, 5),
        (0.5, 0, 2),  # fewer slots than choices: those without a slot are not computed
        (1.25, 4, 2),  # ceil(1.25): small groups round up more
        (0.0, 0, 16),  # dropless by slots: as many slots as tokens
    ],
)
def test_padding_and_dispatch(way, padded, contracted, factor, group_size, slots):
    """Every slot is computed, or every choice with a slot. Dispatch and combine contract ECM."""
    config = replace_moe(
        MIXTRAL,
        run_experts=way,
        group_size=group_size,
        capacity=Capacity(train_factor=factor),
    )
    count, plain = count_flops(config, 16), count_flops(MIXTRAL, 16)
    slots_per_token = 8 * slots / (group_size or 16)
    expert = 3 * 2 * 16 * 20
    rows = slots_per_token if padded else min(slots_per_token, 2)
    assert count.experts + count.padding == 3 * rows * expert
    assert count.dispatch == contracted * 3 * (2 * 8 * slots * 16) * 2
    assert count.model == plain.model, "MFU counts what the mathematics needs"
    assert count.computed == count.model + count.padding + count.dispatch


@pytest.mark.parametrize(("way", "copies"), [("einsum", 2), ("gather", 1)])
def test_gates_on_the_input_make_a_token_of_every_choice(way, copies):
    config = replace_moe(MIXTRAL, run_experts=way, capacity=Capacity(train_factor=1.0))
    gated = replace_moe(config, router=TokenChoice(score=Sigmoid()), gate_on_input=True)
    count, other = (count_flops(c, 16) for c in (config, gated))
    assert other.dispatch == copies * count.dispatch and other.model == count.model


@pytest.mark.parametrize(
    ("settings", "experts"),
    [
        ({"router": TokenChoice(choices=FirstChoice())}, 1),
        ({"router": TokenChoice(choices=FirstChoice()), "num_copy_experts": 8}, 0.5),
        # How many count depends on the data, so the plan takes the maximum.
        ({"router": TokenChoice(choices=Threshold())}, 2),
        ({"router": TokenChoice(choices=RandomChoices())}, 2),
        ({"router": TokenChoice(top_p=0.5)}, 2),
    ],
)
def test_later_choices_that_never_count_cost_nothing(settings, experts):
    capacity = Capacity(train_factor=1.0)
    config = replace_moe(MIXTRAL, run_experts="gather", capacity=capacity, **settings)
    count, expert = count_flops(config, 16), 3 * (3 * 2 * 16 * 20)
    assert (count.experts, mean_experts(config.part["moe"], 16)) == (experts * expert, experts)
    # The number of slots still follows from K.
    slots = 8 * slots_of_an_expert(config, 16) / 16
    assert count.padding == (slots - experts) * expert
    assert count_parameters(config, 16).active_experts == experts * 3 * (3 * 16 * 20)


def test_one_expert_has_no_router_and_a_dense_model_no_experts():
    one = replace_moe(MIXTRAL, num_experts=1, num_selected_experts=1)
    assert count_parameters(one, 16).router == count_flops(one, 16).router == 0
    dense = DENSE
    assert count_parameters(dense, 16).experts == count_parameters(dense, 16).active_experts == 0
    assert count_parameters(dense, 16).total == count_parameters(dense, 16).active
    assert count_flops(dense, 16).dense_ffn == 3 * (3 * 2 * 16 * 40)
    assert count_flops(dense, 16).experts == count_flops(dense, 16).padding == 0


def test_summary_says_what_is_not_zero():
    lines = summary(MIXTRAL, 10).splitlines()
    assert lines[0].startswith("parameters: total 30,192, active 12,912, embedding 1,600,")
    assert lines[1].startswith("forward FLOPs a token: model 25,280, computed 25,280,")
    assert "padding" not in lines[1] and "dense_ffn" not in lines[0]
