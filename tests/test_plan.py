"""The command `python -m moe_jax.plan`: its output and how it ends."""

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys

import pytest

from configs import deepseek_v3, quickstart
from moe_jax.config import MeshConfig, from_config_dict
from moe_jax.plan import DOES_NOT_FIT, Options, run
from moe_jax.planning.parameters import count_parameters
from moe_jax.planning.topology import parse_topology
from tests.tiny_run import ROOT

QUICKSTART = from_config_dict(quickstart.get_config())
LARGE = from_config_dict(deepseek_v3.get_config())
GIB = 1024**3


def test_without_a_machine_it_is_arithmetic(capsys):
    assert run(QUICKSTART, Options()) == 0
    said = capsys.readouterr().out
    # As in the README.
    assert "with both embeddings         4,560,128  1,414,400" in said
    assert "no collectives: one device" in said and "fits" not in said


def test_json_is_the_only_thing_on_stdout(capsys, tmp_path):
    options = Options(json=True, topology="v5e:2x2", compile=False, figures=str(tmp_path))
    assert run(QUICKSTART, options) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["parameters_by_convention"]["with both embeddings"]["total"] == 4_560_128
    assert said["num_devices"] == 4 and said["mesh"]["data"] == 4 and said["fits"] is True
    assert "memory.png" in printed.err and (tmp_path / "roofline.png").exists()


def test_the_large_model_by_arithmetic():
    """Worked by hand from the shapes of DeepSeek-V3 (arXiv:2412.19437, sec. 4.2)."""
    queries = 7168 * 1536 + 1536 + 1536 * 128 * (128 + 64)
    keys_values = 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128)
    attention = queries + keys_values + 128 * 128 * 7168
    expert = 3 * 7168 * 2048
    moe = 257 * expert + 7168 * 256
    dense = 3 * 7168 * 18432
    norms = (2 * 61 + 1) * 7168
    total = 61 * attention + 58 * moe + 3 * dense + norms + 2 * 129280 * 7168
    count = count_parameters(LARGE.model, 4096)
    assert count.total - count.multi_token == total
    assert total + 58 * 256 == 671_026_419_200, "the published 671B, with the selection biases"
    assert count.active == total - 58 * (256 - 8) * expert
    module = attention + moe + 2 * 7168 * 7168 + 5 * 7168
    assert count.multi_token == module == 11_610_068_224 - 256


def test_the_large_model_on_the_pod_it_is_planned_for(capsys):
    options = Options(json=True, topology="v5p:8x16x16", compile=False)
    assert run(LARGE, options) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["mesh"] | {"fsdp": 32, "expert": 64} == said["mesh"] and said["num_devices"] == 2048
    memory = said["memory_estimate"]
    assert memory["optimizer"] == 2 * memory["parameters"]
    # Outside the experts, parameters are split over fsdp only; norms are not split.
    experts = 59 * 256 * 3 * 7168 * 2048
    norms = (2 * 62 + 1 + 3) * 7168 + 62 * (1536 + 512)
    others = 671_026_404_352 + 11_610_067_968 - experts - norms
    assert memory["parameters"] / 4 == experts / 2048 + others / 32 + norms


@pytest.mark.slow
def test_two_thousand_chips_are_swept(capsys):
    assert run(LARGE, Options(json=True, sweep=True, topology="v5p:8x16x16")) == 0
    said = json.loads(capsys.readouterr().out)
    tried = len(said["fitting"]) + len(said["too_large"]) + sum(said["uneven"].values())
    # 2^11 as an ordered product of four, C(14, 3) = 364, except tensor 128 to 2048: C(7, 3) = 35.
    assert tried == 364 - 35
    rules = [rule.removeprefix("part 'moe': ").removeprefix("part 'attention': ")
             for rule in said["uneven"]]  # fmt: skip
    assert all(" " in rule for rule in rules), "a rule, not only the name of the part"
    assert said["fitting"][0]["mesh"]["tensor"] == 1


