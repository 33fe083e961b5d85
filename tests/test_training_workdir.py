"""Which configs a run's directory takes: the same run, whatever was added to the library since."""

import dataclasses
import json
import sys
import textwrap

import pytest

from moe_jax.config import ExperimentConfig, MeshConfig
from moe_jax.config.kinds import load_kind, source_hash
from moe_jax.layers.attention import Attention
from moe_jax.models.layer import ParallelLayer
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.part import MoE
from moe_jax.training.loop import train
from moe_jax.training.metrics import write_run_record
from moe_jax.training.saved import load_run
from moe_jax.training.workdir import check_workdir
from tests.tiny_run import files, tiny_config, tiny_training

CONFIG = tiny_training()
# As it was written before models were made of parts.
OLD_LAYOUT = {
    "name": "experiment",
    "seed": 0,
    "model": {"num_layers": 2, "model_dim": 16, "moe": {"num_experts": 4}},
}


def edit(workdir, change):
    """Changes what `config.json` says."""
    path = workdir / "config.json"
    written = json.loads(path.read_text())
    change(written)
    path.write_text(json.dumps(written))


def refusal(config, workdir):
    with pytest.raises(ValueError) as error:
        check_workdir(config, workdir)
    return str(error.value)


def test_the_same_config_goes_on(tmp_path):
    check_workdir(CONFIG, tmp_path)
    write_run_record(tmp_path, CONFIG)
    check_workdir(CONFIG, tmp_path)


def test_a_directory_of_the_old_layout_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD_LAYOUT))
    before = files(tmp_path)
    message = (
        r"in the layout of format 2: .*config.json is of format 1\. Use the release that wrote it"
    )
    for use in (lambda: train(CONFIG, tmp_path), lambda: load_run(tmp_path)):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value)
    assert files(tmp_path) == before


def test_a_setting_that_the_library_got_since_is_at_its_default(tmp_path):
    write_run_record(tmp_path, CONFIG)

    def drop(written):
        del written["model"]["parts"]["moe"]["gate_on_input"]
        del written["model"]["parts"]["moe"]["bias"]["centered"]
        del written["model"]["stack"]["tied"]
        del written["optimizer"]["b1"]

    edit(tmp_path, drop)
    check_workdir(CONFIG, tmp_path)
    changed = dataclasses.replace(CONFIG.optimizer, b1=0.5)
    message = refusal(dataclasses.replace(CONFIG, optimizer=changed), tmp_path)
    assert "config.optimizer.b1: 0.9 -> 0.5" in message

    # What was not at its default is another config.
    edit(tmp_path, lambda written: written["model"]["parts"]["moe"]["bias"].pop("rate"))
    assert "config.model.parts.moe.bias.rate: 0.001 -> 0.01" in refusal(CONFIG, tmp_path)


def test_every_setting_that_differs_is_named(tmp_path):
    write_run_record(tmp_path, CONFIG)
    router = {"kind": "token_choice", "noise": {"jitter": {"epsilon": 0.1}}, "top_p": 0.5}
    other = tiny_training({"seed": 1, "model": {"parts": {"moe": {"router": router}}}})
    message = refusal(other, tmp_path)
    lines = [line for line in message.splitlines() if line.startswith("  ")]
    assert lines == [
        "  config.model.parts.moe.router.top_p: 1.0 -> 0.5",
        "  config.seed: 0 -> 1",
    ]
    assert "Use another --workdir" in message


def of_whole_layers(**moe):
    """Layers that are parts themselves, with branches inside."""
    branches = (
        ("attention", Attention(num_heads=2, head_dim=8)),
        ("moe", MoE(num_experts=4, expert_dim=32, **moe)),
    )
    model = LanguageModel(
        model_dim=16,
        parts={"block": ParallelLayer(branches=branches)},
        stack=StackLayout(unit=("block",), repeats=2),
    )
    return ExperimentConfig(model=model)


def test_how_a_run_is_placed_may_change(tmp_path):
    placement = {"run_experts": "gather", "exchange": "explicit", "exchange_chunks": 2}
    mesh = MeshConfig(data=1, expert=4)
    makers = {
        "parts": lambda **moe: tiny_config({"model": {"parts": {"moe": moe}}}),
        "layers": of_whole_layers,
    }
    for name, make in makers.items():
        workdir = tmp_path / name
        write_run_record(workdir, make())
        check_workdir(dataclasses.replace(make(**placement), mesh=mesh), workdir)
        message = refusal(make(**placement, group_size=8), workdir)
        lines = [line for line in message.splitlines() if line.startswith("  ")]
        assert len(lines) == 1 and lines[0].endswith("moe.group_size: 0 -> 8")


FOREIGN = """
    import dataclasses
    from moe_jax.part import Part

    @dataclasses.dataclass(frozen=True)
    class Mixer(Part):
        scale: float = 1.0

        def looks_ahead(self, training):
            return False

        def apply(self, params, x_BLM, call, own):
            return {}
"""


def test_a_part_from_outside_whose_source_changed_is_refused(tmp_path, monkeypatch):
    module = tmp_path / "a_mixer_of_somebody.py"
    module.write_text(textwrap.dedent(FOREIGN.format("x_BLM, None, None")))
    monkeypatch.syspath_prepend(tmp_path)
    kind = "a_mixer_of_somebody:Mixer"
    stack = {"unit": [["mixer", "moe"]]}
    parts = {"attention": None, "mixer": {"kind": kind, "scale": 2.0}}
    config = tiny_config({"model": {"parts": parts, "stack": stack}})
    workdir = tmp_path / "run"
    try:
        write_run_record(workdir, config)
        check_workdir(config, workdir)
        with pytest.raises(ValueError, match=r"outside this library.*Pass --trust"):
            load_run(workdir)

        # Another process, later, imports what is in the file then.
        module.write_text(textwrap.dedent(FOREIGN.format("0 * x_BLM, None, None")))
        source_hash.cache_clear()
        message = refusal(config, workdir)
        (line,) = [line for line in message.splitlines() if "source of" in line]
        old, new = line.removeprefix(f"  source of {kind}: ").split(" -> ")
        assert len(old) == len(new) == 64 and old != new

        # A run without the part is another one too.
        assert f"source of {kind}: {old} -> not there" in refusal(tiny_config(), workdir)
    finally:
        load_kind.cache_clear()
        source_hash.cache_clear()
        sys.modules.pop("a_mixer_of_somebody", None)
