"""The run on an accelerator, without one: budget, kills, resuming, the page; rows at tiny sizes."""

import json
import os
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accelerator import (
    attention,
    experts,
    goals,
    page,
    parity,
    quickstart,
    shapes,
    step,
    supervisor,
)
from benchmarks.accelerator.child import measure
from benchmarks.accelerator.groups import BY_NAME, FACTS, GROUPS, Group, Row
from benchmarks.accelerator.kernels import choices
from benchmarks.accelerator.record import ROOT, Record
from benchmarks.accelerator.supervisor import Supervisor, environment_of_child
from moe_jax.config.kinds import KINDS
from moe_jax.moe.part import MoE
from moe_jax.moe.run_experts import WAYS


def states(record):
    return {row: line["state"] for (_, row), line in record.last().items()}


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "accelerator.jsonl")


def test_rows_are_measured_once_and_a_failure_costs_one_row(record):
    calls = []

    def missing():
        calls.append("missing")
        raise NotImplementedError("no such kernel\nhere")

    rows = [Row("first", 1, lambda: {"ms": 2.0}), Row("second", 1, missing)]
    rows.append(Row("third", 1, lambda: {"ms": 3.0}))
    measure("experts", rows, record, until=time.time() + 60)
    measure("experts", rows, record, until=time.time() + 60)
    assert calls == ["missing"]
    assert states(record) == {"first": "measured", "second": "failed", "third": "measured"}
    assert record.last()["experts", "second"]["error"] == "NotImplementedError: no such kernel here"

    record.forget_failed()
    measure("experts", rows, record, until=time.time() + 60)
    assert calls == ["missing", "missing"]


def test_a_row_that_needs_more_than_the_time_left_is_left_out_until_there_is_time(record):
    rows = [Row("long", 100, lambda: {"ms": 1.0}), Row("short", 1, lambda: {"ms": 1.0})]
    measure("experts", rows, record, until=time.time() + 10)
    assert states(record) == {"long": "skipped", "short": "measured"}
    assert record.last()["experts", "long"]["reason"] == "needs about 100 s, 10 s were left"
    measure("experts", rows, record, until=time.time() + 1000)
    assert states(record) == {"long": "measured", "short": "measured"}


def test_a_line_that_a_kill_cut_off_is_no_line(record):
    record.add("experts", "whole", "measured", ms=1.0)
    with record.path.open("a") as file:
        file.write('{"group": "experts", "row": "torn", "sta')
    record.add("experts", "next", "measured", ms=2.0)
    assert states(record) == {"whole": "measured", "next": "measured"}


def test_a_row_in_which_the_whole_run_was_killed_is_measured_again(record):
    record.add("layers", "row", "started", limit=10.0)
    Supervisor(record, 1, dry=True, say=print)
    assert states(record) == {"row": "skipped"}
    measure("layers", [Row("row", 1, lambda: {"ms": 1.0})], record, until=time.time() + 60)
    assert states(record) == {"row": "measured"}


GROUP = Group("layers", 0.5, "A layer")
CHILD = """
import os, pathlib, signal, sys, time
from benchmarks.accelerator.child import measure
from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.record import Record

def abort():
    print("F0000 gemm.cc:1] Check failed: rows == 3", file=sys.stderr, flush=True)
    os.abort()

rows = [Row("before", 1, lambda: {"ms": 1.0}), Row("aborts", 1, abort),
        Row("hangs", 1, lambda: time.sleep(60)), Row("behind", 1, lambda: {"ms": 1.0})]
arguments = dict(one.partition("=")[::2] for one in sys.argv[1:])
measure("layers", rows, Record(pathlib.Path(arguments["--record"])), float(arguments["--until"]))
"""


@pytest.fixture
def run_of_bad_rows(monkeypatch, record):
    """Makes a run whose processes have a row that aborts and one that hangs."""
    start = subprocess.Popen

    def make(patience):
        code = f"import benchmarks.accelerator.child as child; child.PATIENCE = {patience}\n{CHILD}"

        def popen(command, **options):
            return start([sys.executable, "-c", code, *command[4:]], **options)

        monkeypatch.setattr(supervisor.subprocess, "Popen", popen)
        return Supervisor(record, 5, dry=False, say=lambda text: None)

    return make


def test_a_row_that_aborts_or_hangs_takes_only_itself_along(run_of_bad_rows, record):
    run_of_bad_rows(patience=0.5).run_group(GROUP, time.time() + 200)
    assert states(record) == {
        "before": "measured", "aborts": "failed", "hangs": "failed", "behind": "measured",
    }  # fmt: skip
    said = {row: line.get("error") for (_, row), line in record.last().items()}
    assert said["aborts"].startswith("its process ended with signal 6 (SIGABRT): F0000 gemm.cc:1]")
    assert said["hangs"] == "stopped after 3 s"


