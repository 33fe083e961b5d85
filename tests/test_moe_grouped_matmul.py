"""Grouped matmuls: which kernel, its values and gradients, its tiles, and what it compiles to."""

import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax.moe.part import MoE
from moe_jax.moe.run_experts import grouped_matmul as module
from moe_jax.moe.run_experts.grouped_matmul import (
    KERNELS,
    Target,
    choose_kernel,
    grouped_matmul,
    libtpu_version,
    target_in_use,
)
from moe_jax.moe.run_experts.grouped_mosaic import check_dtype, check_multiples
from moe_jax.moe.run_experts.grouped_triton import BAND, find_tiles
from moe_jax.moe.run_experts.plan import plan_experts
from moe_jax.moe.run_experts.tiles import (
    TPU_TILE_BYTES,
    tile_rows,
    tpu_row_tiles,
    tpu_weight_tiles,
)
from tests.moe_oracle import rows_computed

# Which kernel is chosen.

OLD, MIDDLE, NEW = (0, 0, 42, 1), (0, 0, 47), (0, 0, 50, 1)


@pytest.mark.parametrize(
    ("target", "kernel"),
    [
        (Target("cpu"), "loop"),
        (Target("tpu", OLD), "megablox"),
        (Target("tpu", MIDDLE), "megablox"),
        (Target("tpu", (0, 0, 50)), "lax"),
        (Target("tpu", NEW), "lax"),
        (Target("tpu", (0, 1)), "lax"),
        (Target("tpu"), "megablox"),  # libtpu version unknown
        (Target("gpu", capability=(8, 0)), "triton"),
        (Target("gpu", capability=(9, 0)), "triton"),
        (Target("gpu", capability=(12, 0)), "triton"),
        (Target("gpu"), "triton"),  # compiled for GPUs that are not here
    ],
    ids=str,
)
def test_the_kernel_of_a_target(target, kernel):
    assert choose_kernel("auto", target) == kernel
    assert choose_kernel(kernel, target) == kernel
    assert choose_kernel("dense", target) == "dense"


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        (
            "auto",
            Target("gpu", capability=(7, 5)),
            "capability 8.0 or newer: got platform gpu, capability 7.5",
        ),
        ("auto", Target("gpu", capability=(0, 0)), "'ragged' needs an NVIDIA GPU"),  # AMD
        ("auto", Target("metal"), "needs a CPU, a TPU or a GPU: got platform metal"),
        ("lax", Target("tpu", OLD), r"needs a TPU with libtpu 0.0.50 or newer \(jax\[tpu\]>=0.12"),
        ("lax", Target("tpu", MIDDLE), r"got platform tpu, libtpu 0.0.47. Set"),
        ("lax", Target("gpu"), "needs a TPU with libtpu"),
        ("lax", Target("cpu"), "needs a TPU with libtpu"),
        ("loop", Target("tpu", NEW), "'loop' needs a CPU"),
        ("megablox", Target("gpu"), "'megablox' needs a TPU"),
        ("triton", Target("tpu", NEW), "'triton' needs an NVIDIA GPU"),
        ("mosaic_gpu", Target("gpu", capability=(8, 0)), "capability 9.0: got platform gpu"),
        ("mosaic_gpu", Target("gpu", capability=(10, 0)), "capability 9.0: got platform gpu"),
        ("mosaic_gpu", Target("cpu"), "capability 9.0: got platform cpu"),
    ],
    ids=str,
)
def test_dense_products_have_to_be_asked_for(name, target, message):
    with pytest.raises(ValueError, match=message) as error:
        choose_kernel(name, target)
    assert "grouped_matmul='dense'" in str(error.value) and "\n" not in str(error.value)


def test_the_version_of_the_tpu_compiler_is_that_of_its_package(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.50.1")
    assert libtpu_version() == NEW
    monkeypatch.setenv("TPU_LIBRARY_PATH", "other/libtpu.so")
    assert libtpu_version() is None
    # JAX's import of the package sets the path itself.
    package = types.SimpleNamespace(origin="/site/libtpu/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    assert libtpu_version() is None
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/site/libtpu/libtpu.so")
    assert libtpu_version() == NEW
    monkeypatch.delenv("TPU_LIBRARY_PATH")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.44.dev20260301+nightly")
    assert libtpu_version() == (0, 0, 44, 20260301)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert libtpu_version() is None


def test_a_plan_names_its_kernel():
    assert target_in_use() == Target("cpu")
    assert plan_experts(MoE()).kernel == "loop"
    assert plan_experts(MoE(run_experts="gather")).kernel == ""
    for kernel in ("loop", "megablox", "triton", "dense"):
        assert plan_experts(MoE(grouped_matmul=kernel)).kernel == kernel
    with pytest.raises(ValueError, match="'mosaic_gpu' needs an NVIDIA GPU"):
        plan_experts(MoE(grouped_matmul="mosaic_gpu"))
    with pytest.raises(ValueError, match="grouped_matmul"):
        MoE(grouped_matmul="cublas")


def test_the_kernel_does_not_change_results():
    fields = {field.name: field for field in MoE.__dataclass_fields__.values()}
    assert not fields["grouped_matmul"].metadata["changes_results"]
    assert set(KERNELS) == {"auto", "loop", "lax", "dense", *module.PRODUCTS}


# Values and gradients. Rows past the last group are NaN in the inputs of both passes.


def reference(x, weight, sizes, dy):
    """Product and both gradients, in float64, row by row."""
    y, dx, dweight = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(weight)
    for row, expert in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row] = x[row] @ weight[expert]
        dx[row] = weight[expert] @ dy[row]
        dweight[expert] += np.outer(x[row], dy[row])
    return y, dx, dweight


@functools.partial(jax.jit, static_argnames="kernel")
def run(x, weight, sizes, dy, kernel):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, kernel, len(x)), x, weight)
    return y, *vjp(dy)


