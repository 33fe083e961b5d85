"""The denominators of benchmarks: the least work of a layer, against numbers worked by hand."""

import dataclasses

import jax
import pytest

from benchmarks import aot_tpu, sharded_step
from benchmarks.aot_tpu import FORMS, LAYERS, Layer, Row, Work, fewest, line, mesh_for, work_of
from moe_jax.config import MeshConfig
from moe_jax.moe.activations import Relu, SwiGLU
from moe_jax.moe.part import MoE
from moe_jax.moe.run_experts.plan import IMPLEMENTATIONS
from moe_jax.planning.hlo import Collective, Program

RELU = Layer(
    MoE(num_experts=4, num_selected_experts=1, expert_dim=16, activation=Relu()),
    model_dim=8,
    tokens=10,
)


def test_least_forward_of_a_layer_whose_experts_are_split_over_four_devices():
    least = fewest(RELU, MeshConfig(data=1, expert=4), gradient=False)
    # Two products of 8 x 16 per token, and the router's 8 x 4; a multiply-add is two FLOPs.
    assert least.flops == 10 * 2 * (2 * 8 * 16 + 8 * 4)
    # Three of four tokens travel to another device as 8 numbers of 2 bytes, and return.
    assert least.wire_bytes == 2 * 10 * (3 / 4) * 8 * 2
    # Tokens in and out in 2 bytes; one expert's two matrices and the router in 4 bytes.
    assert least.hbm_bytes == 2 * 10 * 8 * 2 + 4 * (2 * 8 * 16 + 8 * 4)


def test_least_with_the_gradient():
    least = fewest(RELU, MeshConfig(data=1, expert=4), gradient=True)
    assert least.flops == 3 * fewest(RELU, MeshConfig(data=1, expert=4), gradient=False).flops
    # Gradients of tokens travel both ways too. The router's gradient is summed over all four
    # devices: a reduce-scatter and an all-gather of 8 x 4 numbers of 4 bytes.
    assert least.wire_bytes == 4 * 10 * (3 / 4) * 8 * 2 + 2 * (3 / 4) * 8 * 4 * 4
    # x, y, dy and dx move; parameters are read and gradients written.
    assert least.hbm_bytes == 4 * 10 * 8 * 2 + 2 * 4 * (2 * 8 * 16 + 8 * 4)


def test_least_of_glu_experts_split_over_fsdp_too():
    moe = MoE(num_experts=2, num_selected_experts=2, expert_dim=16, activation=SwiGLU())
    layer, mesh = Layer(moe, model_dim=8, tokens=10), MeshConfig(data=1, fsdp=4, expert=2)
    matrices = 3 * 8 * 16  # one expert: what a device computes with
    tokens = 10 * 2 * (1 / 2) * 8 * 2  # two choices per token, half of them on the other device
    forward, both = (fewest(layer, mesh, gradient) for gradient in (False, True))
    assert forward.flops == 10 * 2 * (2 * matrices + 8 * 2)
    assert forward.wire_bytes == 2 * tokens + (3 / 4) * matrices * 2
    # A quarter of the matrices and the router is read. Gathered matrices are written and read.
    weights = 4 * (matrices / 4 + 8 * 2 / 4) + 2 * matrices * 2
    assert forward.hbm_bytes == 2 * 10 * 8 * 2 + weights
    assert both.hbm_bytes == 4 * 10 * 8 * 2 + 2 * weights
    # Matrices are gathered once and scattered once; 8 devices share the router.
    assert both.wire_bytes == 4 * tokens + 2 * (3 / 4) * matrices * 2 + 2 * (7 / 8) * 8 * 2 * 4


def test_one_device_sends_nothing():
    assert fewest(RELU, MeshConfig(data=1), gradient=True).wire_bytes == 0


@pytest.mark.parametrize(
    ("layer", "num_devices", "mesh"),
    [
        ("switch", 16, MeshConfig(data=1, expert=16)),
        ("switch", 64, MeshConfig(data=1, expert=64)),
        ("mixtral", 16, MeshConfig(data=1, fsdp=2, expert=8)),
        ("mixtral", 64, MeshConfig(data=1, fsdp=8, expert=8)),
    ],
)
def test_meshes(layer, num_devices, mesh):
    assert mesh_for(LAYERS[layer].moe, num_devices) == mesh


def test_a_ragged_exchange_counts_as_many_rows_as_equally_loaded_experts_get():
    def program(kind, num_bytes):
        one = Collective(kind, "", num_bytes, group=(0, 1, 2, 3), count=2)
        return Program(7, {"": 11}, (one,), {}, ())

    slots = work_of(program("all-to-all", 400), RELU, chunks=1)
    assert slots == Work(7, 11, 2 * 400 * 3 / 4)
    # A buffer for 40 rows of 16 bytes, 10 of them filled.
    rows = work_of(program("ragged-all-to-all", 640), RELU, chunks=1)
    assert rows.wire_bytes == 2 * 160 * 3 / 4


def test_the_table_shows_ratios_and_failures():
    row = Row("switch", "v5e:4x4", "gather compiler, 1.25", gradient=True)
    row = dataclasses.replace(
        row,
        work=Work(3.0, 5.0, 7.0),
        least=Work(2.0, 2.0, 2.0),
        temporary_bytes=2_000_000,
        milliseconds={"compute": 1.0, "memory": 4.0, "wire": 2.0},
        collectives={"all-to-all expert": (4, 6e6)},
    )
    assert line(row).split() == (
        "gather compiler, 1.25 f+b 1.50 2.50 3.50 2 1.00 4.00* 2.00 4 all-to-all expert 6.0".split()
    )
    failed = dataclasses.replace(row, work=None, error="ValueError: no")
    assert line(failed).endswith("FAILED: ValueError: no")


def test_without_libtpu_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["aot_tpu"])
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[tpu\]'"):
        aot_tpu.main()


def test_every_way_to_run_experts_is_compared():
    ways = set(IMPLEMENTATIONS) - {"auto"}
    assert {form.run_experts for form in FORMS} == ways
    assert {run_experts for run_experts, _ in sharded_step.WAYS} == ways
    sizes = [mesh.fill(8).num_devices for mesh in sharded_step.MESHES.values()]
    assert sizes == [sharded_step.NUM_DEVICES] * 4


def test_steps_are_divided_by_the_one_of_their_way_in_the_same_round():
    class Taken:
        def __init__(self, *seconds):
            self.seconds = iter((99.0, *seconds))  # the first call warms up

        def take(self):
            return next(self.seconds)

    alone = {"einsum": Taken(1.0, 3.0, 4.0, 4.0), "gather": Taken(5.0, 5.0, 5.0, 5.0)}
    sharded = {
        ("data=8", "einsum", "compiler"): Taken(3.0, 8.0),
        ("data=8", "gather", "explicit"): Taken(10.0, 5.0),
    }
    found = sharded_step.ratios(alone, sharded, rounds=2)
    assert list(found.values()) == [[1.5, 2.0], [2.0, 1.0]]


def test_the_batch_has_one_microbatch_of_next_tokens():
    batch = sharded_step.batch()
    assert all(value.shape == (1, 16, 128) for value in jax.tree.leaves(batch))
    assert (batch["inputs"][..., 1:] == batch["targets"][..., :-1]).all()
