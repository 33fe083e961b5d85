"""Costs of parts: traced by default, or written out by the part."""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import DataConfig, ExperimentConfig, MeshConfig, TrainingConfig
from moe_jax.costs import Bytes, kept_bytes, traced_costs
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import RMSNorm
from moe_jax.models.layer import Layer, ParallelLayer
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.activations import Gelu, SwiGLU
from moe_jax.moe.part import MoE
from moe_jax.parameters import ParameterSpec, linear, scaled_init
from moe_jax.part import Dims, Part
from moe_jax.planning.arithmetic import count_flops, count_parameters
from moe_jax.planning.communication import collectives
from moe_jax.planning.flops import training_flops
from moe_jax.planning.memory import estimate_memory, kv_cache_bytes, saved_bytes
from moe_jax.planning.report import Plan
from moe_jax.planning.text import plan_text
from moe_jax.planning.topology import parse_topology
from moe_jax.planning.traffic import hbm_traffic
from moe_jax.planning.workload import resolve
from tests.foreign import GatedRecurrence

DIMS = Dims(model_dim=16)
LENGTH = 12
ATTENTION = Attention(num_heads=4, head_dim=6, kernel="xla")


@pytest.mark.parametrize(
    "part",
    [
        ATTENTION,
        replace(ATTENTION, num_kv_heads=2, qk_norm=RMSNorm(), biases=tuple("qkv")),
        replace(ATTENTION, num_kv_heads=2, softcap=2.0, sink=True, window=3),
        replace(ATTENTION, clip_qkv=1.0, qk_norm=RMSNorm(), qk_norm_at="projection"),
        Mlp(dim=40),
        Mlp(dim=40, activation=SwiGLU(), use_bias=True),
        Mlp(dim=40, activation=Gelu()),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trace_agrees_with_what_parts_write_out(part, dtype):
    """FLOPs and saved outputs for remat "dots" agree, whatever dims are split over tensor."""
    written, traced = part.costs(DIMS, LENGTH, dtype), traced_costs(part, DIMS, LENGTH, dtype)
    for batched in (False, True):
        flops = [sum(c.flops for c in costs if c.batched == batched) for costs in (written, traced)]
        assert flops[0] == flops[1], batched
    for name in ("saved_dots", "sums"):
        sizes = [sum(getattr(c, name).on(1) if name != "sums" else c.sums for c in costs)
                 for costs in (written, traced)]  # fmt: skip
        assert sizes[0] == sizes[1], name
    assert {cost.kind for cost in traced} == {cost.kind for cost in written}
    # What a backward pass reads depends on how the maths is written, but its size is similar.
    sizes = [sum(cost.saved.on(1) for cost in costs) for costs in (written, traced)]
    assert 0.5 * sizes[0] <= sizes[1] <= 2 * sizes[0]


def test_products_of_a_dense_ffn_read_and_write_what_its_formula_says():
    (written,), (traced, nothing) = (
        Mlp(dim=40).costs(DIMS, LENGTH, "bfloat16"),
        traced_costs(Mlp(dim=40), DIMS, LENGTH, "bfloat16"),
    )
    assert traced.traffic.on(1) == written.traffic.on(1) == 2 * (16 + 40) * 2
    assert (nothing.flops, nothing.traffic) == (0, Bytes(0, 0))


@dataclasses.dataclass(frozen=True)
class Loops(Part):
    """A part with matmuls in a scan, in a branch and in a convolution."""

    def specs(self, dims):
        def spec(*shape):
            return ParameterSpec(shape, (None,) * len(shape), scaled_init(1.0, 16), "attention")

        return {"one": spec(16, 16), "taps": spec(3, 16, 16), "layers": spec(5, 16, 16)}

    def cache_specs(self, dims, batch, length):
        shape = (batch, length, 6)
        init = scaled_init(1.0, 1)
        return {"latent": ParameterSpec(shape, ("batch", None, None), init, "cache"),
                "keys": ParameterSpec(shape, ("batch", None, "heads"), init, "cache")}  # fmt: skip

    def apply(self, params, x_BLM, call, own):
        y_BLM, _ = jax.lax.scan(lambda y, w: (linear(y, w), None), x_BLM, params["layers"])
        y_BLM = jax.lax.cond(
            jnp.sum(call.tokens_BL) > 3,
            lambda y: linear(linear(y, params["one"]), params["one"]),
            lambda y: linear(y, params["one"]),
            y_BLM,
        )
        taps = params["taps"].astype(x_BLM.dtype)
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(y_BLM, taps, (1,), "SAME",
                                            dimension_numbers=numbers), None, None  # fmt: skip


def test_loops_branches_and_convolutions_are_counted():
    plain, batched = Loops().costs(DIMS, LENGTH, "float32")
    square = 2 * 16 * 16
    assert plain.flops == 5 * square + 2 * square, "five rounds, and the longer branch"
    assert batched.flops == 3 * square, "remat computes a convolution again"
    assert plain.saved_dots == Bytes(4 * 16 * (5 + 2))
    assert plain.saved.whole >= 4 * 16 * (5 + 1), "the carry of every round"
    cache = Loops().cache_specs(DIMS, 1, LENGTH)
    assert kept_bytes(cache, "bfloat16") == Bytes(2 * 6 * LENGTH, 2 * 6 * LENGTH)
    assert plain.sums == 0, "nothing is split over tensor"


def test_weights_are_no_activations():
    """A matrix of a million numbers in another dtype than the tokens is not a saved activation."""
    (cost,) = (c for c in traced_costs(Mlp(dim=2**16), DIMS, 2, "bfloat16") if c.flops)
    assert cost.saved.whole <= 4 * 2**16 * 3


def test_a_layer_keeps_a_residual_and_a_normed_copy_of_each_branch():
    branches = (("attention", Attention(num_heads=2, head_dim=4)), ("mlp", Mlp(dim=8)))
    parts = [cost for _, part in branches for cost in part.costs(DIMS, LENGTH, "bfloat16")]
    alone = sum(cost.saved.on(1) for cost in parts)
    one, both = (cls(branches=branches).costs(DIMS, LENGTH, "bfloat16")
                 for cls in (Layer, ParallelLayer))  # fmt: skip
    assert sum(cost.saved.on(1) for cost in one) == alone + 2 * 2 * 2 * 16
    assert sum(cost.saved.on(1) for cost in both) == alone + 2 * 2 * 16
    assert [cost.ends_layer for cost in one if cost.flops] == [False, False, True]
    assert all(cost.ends_layer for cost in both)


def planned(parts, layers, mesh=None, **model):
    config = ExperimentConfig(
        model=LanguageModel(
            vocab_size=32, model_dim=16, parts=parts, stack=StackLayout.of(layers), **model
        ),
        data=DataConfig(sequence_length=LENGTH),
        training=TrainingConfig(batch_size=8),
        mesh=mesh or MeshConfig(data=1),
    )
    return resolve(config, config.mesh.num_devices)


def test_a_foreign_mixer_is_planned_with_no_code():
    """Three matmuls of 16 x 8 per token and layer, in two of three layers."""
    attention = replace(ATTENTION, num_heads=2, head_dim=8)
    parts = {"mixer": GatedRecurrence(dim=8), "attention": attention, "mlp": Mlp(dim=24)}
    layers = [("mixer", "mlp"), ("mixer", "mlp"), ("attention", "mlp")]
    work = planned(parts, layers)
    flops, parameters = (count(work.model, LENGTH) for count in (count_flops, count_parameters))
    assert flops.other == 2 * 3 * (2 * 16 * 8)
    assert flops.attention == 4 * 2 * 16 * 16 + 2 * 2 * LENGTH * 16
    assert flops.dense_ffn == 3 * 2 * 2 * 16 * 24
    assert parameters.other == 2 * 3 * 16 * 8
    assert parameters.total == sum(spec.size for spec in jax.tree.leaves(work.model.specs()))
    assert training_flops(work.model, LENGTH)["other"] == 3 * flops.other
    dots, full = (planned(parts, layers, remat=remat) for remat in ("dots", "full"))
    assert training_flops(full.model, LENGTH)["other"] == 4 * flops.other
    # The saved outputs of its matmuls, 8 + 8 + 16 numbers, add to those of other parts and inputs.
    without = planned({"attention": parts["attention"], "mlp": Mlp(dim=24)}, layers[2:] * 3,
                      remat="dots")  # fmt: skip
    of_attention = 3 * 16 + 16
    assert saved_bytes(without) - saved_bytes(dots) == 4 * 8 * LENGTH * 2 * (of_attention - 32)
    assert estimate_memory(work).saved_activations > 0
    assert hbm_traffic(work)["other"] > 3 * 4 * parameters.other
    of_a_token = 2 * 16 * 4 + 4
    assert kv_cache_bytes(work, 8, LENGTH) == 8 * LENGTH * of_a_token, "of one attention layer"
    mesh = MeshConfig(data=1, fsdp=2, tensor=2)
    sent = {one.name for one in collectives(planned(parts, layers, mesh))}
    assert {"mixer weights", "mixer gradient", "other output"} <= sent
    said = plan_text(Plan(work, parse_topology("v5e:1x1")))
    assert "other" in said and "run_experts -" in said


def test_several_moe_parts_of_different_sizes_add_up():
    small = MoE(num_experts=4, num_selected_experts=2, expert_dim=8, run_experts="einsum")
    large = MoE(num_experts=8, num_selected_experts=1, expert_dim=32, run_experts="ragged")
    parts = {"attention": Attention(num_heads=2, head_dim=8), "small": small, "large": large}
    both = [("attention", "small"), ("attention", "large"), ("attention", "large")]
    work = planned(parts, both)
    count = count_flops(work.model, LENGTH)
    assert count.experts == 2 * (2 * 2 * 16 * 8) + 2 * (2 * 2 * 16 * 32)
    assert count.router == 2 * 16 * 4 + 2 * (2 * 16 * 8)
    alone = planned({"attention": parts["attention"], "small": small}, both[:1])
    assert count.dispatch == count_flops(alone.model, LENGTH).dispatch > 0
    active = 2 * (2 * 16 * 8) + 2 * (2 * 16 * 32)
    assert count_parameters(work.model, LENGTH).active_experts == active
    assert work.run_experts == {"small": "einsum", "large": "ragged"}
