"""Bytes on one device by component, worked by hand."""

import dataclasses

import jax
import pytest

from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)
from moe_jax.config.run import OPTIMIZERS
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.models.multi_token import MultiToken
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.costs import expert_rows, memory_rows
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.moe.routing.soft import Soft
from moe_jax.parallel.mesh import make_mesh
from moe_jax.planning.flops import (
    KINDS,
    count_flops,
    different_layers,
    forward_flops,
    training_flops,
)
from moe_jax.planning.memory import (
    dispatch_bytes,
    estimate_memory,
    gathered_parameters,
    kv_cache_bytes,
    layer_activations,
    optimizer_bytes,
    saved_bytes,
    working_set,
)
from moe_jax.planning.serving import serving_costs
from moe_jax.planning.traffic import hbm_traffic
from moe_jax.planning.workload import resolve
from moe_jax.training.memory import needed_bytes
from moe_jax.training.state import init_state
from tests.tiny_run import tiny_config

# One dense and two MoE layers; M = 8, 2 heads and 1 key-value head of 4, H = 16, V = 32, L = 10;
# E = 4, K = 2, experts of H = 12, capacity factor 1: C = 10 * 2 / 4 = 5 slots, 2 per token.
MODEL = LanguageModel(
    vocab_size=32, model_dim=8, tie_embeddings=False, compute_dtype="bfloat16", remat="none",
    parts={
        "attention": Attention(num_heads=2, num_kv_heads=1, head_dim=4, kernel="xla"),
        "mlp": Mlp(dim=16, activation=SwiGLU()),
        "moe": MoE(
            num_experts=4, num_selected_experts=2, expert_dim=12, run_experts="gather",
            capacity=Capacity(train_factor=1.0),
        ),
    },
    stack=StackLayout(first=(("attention", "mlp"),), repeats=2, allow_lookahead=True),
)  # fmt: skip


def workload(mesh=None, batch=8, microbatches=1, optimizer="adamw", parts=None, **model):
    """The plan of the model with changed settings of its parts and of itself."""
    changed = MODEL.part
    for name, settings in (parts or {}).items():
        changed[name] = dataclasses.replace(changed[name], **settings)
    mesh = mesh or MeshConfig(data=1)
    config = ExperimentConfig(
        model=dataclasses.replace(MODEL, parts=changed, **model),
        data=DataConfig(sequence_length=10),
        optimizer=OptimizerConfig(name=optimizer, schedule="constant"),
        training=TrainingConfig(batch_size=batch, num_microbatches=microbatches), mesh=mesh,
    )  # fmt: skip
    return resolve(config, mesh.num_devices)


def dense_layer(work):
    return different_layers(work.model, work.lengths)[0]


def moe_layer(work):
    return different_layers(work.model, work.lengths)[1]


def rows(work):
    """Rows per token that experts compute, and rows per token that have a place in memory."""
    moe = work.model.part["moe"]
    return expert_rows(moe, work.length), memory_rows(moe, work.length)


# Bytes per token: 4 M = 32 numbers and 3 ND + 3 KD = 36 in bfloat16; 2 heads x 10 probabilities in
# float32 and in bfloat16. Dense: 3 H = 48. MoE: 2 slots x (M + 2 x 12), and 2 x E in float32.
ATTENTION = 2 * (32 + 36) + 20 * (4 + 2)
DENSE = ATTENTION + 2 * 48
MOE = ATTENTION + 2 * 2 * (8 + 24) + 4 * 8


def test_without_remat_all_that_the_backward_pass_reads_is_saved():
    work = workload(batch=8)
    assert work.tokens == 80 and rows(work)[0] == 2
    assert layer_activations(work, dense_layer(work)) == 80 * DENSE
    assert layer_activations(work, moe_layer(work)) == 80 * MOE
    assert saved_bytes(work) == 80 * (DENSE + 2 * MOE)
    # One-hot tensors take their gradient from the outputs.
    einsum = workload(batch=8, parts={"moe": {"run_experts": "einsum"}})
    assert layer_activations(einsum, moe_layer(einsum)) == 80 * (MOE + 2 * 2 * 8)


