"""Bytes that devices send, by hand; the axes of a group; the bytes that leave a node."""

import dataclasses

import pytest

from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.models.multi_token import MultiToken
from moe_jax.models.stack import StackLayout
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.planning.communication import Collective, collectives, crossing_share, num_islands
from moe_jax.planning.hlo import Collective as HloCollective
from moe_jax.planning.report import axes_of_group, collective_rows
from moe_jax.planning.workload import resolve
from moe_jax.weights.low_rank import Adapters
from moe_jax.weights.quantised import Quantisation

# One dense and two MoE layers; M = 8, 2 heads and 2 key-value heads of 4, H = 16, V = 32, L = 16;
# E = 4 with H = 12, K = 2, capacity factor 1: 2 slots per token. All in bfloat16.
MODEL = LanguageModel(
    vocab_size=32, model_dim=8, tie_embeddings=False, compute_dtype="bfloat16",
    parts={
        "attention": Attention(num_heads=2, head_dim=4),
        "mlp": Mlp(dim=16),
        "moe": MoE(
            num_experts=4, num_selected_experts=2, expert_dim=12, run_experts="gather",
            capacity=Capacity(train_factor=1.0),
        ),
    },
    stack=StackLayout(first=(("attention", "mlp"),), repeats=2),
)  # fmt: skip
EXPERTS, ATTENTION, TABLE = 2 * 4 * 2 * 96, 3 * 4 * 64, 32 * 8


def messages(mesh, microbatches=1, batch=16, optimizer=None, **model):
    config = ExperimentConfig(
        model=dataclasses.replace(MODEL, **model), data=DataConfig(sequence_length=16),
        optimizer=optimizer or OptimizerConfig(),
        training=TrainingConfig(batch_size=batch, num_microbatches=microbatches), mesh=mesh,
    )  # fmt: skip
    found = collectives(resolve(config, mesh.num_devices))
    return {(one.name, one.operation): one for one in found}


def test_one_device_sends_nothing():
    assert messages(MeshConfig(data=1)) == {}


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 75),  # gets three quarters of 100 bytes, sends its quarter three times
        ("reduce-scatter", 75),
        ("all-reduce", 150),
        ("all-to-all", 75),
    ],
)
def test_bytes_on_the_wire(kind, sent):
    assert Collective("", "experts", kind, ("data",), 4, 100.0).wire_bytes == sent


def test_copies_reduce_their_gradients():
    found = messages(MeshConfig(data=4))
    assert {kind for _, kind in found} == {"all-reduce"}
    assert found["experts gradient", "all-reduce"].array_bytes == 2 * EXPERTS
    assert found["attention gradient", "all-reduce"].axes == ("data",)
    halves = messages(MeshConfig(data=4), microbatches=2)
    assert halves["experts gradient", "all-reduce"].array_bytes == 2 * 2 * EXPERTS


def test_fsdp_gathers_weights_twice_and_scatters_gradients_once():
    found = messages(MeshConfig(data=2, fsdp=2))
    weights = found["experts weights", "all-gather"]
    assert (weights.array_bytes, weights.axes) == (2 * 2 * EXPERTS, ("fsdp",))
    assert found["experts gradient", "reduce-scatter"].array_bytes == 2 * EXPERTS
    shards = found["experts gradient", "all-reduce"]
    assert (shards.array_bytes, shards.axes) == (2 * EXPERTS / 2, ("data",))
    # 16 sequences of 16 over 4 devices, 8 dims: the rows of tokens are larger than the table.
    assert found["embedding weights", "all-gather"].array_bytes == 2 * TABLE
    assert found["head weights", "all-gather"].array_bytes == 2 * 2 * TABLE
    few = messages(MeshConfig(data=2, fsdp=2), batch=4)
    assert few["embedding weights", "all-gather"].array_bytes == 2 * 16 * 8


def test_a_tied_table_is_gathered_for_the_head_of_both_passes():
    """The lookup reads what the head gathers; an extra forward pass sends the rows of tokens."""
    for batch in (4, 16):
        tied = messages(MeshConfig(data=2, fsdp=2), batch=batch, tie_embeddings=True)
        assert tied["embedding weights", "all-gather"].array_bytes == 2 * 2 * TABLE
        assert tied["embedding gradient", "reduce-scatter"].array_bytes == 2 * TABLE
    # The balance loss of the whole batch; 16 tokens on a device and microbatch, half of the table.
    again = messages(MeshConfig(data=2, fsdp=2), microbatches=2, batch=8, tie_embeddings=True)
    assert again["embedding weights", "all-gather"].array_bytes == 2 * (2 * 2 * TABLE + 2 * 16 * 8)