def test_a_row_that_the_time_runs_out_in_is_left_out_and_no_failure(run_of_bad_rows, record):
    record.add("layers", "aborts", "failed")
    run = run_of_bad_rows(patience=100)
    run.end = time.time() + supervisor.RESERVED / 2
    run.run_group(GROUP, time.time() + 8)
    assert states(record) == {"before": "measured", "aborts": "failed", "hangs": "skipped"}


def test_a_process_that_cannot_start_says_why_once(monkeypatch, record):
    monkeypatch.setattr(supervisor, "ROOT", record.path.parent)  # without the package
    monkeypatch.setattr(supervisor, "environment_of_child", lambda *_: {"PATH": os.environ["PATH"]})
    Supervisor(record, 5, dry=True, say=lambda text: None).run_group(GROUP, time.time() + 60)
    [line] = record.lines()
    assert (line["row"], line["state"]) == ("start", "failed")
    assert "No module named 'benchmarks'" in line["error"]


def test_a_machine_without_an_accelerator_is_refused(record):
    record.add("facts", "device", "measured", platform="cpu", kind="cpu")
    with pytest.raises(RuntimeError, match="JAX found a CPU only"):
        Supervisor(record, 1, dry=False, say=print).check_machine()
    assert states(record) == {"device": "skipped"}, "looked at again when there is one"
    record.add("facts", "device", "measured", platform="cpu", kind="cpu")
    with pytest.raises(RuntimeError, match=r"is of TPU v5e, this is cpu\. Choose another --out"):
        Supervisor(record, 1, dry=True, say=print).check_machine("TPU v5e")