def test_full_remat_saves_the_input_of_each_layer():
    assert saved_bytes(workload(remat="full")) == 80 * 3 * 8 * 2


def test_remat_dots_saves_projections_dense_ffn_and_router_too():
    """Input and output M each, q 8, k and v 4 each; dense 2 H + M; the router's E in float32."""
    per_token = 3 * (16 + 16) * 2 + (2 * 16 + 8) * 2 + 2 * 4 * 4
    assert saved_bytes(workload(remat="dots")) == 80 * per_token
    shared = workload(remat="dots", parts={"moe": {"shared_expert_dim": 24}})
    assert saved_bytes(shared) == 80 * (per_token + 2 * 2 * (24 + 8))


def test_microbatches_and_devices_share_the_tokens():
    whole = saved_bytes(workload())
    assert saved_bytes(workload(microbatches=4)) == whole / 4
    for mesh in (MeshConfig(data=4), MeshConfig(data=2, expert=2), MeshConfig(data=1, fsdp=4)):
        assert saved_bytes(workload(mesh)) == whole / 4
    alone = workload(MeshConfig(data=1, tensor=1))
    assert layer_activations(alone, dense_layer(alone)) == 80 * DENSE


def test_the_working_set_has_gathered_weights_and_their_gradient():
    """Of an MoE layer: q, o 64 each, k, v 32 each; norms 16; router 32; experts 4 x 2 x 96."""
    own = 192 + 16 + 32 + 768
    alone, split = workload(), workload(MeshConfig(data=1, fsdp=2))
    assert gathered_parameters(alone, moe_layer(alone)) == own
    assert gathered_parameters(split, moe_layer(split)) == gathered_parameters(
        alone, moe_layer(alone)
    )
    by_expert = workload(MeshConfig(data=1, expert=2))
    assert gathered_parameters(by_expert, moe_layer(by_expert)) == own - 384
    full = workload(remat="full")
    weights = 2 * 2 * gathered_parameters(full, moe_layer(full))
    assert working_set(full, moe_layer(full)) == weights + 80 * MOE
    assert working_set(alone, moe_layer(alone)) == weights + 80 * 20 * 4, "gradient of the scores"


def test_dispatch_buffers():
    """Two slots of 8 per token, in and out: 32 numbers, doubled if they travel; GSEC for einsum."""
    alone, split = workload(), workload(MeshConfig(data=1, expert=2))
    assert dispatch_bytes(alone, moe_layer(alone)) == 80 * 2 * 2 * 8 * 2
    assert dispatch_bytes(split, moe_layer(split)) == 40 * 4 * 2 * 8 * 2
    assert dispatch_bytes(alone, dense_layer(alone)) == 0
    einsum = workload(parts={"moe": {"run_experts": "einsum"}})
    assert dispatch_bytes(einsum, moe_layer(einsum)) == 80 * (2 * 2 * 8 + 2 * 4 * 5) * 2
    assert rows(workload(parts={"moe": {"run_experts": "ragged"}}))[0] == 2


def test_sorted_rows_have_a_place_for_each_choice_of_expert_choice():
    """All 4 experts, or `max_experts`. 10 tokens fill 5 slots per expert, so 2 are computed."""
    settings = {"router": ExpertChoice(predictor_loss_weight=1.0), "run_experts": "ragged"}
    work = workload(parts={"moe": settings})
    assert rows(work) == (2, 4)
    assert dispatch_bytes(work, moe_layer(work)) == 80 * 2 * 4 * 8 * 2
    # In addition to the rows: logits, the predictor's logits, and probabilities.
    expected = 80 * (ATTENTION + 4 * 2 * (8 + 24) + 3 * 4 * 4)
    assert layer_activations(work, moe_layer(work)) == expected
    one = ExpertChoice(predictor_loss_weight=1.0, max_experts=1)
    assert rows(workload(parts={"moe": settings | {"router": one}}))[1] == 1


