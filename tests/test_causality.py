"""Causality probe: perturbing a sequence's suffix must not move the outputs before it.

The probe covers every registered queue, router and part, with every kind of gate, in training
and in evaluation. Where `looks_ahead` declares causality, it passes. Elsewhere it finds a
perturbation that moves the prefix, and a causal stack refuses the part.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.kinds import KINDS, kind_of, load_kind
from moe_jax.config.settings import Settings
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.block import moe_block
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import BatchPrioritized, ByProbability, ChoiceMajor, RandomOrder, TokenMajor
from moe_jax.moe.routing.cosine import Cosine
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.moe.routing.logits import Linear, Sigmoid, Softmax, SoftmaxOverSelected
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
from moe_jax.part import Call, Dims, Own
from tests.slow import slow_but

# The same tokens in the same slots give bit-equal outputs, or differ by the rounding of a few
# float32 sums. A token that loses or gains an expert moves by about 1.
STILL, MOVED = 1e-5, 1e-2

LENGTH, SPLIT, MODEL_DIM = 8, 5, 4
DIMS = Dims(MODEL_DIM)
PERTURBATIONS = 32

QUEUES = {kind: load_kind("queue", kind)() for kind in KINDS["queue"]}
GATES = {
    "softmax": TokenChoice(projection=Linear(), score=Softmax()),
    "softmax renormalized": TokenChoice(renormalize=True),
    "softmax after top-k": TokenChoice(score=SoftmaxOverSelected(), choices=Threshold()),
    "sigmoid": TokenChoice(score=Sigmoid()),
    "noisy": TokenChoice(noise=(Jitter(epsilon=0.1), Gaussian(stddev=0.1))),
    "group-limited": TokenChoice(groups=ExpertGroups(num_groups=2, num_selected=1)),
    "top-p": TokenChoice(top_p=0.7, projection=Linear(temperature=0.5), selection=Sampled()),
    "random second": TokenChoice(selection=SampledRest(), choices=RandomChoices()),
    "cosine, learned noise": TokenChoice(projection=Cosine(dim=3), noise=(Learned(),)),
}
# Each registered kind that is missing from these gates gets its own gate, with the default queue.
FIELD_OF = {
    "projection": "projection",
    "noise": "noise",
    "score": "score",
    "selection": "selection",
    "choice_policy": "choices",
}


def kinds_in(value):
    """The (family, kind) of all settings inside a value."""
    found = set()
    if isinstance(value, Settings):
        found = {(value.family, kind_of(value))} if value.family else set()
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    if isinstance(value, tuple):
        found = found.union(*map(kinds_in, value))
    return found


def gate_of(family, kind):
    one = load_kind(family, kind)()
    return TokenChoice(**{FIELD_OF[family]: (one,) if family == "noise" else one})


OTHER_GATES = {
    f"{family} {kind}": gate_of(family, kind)
    for family in FIELD_OF
    for kind in KINDS[family]
    if (family, kind) not in kinds_in(tuple(GATES.values()))
}
ONE_CHOICE = ("softmax", "sigmoid", "noisy", "group-limited")
CASES = [
    (queue, choices, gate)
    for queue in QUEUES
    for choices in (1, 2)
    for gate in GATES
    if choices > 1 or gate in ONE_CHOICE
] + [("token_major", 2, gate) for gate in OTHER_GATES]
# All queues with one kind of gate, and all kinds of gate with one queue.
QUICK = [case for case in CASES if case[2] == "softmax" or case[:2] == ("token_major", 2)]


def make_block(queue, choices, router=None, *, factor=0.5, eval_factor=0.0, **settings):
    router = router or TokenChoice()
    settings = {"num_experts": 4, "expert_dim": 8, "init_scale": 4.0} | settings
    if isinstance(router, Soft):
        settings |= {"group_size": LENGTH}
    else:
        settings = {"run_experts": "einsum"} | settings
    return MoE(
        num_selected_experts=choices,
        router=router,
        capacity=Capacity(queue=queue, train_factor=factor, eval_factor=eval_factor),
        **settings,
    )


def make_values(part, sequences=1):
    """Parameters, batches of tokens, and replacement suffixes for each batch's last sequence."""
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda spec: random.normal(size=spec.shape).astype(np.float32), part.specs(DIMS)
    )
    x = random.normal(size=(PERTURBATIONS, sequences, LENGTH, MODEL_DIM)).astype(np.float32)
    suffixes = random.normal(size=(PERTURBATIONS, LENGTH - SPLIT, MODEL_DIM)).astype(np.float32)
    return params, x, 2 * suffixes


@functools.partial(jax.jit, static_argnames=("part", "training", "capacity", "causal"))
def outputs(params, x_PBLM, part, training, capacity, causal):
    # Jitter, noise and random queue draw the same values in every call.
    memory = jnp.sin(jnp.arange(x_PBLM[0].size)).reshape(x_PBLM.shape[1:])  # for cross-attention
    rng = jax.random.key(3) if training else None
    call = Call(rng=rng, capacity=capacity, causal=causal, memory=memory)
    return jax.vmap(lambda x: part.apply(params, x, call.with_defaults(x), Own())[0])(x_PBLM)