def test_what_does_not_fit_ends_with_a_code_of_its_own(capsys):
    small = dataclasses.replace(LARGE, mesh=MeshConfig(data=1, fsdp=32, expert=8))
    assert run(small, Options(topology="v5e:16x16", compile=False)) == DOES_NOT_FIT
    said = capsys.readouterr().out
    assert "does not fit" in said and "what takes the memory" in said
    assert run(small, Options(topology="v5e:16x16", sweep=True)) == DOES_NOT_FIT
    assert "0 meshes fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"topology": "v5e:32x32"}, "a v5e slice has two dims"),
        ({"sweep": True}, "no --topology"),
        ({"forward": True}, "no --topology"),
        (
            {"serve": True, "figures": "x", "compile_best": 1},
            "--figures, --compile_best with --serve",
        ),
        ({"serve": True, "sweep": True, "topology": "v5e:2x2"}, "--sweep with --serve"),
        ({"serve": True, "forward": True, "topology": "v5e:2x2"}, "--forward with --serve"),
        ({"sweep": True, "forward": True, "topology": "v5e:2x2"}, "--forward with --sweep"),
        ({"sweep": True, "figures": "x", "topology": "v5e:2x2"}, "--figures with --sweep"),
        ({"compile": False, "forward": True, "topology": "v5e:2x2"}, "--forward with --nocompile"),
        ({"compile_best": 2, "topology": "v5e:2x2"}, "--compile_best=2 without --sweep"),
        ({"context": 64, "topology": "v5e:2x2"}, "--context=64 without --serve"),
        ({"context": 64, "batch": 8}, "--context=64, --batch=8 without --serve"),
    ],
)
def test_mistakes_are_refused_before_any_work(options, said):
    with pytest.raises(ValueError, match=said):
        run(LARGE, Options(**options))


def command(*arguments, timeout=600):
    return subprocess.run(
        [sys.executable, "-m", "moe_jax.plan", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=timeout,
    )  # fmt: skip


def test_the_command_overrides_settings_and_says_errors_in_one_line():
    done = command(
        "--config=configs/quickstart.py", "--topology=h100:2x2", "--nocompile", "--json",
        "--config.mesh.data=2", "--config.mesh.expert=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["mesh"]["expert"] == 2 and said["topology"]["devices_per_island"] == 2
    done = command("--config=configs/quickstart.py", "--topology=v5p:3x3x3")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: a v5p slice has three dims"), done.stderr


DOCUMENTED = [
    shlex.split(line)
    for line in re.findall(
        r"^    python -m moe_jax\.plan (.+)$",
        (ROOT / "docs" / "planning.md").read_text() + (deepseek_v3.__doc__ or ""),
        re.MULTILINE,
    )
]


def test_documented_commands_name_files_and_machines_that_there_are():
    assert len(DOCUMENTED) >= 5
    for arguments in DOCUMENTED:
        given = dict(part.lstrip("-").split("=", 1) for part in arguments if "=" in part)
        assert (ROOT / given["config"].split(":")[0]).exists()
        assert "topology" not in given or parse_topology(given["topology"])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", DOCUMENTED, ids=" ".join)
def test_documented_commands_run(arguments, tmp_path):
    """Except the compilers, which take minutes and may not be installed."""
    here = [f"--figures={tmp_path}" if "--figures" in part else part for part in arguments]
    done = command(*(part for part in here if part != "--forward"), "--nocompile")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "topology"),
    [("libtpu", "v5e:2x2"), ("libtpu", "2*v5e:2x2"), ("jax_cuda12_plugin", "h100:4")],
)
def test_the_real_step_compiles_for_a_machine_that_is_not_here(package, topology):
    """Compiled FLOPs equal the arithmetic, arguments are the state, and collectives exist."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    slices = 2 if topology.startswith("2*") else 1
    done = command(
        "--config=configs/quickstart.py", f"--topology={topology}", "--json", "--forward",
        "--config.model.parts.moe.run_experts=gather", "--config.mesh.data=1",
        "--config.mesh.fsdp=2", "--config.mesh.expert=2", f"--config.mesh.slices={slices}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    step = said["compiled_step"]
    assert step["flops_over_arithmetic"] == pytest.approx(1, abs=0.02)
    state = said["memory_estimate"]["parameters"] + said["memory_estimate"]["optimizer"]
    assert step["memory"]["arguments"] == pytest.approx(state, rel=0.01)
    assert step["memory"]["aliased"] == pytest.approx(state, rel=0.01)
    kinds = {(row["kind"], tuple(row["axes"])) for row in step["collectives"]}
    assert ("all-to-all", ("expert",)) in kinds
    assert any(kind == "all-gather" and axes == ("fsdp",) for kind, axes in kinds)
    assert not step["unknown_loops"]
    assert said["compiled_forward"]["flops"] < step["flops"] / 2
