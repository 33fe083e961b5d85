"""A whole run in this process: what it writes, how it stops and how it resumes."""

import dataclasses
import json
import os
import re
import shutil
import signal
from unittest import mock

import jax
import numpy as np
import pytest

from moe_jax.analysis.runs import read_entry
from moe_jax.config import MeshConfig
from moe_jax.moe.run_experts import buffer
from moe_jax.parallel.mesh import describe_mesh, make_mesh
from moe_jax.training import loop
from moe_jax.training.checkpoints import Checkpoints, DamagedCheckpointError
from moe_jax.training.files import METRICS_FILE, RUN_FILE
from moe_jax.training.loop import BufferOverflowError, train
from moe_jax.training.metrics import read_metrics
from moe_jax.training.placement import inference_rows
from moe_jax.training.saved import CHECKPOINTS, load_run, open_run_data
from moe_jax.training.signals import Interrupted
from moe_jax.training.step import StepMetrics
from moe_jax.training.workdir import check_workdir
from tests.tiny_run import assert_same_run, files, tiny_moe, tiny_training

CONFIG = tiny_training()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run. Tests do not write to it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(CONFIG, workdir)
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def at_batch(monkeypatch, number, action):
    """Calls `action` when the batch of a step is requested."""
    real = loop.train_batches

    def batches(*args, start_step, **kwargs):
        for step, batch in enumerate(real(*args, start_step=start_step, **kwargs), start_step + 1):
            if step == number:
                action()
            yield batch

    monkeypatch.setattr(loop, "train_batches", batches)


def damage(checkpoint):
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def test_what_a_run_writes(finished):
    assert {path.name for path in finished.iterdir()} >= {
        "config.json", "run.json", "metrics.jsonl", "checkpoints", "evaluation.json",
    }  # fmt: skip
    rows = read_metrics(finished / METRICS_FILE)
    trained = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 13))
    assert [row["step"] for row in rows if "heldout/dropless/nats_per_token" in row] == [4, 8, 12]
    for row in trained:
        for layer in ("layer_00", "layer_01"):
            np.testing.assert_allclose(sum(row[f"moe/{layer}/expert_load"]), 1, rtol=1e-5)
    # The clock starts at the first step, which has no speed yet.
    assert ["perf/tokens_per_s" in row for row in trained] == [False] + [True] * 11
    assert sorted(path.name for path in (finished / CHECKPOINTS).iterdir()) == ["12", "9"]

    said = json.loads((finished / "evaluation.json").read_text())
    assert said["step"] == 12
    last = [row for row in rows if row["step"] == 12 and "heldout/dropless/nats_per_token" in row]
    assert last[0]["heldout/dropless/nats_per_token"] == said["dropless"]["nats_per_token"]


def test_a_run_that_crashes_and_is_stopped_ends_like_one_that_was_not(
    finished, tmp_path, monkeypatch, capsys
):
    def crash():
        raise RuntimeError("crash")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        at_batch(patch, 5, crash)
        train(CONFIG, tmp_path)
    # The running step is finished, saved and the last one. Its number is no multiple of 3 or 4.
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="SIGTERM after step 7"):
        at_batch(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(CONFIG, tmp_path)
    assert load_run(tmp_path)[1].step == 7
    capsys.readouterr()
    train(CONFIG, tmp_path)
    assert "resuming after step 7 of 12" in capsys.readouterr().out
    assert_same_run(tmp_path, finished)
    record = json.loads((tmp_path / RUN_FILE).read_text())
    assert [session["start_step"] for session in record["earlier"]] == [0, 4]
    assert record["start_step"] == 7


def test_a_signal_during_an_evaluation_acts_at_once(finished, tmp_path, monkeypatch, request):
    """The step is already saved; a restart makes up for the evaluation."""
    real, before = loop.evaluate, signal.default_int_handler
    # A shell that starts the tests in the background ignores SIGINT.
    replaced = signal.signal(signal.SIGINT, before)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, replaced))

    def evaluate(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "evaluate", evaluate)
        train(CONFIG, tmp_path)
    assert load_run(tmp_path)[1].step == 4
    steps = [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)]
    assert steps == [1, 2, 3, 4]
    assert signal.getsignal(signal.SIGINT) is before
    train(CONFIG, tmp_path)
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("parts", [1, 4])
def test_as_many_sequences_are_scored_during_a_run_whatever_its_microbatches(parts, monkeypatch):
    training = {"num_microbatches": parts, "batch_size": 8, "evaluation_batches": 3}
    config = tiny_training({"training": training})
    read = {}
    for name in ("evaluate", "evaluation_params", "evaluation_row", "evaluation_line"):
        monkeypatch.setattr(loop, name, lambda *args, **settings: read.update(settings))
    run = mock.MagicMock(config=config, is_last=lambda step: False)
    loop.Session.evaluate(run, 4, mock.MagicMock())
    assert read["max_batches"] * inference_rows(config, make_mesh(MeshConfig(data=1))) == 24


