"""Parameters, FLOPs and memory of a model with two stacks, by hand."""

import dataclasses

import pytest

from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    Lengths,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)
from moe_jax.data.objectives.span_corruption import SpanCorruption
from moe_jax.layers.attention import Attention
from moe_jax.layers.cross_attention import CrossAttention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.stack import StackLayout
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.planning.flops import count_flops, training_flops
from moe_jax.planning.memory import estimate_memory, kv_cache_bytes, saved_bytes
from moe_jax.planning.parameters import count_parameters
from moe_jax.planning.report import Plan, describe
from moe_jax.planning.text import parameters_text
from moe_jax.planning.workload import resolve

M, V, ND, H, E, T, L = 8, 384, 6, 10, 4, 32, 8  # N = 2 heads of D = 3
LENGTHS = Lengths(decoder=L, encoder=T)
BLOCK = MoE(
    num_experts=E, num_selected_experts=1, expert_dim=H, run_experts="gather",
    capacity=Capacity(train_factor=1.0),
)  # fmt: skip
MODEL = EncoderDecoder(
    vocab_size=V,
    model_dim=M,
    parts={
        "attention": Attention(num_heads=2, head_dim=3, rotary=None),
        "cross": CrossAttention(num_heads=2, head_dim=3),
        "mlp": Mlp(dim=H),
        "moe": BLOCK,
    },
    encoder=StackLayout(unit=(("attention", "moe"),), repeats=3, causal=False),
    stack=StackLayout(unit=(("attention", "cross", "mlp"),), repeats=2),
)


def test_parameters_of_both_stacks_are_counted():
    count = count_parameters(MODEL, LENGTHS)
    assert count.embedding == V * M and count.head == 0
    assert count.attention == (3 + 2 + 2) * 4 * M * ND
    assert (count.dense_ffn, count.experts, count.router) == (
        2 * 2 * M * H, 3 * E * 2 * M * H, 3 * M * E
    )  # fmt: skip
    assert count.active_experts == 3 * 2 * M * H, "a pair uses every layer of both stacks"
    assert count.norms == (3 * 2 + 2 * 3 + 2) * M


def test_flops_are_those_of_a_sequence_over_its_tokens_of_both_stacks():
    count = count_flops(MODEL, LENGTHS)
    encoder = T * (2 * 4 * M * ND + 4 * T * ND)
    decoder = L * (2 * 4 * M * ND + 4 * L * ND)
    cross = L * (2 * 2 * M * ND + 4 * T * ND) + T * 2 * 2 * M * ND
    by_hand = 3 * encoder + 2 * (decoder + cross)
    assert count.attention == pytest.approx(by_hand / (T + L))
    assert count.experts == pytest.approx(3 * T * 2 * 2 * M * H / (T + L))
    assert count.router == pytest.approx(3 * T * 2 * M * E / (T + L))
    assert count.dense_ffn == pytest.approx(2 * L * 2 * 2 * M * H / (T + L))
    assert count.head == pytest.approx(L * 2 * M * V / (T + L))
    assert sum(training_flops(MODEL, LENGTHS).values()) == pytest.approx(3 * count.computed)


def workload(**model):
    return resolve(
        ExperimentConfig(
            model=dataclasses.replace(MODEL, **model),
            data=DataConfig(sequence_length=T, objective=SpanCorruption()),
            optimizer=OptimizerConfig(warmup_steps=0),
            training=TrainingConfig(batch_size=4),
            mesh=MeshConfig(data=1),
        ),
        1,
    )


def test_lengths_are_those_of_the_objective():
    work = workload()
    assert work.lengths == LENGTHS, "of 35 tokens 5 are noise, in 2 spans: 5 + 2 + 1"
    assert (work.tokens, work.decoder_tokens) == (4 * (T + L), 4 * L)


def test_memory_is_of_the_tokens_of_each_stack():
    full = workload(remat="full")
    assert saved_bytes(full) == 4 * 4 * M * (3 * T + 2 * L), "the input of every layer"
    assert estimate_memory(full).logits == 2 * 4 * 4 * L * V
    # Keys and values of two layers, for the text so far and for the encoder's memory.
    assert kv_cache_bytes(full, 5, L) == 5 * 2 * (2 * ND * 4 * (L + T) + 4 * L)


def test_a_plan_describes_it():
    plan = Plan(workload())
    described = describe(plan)
    assert described["tokens_per_step"] == 4 * (T + L)
    assert described["parameters"]["attention"] == 7 * 4 * M * ND
    assert "attention" in parameters_text(plan)