def test_an_adapted_model_gathers_its_matrices_and_reduces_the_gradients_of_adapters():
    """Experts are stored in int8: one byte each, and half a byte for the scale of four."""
    found = messages(
        MeshConfig(data=2, fsdp=2), optimizer=OptimizerConfig(trainable=("adapters",)),
        adapters=Adapters(("attention",), rank=2), quantisation=Quantisation(group_size=4),
    )  # fmt: skip
    assert {name for name, kind in found if kind != "all-gather"} == {"adapters gradient"}
    assert found["experts weights", "all-gather"].array_bytes == 2 * 1.5 * EXPERTS
    assert found["attention weights", "all-gather"].array_bytes == 2 * 2 * ATTENTION


def test_norms_are_copied_everywhere():
    found = messages(MeshConfig(data=2, fsdp=2))
    assert found["norms gradient", "all-reduce"].array_bytes == 2 * 8 * 7
    assert found["norms gradient", "all-reduce"].axes == ("data", "fsdp")


def test_slots_travel_to_their_experts_and_back():
    """64 tokens per device, 2 slots of 8 numbers each, 2 layers, forward and backward."""
    found = messages(MeshConfig(data=1, expert=4))
    for name in ("dispatch", "combine"):
        one = found[name, "all-to-all"]
        assert (one.array_bytes, one.axes, one.group_size) == (
            2 * 2 * 64 * 2 * 8 * 2,
            ("expert",),
            4,
        )
    assert ("experts gradient", "all-reduce") not in found, "every expert is on one device"
    assert found["attention gradient", "all-reduce"].axes == ("expert",)
    assert found["attention gradient", "all-reduce"].array_bytes == 2 * ATTENTION
    again = messages(MeshConfig(data=1, expert=4), remat="full")
    assert again["dispatch", "all-to-all"].array_bytes == 3 * 2 * 64 * 2 * 8 * 2
    assert again["combine", "all-to-all"].array_bytes == 2 * 2 * 64 * 2 * 8 * 2, "gates need none"
    moe = dataclasses.replace(MODEL.part["moe"], run_experts="einsum")
    parts = {**MODEL.part, "moe": moe}
    einsum = messages(MeshConfig(data=1, expert=4), remat="full", parts=parts)
    assert einsum["combine", "all-to-all"].array_bytes == 3 * 2 * 64 * 2 * 8 * 2


def test_experts_may_span_slices():
    mesh = MeshConfig(slices=2, data=1, expert=2, experts_span_slices=True)
    one = messages(mesh)["dispatch", "all-to-all"]
    assert (one.axes, one.group_size) == (("expert_slice", "expert"), 4)
    assert num_islands(mesh, one.axes, devices_per_island=2) == 2
    assert one.crossing_bytes(mesh, 2) == one.array_bytes / 2


def test_tensor_parallelism_sums_outputs():
    """256 tokens: attention in 3 layers, dense FFN in one, experts 2 x 2 slots; once each way."""
    found = messages(MeshConfig(data=1, tensor=2))
    sizes = {name: one.array_bytes for (name, _), one in found.items()}
    tokens = 256 * 8 * 2
    assert sizes == {
        "attention output": 2 * 3 * tokens,
        "dense ffn output": 2 * tokens,
        "experts output": 2 * 2 * 2 * tokens,
        "head output": 2 * tokens,
    }
    assert all(one.axes == ("tensor",) for one in found.values())
    full = messages(MeshConfig(data=1, tensor=2), remat="full")
    assert full["attention output", "all-reduce"].array_bytes == 3 * 3 * tokens


def test_tensor_parallelism_sums_the_embeddings_and_heads_of_multi_token_modules():
    """Two modules beside the model; two microbatches embed all tokens once more, for sums."""
    modules = MultiToken(depth=2, layer=("attention", "mlp"))
    tokens = 256 * 8 * 2
    for microbatches, ends in ((1, 3 * 2), (2, 3 * 3)):
        found = messages(MeshConfig(data=1, tensor=2), microbatches, multi_token=modules)
        assert found["head output", "all-reduce"].array_bytes == ends * tokens


