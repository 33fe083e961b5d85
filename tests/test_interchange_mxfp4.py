"""gpt-oss as published: experts in MXFP4."""

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.__main__ import main
from moe_jax.interchange.mxfp4 import dequantise
from moe_jax.interchange.tensor_files import TensorFiles, ToWrite, write_tensors
from tests.hf_families import CASES, Case, write_model

CASE = Case({**CASES["gpt_oss"].settings, "intermediate_size": 64})  # blocks of 32
EXPERTS, ROWS, BLOCKS = 8, {"gate_up_proj": 128, "down_proj": 32}, {"gate_up_proj": 1,
                                                                   "down_proj": 2}  # fmt: skip


def packed(name: str):
    """Random blocks and scales of a projection of all experts."""
    random, shape = np.random.RandomState(len(name)), (EXPERTS, ROWS[name], BLOCKS[name])
    blocks = random.randint(0, 256, (*shape, 16)).astype(np.uint8)
    return blocks, random.randint(120, 125, shape).astype(np.uint8)


def published(directory):
    """The tiny model with packed experts, equal in every layer."""
    write_model(directory, CASE)
    files = TensorFiles(directory)
    values = {name: files.read(name) for name in files.tensors}
    for name in [name for name in values if name.endswith(("gate_up_proj", "down_proj"))]:
        del values[name]
        values[f"{name}_blocks"], values[f"{name}_scales"] = packed(name.rpartition(".")[2])
    write_tensors(directory, [to_write(name, value) for name, value in values.items()])
    return directory


def to_write(name, value):
    return ToWrite(name, value.dtype, value.shape, lambda: value)


def test_numbers_by_hand():
    """A byte's lower half comes first. Scale 126 means one half. Rows become columns."""
    blocks = np.zeros((1, 2, 1, 16), np.uint8)
    blocks[0, 0, 0, :2] = 0xF7, 0x8A  # 6, -6; -1, -0
    blocks[0, 1, 0, 15] = 0x30  # the last but one is 0, the last 1.5
    values = dequantise(blocks, np.array([[[126], [129]]], np.uint8))
    assert values.shape == (1, 32, 2)
    assert values[0, :4, 0].tolist() == [3, -3, -0.5, 0]
    assert values[0, 30:, 1].tolist() == [0, 6]


def test_packed_experts_are_read_as_bfloat16(tmp_path):
    _, params = moe_jax.from_hf(published(tmp_path / "hf"))
    experts = params["stack"]["unit"]["0"]["moe"]["experts"]
    gate_up = dequantise(*packed("gate_up_proj"))
    assert experts["wg"].dtype == experts["wo"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(experts["wg"][0].astype(np.float32), gate_up[..., ::2])
    np.testing.assert_array_equal(experts["wi"][0].astype(np.float32), gate_up[..., 1::2])
    down = dequantise(*packed("down_proj"))
    np.testing.assert_array_equal(experts["wo"][0].astype(np.float32), down)


def test_blocks_without_scales_are_named(tmp_path):
    directory = published(tmp_path / "hf")
    files = TensorFiles(directory)
    values = {name: files.read(name) for name in files.tensors}
    lost = "model.layers.1.mlp.experts.down_proj_scales"
    write_tensors(directory, [to_write(*one) for one in values.items() if one[0] != lost])
    with pytest.raises(ValueError, match=lost):
        moe_jax.from_hf(directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_numbers_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = packed(name)
    theirs = mxfp4.convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    np.testing.assert_array_equal(dequantise(blocks, scales), theirs.numpy())


def test_packed_experts_come_out_as_the_bfloat16_that_they_stand_for(tmp_path):
    hf, run, again = published(tmp_path / "hf"), tmp_path / "run", tmp_path / "again"
    assert main(["convert", f"--from-hf={hf}", f"--workdir={run}"]) == 0
    assert main(["convert", f"--workdir={run}", f"--to-hf={again}"]) == 0
    for name, one in TensorFiles(again).tensors.items():
        packed_here = name.endswith(("gate_up_proj", "down_proj"))
        assert one.dtype.name == ("bfloat16" if packed_here else "float32"), name