@pytest.mark.parametrize("step", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_a_step_is_saved_before_its_evaluation_which_a_restart_makes_up_for(
    step, finished, tmp_path, monkeypatch
):
    real = loop.evaluate

    def evaluate(*args, **kwargs):
        if int(kwargs["step"]) == step:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(loop, "evaluate", evaluate)
        train(CONFIG, tmp_path)
    assert load_run(tmp_path)[1].step == step
    train(CONFIG, tmp_path)
    assert_same_run(tmp_path, finished)


def test_a_run_without_evaluation(tmp_path):
    """Its corpus need not hold anything out, unlike in the refusal below."""
    config = of_documents(tmp_path, 1, evaluate_every=0, num_steps=2)
    assert train(config, tmp_path / "run") == {}
    assert not (tmp_path / "run" / "evaluation.json").exists()


def of_documents(directory, number, **training):
    """A run on a corpus with this number of documents, none of which is held out."""
    lines = [
        json.dumps({"id": f"chapter-{n}", "text": "A dark night. " * 30}) for n in range(number)
    ]
    (directory / "corpus").mkdir()
    (directory / "corpus" / "book.jsonl").write_text("\n".join(lines) + "\n")
    data = {
        "corpus": f"jsonl:{directory / 'corpus'}",
        "cache_dir": str(directory / "cache"),
        "heldout_fraction": 1e-9,
    }
    return tiny_training({"data": data, "training": training})


@pytest.mark.slow
def test_a_run_is_extended(tmp_path, capsys):
    """If the schedule ignores the end, the run equals one that was as long from the start."""

    def steps(number):
        settings = {"num_steps": number, "evaluate_every": 0, "sample_prompt": ""}
        return tiny_training({"optimizer": {"schedule": "constant"}, "training": settings})

    train(steps(5), tmp_path / "extended")
    capsys.readouterr()
    train(steps(8), tmp_path / "extended")
    said = "resuming after step 5 of 8, extended from 5"
    assert said in capsys.readouterr().out
    train(steps(8), tmp_path / "at_once")
    states = [load_run(tmp_path / name, moments=True)[1] for name in ("extended", "at_once")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    rows = read_metrics(tmp_path / "extended" / METRICS_FILE)
    assert [row["step"] for row in rows] == list(range(1, 9))


@pytest.mark.slow
def test_a_run_that_has_not_begun_to_decay_is_extended(tmp_path, monkeypatch):
    """The steps of wsd are alike until the decay: with 8 steps, until the sixth."""

    def steps(number):
        settings = {"num_steps": number, "evaluate_every": 0, "sample_prompt": ""}
        return tiny_training({"optimizer": {"schedule": "wsd"}, "training": settings})

    def crash():
        raise RuntimeError("crash")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        at_batch(patch, 8, crash)
        train(steps(8), tmp_path / "extended")
    train(steps(11), tmp_path / "extended")
    train(steps(11), tmp_path / "at_once")
    states = [load_run(tmp_path / name, moments=True)[1] for name in ("extended", "at_once")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    with pytest.raises(ValueError, match=r"schedule='wsd' follows num_steps from step 8"):
        train(steps(20), tmp_path / "extended")


def test_a_run_stays_with_the_text_it_was_started_with(tmp_path):
    """The corpus may move, but its text may not change."""
    config = of_documents(tmp_path, 3, evaluate_every=0, num_steps=2)
    train(config, tmp_path / "run")
    corpus = tmp_path / "corpus"
    corpus.rename(tmp_path / "moved")
    data = dataclasses.replace(config.data, corpus=f"jsonl:{tmp_path / 'moved'}")
    moved = dataclasses.replace(config, data=data)
    train(moved, tmp_path / "run")
    file = tmp_path / "moved" / "book.jsonl"
    file.write_text(file.read_text().replace("dark", "bright"))
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match=r"content of corpus: sha256 \w{12} -> \w{12}\n"):
        train(moved, tmp_path / "run")
    with pytest.raises(ValueError, match=r"with the data it was trained on: since .*of corpus"):
        open_run_data(tmp_path / "run", moved)
    assert files(tmp_path / "run") == before


def test_a_run_is_used_from_another_folder_and_with_data_that_moved(tmp_path, monkeypatch):
    of_documents(tmp_path, 3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = {"evaluate_every": 0, "num_steps": 2}
    data = {"corpus": "corpus", "cache_dir": "", "heldout_fraction": 1e-9}
    config = tiny_training({"data": data, "training": settings})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train(config, "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_run_data("../run", load_run("../run")[0]).domains == ("book",)
    # The checkpoint has the old path; `config.json` may have the new one.
    (tmp_path / "corpus").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="corpus"):
        open_run_data("../run", load_run("../run")[0])
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace("/corpus", "/moved"))
    assert open_run_data("../run", load_run("../run")[0]).domains == ("book",)


def test_a_finished_run_does_not_train_again(copy, monkeypatch):
    def no_step(config, mesh):
        def step(state, batch):
            raise AssertionError("a step was taken")

        return step

    monkeypatch.setattr(loop, "compile_train_step", no_step)
    before = files(copy)
    train(CONFIG, copy)
    after = files(copy)
    for name in before:
        if name.startswith((CHECKPOINTS, "evaluation", METRICS_FILE, "config")):
            assert after[name] == before[name], name


def test_another_config_is_refused_before_anything_happens(copy, monkeypatch):
    def not_called(*args, **kwargs):
        raise AssertionError("too late")

    for name in ("restore", "new_state", "Checkpoints", "write_run_record"):
        monkeypatch.setattr(loop, name, not_called)
    before = files(copy)
    other = tiny_training({"training": {"num_steps": 11}, **tiny_moe(num_experts=8)})
    with pytest.raises(ValueError) as error:
        train(other, copy)
    assert "config.training.num_steps: 12 -> 11" in str(error.value)
    assert "config.model.parts.moe.num_experts: 4 -> 8" in str(error.value)
    assert "Use another --workdir" in str(error.value)
    assert files(copy) == before


def test_a_run_that_began_while_this_one_built_its_data_is_not_continued(
    finished, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    monkeypatch.setattr(loop, "check_data", lambda *_, **__: shutil.copytree(finished, workdir))
    other = tiny_training(tiny_moe(num_experts=8))
    with pytest.raises(ValueError, match=r"parts\.moe\.num_experts: 4 -> 8"):
        train(other, workdir)
    assert files(workdir).keys() - files(finished).keys() <= {".lock"}


def test_a_directory_in_use_is_refused(tmp_path, monkeypatch):
    """A second run starts while the first one trains."""
    monkeypatch.setattr("moe_jax.training.workdir.LOCK_SECONDS", 0.2)

    def start_another():
        with pytest.raises(ValueError, match="another process trains in"):
            train(CONFIG, tmp_path)
        raise RuntimeError("it was refused")

    at_batch(monkeypatch, 2, start_another)
    with pytest.raises(RuntimeError, match="it was refused"):
        train(CONFIG, tmp_path)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    finished, copy, caplog, capsys
):
    damage(copy / CHECKPOINTS / "12")
    train(CONFIG, copy)
    assert re.search(r"Checkpoint .*/12 is damaged and not used: the content of", caplog.text)
    assert "resuming after step 9 of 12" in capsys.readouterr().out
    assert_same_run(copy, finished)
    names = sorted(path.name for path in (copy / CHECKPOINTS).iterdir())
    assert names == ["12", "9", "damaged-12"]


def test_a_run_does_not_begin_anew_when_all_its_checkpoints_are_damaged(copy):
    for step in ("9", "12"):
        damage(copy / CHECKPOINTS / step)
    with pytest.raises(DamagedCheckpointError, match=r"all are damaged in .*: 9, 12\. Bring back"):
        train(CONFIG, copy)
    assert sorted(path.name for path in (copy / CHECKPOINTS).iterdir()) == ["12", "9"]


def test_a_run_that_begins_anew_does_not_show_the_results_of_the_one_before(copy, monkeypatch):
    (copy / "report").mkdir()
    (copy / "report" / "report.md").write_text("old")
    shutil.rmtree(copy / CHECKPOINTS)
    (copy / METRICS_FILE).unlink()
    assert read_entry(copy, "run").score.step == 12

    def stop():
        raise RuntimeError("before the first step")

    at_batch(monkeypatch, 1, stop)
    with pytest.raises(RuntimeError, match="before the first step"):
        train(CONFIG, copy)
    entry = read_entry(copy, "run")
    assert entry.score.step == entry.step == 0
    assert (copy / "earlier-evaluation.json").is_file()
    assert (copy / "earlier-report" / "report.md").is_file() and not (copy / "report").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    optimizer = {"learning_rate": 1e30, "warmup_steps": 0}
    config = tiny_training({"optimizer": optimizer, "training": {"checkpoint_every": 1}})
    with pytest.raises(FloatingPointError) as error:
        train(config, tmp_path)
    found = re.search(
        r"train/\w+ is (nan|inf) at step (\d+); "
        r"last good step: (\d+) in (\S+)\.",
        str(error.value),
    )
    assert found, str(error.value)
    assert "Lower optimizer.learning_rate" in str(error.value)
    # The named checkpoint exists, is whole, and is older than the failed step.
    step, named = int(found[2]), int(found[3])
    assert load_run(tmp_path)[1].step == named < step
    assert found[4] == str(tmp_path / CHECKPOINTS)
    # The failed step is in the metrics, so a comparison knows of it.
    *rows, last = read_metrics(tmp_path / METRICS_FILE)
    assert all(np.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)
    assert last["step"] == step
    named = [last[f"train/{name}"] for name in ("loss", "total_loss", "grad_norm")]
    assert not np.isfinite(named).all()
    assert read_entry(tmp_path, "run").diverged


def test_before_its_first_checkpoint_a_run_has_no_good_state_of_its_own(
    finished, tmp_path, monkeypatch
):
    """This includes a run that starts from the step of another run's checkpoint."""

    def no_number(config, mesh):
        return lambda state, batch: (state, StepMetrics(*[np.float32(np.nan)] * 4, {}))

    monkeypatch.setattr(loop, "compile_train_step", no_number)
    source = {"path": str(finished), "step": 9, "optimizer_state": True, "data_position": True}
    with pytest.raises(FloatingPointError, match="is nan at step 10; no checkpoint is complete"):
        train(tiny_training({"init_from": source}), tmp_path / "run")


@pytest.mark.parametrize("name", ["loss", "total_loss", "grad_norm"])
def test_each_metric_that_must_be_finite_is_named(name, tmp_path):
    metrics, message = StepMetrics(*[np.float32(1)] * 5), rf"train/{name} is inf at step 7; no che"
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        loop.check_finite(7, metrics, checkpoints)
        with pytest.raises(FloatingPointError, match=message):
            loop.check_finite(7, metrics._replace(**{name: np.float32(np.inf)}), checkpoints)


STOPS = {"run_experts": "ragged", "buffer_factor": 1.5, "stop_at_overflow": True}


def test_the_layer_that_needs_the_largest_buffer_is_named_and_the_factor_that_would_do(tmp_path):
    config, metrics = tiny_training(tiny_moe(**STOPS)), StepMetrics(*[np.float32(1)] * 4, {})
    said = {
        "moe/buffer_overflow": np.array([0, 0]),
        "moe/buffer_rows": np.array([30, 45]),
        "moe/buffer_factor": np.array([1.0, 1.5]),
    }
    (tmp_path / "5").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=None)
    loop.check_overflow(7, metrics, config, checkpoints)  # no buffer in use
    loop.check_overflow(7, metrics._replace(of_parts=said), config, checkpoints)
    said |= {
        "moe/buffer_overflow": np.array([9, 1234]),
        "moe/buffer_rows": np.array([55, 72]),
        "moe/buffer_factor": np.array([1.8333, 2.4], np.float32),
    }
    with pytest.raises(BufferOverflowError) as error:
        loop.check_overflow(7, metrics._replace(of_parts=said), config, checkpoints)
    assert str(error.value) == (
        "moe/layer_01 lost 1,234 choices at step 7: a device was sent 72 rows, 2.4 times the mean, "
        "and has room for buffer_factor=1.5 times; last good step: 5 in "
        f"{tmp_path}. Set model.parts.moe.buffer_factor=2.41, or stop_at_overflow=False, and go on "
        "in this workdir."
    )
    loses = tiny_moe(**STOPS | {"stop_at_overflow": False})
    loses["model"]["stack"] = {"allow_lookahead": True}
    loop.check_overflow(7, metrics._replace(of_parts=said), tiny_training(loses), checkpoints)
    checkpoints.close()


@pytest.mark.slow
def test_a_run_that_a_full_buffer_stopped_goes_on_with_more_room(tmp_path, monkeypatch):
    """With tiles of one row, the smallest buffer has no room to spare."""
    monkeypatch.setattr(buffer, "TILE", 1)
    with pytest.raises(BufferOverflowError, match=r"at step 1: .* no checkpoint is co") as error:
        train(moving({"expert": 8}, **STOPS | {"buffer_factor": 1.0}), tmp_path)
    found = re.search(r"sent (\d+) rows, ([\d.]+) times the mean", str(error.value))
    assert found, str(error.value)
    # A device's sequence has 16 tokens with two choices each.
    assert int(found[1]) / 32 == pytest.approx(float(found[2]), rel=1e-3)
    train(moving({"expert": 8}, **STOPS | {"buffer_factor": 8.0}), tmp_path)
    rows = [row for row in read_metrics(tmp_path / METRICS_FILE) if "train/loss" in row]
    assert [row["moe/layer_00/buffer_overflow"] for row in rows] == [0] * 6
    assert rows[0]["moe/layer_00/buffer_rows"] == int(found[1])


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    config = tiny_training({"model": {"vocab_size": 256}})
    with pytest.raises(ValueError, match=r"vocab_size=256, 'byte' has 384\. Set model.vocab_size"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# float32 sums in another order (epsilon 1.2e-7), for three steps.
FLOAT32 = {"rtol": 1e-6}


def moving(mesh, **moe):
    moe = {"num_experts": 8, "capacity": {"eval_factor": 0.0}, **moe}
    return tiny_training(
        {
            "model": {"parts": {"moe": moe}, "stack": {"repeats": 1}},
            "training": {"batch_size": 8, "num_steps": 6, "evaluate_every": 6, "sample_prompt": ""},
            "mesh": mesh,
        }
    )


MOVING = moving({"expert": 8})


def on_mesh(mesh):
    return dataclasses.replace(MOVING, mesh=mesh)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run on expert=8, stopped after step 3 of 6, and the same run continued to its end."""
    workdir = tmp_path_factory.mktemp("moving")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="after step 3"):
        at_batch(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(MOVING, workdir / "stopped")
    shutil.copytree(workdir / "stopped", workdir / "never_moved")
    train(MOVING, workdir / "never_moved")
    return workdir


# `test_training_saved` moves a state and `test_training_workdir` compares configs, both quickly.
@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=4, expert=2),
        MeshConfig(data=1),
        MeshConfig(data=2, expert=2, tensor=2),
    ],
)
def test_a_run_goes_on_on_another_mesh(mesh, stopped, tmp_path, capsys):
    workdir = shutil.copytree(stopped / "stopped", tmp_path / "moved")
    train(on_mesh(mesh), workdir)
    said = capsys.readouterr().out
    assert "resuming after step 3 of 6" in said and describe_mesh(make_mesh(mesh)) in said
    rows, expected = (
        [row for row in read_metrics(path / METRICS_FILE) if "train/loss" in row]
        for path in (workdir, stopped / "never_moved")
    )
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == list(range(1, 7))
    for row, wanted in zip(rows, expected, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            np.testing.assert_allclose(row[name], wanted[name], **FLOAT32, err_msg=str(row["step"]))
    said, wanted = (
        json.loads((path / "evaluation.json").read_text())["dropless"]["nats_per_token"]
        for path in (workdir, stopped / "never_moved")
    )
    np.testing.assert_allclose(said, wanted, **FLOAT32)


@pytest.mark.slow
def test_a_workdir_takes_another_mesh_but_no_other_model(stopped):
    workdir = stopped / "stopped"
    mesh = {"slices": 2, "data": 1, "expert": 4, "experts_span_slices": True}
    placement = {"run_experts": "gather", "exchange": "explicit", "exchange_chunks": 2}
    check_workdir(moving(mesh, **placement), workdir)
    with pytest.raises(ValueError) as error:
        check_workdir(moving(mesh, **placement, expert_dim=64), workdir)
    lines = [line for line in str(error.value).splitlines() if "->" in line and ": " in line]
    assert lines[1:] == ["  config.model.parts.moe.expert_dim: 32 -> 64"]