@pytest.mark.parametrize(
    ("axes", "islands"),
    [(("tensor",), 1), (("expert",), 1), (("fsdp",), 2), (("data",), 2), (("data", "fsdp"), 4)],
)
def test_axes_that_leave_a_node_of_eight(axes, islands):
    """Tensor varies fastest over device numbers: data 2, fsdp 2, expert 4, tensor 2 on 4 nodes."""
    assert num_islands(MeshConfig(data=2, fsdp=2, expert=4, tensor=2), axes, 8) == islands


@pytest.mark.parametrize(
    ("kind", "islands", "group", "share"),
    [
        ("all-gather", 1, 8, 0.0),
        ("all-gather", 2, 2, 1 / 2),  # half comes from outside, through the only card
        ("all-gather", 2, 16, 1 / 16),  # half comes from outside, through eight cards
        ("reduce-scatter", 4, 32, 3 / 32),
        ("all-reduce", 2, 16, 2 / 16),
        ("all-to-all", 2, 16, 1 / 2),
        ("ragged-all-to-all", 4, 32, 3 / 4),
    ],
)
def test_bytes_that_leave_a_node(kind, islands, group, share):
    assert crossing_share(kind, islands, group) == pytest.approx(share)


MESH = MeshConfig(data=2, fsdp=2, expert=2)


@pytest.mark.parametrize(
    ("group", "axes"),
    [
        ((0, 1), ("expert",)),
        ((1, 3), ("fsdp",)),
        ((0, 4), ("data",)),
        ((0, 1, 2, 3), ("fsdp", "expert")),
        (tuple(range(8)), ("data", "fsdp", "expert")),
        ((5,), ()),
    ],
)
def test_the_axes_of_a_group_are_those_its_devices_differ_in(group, axes):
    assert axes_of_group(group, MESH) == axes


def test_collectives_of_a_program_are_added_by_operation_and_axes():
    program = (
        HloCollective("all-gather", "f32[8]", 32, (0, 2), "layer_0", 3),
        HloCollective("all-gather", "f32[16]", 64, (1, 3), "layer_1", 1),
        HloCollective("all-to-all", "f32[8]", 32, (0, 1), "", 10),
        HloCollective("all-reduce", "f32[]", 4, (0,), "", 1),  # on one device: nothing is sent
    )
    first, second = collective_rows(program, MESH, devices_per_island=2)
    assert (first.operation, first.axes, first.count) == ("all-to-all", ("expert",), 10)
    assert (first.array_bytes, first.wire_bytes, first.crossing_bytes) == (320, 160, 0)
    assert (second.operation, second.axes, second.count) == ("all-gather", ("fsdp",), 4)
    assert (second.array_bytes, second.wire_bytes) == (160, 80)
    assert second.crossing_bytes == 160 / 2, "of two nodes of two devices: a half, by one card"


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (MeshConfig(data=32), "a microbatch must split over"),
        (MeshConfig(data=1, expert=8), r"'expert' of \S*experts/wi .* over 8 devices"),
        (MeshConfig(data=1, fsdp=16), r"'model' of \S+ .* is 8, over 16 devices"),
        (MeshConfig(data=1, tensor=4), "num_heads"),
    ],
)
def test_a_mesh_that_splits_unevenly_is_refused(mesh, said):
    with pytest.raises(ValueError, match=said):
        messages(mesh)


def test_auto_is_resolved_for_the_machine():
    auto = dataclasses.replace(MODEL.part["moe"], run_experts="auto")
    model = dataclasses.replace(MODEL, parts=MODEL.part | {"moe": auto})
    config = ExperimentConfig(model=model, data=DataConfig(sequence_length=16))
    assert resolve(config).run_experts == {"moe": "ragged"}
    assert resolve(config, 1, "tpu").run_experts == {"moe": "gather"}
    assert resolve(config, 8).run_experts == {"moe": "gather"}


def test_all_devices_of_a_machine_are_used():
    config = ExperimentConfig(model=MODEL, data=DataConfig(sequence_length=16))
    assert resolve(config, 8).mesh.data == 8
    fixed = dataclasses.replace(config, mesh=MeshConfig(data=4))
    with pytest.raises(ValueError, match=r"4 of 8.*Set one size of config.mesh to -1"):
        resolve(fixed, 8)