def check(kernel, rows, inner, outer, sizes, dtype="float32", tolerance=2e-6):
    random = np.random.default_rng(0)

    def draw(*shape):
        return np.asarray(jnp.asarray(random.normal(size=shape), dtype), float)

    x, dy, weight = draw(rows, inner), draw(rows, outer), draw(len(sizes), inner, outer)
    expected = reference(x, weight, sizes, dy)
    filled = sum(sizes)
    x[filled:], dy[filled:] = np.nan, np.nan
    given = [jnp.asarray(value, dtype) for value in (x, weight, dy)]
    got = run(given[0], given[1], jnp.array(sizes, jnp.int32), given[2], kernel)
    for name, value, wanted in zip(("y", "dx", "dweight"), got, expected, strict=True):
        assert value.dtype == dtype and value.shape == wanted.shape
        value = np.asarray(value, float)
        if name != "dweight":
            value, wanted = value[:filled], wanted[:filled]
        scale = max(np.abs(wanted).max(initial=0), 1)
        np.testing.assert_allclose(value / scale, wanted / scale, atol=tolerance, err_msg=name)
    for size, of_expert in zip(sizes, np.asarray(got[2]), strict=True):
        assert size or not of_expert.any()


# Dims are not multiples of tiles; groups start and end anywhere.
CASES = {
    "an empty group, and groups that share tiles": (390, 136, 130, [100, 0, 37, 200]),
    "small": (40, 8, 12, [10, 0, 20, 3]),
    "all rows in one group": (300, 72, 200, [0, 0, 300]),
    "no rows": (64, 8, 16, [0, 0]),
    "one row": (64, 8, 16, [0, 1, 0]),
    "whole tiles": (512, 128, 256, [128, 0, 256, 128]),
    "more experts than rows": (6, 24, 8, [0, 1, 0, 0, 2, 0, 0, 0, 1]),
    "many tiles": (1300, 300, 136, [700, 1, 0, 499]),
}
QUICK = "an empty group, and groups that share tiles"


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        pytest.param(kernel, case, marks=() if case == QUICK else pytest.mark.slow)
        for kernel in ("megablox", "triton")
        for case in CASES
    ],
)
def test_values_and_gradients(kernel, case):
    check(kernel, *CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["megablox", "triton"])
def test_bfloat16_is_summed_in_float32(kernel):
    # Rounding the result costs at most 2^-8 of it; sums in bfloat16 cost several times that.
    check(kernel, 700, 512, 136, [600, 0, 60], "bfloat16", tolerance=2**-8)


def test_mosaic_takes_whole_tiles():
    check_multiples(128, 256)
    with pytest.raises(ValueError, match=r"multiples of 128: \(128, 200\)\. Set .*'triton'"):
        check_multiples(128, 200)


def test_mosaic_rounds_no_float32():
    check_dtype(jnp.bfloat16)
    array, sizes = jnp.ones((128, 128)), jnp.array([128], jnp.int32)
    with pytest.raises(ValueError, match=r"as TF32: float32\. Set grouped_matmul='triton'"):
        grouped_matmul(array, array[None], sizes, "mosaic_gpu", 128)


# Tiles.


TILE, NUM_ROWS = 16, 300
found_tiles = jax.jit(lambda sizes: find_tiles(sizes, TILE, NUM_ROWS))


@given(sizes=st.lists(st.integers(0, 75), min_size=4, max_size=4))
@settings(max_examples=40)
@example(sizes=[300, 0, 0, 0])
@example(sizes=[75, 75, 75, 75])
@example(sizes=[0, 0, 0, 0])
def test_tiles_cover_every_row_of_a_group_once(sizes):
    tile, num_rows = TILE, NUM_ROWS
    tiles = [np.asarray(values) for values in found_tiles(jnp.array(sizes, jnp.int32))]
    assert len(tiles[0]) % BAND == 0
    covered = np.full(num_rows, -1)
    count = 0
    for expert, first, end in zip(*tiles, strict=True):
        rows = covered[first : min(first + tile, end)]
        assert (rows == -1).all()
        rows[:] = expert
        count += first < end
    np.testing.assert_array_equal(covered[: sum(sizes)], np.repeat(np.arange(len(sizes)), sizes))
    assert (covered[sum(sizes) :] == -1).all()
    assert tile * count == rows_computed(np.array(sizes), tile, aligned=False)