def test_soft_slots_have_weights_for_each_token():
    """5 slots for each of 4 experts: logits and two softmaxes of 20 in float32."""
    settings = {"moe": {"router": Soft(), "group_size": 10, "run_experts": "auto"}}
    work = workload(parts=settings)
    expected = 80 * (ATTENTION + 2 * 2 * (16 + 24) + 3 * 20 * 4)
    assert layer_activations(work, moe_layer(work)) == expected
    assert dispatch_bytes(work, moe_layer(work)) == 80 * (2 * 2 * 8 + 2 * 20) * 2
    assert saved_bytes(workload(parts=settings, remat="dots")) == 80 * (
        3 * (16 + 16) * 2 + (2 * 16 + 8) * 2 + 2 * 20 * 4
    )


def test_state_is_three_float32_numbers_a_parameter_and_gradients_one():
    work = workload()
    leaves = jax.tree.leaves(jax.eval_shape(lambda: init_state(work.config)).params)
    size = sum(leaf.size for leaf in leaves)
    memory = estimate_memory(work)
    assert (memory.parameters, memory.optimizer, memory.gradients) == (4 * size, 8 * size, 4 * size)
    assert estimate_memory(workload(microbatches=2)).gradients == 8 * size
    assert memory.logits == 2 * 80 * 32 * 4
    state = 16 * size + memory.saved_activations
    assert memory.total == state + max(memory.logits, memory.layer + memory.dispatch)


QUANTISED = {"quantisation": {"names": ["experts"], "bits": 4, "group_size": 4}}
ADAPTED = QUANTISED | {"adapters": {"names": ["attention", "experts"]}}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model": {"quantisation": {"names": ["all"], "bits": 16}}},
        {"model": QUANTISED, "optimizer": {"frozen": ["experts"]}},
        {"model": ADAPTED, "optimizer": {"trainable": ["adapters"]}},
        {"training": {"num_microbatches": 2, "batch_size": 16}},
        {"optimizer": {"name": "lion", "trainable": ["attention"]}},
    ],
    ids=str,
)
def test_a_plan_counts_the_state_as_training_does(settings):
    """This includes quantised weights and adapters in their own dtypes, but not counters."""
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    config = dataclasses.replace(tiny_config(settings), mesh=mesh)
    memory, needed = estimate_memory(resolve(config, 8)), needed_bytes(config, make_mesh(mesh))
    assert memory.parameters == needed["parameters"]
    assert memory.gradients == needed["gradients"]
    assert 0 <= needed["optimizer"] - memory.optimizer <= 64
    assert serving_costs(config.model, 16) == serving_costs(tiny_config().model, 16)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_those_of_the_real_optimizer(name, scan_layers):
    """Except counters, coefficients and optax's one-number placeholders."""
    wide = {
        "attention": {"head_dim": 64},
        "mlp": {"dim": 160},
        "moe": {"expert_dim": 144, "use_bias": True},
    }
    sizes = {"model_dim": 128, "vocab_size": 200}
    work = workload(optimizer=name, scan_layers=scan_layers, parts=wide, **sizes)
    state = jax.eval_shape(lambda: init_state(work.config))
    sizes = [leaf.size for leaf in jax.tree.leaves(state.opt_state)]
    placeholders = 4 * sum(size for size in sizes if size <= 64)
    assert min(leaf.size for leaf in jax.tree.leaves(state.params)) > 64
    assert optimizer_bytes(work) == pytest.approx(4 * sum(sizes), abs=placeholders + 1)
    assert placeholders < 0.01 * optimizer_bytes(work)


