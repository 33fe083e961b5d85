"""Attention compiled for absent accelerators: the program has kernels and writes no scores."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks.aot_attention import LAYERS, Layer, scores_in


def test_scores_are_found_in_a_program():
    layer = Layer(length=64, heads=4, kv_heads=2, dims=(8, 8))
    program = """
      %a = f32[1,4,64,64]{3,2,1,0} fusion(f32[4,64,8]{2,1,0} %q, bf16[1,1,64,64]{3,2,1,0} %mask)
      %b = bf16[2,2,64,64]{3,2,1,0} convert(%a), pred[64,64]{1,0} %rules
      %c = f32[4,64,128]{2,1,0} custom-call(%b), custom_call_target="tpu_custom_call"
    """
    assert scores_in(program, layer) == ("bf16[2,2,64,64]", "f32[1,4,64,64]")


def compiled(topologies, tmp_path, layers):
    """Rows of a run of the benchmark in its own process, which can load the compiler."""
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.aot_attention", f"--topologies={topologies}",
               f"--layers={','.join(layers)}", f"--json={file}"]  # fmt: skip
    # CUDA's other libraries are needed only to run programs.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    return {(row["layer"], row["kernel"]): row for row in json.loads(file.read_text())}


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x2", "v6e:4x4"])
def test_splash_writes_no_scores_on_a_tpu(topology, tmp_path):
    """Three kernels: forward, gradient of queries, gradient of keys and values."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    names = [name for name in LAYERS if name != "long"]
    rows = compiled(topology, tmp_path, names)
    for name in names:
        xla, splash = (rows[name, kernel] for kernel in ("xla", "splash"))
        assert (xla["kernels"], splash["kernels"]) == (0, 3)
        assert xla["scores"] and not splash["scores"]
        layer = LAYERS[name]
        lanes = -(-layer.dims[0] // 128) * 128
        of_queries = layer.length * layer.heads * lanes * 2
        assert splash["temporary_bytes"] < 6 * of_queries, "linear in the length"
        assert xla["temporary_bytes"] > layer.heads * layer.length**2 * 4, "scores in float32"


@pytest.mark.slow
def test_memory_of_splash_is_linear_in_the_length(tmp_path):
    """At four times the length, xla does not fit: its scores grow 16 times."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    rows = compiled("v5p:2x2x2", tmp_path, ["grouped", "long"])
    short, long = (rows[name, "splash"]["temporary_bytes"] for name in ("grouped", "long"))
    assert 3 < long / short < 5


@pytest.mark.slow
def test_no_scores_are_written_on_a_gpu(tmp_path):
    """With cuDNN: two kernels, and one mask for all heads in two arrays. With Triton: no mask."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("needs the CUDA plugin")
    rows = compiled("h100:8", tmp_path, ["grouped", "window"])
    for name in ("grouped", "window"):
        xla, cudnn, triton = (rows[name, kernel] for kernel in ("xla", "cudnn", "triton"))
        assert [one["kernels"] for one in (xla, cudnn, triton)] == [0, 2, 3]
        assert xla["scores"] and not cudnn["scores"] and not triton["scores"]
        assert cudnn["temporary_bytes"] < 2.1 * LAYERS[name].length ** 2 * 2
        assert max(cudnn["temporary_bytes"], triton["temporary_bytes"]) < (
            xla["temporary_bytes"] / 30
        )


@pytest.mark.slow
def test_memory_of_triton_is_linear_in_the_length(tmp_path):
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("needs the CUDA plugin")
    rows = compiled("h100:8", tmp_path, ["grouped", "long"])
    short, long = (rows[name, "triton"]["temporary_bytes"] for name in ("grouped", "long"))
    assert 3 < long / short < 5