@pytest.mark.parametrize(
    ("experts", "rows", "computed"),
    [
        # rows computed over rows filled, by tiles of 128, 256, 512 and 1,024 rows
        (1, 8192, (1.00, 1.00, 1.00, 1.00)),
        (8, 1024, (1.11, 1.21, 1.44, 1.88)),
        (32, 1024, (1.12, 1.24, 1.48, 1.96)),
        (4, 8192, (1.01, 1.02, 1.05, 1.09)),
        (64, 512, (1.24, 1.49, 1.98, 2.95)),
        (128, 256, (1.49, 1.99, 2.98, 4.96)),
    ],
)
def test_rows_computed_in_vain_by_tiles_of_megablox(experts, rows, computed):
    random = np.random.default_rng(0)
    draws = random.multinomial(experts * rows, np.full(experts, 1 / experts), size=100)
    for tile, expected in zip((128, 256, 512, 1024), computed, strict=True):
        mean = np.mean([rows_computed(sizes, tile, aligned=True) for sizes in draws])
        assert mean / (experts * rows) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(
    ("experts", "rows", "tpu", "gpu"),
    [
        (1, 8192, 512, 128),
        (4, 8192, 512, 128),
        (8, 2048, 256, 128),
        (8, 1024, 128, 128),
        (32, 1024, 128, 128),
        (64, 512, 128, 128),
        (64, 256, 128, 64),
        (64, 64, 128, 16),
        (64, 1, 128, 16),
        (64, 0, 128, 16),
    ],
)
def test_tiles_follow_the_rows_of_an_expert(experts, rows, tpu, gpu):
    sizes = experts * rows, experts
    assert tile_rows(*sizes, smallest=128, largest=512) == tpu
    assert tile_rows(*sizes, smallest=16, largest=128, tiles_per_expert=4) == gpu


@pytest.mark.parametrize("experts", [8, 32])
def test_with_1024_rows_an_expert_an_eighth_is_computed_in_vain(experts):
    random = np.random.default_rng(0)
    draws = random.multinomial(experts * 1024, np.full(experts, 1 / experts), size=50)
    tile = tile_rows(experts * 1024, experts, smallest=128, largest=512)
    for aligned in (True, False):
        mean = np.mean([rows_computed(sizes, tile, aligned) for sizes in draws])
        assert mean / (experts * 1024) <= 1.125


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("rows", "experts", "inner", "outer"),
    [
        (8192, 1, 4096, 14336),
        (8192, 1, 14336, 4096),
        (32768, 32, 7168, 2048),
        (32768, 32, 2048, 7168),
        (8192, 8, 768, 3072),
        (512, 64, 2000, 1000),
        (16, 2, 8, 8),
    ],
)
def test_tiles_of_a_tpu_fit_and_cover_dims(rows, experts, inner, outer, itemsize):
    tile_r, tile_i, tile_o = tpu_row_tiles(rows, experts, inner, outer, itemsize)
    assert 2 * itemsize * (tile_r * (tile_i + tile_o) + tile_i * tile_o) <= TPU_TILE_BYTES
    weight_tiles = tpu_weight_tiles(rows, experts, inner, outer, itemsize)
    for tiles in ((tile_r, tile_i, tile_o), weight_tiles):
        assert all(tile % 128 == 0 for tile in tiles)
        assert tiles[1] < inner + 128 and tiles[2] < outer + 128


def test_weights_stay_on_the_chip_where_they_fit():
    # One tile covers all of I, so an expert's weights are read once, not once per tile of rows.
    assert tpu_row_tiles(8192, 8, 2048, 1024, itemsize=2)[1] == 2048
    assert tpu_row_tiles(32768, 32, 7168, 2048, itemsize=2)[1] == 7168


# Compiled ahead of time: three SwiGLU products with all gradients are nine kernel calls.


def ahead_of_time(package, topology, kernel="auto"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    done = subprocess.run(
        [sys.executable, "-m", "tests.grouped_ahead_of_time", topology, kernel],
        capture_output=True, text=True, timeout=600,
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["auto", "megablox"])
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x2", "v6e:4x4"])
def test_a_tpu_computes_no_more_than_the_rows(topology, kernel):
    found = ahead_of_time("libtpu", topology, kernel)
    assert found["flops"] <= 1.01 and found["calls"] == 9, found


@pytest.mark.slow
def test_dense_products_of_an_old_libtpu_are_seen():
    if (libtpu_version() or NEW) > OLD:
        pytest.skip("needs libtpu 0.0.42.1 or older")
    found = ahead_of_time("libtpu", "v5e:4x4", "dense")
    assert found["flops"] > 3 and found["calls"] == 6, found  # dweight has no kernel


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h100:8", "a100:8"])
def test_a_gpu_has_kernels_and_not_the_memory_of_dense_products(topology):
    found = ahead_of_time("jax_cuda12_plugin", topology)
    dense = ahead_of_time("jax_cuda12_plugin", topology, "dense")
    assert (found["kernel"], found["calls"], dense["calls"]) == ("triton", 9, 0)
    assert found["temp"] < dense["temp"] / 8
