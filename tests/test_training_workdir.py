"""Which configs a run's directory accepts: the same run, whatever the library added since."""

import dataclasses
import json
import pathlib
import sys
import textwrap

import numpy as np
import pytest

from moe_jax.config import ExperimentConfig, MeshConfig, OptimizerConfig, write_config
from moe_jax.config.kinds import load_kind, source_hash
from moe_jax.layers.attention import Attention
from moe_jax.models.layer import ParallelLayer
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.part import MoE
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.imported import save_imported, save_state
from moe_jax.training.loop import train
from moe_jax.training.metrics import MetricWriter
from moe_jax.training.optimizers import learning_rate_schedule, steps_independent_of_length
from moe_jax.training.run_record import write_run_record
from moe_jax.training.saved import CHECKPOINTS, kept_steps, load_run
from moe_jax.training.workdir import check_workdir, recorded_run
from tests.tiny_run import JITTER, files, tiny_config, tiny_moe, tiny_state, tiny_training

CONFIG = tiny_training()
# As written before models were made of parts.
OLD_LAYOUT = {
    "name": "experiment",
    "seed": 0,
    "model": {"num_layers": 2, "model_dim": 16, "moe": {"num_experts": 4}},
}


def begin(workdir, config, content=None):
    """What a run leaves if it is killed before its first checkpoint."""
    write_run_record(workdir, config, content=content)
    with MetricWriter(workdir) as writer:
        writer.write(1, {"train/loss": 6.0})


def edit(workdir, change):
    """Changes the content of `config.json`."""
    path = workdir / "config.json"
    written = json.loads(path.read_text())
    change(written)
    path.write_text(json.dumps(written))


def refusal(config, workdir, content=None):
    with pytest.raises(ValueError) as error:
        check_workdir(config, workdir, content)
    return str(error.value)


def test_the_same_config_goes_on(tmp_path):
    check_workdir(CONFIG, tmp_path)
    begin(tmp_path, CONFIG)
    check_workdir(CONFIG, tmp_path)


def test_a_directory_of_the_old_layout_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD_LAYOUT))
    before = files(tmp_path)
    message = r"the layouts of formats 2 to 5 .*: .*config.json is of format 1\. Use the release"
    for use in (lambda: train(CONFIG, tmp_path), lambda: load_run(tmp_path)):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value)
    assert files(tmp_path) == before


def test_a_setting_that_the_library_got_since_is_at_its_default(tmp_path):
    begin(tmp_path, CONFIG)

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

    # A setting that was not at its default makes another config.
    edit(tmp_path, lambda written: written["model"]["parts"]["moe"]["bias"].pop("rate"))
    assert "config.model.parts.moe.bias.rate: 0.001 -> 0.01" in refusal(CONFIG, tmp_path)


def test_every_setting_that_differs_is_named(tmp_path):
    begin(tmp_path, CONFIG)
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
    """Layers that are parts themselves, with branches."""
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
        begin(workdir, make())
        check_workdir(dataclasses.replace(make(**placement), mesh=mesh), workdir)
        message = refusal(make(**placement, group_size=8), workdir)
        lines = [line for line in message.splitlines() if line.startswith("  ")]
        assert len(lines) == 1 and lines[0].endswith("moe.group_size: 0 -> 8")


def test_a_run_is_not_trained_on_in_the_directory_of_a_model_without_moments(tmp_path, monkeypatch):
    state, model = tiny_state(CONFIG), tmp_path / "model"
    save_imported(model, CONFIG, state.params, state.model_state, {}, {"made_by": "a test"})
    before = files(model)
    for config in (CONFIG, dataclasses.replace(CONFIG, seed=1)):
        with pytest.raises(ValueError) as error:
            train(config, model)
        assert str(error.value) == (
            "A run can go on only from a checkpoint with the optimizer's state: "
            f"{model / CHECKPOINTS / '0'} is of a model that was made without one (imported.json). "
            f"Use another --workdir and --config.init_from.path={model}."
        )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="of a model that was made without"):
        train(CONFIG, pathlib.Path("model"))
    assert files(model) == before
    # A model saved with moments is a run that can go on.
    save_state(tmp_path / "upcycled", CONFIG, state, {}, {"made_by": "a test"})
    check_workdir(CONFIG, tmp_path / "upcycled")


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
        begin(workdir, config)
        check_workdir(config, workdir)
        with pytest.raises(ValueError, match=r"outside this library.*Pass --trust"):
            load_run(workdir)

        # A later process imports the changed file.
        module.write_text(textwrap.dedent(FOREIGN.format("0 * x_BLM, None, None")))
        source_hash.cache_clear()
        message = refusal(config, workdir)
        (line,) = [line for line in message.splitlines() if "source of" in line]
        old, new = line.removeprefix(f"  source of {kind}: sha256 ").split(" -> ")
        assert len(old) == len(new) == 12 and old != new

        # A run without the part differs too.
        assert f"source of {kind}: sha256 {old} -> not there" in refusal(tiny_config(), workdir)
    finally:
        load_kind.cache_clear()
        source_hash.cache_clear()
        sys.modules.pop("a_mixer_of_somebody", None)