def prefix_movements(part, sequences=1, *, training=True, capacity=None, causal=True):
    """How far outputs before SPLIT move under each perturbation.

    Only the suffix of the last sequence changes, and only its prefix is measured.
    """
    params, x, suffixes = make_values(part, sequences)
    perturbed = x.copy()
    perturbed[:, -1, SPLIT:] = suffixes
    settings = (part, training, capacity, causal)
    moved = np.abs(outputs(params, perturbed, *settings) - outputs(params, x, *settings))
    assert moved[:, -1, SPLIT:].max() > MOVED
    return moved[:, -1, :SPLIT].max(axis=(1, 2))


def assert_declared(movements, looks_ahead):
    if looks_ahead:
        assert movements.max() > MOVED
    else:
        assert movements.max() < STILL


@pytest.mark.parametrize(("queue", "choices", "gate"), slow_but(QUICK, CASES))
def test_probe_agrees_with_the_declaration(queue, choices, gate):
    moe = make_block(QUEUES[queue], choices, (GATES | OTHER_GATES)[gate])
    assert moe.looks_ahead(training=True) == QUEUES[queue].looks_ahead(num_choices=choices)
    assert_declared(prefix_movements(moe), moe.looks_ahead(training=True))


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("queue", [name for name, one in QUEUES.items() if not one.needs_rng])
def test_probe_agrees_with_the_declaration_of_a_queue_in_evaluation(queue, choices):
    moe = make_block(QUEUES[queue], choices, factor=0.0, eval_factor=0.5)
    assert not moe.looks_ahead(training=True)
    assert moe.looks_ahead(training=False) == QUEUES[queue].looks_ahead(num_choices=choices)
    assert_declared(prefix_movements(moe, training=False), moe.looks_ahead(training=False))


def test_every_kind_of_what_routers_are_made_of_is_probed():
    registered = {(family, kind) for family in FIELD_OF for kind in KINDS[family]}
    assert registered <= kinds_in((*GATES.values(), *OTHER_GATES.values()))