def test_the_cache_of_keys_and_values():
    """3 layers, 6 sequences of 100 tokens: one head of 4 in bfloat16, twice, and a position."""
    of_a_text = 3 * 100 * (2 * 4 * 2 + 4)
    for devices, texts in ((1, 6), (3, 2), (8, 1)):
        work = workload(MeshConfig(data=devices), batch=24)
        assert kv_cache_bytes(work, 6, 100) == texts * of_a_text


@pytest.mark.parametrize("setting", ["window", "chunk"])
def test_the_cache_of_a_window_or_a_chunk_is_a_ring(setting):
    """3 layers, 13 slots for a span of 5; a tensor mesh splits keys and values, not positions."""
    parts = {"attention": {setting: 5, "num_kv_heads": 2}}
    assert kv_cache_bytes(workload(parts=parts), 6, 100) == 6 * 3 * 13 * (2 * 2 * 4 * 2 + 4)
    halves = workload(MeshConfig(data=1, tensor=2), parts=parts)
    assert kv_cache_bytes(halves, 6, 100) == 6 * 3 * 13 * (2 * 4 * 2 + 4)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_training_flops_are_three_forward_passes_and_what_remat_repeats(remat):
    config = dataclasses.replace(MODEL, remat=remat)
    forward, training = forward_flops(config, 10), training_flops(config, 10)
    passes = {
        "none": dict.fromkeys(KINDS, 3),
        "full": dict.fromkeys(KINDS, 4) | {"head": 3},
        # Recomputes scores and weighted values, 2 x 2 L ND per layer, and experts.
        "dots": dict.fromkeys(KINDS, 3) | {"experts": 4},
    }[remat]
    expected = {kind: passes[kind] * forward[kind] for kind in KINDS}
    if remat == "dots":
        expected["attention"] += 3 * 2 * 2 * 10 * 8
    assert training == expected


def test_the_dispatch_tensor_has_no_gradient():
    """Of the two contractions, one has two products in the backward pass, the other has one."""
    config = workload(parts={"moe": {"run_experts": "einsum"}}).model
    count = count_flops(config, 10)
    assert count.dispatch == 2 * 2 * (2 * 4 * 5 * 8)
    assert training_flops(config, 10)["routing"] == 3 * count.router + 5 * count.dispatch / 2


def test_loads_of_several_microbatches_are_counted_in_a_forward_pass_of_their_own():
    """The load-balance loss of the whole batch, which is the default scope, needs them."""
    forward, one, four = forward_flops(MODEL, 10), *(training_flops(MODEL, 10, n) for n in (1, 4))
    assert four == {kind: one[kind] + forward[kind] * (kind != "head") for kind in KINDS}
    losses = (LoadBalance(weight=0.01, scope="microbatch"),)
    each = workload(microbatches=4, parts={"moe": {"losses": losses}})
    assert training_flops(each.model, 10, 4) == one
    assert workload(microbatches=4).extra_forward_passes == 1
    assert each.extra_forward_passes == 0


def test_memory_traffic_of_the_experts():
    """Two MoE layers, 80 tokens x 2 slots, two products [8, 12] and [12, 8]; three passes."""
    rows_in_and_out = 80 * 2 * 2 * (8 + 12) * 2
    weights = 2 * 4 * 2 * 96
    assert hbm_traffic(workload())["experts"] == 3 * 2 * (rows_in_and_out + weights)
    assert hbm_traffic(workload(remat="full"))["experts"] == 4 * 2 * (rows_in_and_out + weights)
    size = estimate_memory(workload()).parameters / 4
    assert hbm_traffic(workload())["optimizer"] == 7 * 4 * size


def test_every_multi_token_module_runs_the_head():
    """80 tokens of 8 in three passes with weights [8, 32]; float32 logits [80, 32], four times."""
    of_a_head = 3 * 2 * (80 * 8 + 8 * 32) + 4 * 4 * 80 * 32
    assert hbm_traffic(workload())["head"] == of_a_head
    modules = MultiToken(depth=2, layer=("attention", "mlp"))
    assert hbm_traffic(workload(multi_token=modules))["head"] == 3 * of_a_head
