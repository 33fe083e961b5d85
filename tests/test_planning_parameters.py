"""Parameters by the three conventions, and a device's share of them."""

import dataclasses
import math

import jax
import pytest

from moe_jax.config import MeshConfig
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.mamba import Mamba
from moe_jax.layers.norms import LayerNorm, RMSNorm
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import named_sharding
from moe_jax.planning.parameters import (
    COMPONENTS,
    component,
    count_parameters,
    local_bytes,
    local_size,
    num_parts,
    plain_parameter_specs,
    shards_of,
)


def published(layers, model, heads, kv_heads, experts, selected, hidden, vocab, qk_norm=None):
    """A decoder with SwiGLU experts in every layer, head dim 128, and an untied head."""
    return LanguageModel(
        vocab_size=vocab, model_dim=model, tie_embeddings=False,
        parts={
            "attention": Attention(
                num_heads=heads, num_kv_heads=kv_heads, head_dim=128, qk_norm=qk_norm
            ),
            "moe": MoE(
                num_experts=experts, num_selected_experts=selected, expert_dim=hidden,
                activation=SwiGLU(), router=TokenChoice(renormalize=True),
            ),
        },
        stack=StackLayout(repeats=layers),
    )  # fmt: skip


MIXTRAL_8X7B = published(32, 4096, 32, 8, 8, 2, 14336, 32000)
SMALL = LanguageModel(
    vocab_size=64, model_dim=16, tie_embeddings=False, norm=LayerNorm(),
    parts={
        "attention": Attention(
            num_heads=4, num_kv_heads=2, head_dim=8, biases=tuple("qkvo"), qk_norm=RMSNorm()
        ),
        "mlp": Mlp(dim=32),
        "moe": MoE(
            num_experts=4, num_selected_experts=2, expert_dim=24, use_bias=True,
            shared_expert_dim=24, shared_expert_gate=True,
        ),
    },
    stack=StackLayout(first=(("attention", "mlp"),), repeats=3),
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (MIXTRAL_8X7B, 46_702_792_704, (12.88, 12.75, 12.62)),
        # Qwen3-30B-A3B, DBRX
        (
            published(48, 2048, 32, 4, 128, 8, 768, 151936, qk_norm=RMSNorm()),
            30_532_122_624,
            (3.35, 3.04, 2.73),
        ),
        (published(40, 6144, 48, 8, 16, 4, 10752, 100352), 131_596_523_520, (36.47,)),
    ],
)
def test_models_whose_size_is_published(config, total, active):
    """Totals are those of the released weights; active ones are in billions, by convention."""
    count = count_parameters(config, 16)
    assert count.total == total
    conventions = count.by_convention().values()
    for (_, counted), expected in zip(conventions, active, strict=False):
        assert counted / 1e9 == pytest.approx(expected, abs=0.006)


def test_conventions_leave_out_embeddings():
    count = count_parameters(MIXTRAL_8X7B, 16)
    both, without_input, without = count.by_convention().values()
    assert both == (count.total, count.active)
    assert without_input == (count.total - 32000 * 4096, count.active - 32000 * 4096)
    assert without == (count.total - 2 * 32000 * 4096, count.active - 2 * 32000 * 4096)


def test_a_tied_embedding_is_the_head_which_only_the_last_convention_leaves_out():
    count = count_parameters(dataclasses.replace(SMALL, tie_embeddings=True), 16)
    both, without_input, without = count.by_convention().values()
    assert both == without_input == (count.total, count.active)
    assert without == (count.total - 64 * 16, count.active - 64 * 16)


MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=2, expert=4),
    MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(data=1, expert=4, tensor=2),
    MeshConfig(slices=2, data=1, fsdp=2, expert=2),
    MeshConfig(slices=2, data=1, fsdp=2, expert=2, experts_span_slices=True),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_device_holds_what_its_shardings_say(mesh, scan_layers):
    config = dataclasses.replace(SMALL, scan_layers=scan_layers)
    real = make_mesh(mesh, jax.devices())
    held = 0
    for spec in plain_parameter_specs(config):
        local = named_sharding(spec.axes, real).shard_shape(spec.shape)
        assert local_size(spec, mesh) == math.prod(local)
        assert num_parts(spec, mesh) * local_size(spec, mesh) == spec.size
        held += local_size(spec, mesh)
    assert local_bytes(config.specs(), mesh) == 4 * held


def test_by_hand():
    """Experts [4, 16, 24] in 3 layers: fsdp 2, expert 2 and tensor 2 leave one eighth each."""
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    assert [shards_of(name, mesh) for name in ("model", "expert", "hidden", "batch", None)] == [
        2, 2, 2, 4, 1,
    ]  # fmt: skip
    local = dict.fromkeys(COMPONENTS, 0)
    for spec in plain_parameter_specs(SMALL):
        local[component(spec)] += local_size(spec, mesh)
    matrices, biases = 2 * 4 * 16 * 24 // 8, 4 * 24 // 4 + 4 * 16 // 4
    assert local["experts"] == 3 * (matrices + biases)
    assert local["embedding"] == local["head"] == 64 * 16 // 4
    assert local["router"] == 3 * 16 * 4 // 2, "split over fsdp; every device routes its own tokens"
    assert local["norms"] == 2 * 16 * (4 * 2 + 1), "never split"


def test_experts_of_a_tied_block_are_counted_once():
    moe = MoE(num_experts=4, num_selected_experts=1, expert_dim=8)
    parts = {"attention": Attention(num_heads=1, head_dim=4), "moe": moe}
    layout = StackLayout(unit=(("attention", "moe"),), repeats=2, tied=("moe",))
    model = LanguageModel(vocab_size=8, model_dim=4, parts=parts, stack=layout)
    count = count_parameters(model, 16)
    assert (count.experts, count.active_experts) == (4 * 2 * 4 * 8, 2 * 4 * 8)


def test_mamba_is_a_component_of_its_own():
    """Per layer: [4, 8] twice in, [8, 4] out, taps [4, 8] with a bias, [8, 2 + 4] to dt, B, C.

    Then [2, 8] with a bias to the steps, [8, 2] of log A, and D.
    """
    mamba = Mamba(state_dim=2, dt_rank=2)
    layout = StackLayout(unit=(("mamba", "mlp"),), repeats=3)
    model = LanguageModel(
        vocab_size=8, model_dim=4, parts={"mamba": mamba, "mlp": Mlp(dim=8)}, stack=layout
    )
    count = count_parameters(model, 16)
    assert count.mamba == 3 * (3 * 32 + 32 + 8 + 48 + 16 + 8 + 16 + 8)
    assert count.other == count.attention == 0
    assert count.total == count.active == sum(spec.size for spec in plain_parameter_specs(model))
