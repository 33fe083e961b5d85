"""Broken model directories: every error names the tensor or the file."""

import dataclasses
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.files import require_absent, whole_or_absent
from moe_jax.interchange.rules import LINEAR, Inserted, Merged, Rule
from moe_jax.interchange.tensor_files import INDEX, ONE_FILE, TensorFiles, ToWrite, write_tensors
from moe_jax.parallel.mesh import make_mesh
from tests.hf_families import CASES, write_model
from tests.tiny_run import ROOT

CASE = CASES["mixtral"]
GATE = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model in one file."""
    return write_model(tmp_path_factory.mktemp("model") / "hf", CASE)


@pytest.fixture
def model(whole, tmp_path):
    """A copy of the model to break."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "hf"))


def rewrite(model, **changed):
    """Rewrites a model with the tensors in `changed`; None drops a tensor."""
    files = TensorFiles(model)
    values = {name: files.read(name) for name in files.tensors} | changed
    kept = {name: value for name, value in values.items() if value is not None}
    write_tensors(model, [to_write(name, value) for name, value in kept.items()])


def to_write(name, value):
    return ToWrite(name, value.dtype, value.shape, lambda: value)


def refused(model, *words):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))) as caught:
        moe_jax.from_hf(model)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_named(model):
    rewrite(model, **{GATE: None})
    refused(model, GATE, "(4, 32)", "missing")


def test_an_unknown_tensor_is_named(model):
    rewrite(model, **{"model.layers.1.extra.weight": np.zeros(3, np.float32)})
    refused(model, "model.layers.1.extra.weight")


def test_a_wrong_shape_is_named(model):
    rewrite(model, **{GATE: np.zeros((4, 31), np.float32)})
    refused(model, GATE, "(4, 31)", "(4, 32)")


def test_a_wrong_dtype_is_named(model):
    rewrite(model, **{GATE: np.zeros((4, 32), np.int8)})
    refused(model, GATE, "int8")


def test_an_unknown_architecture_is_named(model):
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "model_type": "gpt_17"}))
    refused(model, "mixtral", "gpt_17")


def test_a_missing_size_is_named(model):
    settings = json.loads((model / "config.json").read_text())
    del settings["num_local_experts"]
    (model / "config.json").write_text(json.dumps(settings))
    refused(model, "num_local_experts")


def test_a_cut_file_is_named_with_the_tensor(model):
    file = model / ONE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    refused(model, ONE_FILE, "is cut", "weight")


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 200, b"\x02" + b"\0" * 7 + b"[}"])
def test_a_file_that_is_none_is_named(model, content):
    (model / ONE_FILE).write_bytes(content)
    refused(model, ONE_FILE)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        {"dtype": "F32", "shape": [2], "data_offsets": "ab"},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]},
        {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
    ],
    ids=str,
)
def test_an_entry_of_another_type_is_named_with_its_file(model, entry):
    text = json.dumps({GATE: entry}).encode()
    (model / ONE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=re.escape(GATE)) as caught:
        TensorFiles(model)
    assert str(model / ONE_FILE) in str(caught.value)


def test_a_header_that_is_a_list_is_named(model):
    (model / ONE_FILE).write_bytes((4).to_bytes(8, "little") + b"[{}]" + bytes(8))
    refused(model, ONE_FILE, "is not a safetensors file")


@pytest.mark.parametrize("change", [{"rope_parameters": "x"}, {"text_config": 3}])
def test_a_setting_of_another_type_is_named_with_its_file(model, change):
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | change))
    if "rope_parameters" in change:
        refused(model, "config.json", "a type that mixtral does not have")
    else:
        moe_jax.from_hf(model)  # Mixtral has no such setting
    (model / "config.json").write_text("[" * 100_000)
    refused(model, "config.json", "is not valid JSON")


def test_an_index_that_points_nowhere_is_named(model):
    index = {"weight_map": {GATE: "model-00001-of-00002.safetensors"}}
    (model / INDEX).write_text(json.dumps(index))
    refused(model, INDEX, "model-00001-of-00002.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": {"lost.weight": ONE_FILE}}))
    refused(model, "lost.weight", ONE_FILE)
    (model / INDEX).write_text("{")
    refused(model, INDEX)