# Non-default settings of routers. test_moe_routing_fixed probes hashing by token id.
ROUTER_SETTINGS = {"hash": {"by": "position"}}
CHOICES_OF = {"base": 1}
ROUTERS = {
    kind: load_kind("router", kind)(**ROUTER_SETTINGS.get(kind, {})) for kind in KINDS["router"]
} | {
    "expert_choice, predictor": ExpertChoice(predictor_loss_weight=1.0),
    "expert_choice, predictor, limited": ExpertChoice(predictor_loss_weight=1.0, max_experts=1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_probe_agrees_with_the_declaration_of_every_router(name, training):
    router = ROUTERS[name]
    moe = make_block(TokenMajor(), CHOICES_OF.get(name, 2), router, factor=1.0)
    assert moe.looks_ahead(training) == router.looks_ahead(training)
    movements = prefix_movements(moe, training=training, capacity=1.0)
    assert_declared(movements, moe.looks_ahead(training))


# Settings of parts whose defaults are incomplete or too large.
PART_SETTINGS = {
    "attention": {"num_heads": 2, "head_dim": 4},
    "cross_attention": {"num_heads": 2, "head_dim": 4},
    "mlp": {"dim": 8},
    "moe": {"num_experts": 4, "expert_dim": 8, "init_scale": 4.0},
    "layer": {"branches": (("attention", Attention(num_heads=2, head_dim=4)), ("mlp", Mlp(dim=8)))},
}
PART_SETTINGS["parallel_layer"] = PART_SETTINGS["layer"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS["part"] if load_kind("part", kind).adds_to_residual]
)
def test_probe_agrees_with_the_declaration_of_every_part(kind, training):
    part = load_kind("part", kind)(**PART_SETTINGS.get(kind, {}))
    assert_declared(prefix_movements(part, training=training), part.looks_ahead(training))


def test_the_probe_sees_attention_of_an_encoder_look_ahead():
    attention = Attention(**PART_SETTINGS["attention"])
    assert prefix_movements(attention, training=False, causal=False).max() > MOVED


def stack_of(moe, *, allow=False):
    """A causal model of one layer with this block, with or without permission to look ahead."""
    layout = StackLayout(unit=(("moe",),), repeats=1, allow_lookahead=allow)
    return LanguageModel(model_dim=MODEL_DIM, parts={"moe": moe}, stack=layout)


def assert_refused_unless_allowed(moe):
    stack_of(moe, allow=True)
    modes = [
        name
        for name, training in (("training", True), ("evaluation", False))
        if moe.looks_ahead(training)
    ]
    if not modes:
        stack_of(moe)
        return
    message = (
        rf"must not depend on later tokens: the part 'moe' looks at them in {' and '.join(modes)}: "
        r"MoE\(.*\. Use .*stack\.allow_lookahead=True"
    )
    with pytest.raises(ValueError, match=message):
        stack_of(moe)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_that_looks_ahead_is_refused_unless_allowed(name):
    assert_refused_unless_allowed(make_block(TokenMajor(), 1, ROUTERS[name]))


@pytest.mark.parametrize(
    ("queue", "choices", "causal"),
    [
        (TokenMajor(), 1, True),
        (TokenMajor(), 2, True),
        (ChoiceMajor(), 1, True),
        (ChoiceMajor(), 2, False),  # a later first choice evicts an earlier second choice
        (BatchPrioritized(), 1, False),
        (BatchPrioritized(), 2, False),
        (ByProbability(), 1, False),
        (ByProbability(), 2, False),
        (RandomOrder(), 1, False),
        (RandomOrder(), 2, False),
    ],
)
def test_declaration_by_name(queue, choices, causal):
    assert queue.looks_ahead(num_choices=choices) == (not causal)


@pytest.mark.parametrize(
    ("router", "training", "evaluation"),
    [
        (TokenChoice(), False, False),
        (ExpertChoice(), True, True),
        (ExpertChoice(predictor_loss_weight=1.0), True, False),
        (Soft(), True, True),
        (ROUTERS["sinkhorn"], True, False),
        (ROUTERS["base"], True, False),
        (ROUTERS["hash"], False, False),
        (ROUTERS["random"], False, False),
        (ROUTERS["uniform"], False, False),
    ],
    ids=repr,
)
def test_declaration_of_routers_by_name(router, training, evaluation):
    assert (router.looks_ahead(True), router.looks_ahead(False)) == (training, evaluation)


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("choices", [1, 2])
def test_a_queue_that_looks_ahead_is_refused_unless_allowed(queue, choices):
    assert_refused_unless_allowed(make_block(QUEUES[queue], choices))


@pytest.mark.parametrize("queue", QUEUES)
def test_dropless_is_causal_whatever_the_queue_and_needs_no_permission(queue):
    moe = make_block(QUEUES[queue], 2, factor=0.0)
    stack_of(moe)
    assert prefix_movements(moe).max() < STILL


def test_a_capacity_limited_evaluation_needs_a_causal_queue_too():
    capacity = Capacity(queue=ChoiceMajor(), train_factor=0, eval_factor=2.0)
    with pytest.raises(ValueError, match="the part 'moe' looks at them in evaluation"):
        stack_of(MoE(num_selected_experts=2, capacity=capacity))


@pytest.mark.parametrize("group_size", [4, LENGTH, 2 * LENGTH])
def test_token_major_is_causal_for_every_group_size(group_size):
    moe = make_block(TokenMajor(), 2, group_size=group_size)
    assert prefix_movements(moe, sequences=2).max() < STILL


@pytest.mark.parametrize("way", ["gather", "ragged"])
def test_every_way_of_running_experts_is_causal(way):
    # No vmap: it would turn a loop over experts into another program.
    moe = make_block(TokenMajor(), 2, run_experts=way)
    params, x, suffixes = make_values(moe)
    output = jax.jit(lambda x_BLM: moe_block(params, x_BLM, moe, Call(capacity=0.5))[0])
    for x_BLM, suffix in zip(x[:8], suffixes[:8], strict=True):
        perturbed = x_BLM.copy()
        perturbed[0, SPLIT:] = suffix
        moved = np.abs(output(perturbed) - output(x_BLM))
        assert moved[:, :SPLIT].max() < STILL


@pytest.mark.parametrize("queue", [TokenMajor(), ChoiceMajor()], ids=kind_of)
def test_probe_of_a_whole_model_in_training(queue):
    model = LanguageModel(
        vocab_size=17,
        model_dim=8,
        parts={"attention": Attention(num_heads=2, head_dim=4), "moe": make_block(queue, 2)},
        stack=StackLayout(repeats=2, allow_lookahead=True),
        dropout_rate=0.1,
    )
    tokens = jax.random.randint(jax.random.key(0), (1, LENGTH), 0, 17)
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda spec: random.normal(size=spec.shape).astype(np.float32), model.specs()
    )

    @jax.jit
    def logits(tokens):
        call = Call(tokens_BL=tokens, capacity=0.5, rng=jax.random.key(2))
        return model.run(params, call).logits_BLV

    movements = []
    for seed in range(16):
        suffix = jax.random.randint(jax.random.key(seed), (LENGTH - SPLIT,), 0, 17)
        moved = logits(tokens.at[0, SPLIT:].set(suffix)) - logits(tokens)
        movements.append(np.abs(moved[:, :SPLIT]).max())
    looks_ahead = model.looks_ahead(training=True)
    assert looks_ahead == queue.looks_ahead(num_choices=2)
    assert_declared(np.array(movements), looks_ahead)