def with_training(config, **settings):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **settings))


def test_a_directory_without_steps_takes_another_run(tmp_path):
    write_run_record(tmp_path, CONFIG)
    other = dataclasses.replace(CONFIG, seed=1)
    check_workdir(other, tmp_path)
    (tmp_path / "config.json").write_text("{")
    check_workdir(other, tmp_path)
    begin(tmp_path, CONFIG)
    assert "config.seed: 0 -> 1" in refusal(other, tmp_path)


def test_what_does_not_change_results_may_change(tmp_path):
    begin(tmp_path, CONFIG)
    training = {
        "log_every": 5, "evaluate_every": 0, "evaluation_batches": 1, "checkpoint_every": 7,
        "keep_checkpoints": 5, "sample_prompt": "", "sample_tokens": 1,
    }  # fmt: skip
    other = with_training(dataclasses.replace(CONFIG, name="renamed"), **training)
    model = dataclasses.replace(other.model, remat="full", scan_layers=True)
    check_workdir(dataclasses.replace(other, model=model), tmp_path)


@pytest.mark.parametrize(
    ("mesh", "way"),
    [({"expert": 4}, {}), ({}, {"run_experts": "gather"}), ({}, {"exchange": "explicit"})],
)
def test_with_dropout_in_experts_a_run_stays_where_it_draws(mesh, way, tmp_path):
    for rate in (0.0, 0.4):
        config = tiny_config(tiny_moe(expert_dropout_rate=rate))
        moved = tiny_config({**tiny_moe(expert_dropout_rate=rate, **way), "mesh": mesh})
        begin(tmp_path / str(rate), config)
        if rate == 0:
            check_workdir(moved, tmp_path / str(rate))
            continue
        check_workdir(config, tmp_path / str(rate))
        assert refusal(moved, tmp_path / str(rate)).count("dropout masks of experts") == 1
    # Slots that the compiler exchanges are drawn as one array, wherever they are placed.
    slots = tiny_moe(expert_dropout_rate=0.4, run_experts="gather", exchange="compiler")
    begin(tmp_path / "slots", tiny_config(slots))
    check_workdir(tiny_config({**slots, "mesh": {"expert": 4}}), tmp_path / "slots")


def test_a_run_is_extended_but_not_shortened(tmp_path):
    begin(tmp_path, CONFIG)
    check_workdir(with_training(CONFIG, num_steps=24), tmp_path)
    message = refusal(with_training(CONFIG, num_steps=6), tmp_path)
    assert "config.training.num_steps: 12 -> 6" in message


@pytest.mark.parametrize(
    ("settings", "may_change"),
    [
        ({}, True),
        (tiny_moe(losses={"router_z": {"weight": 0.1}, "load_balance": {"weight": 0.1}}), True),
        (tiny_moe(losses={"importance": {"weight": 0.1}}), False),
        (tiny_moe(losses={"load_balance": {"weight": 0.1, "scope": "microbatch"}}), False),
        (tiny_moe(router={"kind": "token_choice", "noise": {"jitter": JITTER}}), False),
        ({"model": {"dropout_rate": 0.1}}, False),
    ],
    ids=["plain", "losses that add up", "importance", "microbatch", "noise", "dropout"],
)
def test_microbatches_may_change_where_a_step_does_not_depend_on_them(
    settings, may_change, tmp_path
):
    config = tiny_config(settings)
    begin(tmp_path, config)
    other = with_training(config, num_microbatches=2)
    if may_change:
        check_workdir(other, tmp_path)
    else:
        assert "config.training.num_microbatches: 1 -> 2" in refusal(other, tmp_path)


def test_a_run_is_bound_to_what_its_corpus_and_tokenizer_hold_not_to_their_paths(tmp_path):
    content = {"corpus": "aaaa", "tokenizer": "bbbb"}
    begin(tmp_path, CONFIG, content)
    check_workdir(CONFIG, tmp_path, content)
    moved = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, corpus="jsonl:elsewhere", cache_dir="")
    )
    check_workdir(moved, tmp_path, content)
    assert "content of corpus: sha256 aaaa -> cccc" in refusal(
        CONFIG, tmp_path, content | {"corpus": "cccc"}
    )
    assert "content of tokenizer: sha256 bbbb -> cccc" in refusal(
        CONFIG, tmp_path, content | {"tokenizer": "cccc"}
    )
    # If nothing is known of the content, the path counts.
    begin(tmp_path, CONFIG)
    assert "config.data.corpus: 'embedded' -> 'jsonl:elsewhere'" in refusal(
        moved, tmp_path, content
    )