def test_a_directory_without_a_model_says_what_is_there(model):
    (model / ONE_FILE).rename(model / "pytorch_model.bin")
    refused(model, "pytorch_model.bin")
    refused(model / "not_there", "not_there")


def test_several_files_are_one_model(whole, tmp_path):
    config, params = moe_jax.from_hf(whole)
    moe_jax.to_hf(config, params, tmp_path / "hf", shard_bytes=20_000)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    _, again = moe_jax.from_hf(tmp_path / "hf")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, again))
    (tmp_path / "hf" / INDEX).unlink()  # the index is optional
    moe_jax.from_hf(tmp_path / "hf")


def test_a_tensor_in_two_files_is_named(whole, tmp_path):
    config, params = moe_jax.from_hf(whole)
    moe_jax.to_hf(config, params, tmp_path / "hf", shard_bytes=20_000)
    (tmp_path / "hf" / INDEX).unlink()
    first = sorted((tmp_path / "hf").glob("*.safetensors"))[0]
    shutil.copy(first, tmp_path / "hf" / "copy.safetensors")
    refused(tmp_path / "hf", "a tensor must be in only one file", "weight", "copy.safetensors")


def test_a_tied_head_may_be_in_the_files_too(tmp_path):
    case = next(case for case in CASES.values() if case.settings["model_type"] == "granitemoe")
    model = write_model(tmp_path / "hf", case)
    embedding = TensorFiles(model).read("model.embed_tokens.weight")
    rewrite(model, **{"lm_head.weight": embedding})
    moe_jax.from_hf(model)
    rewrite(model, **{"lm_head.weight": embedding + 1})
    refused(model, "lm_head.weight", "model.embed_tokens.weight", "differ")


def test_fused_experts_are_read_as_single_ones(whole, tmp_path):
    files = TensorFiles(whole)
    fused = {name: files.read(name) for name in files.tensors if "block_sparse_moe" not in name}
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        w1, w2, w3 = (
            np.stack([files.read(f"{old}experts.{e}.{w}.weight") for e in range(4)])
            for w in ("w1", "w2", "w3")
        )
        fused[f"{new}experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        fused[f"{new}experts.down_proj"] = w2
        fused[f"{new}gate.weight"] = files.read(f"{old}gate.weight")
    write_model(tmp_path / "hf", CASE)
    write_tensors(tmp_path / "hf", [to_write(*item) for item in fused.items()])
    (_, one), (_, other) = moe_jax.from_hf(whole), moe_jax.from_hf(tmp_path / "hf")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), one, other))


def test_numbers_stay_as_stored_unless_a_dtype_is_asked_for(whole, tmp_path):
    config, params = moe_jax.from_hf(whole)
    moe_jax.to_hf(config, params, tmp_path / "half", dtype="bfloat16")
    _, half = moe_jax.from_hf(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    moe_jax.to_hf(config, half, tmp_path / "again")
    for name in (ONE_FILE, "config.json"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    _, wide = moe_jax.from_hf(tmp_path / "half", dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}


def test_tensors_that_no_dtype_is_given_for_have_the_most_common_one(whole, tmp_path):
    """For example, experts read from one tensor and written one by one."""
    config, params = moe_jax.from_hf(whole)
    dtypes = {GATE: "float32", "one": "bfloat16", "two": "bfloat16"}
    moe_jax.to_hf(config, params, tmp_path / "hf", dtype=dtypes)
    found = {name: one.dtype.name for name, one in TensorFiles(tmp_path / "hf").tensors.items()}
    assert found.pop(GATE) == "float32" and set(found.values()) == {"bfloat16"}


def test_a_model_that_the_family_cannot_say_is_not_written(whole, tmp_path):
    config, params = moe_jax.from_hf(whole)
    moe = dict(config.model.parts)["moe"]
    other = dataclasses.replace(moe, gate_on_input=True)
    parts = {**dict(config.model.parts), "moe": other}
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, parts=parts))
    with pytest.raises(ValueError, match="gate_on_input"):
        moe_jax.to_hf(changed, params, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_what_fails_while_writing_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("the disk")

    good = to_write("a", np.zeros(3, np.float32))
    with pytest.raises(RuntimeError), whole_or_absent(tmp_path / "hf") as directory:
        write_tensors(directory, [good, good._replace(name="b", make=fail)])
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_not_overwritten(whole, model):
    config, params = moe_jax.from_hf(whole)
    with pytest.raises(ValueError, match="there already"):
        moe_jax.to_hf(config, params, model)


def test_a_place_that_cannot_be_a_directory_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"/file is a file, .*/file/new\. Name another place"):
        require_absent(tmp_path / "file" / "new")
    with pytest.raises(ValueError, match="link is there already"):
        require_absent(tmp_path / "link")
    require_absent(tmp_path / "some" / "new")