def test_processes_keep_a_cpu_beside_the_accelerator_and_take_no_memory_in_advance():
    made = environment_of_child(
        {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, False
    )
    assert made["JAX_PLATFORMS"] == "cuda,cpu"
    assert made["XLA_PYTHON_CLIENT_MEM_FRACTION"] == ".5"
    assert made["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert environment_of_child({}, False)["JAX_PLATFORMS"] == ""
    assert environment_of_child({}, True)["JAX_PLATFORMS"] == "cpu"


def test_what_matters_most_fits_in_eight_minutes_even_if_every_group_takes_its_share():
    seconds = 8 * 60
    groups = (FACTS, *GROUPS[:6])
    assert groups[-1].name == "step"
    taken = sum(supervisor.STARTUP + group.share * seconds for group in groups)
    assert taken <= seconds - supervisor.RESERVED


def test_loads_by_hand():
    shape = shapes.Shape(rows=100, experts=5, model_dim=2, expert_dim=3)
    assert shapes.group_sizes(shape, "even").tolist() == [25, 25, 25, 25, 0]
    zipf = shapes.group_sizes(shape, "zipf")
    # 100 times 12, 6, 4 and 3 parts of 25.
    assert zipf.tolist() == [48, 24, 16, 12, 0]
    # 25 slots each: of 25 rows all stay, of the favourite's 48 only 25.
    assert shape.slots == 25
    assert shapes.kept_in_slots(shape, "even") == 100
    assert shapes.kept_in_slots(shape, "zipf") == 25 + 24 + 16 + 12
    # Three products of 2 x 3 a row, two FLOPs each, three times for both gradients.
    assert shape.flops(10) == 10 * 3 * (2 * 2 * 3) * 3


def test_pairs_of_attention_by_hand():
    assert attention.seen_pairs(4, None) == 1 + 2 + 3 + 4
    assert attention.seen_pairs(4, 2) == 1 + 2 + 2 + 2
    form = attention.Form(batch=2, length=6, heads=3, kv_heads=3, dim=5, value_dim=7, documents=2)
    # A document ends at 6 / (2 * 2) = 1; the other has the five tokens left.
    assert form.segments.tolist() == [1, 2, 2, 2, 2, 2]
    assert form.pairs == 2 * (1 + 15)
    assert form.flops == 3 * 2 * form.pairs * 3 * (5 + 7)
    positions = attention.positions_of(jnp.asarray([[1, 1, 2, 2, 2, 3]]))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]


@pytest.mark.parametrize("form", ["slots 1.25", "ragged", "dense FFN"])
def test_the_forms_of_experts_are_the_same_function(form):
    """Of expert 0 on its own rows, against the products written out."""
    if form == "ragged" and (kernels := choices(MoE, "grouped_matmul")):
        form = f"ragged {kernels[-1]}"
    shape = shapes.TINY["tiny_E4"]
    made = experts.make(shape, "even", form)
    y = made.function(made.x, made.weights, made.sizes_E)
    count = 32  # of expert 0's 43 rows, or 40 slots
    first = made.x.reshape(-1, shape.model_dim)[:count].astype(jnp.float32)
    wi, wg, wo = (
        (made.weights[name] if form == "dense FFN" else made.weights[name][0]).astype(jnp.float32)
        for name in ("wi", "wg", "wo")
    )
    expected = (jax.nn.silu(first @ wg) * (first @ wi)) @ wo
    got = y.reshape(-1, shape.model_dim)[:count].astype(jnp.float32)
    assert jnp.abs(got - expected).max() <= 2e-2 * jnp.abs(expected).max()


def test_parity_sees_a_planted_fault_and_an_empty_expert(monkeypatch):
    _, assignment = parity.make_case(parity.TINY, "float32")
    kept = np.asarray(assignment.kept_GSK)
    assert not (np.asarray(assignment.expert_index_GSK) == parity.TINY.experts - 1).any()
    assert 0 < kept.mean() < 1

    right = parity.compare_way("gather", "", "float32 highest", parity.TINY)
    assert right["passed"] and right["error"] < 1e-6
    monkeypatch.setattr(parity, "dense_sum", lambda assignment: wrong(assignment))
    assert not parity.compare_way("gather", "", "float32 highest", parity.TINY)["passed"]


def wrong(assignment):
    """The sum without the drops."""
    kept = np.ones_like(np.asarray(assignment.kept_GSK))
    return DENSE_SUM(
        assignment._replace(
            kept_GSK=jnp.asarray(kept), expert_index_GSK=0 * assignment.expert_index_GSK
        )
    )


DENSE_SUM = parity.dense_sum


def test_attention_is_compared_with_a_softmax_written_out():
    form = attention.tiny(attention.FORMS["window"])._replace(length=48, documents=2, window=9)
    right = parity.compare_attention("xla", form, "float32 highest")
    assert right["passed"] and right["error"] < 1e-6
    run = attention.by_kernel("xla", form._replace(window=10))
    with mock.patch.object(attention, "by_kernel", lambda *_: run):
        assert not parity.compare_attention("xla", form, "float32 highest")["passed"]


def test_experts_are_checked_at_full_size_against_one_of_them_alone():
    """What a kernel must be right about: the last expert with rows, and the one without."""
    shape = shapes.TINY["tiny_E4"]
    sizes = jnp.asarray(shapes.group_sizes(shape, "even"))
    made = experts.make(shape, "even", "slots 1.25")._replace(
        x=experts.random(8, (shape.rows, shape.model_dim)), sizes_E=sizes
    )
    dy = experts.random(9, made.x.shape)

    def by_expert(x, weights):
        """Row by row, with the weights of its own expert."""
        expert = np.repeat(np.arange(shape.experts), np.asarray(sizes))
        own = {name: weight[expert] for name, weight in weights.items()}
        hidden = jax.nn.silu(jnp.einsum("RM,RMH->RH", x, own["wg"]))
        hidden *= jnp.einsum("RM,RMH->RH", x, own["wi"])
        return jnp.einsum("RH,RHM->RM", hidden, own["wo"])

    y, vjp = jax.vjp(by_expert, made.x, made.weights)
    dx, dweights = vjp(dy)
    found = experts.checked(made, dy, (y, (dx, dweights)))
    assert found["error"] < 2e-2 and found["empty_expert"] == 0
    shifted = experts.checked(made, dy, (y, (jnp.roll(dx, 1, axis=0), dweights)))
    assert shifted["error"] > 0.1


def test_nan_never_passes():
    found = parity.verdict({"y": np.array([np.nan])}, {"y": np.array([1.0])}, "bfloat16")
    assert not found["passed"]


def test_every_way_and_every_router_has_a_row():
    names = {row.name for row in parity.rows(dry=True)}
    for precision in ("bfloat16", "float32 highest"):
        assert {f"{way}/{precision}" for way in ("einsum", "gather")} <= names
        assert {f"router {kind}/{precision}" for kind in KINDS["router"]} <= names
    ragged = [name for name in names if name.startswith("ragged")]
    assert ragged and {"auto", "einsum", "gather", "ragged"} == set(WAYS)


def test_what_fits_is_chosen_by_memory():
    size = step.SIZES["Mixtral-shaped"]
    small, large = (next(step.fitting(size, step.DEFAULT, gb * 1e9)) for gb in (73, 130))
    assert small.training.batch_size * small.data.sequence_length >= step.ENOUGH
    assert large.model.stack.repeats >= small.model.stack.repeats
    assert not list(step.fitting(size, step.DEFAULT, 5e9))


@pytest.mark.slow
def test_a_step_falls_and_says_its_rates():
    config = step.config_of(step.TINY["tiny"], step.DEFAULT, 1, 2, "none")
    found = step.train(config, dry=True)
    assert found["finite"] and len(found["losses"]) == 4
    assert found["losses"][0] == pytest.approx(np.log(64), rel=0.3)
    assert found["share"] > 0 and found["mfu"] is None


def test_the_losses_of_the_quickstart_are_read_from_its_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": 5 - step / 100, "perf/tokens_per_s": float(step)}
            for step in range(10, 201, 10)]  # fmt: skip
    rows.append({"step": 200, "checkpoint/seconds": 1.0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = quickstart.summary(quickstart.read(path))
    assert found["losses"] == {"10": 4.9, "50": 4.5, "100": 4.0, "150": 3.5, "200": 3.0}
    assert found["tokens_per_s"] == 105
    assert list(quickstart.summary({5: {"train/loss": 1.0}})["losses"]) == ["5"]


def a_card(**changes):
    """Rows as a run leaves them."""
    device = {"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "devices": 1, "memory_gb": 73.0,
              "peak_tflops": 989.4, "versions": {"jax": "0.11.2"}, "python": "3.12", "card": "",
              "at": 1.8e9, "commit": "abc1234"}  # fmt: skip
    speed = {"ms": 10.0, "ms_low": 9.9, "ms_high": 10.4, "tflops": 500.0, "share": 0.63,
             "temporary_mb": 17.0}  # fmt: skip
    rows = {
        ("facts", "device"): device,
        ("experts", "mixtral_E8/even/ragged triton"): speed,
        ("experts", "mixtral_E8/even/ragged dense"): speed | {"ms": 1.0, "share": 0.99},
        ("experts", "fine_E64/even/ragged triton"): speed | {"share": 0.44},
        ("torch_experts", "mixtral_E8/even/three products"): speed | {"ms": 11.0},
        ("parity", "gather/bfloat16"): {
            "error": 3e-3, "of": "y", "tolerance": 2e-2, "passed": True,
        },
    }  # fmt: skip
    return {
        key: {"group": key[0], "row": key[1], "state": "measured", **line}
        for key, line in {**rows, **changes}.items()
    }


def test_goals_pass_and_fail_by_the_kernels_that_are_kernels():
    card = a_card()
    verdicts = {goal.text: goal.verdict(card) for goal in goals.GOALS}
    assert list(verdicts.values()) == [
        "pass: 1 of 1",
        "pass: 63% by ragged triton",
        "**fail**: 44% by ragged triton",
        "pass: 10 ms, PyTorch 11 ms",
        "not measured",
        "not measured",
    ]


def test_the_page_says_what_was_left_out_and_why():
    card = a_card()
    card["experts", "dsv3_E32/even/ragged triton"] = {
        "state": "failed", "error": "stopped after 74 s",
    }  # fmt: skip
    text = page.make_page([card])
    assert "Never run" not in text
    assert "| NVIDIA H100 80GB HBM3 | 0.11.2 | abc1234 |" in text
    assert "| mixtral_E8/even/ragged triton | 10 | 9.9 to 10.4 | 500 | 63% | 17 |  |" in text
    assert "- dsv3_E32/even/ragged triton: failed, stopped after 74 s" in text


def test_the_page_in_docs_is_made_of_the_records_in_docs():
    assert page.PAGE.read_text(encoding="utf-8") == page.make_page()
    assert ("Never run" in page.make_page()) == (not page.measured_cards())


def test_a_dry_run_is_never_published(record, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "FOLDER", tmp_path / "cards")
    record.add("facts", "device", "measured", platform="cpu", kind="cpu")
    assert "is of no accelerator" in page.publish(record)
    assert not page.FOLDER.exists()
    line = a_card()["facts", "device"]
    record.add(
        "facts",
        "device",
        "measured",
        **{k: v for k, v in line.items() if k not in ("group", "row", "state", "at")},
    )
    page.publish(record)
    [path] = page.FOLDER.iterdir()
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    assert json.loads(path.read_text())[0]["kind"] == "NVIDIA H100 80GB HBM3"


@pytest.mark.slow
def test_the_whole_run_on_a_cpu(tmp_path):
    """One command; every group has rows; a second start has nothing left to measure."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.accelerator",
        "--dry",
        f"--out={tmp_path}",
        "--minutes=60",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    record = Record(tmp_path / "accelerator.jsonl")
    last = record.last()
    assert {group for group, _ in last} >= {FACTS.name, *BY_NAME} - {"torch_experts"}
    bad = {key: line.get("error") for key, line in last.items() if line["state"] != "measured"}
    assert not bad
    assert all(line["passed"] for (group, _), line in last.items() if group == "parity")

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    *facts, last_line = again.stdout.splitlines()
    assert all(line.startswith("facts/device: ") for line in facts)
    assert last_line == f"rows: {record.path}"