def save(workdir, step, **metadata):
    with Checkpoints(workdir / CHECKPOINTS, keep=5) as checkpoints:
        checkpoints.save(step, {"x": np.zeros(3)}, metadata=metadata)


def test_a_checkpoint_knows_its_own_run(tmp_path):
    save(tmp_path, 3, run=write_config(CONFIG))
    other = dataclasses.replace(CONFIG, seed=1)
    check_workdir(CONFIG, tmp_path)
    message = refusal(other, tmp_path)  # there is no config.json
    assert "config.seed: 0 -> 1" in message and str(tmp_path / CHECKPOINTS / "3") in message
    for text in ("{", json.dumps(write_config(other))):
        (tmp_path / "config.json").write_text(text)
        check_workdir(CONFIG, tmp_path)
        assert "config.seed: 0 -> 1" in refusal(other, tmp_path)

    # If a checkpoint's record is damaged, the previous checkpoint's record counts.
    save(tmp_path, 6, run=write_config(other))
    (tmp_path / CHECKPOINTS / "6" / "metadata.json").write_text("{}")
    check_workdir(CONFIG, tmp_path)


def test_a_record_is_read_by_one_process_alone(tmp_path, monkeypatch):
    """Orbax's manager waits for the other processes, which may not see the directory."""

    def refuse(*args, **kwargs):
        raise AssertionError("a manager is made")

    save(tmp_path, 3, run=write_config(CONFIG))
    monkeypatch.setattr("orbax.checkpoint.CheckpointManager", refuse)
    assert recorded_run(tmp_path)[1] == str(tmp_path / CHECKPOINTS / "3")
    assert kept_steps(tmp_path) == [3]
    check_workdir(CONFIG, tmp_path)


def test_a_damaged_config_is_named(tmp_path):
    begin(tmp_path, CONFIG)
    path = tmp_path / "config.json"
    path.write_text(path.read_text()[:-20])
    assert f"{path} is damaged: it is not valid JSON" in refusal(CONFIG, tmp_path)
    path.unlink()
    assert "neither a config.json nor a checkpoint with a record" in refusal(CONFIG, tmp_path)


def made(workdir, config, step):
    """Writes a run with a checkpoint of this step."""
    with Checkpoints(workdir / CHECKPOINTS, keep=5) as checkpoints:
        checkpoints.save(step, {"x": np.zeros(3)}, metadata={"run": write_config(config)})


def longer(config):
    return with_training(config, num_steps=24)


BIAS = {"kind": "sign", "frozen_fraction": 0.25}


@pytest.mark.parametrize(
    ("schedule", "moe", "last"),
    [
        ("constant", {}, 12),
        ("rsqrt", {}, 12),
        ("wsd", {}, 9),  # of 12 steps the last 2.4 decay
        ("cosine", {}, 2),  # the warm-up
        ("linear", {}, 2),
        ("constant", {"bias": BIAS}, 9),
        ("constant", {"bias": {"kind": "sign", "schedule": "linear"}}, 0),
    ],
)
def test_a_run_is_extended_while_no_finished_step_follows_its_end(schedule, moe, last, tmp_path):
    config = tiny_training({**tiny_moe(**moe), "optimizer": {"schedule": schedule}})
    if last:
        made(tmp_path, config, last)
        check_workdir(longer(config), tmp_path)
    if last < 12:
        made(tmp_path, config, last + 1)
        message = refusal(longer(config), tmp_path)
        assert f"12 -> 24 in {tmp_path} at step {last + 1}" in message
        assert f"follows num_steps from step {last}" in message
        assert f"init_from.path={tmp_path} and init_from.optimizer_state=True" in message
        assert "\n" not in message


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "rsqrt", "wsd"])
def test_the_steps_that_are_alike_have_the_same_rates(schedule):
    settings = OptimizerConfig(schedule=schedule, warmup_steps=3)
    alike = int(min(steps_independent_of_length(settings, 20), 20))
    steps = np.arange(20)
    short, long = (
        np.asarray(learning_rate_schedule(settings, n)(steps) * np.ones(20)) for n in (20, 37)
    )
    np.testing.assert_array_equal(short[:alike], long[:alike])
    assert alike == 20 or short[alike] != long[alike]