def test_on_a_mesh_each_device_reads_its_own_part(whole):
    _, params = moe_jax.from_hf(whole)
    mesh = make_mesh(moe_jax.config.MeshConfig(data=1, expert=2, tensor=2).fill(4))
    _, placed = moe_jax.from_hf(whole, mesh=mesh)
    experts = placed["stack"]["unit"]["0"]["moe"]["experts"]["wi"]
    assert experts.addressable_shards[0].data.size * 4 == experts.size
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, placed))


def test_a_mesh_that_splits_nothing_evenly_is_refused_first(whole):
    mesh = make_mesh(moe_jax.config.MeshConfig(data=1, tensor=3).fill(3))
    with pytest.raises(ValueError, match=r"evenly.*embedding.*over 3 devices"):
        moe_jax.from_hf(whole, mesh=mesh)


def test_layouts_by_hand():
    leaf = np.arange(12).reshape(2, 2, 3)  # two experts [in 2, out 3]
    rule = Rule("w", ("a", "b"), LINEAR, axis=-2, interleaved=True)
    joined = rule.write([leaf, leaf + 100])
    assert joined[0].tolist() == [[0, 3], [100, 103], [1, 4], [101, 104], [2, 5], [102, 105]]
    assert rule.shape([leaf.shape, leaf.shape]) == joined.shape == (2, 6, 2)
    np.testing.assert_array_equal(rule.read(joined, [leaf.shape] * 2, 1), leaf + 100)
    one_after_another = Rule("w", ("a", "b"), LINEAR, axis=-2)
    joined = one_after_another.write([leaf, leaf + 100])
    assert joined[0, :, 0].tolist() == [0, 1, 2, 100, 101, 102]
    np.testing.assert_array_equal(one_after_another.read(joined, [leaf.shape] * 2, 0), leaf)
    merged = Merged(LINEAR)
    assert merged.write(leaf).tolist() == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    np.testing.assert_array_equal(merged.read(merged.write(leaf), leaf.shape), leaf)
    tap = Inserted(1)
    assert tap.shape((8, 4)) == (8, 1, 4)
    np.testing.assert_array_equal(tap.read(tap.write(leaf[0]), leaf[0].shape), leaf[0])
    turned = Inserted(1, LINEAR)  # a convolution [K 2, C 3] as PyTorch's [C, 1, K]
    assert turned.write(leaf[0]).tolist() == [[[0, 3]], [[1, 4]], [[2, 5]]]
    np.testing.assert_array_equal(turned.read(turned.write(leaf[0]), leaf[0].shape), leaf[0])


def test_a_directory_is_whole_or_absent_when_its_writer_is_killed(tmp_path):
    """Every command that makes a model writes this way: convert, upcycle, quantise and others."""
    code = """
import os, pathlib, signal, sys
from moe_jax.files import whole_or_absent
with whole_or_absent(pathlib.Path(sys.argv[1])) as partial:
    (partial / "half").write_text("written")
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""
    target = tmp_path / "made"
    for how, code_of_exit in (("killed", -signal.SIGKILL), ("whole", 0)):
        command = [sys.executable, "-c", code, str(target), how]
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == code_of_exit
        assert target.exists() == (how == "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "what was left is removed"
    assert (target / "half").read_text() == "written"
