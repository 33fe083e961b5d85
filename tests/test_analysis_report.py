"""The report of a run, made only from its files."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from moe_jax.analysis.report import _layer_table, read_run, write_report
from moe_jax.config import ExperimentConfig, OptimizerConfig, TrainingConfig, read_config
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.part import MoE
from moe_jax.report import command
from moe_jax.training.files import read_json
from moe_jax.training.loss_labels import NOTES, SEES
from moe_jax.training.metrics import MetricWriter
from moe_jax.training.run_record import write_run_record

DOMAINS = ("drama", "folio1623", "multilingual", "prose", "python", "speech")
MAX_BYTES = 150_000


def moe_metrics(rng, layer: str, progress: float, num_experts: int, part: str = "moe") -> dict:
    """Metrics of a router that starts uneven and balances gradually."""
    logits = np.random.default_rng(len(layer) + int(layer[-2:])).standard_normal(num_experts)
    load = np.exp(logits * (0.15 + 1.2 * np.exp(-6 * progress)))
    load = load / load.sum() + 0.004 * rng.standard_normal(num_experts) / num_experts**0.5
    load = np.maximum(load, 0) / np.maximum(load, 0).sum()
    return {
        f"{part}/{layer}/expert_load": load.astype(np.float32),
        f"{part}/{layer}/expert_load_max": load.max(),
        f"{part}/{layer}/max_violation": load.max() * num_experts - 1,
        f"{part}/{layer}/dropped_fraction": float(np.maximum(load - 1.25 / num_experts, 0).sum()),
        f"{part}/{layer}/router_entropy": np.log(num_experts) * (0.98 - 0.5 * progress**0.3),
        f"{part}/{layer}/load_balance_loss": float(num_experts * (load**2).sum()),
        f"{part}/{layer}/router_z_loss": 4.2,
    }


def losses(nats: float, offset: float = 0.0) -> dict:
    domains = {
        name: {"nats_per_token": nats + 0.1 * i, "bits_per_byte": (nats + 0.1 * i) / np.log(2)}
        for i, name in enumerate(DOMAINS)
    }
    nats += offset
    return {"nats_per_token": nats, "bits_per_byte": nats / np.log(2), "domains": domains}


def make_run(
    directory: pathlib.Path, *, layers=(1, 3), num_experts=8, num_steps=1000, finished=True
) -> None:
    """Writes the files of a run of a MoE model, or of a dense one if `layers` is empty."""
    rng = np.random.default_rng(0)
    num_layers = max([4, *(i + 1 for i in layers)])
    names = [("attention", "moe" if i in layers else "mlp") for i in range(num_layers)]
    layout = StackLayout.of(names)
    parts = {"attention": Attention(), "mlp": Mlp(), "moe": MoE(num_experts=num_experts)}
    parts = {name: part for name, part in parts.items() if name in layout.names}
    config = ExperimentConfig(
        name="quickstart",
        model=LanguageModel(parts=parts, stack=layout),
        optimizer=OptimizerConfig(warmup_steps=1),
        training=TrainingConfig(num_steps=num_steps),
    )
    write_run_record(directory, config, facts={"parameters": {"total": 3_456_789, "active": 9}})
    names = [f"layer_{i:02d}" for i in layers]
    with MetricWriter(directory) as writer:
        for step in range(10, num_steps + 1, 10):
            nats = 1.4 + 4.2 / (1 + step / 25) + 0.03 * rng.standard_normal()
            metrics = {
                "train/loss": nats, "perf/tokens_per_s": 20_000 + 500 * rng.standard_normal(),
                "perf/mfu": 0.41, "perf/seconds_per_step": 0.2,
            }  # fmt: skip
            for name in names:
                metrics |= moe_metrics(rng, name, step / num_steps, num_experts)
            if step % 200 == 0:
                for way, offset in (("dropless", 0.05), ("capacity_limited", 0.09)):
                    result = losses(nats + offset)
                    prefix = f"heldout/{way}"
                    metrics[f"{prefix}/nats_per_token"] = result["nats_per_token"]
                    metrics[f"{prefix}/bits_per_byte"] = result["bits_per_byte"]
                    for name, loss in result["domains"].items():
                        metrics[f"{prefix}/domain/{name}/bits_per_byte"] = loss["bits_per_byte"]
            writer.write(step, metrics)
    if finished:
        share = {
            name: {domain: rng.dirichlet(np.full(num_experts, 2.0)).tolist() for domain in DOMAINS}
            for name in names
        }
        evaluation = {"step": num_steps, "dropless": losses(1.5), "domain_expert_share": share}
        if layers:
            evaluation["capacity_limited"] = losses(1.5, 0.04)
        (directory / "evaluation.json").write_text(json.dumps(evaluation))
        (directory / "sample.txt").write_text("The whale\n```python\nprint()\n```\nand | the sea")


def report_of(directory: pathlib.Path) -> tuple[str, set[str]]:
    text = write_report(directory).read_text()
    images = {path.name for path in (directory / "report").glob("*.png")}
    assert set(re.findall(r"\]\((\w+\.png)\)", text)) == images
    return text, images


def test_report_of_a_moe_run(tmp_path):
    make_run(tmp_path)
    text, images = report_of(tmp_path)
    assert images == {"loss.png", "expert_load.png", "domain_experts.png", "router.png"}
    assert text.startswith("# quickstart\n\n1,000 steps, 4,096,000 tokens, on 8 x cpu")
    bits = f"{1.5 / np.log(2):.4f}"
    assert f"| **all** | 1.5000 | {bits} | 1.5400 |" in text
    assert "| python | 1.9000 |" in text
    assert "3,456,789 in all, 9 used by a token" in text
    assert "| time in training steps | 200 s |" in text
    unit = "[['attention', 'mlp'], ['attention', 'moe']]"
    assert f"config.model.stack.unit: [['attention', 'moe']] -> {unit}" in text
    assert "````text\nThe whale\n```python" in text
    assert "| layer_03 |" in text


def test_the_report_says_what_a_bounded_buffer_lost(tmp_path):
    make_run(tmp_path, num_steps=40)
    assert "buffer" not in _layer_table(read_run(tmp_path))
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    for number, row in enumerate(rows):
        for layer, lost in (("layer_01", 0), ("layer_03", 5 * (number % 2))):
            row[f"moe/{layer}/buffer_overflow"] = lost
            row[f"moe/{layer}/buffer_factor"] = 1.25 + lost / 10
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = _layer_table(read_run(tmp_path))
    assert "| lost in the buffer | buffer needed, x even |" in text
    lost = 5 * ((len(rows) - 1) % 2)
    assert f"| {lost} | {1.25 + lost / 10:.2f} |" in text
    assert text.endswith(f"overflowed in {len(rows) // 2} of {len(rows)} logged steps.")


@pytest.mark.parametrize(("layers", "num_experts"), [
    ((1, 3), 8), pytest.param(tuple(range(12)), 512, marks=pytest.mark.slow),
])  # fmt: skip
def test_figures_are_small_and_not_empty(tmp_path, layers, num_experts):
    make_run(tmp_path, layers=layers, num_experts=num_experts, num_steps=1500)
    _, images = report_of(tmp_path)
    for name in images:
        path = tmp_path / "report" / name
        assert path.stat().st_size < MAX_BYTES
        pixels = imread(path)
        height, width, _ = pixels.shape
        assert 250 < height < 1500 and 700 < width < 1500
        assert pixels[..., :3].std() > 0.05


def test_report_of_a_dense_run_has_no_moe_figures(tmp_path):
    make_run(tmp_path, layers=())
    text, images = report_of(tmp_path)
    assert images == {"loss.png"}
    assert "Routing" not in text and "capacity-limited" not in text
    assert "config.model.stack.unit: [['attention', 'moe']] -> [['attention', 'mlp']]" in text


def test_report_of_a_run_that_is_still_going(tmp_path):
    make_run(tmp_path, finished=False)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:50]))
    text, images = report_of(tmp_path)
    assert text.startswith("# quickstart\n\n500 of 1,000 steps")
    assert "Held-out text at step 400:" in text and "| drama | - |" in text
    assert images == {"loss.png", "expert_load.png", "router.png"}
    # The first line alone has no evaluation.
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    assert "Held-out text was not evaluated." in report_of(tmp_path)[0]


def test_report_of_a_run_without_a_step_of_its_own(tmp_path):
    """For example, a model written at its last step without training, then evaluated."""
    make_run(tmp_path, layers=(0,), num_steps=200)
    row = {"heldout/dropless/nats_per_token": 1.5, "heldout/dropless/bits_per_byte": 2.2}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 200} | row) + "\n")
    assert "Held-out text" in report_of(tmp_path)[0]


def test_unused_experts_and_nan_losses_are_drawn(tmp_path):
    make_run(tmp_path, layers=(0,), num_experts=4, num_steps=200)
    with MetricWriter(tmp_path, start_step=190) as writer:
        load = {"moe/layer_00/expert_load": [1.0, 0.0, 0.0, 0.0]}
        writer.write(200, {"train/loss": float("nan"), **load})
    report_of(tmp_path)


def test_domains_of_any_name_are_reported(tmp_path):
    """Names with markup of matplotlib, Markdown or HTML are escaped; null and NaN become "-"."""
    make_run(tmp_path, layers=(), num_steps=20)
    names = ("a$b^$", "<script>alert(1)</script>", "*|*", "中文" * 100)
    heldout = {f"heldout/dropless/domain/{name}/bits_per_byte": 2.0 for name in names}
    heldout |= {f"heldout/dropless/domain/{name}/nats_per_token": float("nan") for name in names}
    with MetricWriter(tmp_path, start_step=10) as writer:
        writer.write(20, {"train/loss": 1.0, "heldout/dropless/nats_per_token": 2.0, **heldout})
    (tmp_path / "evaluation.json").unlink()
    text, _ = report_of(tmp_path)
    assert (
        "<script" not in text and "| &lt;script&gt;alert(1)&lt;/script&gt; | - | 2.0000 |" in text
    )
    assert r"| a\$b^\$ | - | 2.0000 |" in text and r"| \*\|\* | - | 2.0000 |" in text


def test_an_extended_run_says_so_and_shows_its_newest_held_out_losses(tmp_path):
    make_run(tmp_path, layers=(), num_steps=20)  # its evaluation.json is from step 20
    config = read_config(read_json(tmp_path / "config.json"), ExperimentConfig)
    longer = dataclasses.replace(config.training, num_steps=50)
    write_run_record(tmp_path, dataclasses.replace(config, training=longer), start_step=20)
    with MetricWriter(tmp_path, start_step=20) as writer:
        writer.write(30, {"train/loss": 1.0})
    text, _ = report_of(tmp_path)
    assert "30 of 50 steps (extended from 20), " in text and "Held-out text at step 20:" in text
    with MetricWriter(tmp_path, start_step=30) as writer:
        writer.write(40, {"train/loss": 1.0, "heldout/dropless/nats_per_token": 0.125})
    text, _ = report_of(tmp_path)
    assert "Held-out text at step 40:" in text and "| 0.1250 |" in text


def test_a_report_marks_what_saw_later_tokens(tmp_path):
    make_run(tmp_path, layers=(1,), num_steps=200)
    plain, _ = report_of(tmp_path)
    assert "dropless, nats/token" in plain and "later tokens" not in plain
    record = json.loads((tmp_path / "run.json").read_text())
    record["losses"] = {
        "train": {"label": "train", "mark": SEES},
        "dropless": {"label": "slots of training", "mark": SEES},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    before = (tmp_path / "report" / "router.png").read_bytes()
    text, _ = report_of(tmp_path)
    assert f"slots of training ({SEES}), nats/token" in text and "dropless" not in text
    assert f"nats/token ({SEES})." in text and text.count(NOTES[SEES]) == 1
    assert (tmp_path / "report" / "router.png").read_bytes() != before
    assert read_run(tmp_path).loss_labels["train"].name == f"train ({SEES})"


def test_what_a_run_did_not_record_of_later_tokens_is_told_by_its_config(tmp_path):
    make_run(tmp_path, num_steps=10)
    record, config = (json.loads((tmp_path / n).read_text()) for n in ("run.json", "config.json"))
    del record["losses"]
    moe = config["model"]["parts"]["moe"]
    moe["router"] = {"kind": "expert_choice"}
    config["model"]["stack"]["allow_lookahead"] = True
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_run(tmp_path).loss_labels["dropless"].mark == SEES


def test_a_file_that_is_cut_is_named(tmp_path):
    make_run(tmp_path, num_steps=10)
    (tmp_path / "run.json").write_text('{"started": ')
    with pytest.raises(
        ValueError, match=r"run\.json is damaged: it is not valid JSON .*Bring back a copy"
    ):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "run.json").write_text("{}"),
        lambda path: (path / "metrics.jsonl").write_text('{"step":1,"moe/layer_0/expert_load":3}'),
        lambda path: (path / "metrics.jsonl").write_text('{"step":1,"train/loss":"x"}'),
    ],
    ids=["record", "load", "loss"],
)
def test_other_content_is_refused_and_nothing_is_written(tmp_path, change):
    make_run(tmp_path, num_steps=10)
    change(tmp_path)
    with pytest.raises(ValueError, match=r"Bring back a copy|not convert string to float: 'x'"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


def test_layers_of_several_parts_are_in_the_order_of_the_model(tmp_path):
    """Four experts in layers 1, 2 and 100; six experts in layers 0 and 2."""
    make_run(tmp_path, layers=(1,), num_experts=4, num_steps=200)
    places = {"six/layer_00": 6, "six/layer_02": 6, "moe/layer_02": 4, "moe/layer_100": 4}
    metrics = {}
    for place, num_experts in places.items():
        part, layer = place.split("/")
        metrics |= moe_metrics(np.random.default_rng(0), layer, 1.0, num_experts, part)
    with MetricWriter(tmp_path, start_step=190) as writer:
        last = moe_metrics(np.random.default_rng(0), "layer_01", 1.0, 4)
        writer.write(200, {"train/loss": 1.0, "domain/layer_03": 1.0} | last | metrics)
    run = read_run(tmp_path)
    assert run.layers == {
        "layer_00": "six/layer_00", "layer_01": "moe/layer_01", "layer_02_moe": "moe/layer_02",
        "layer_02_six": "six/layer_02", "layer_100": "moe/layer_100",
    }  # fmt: skip
    assert list(run.num_experts.values()) == [6, 4, 4, 6, 4]
    text, images = report_of(tmp_path)
    assert {"expert_load.png", "router.png"} < images
    fullest = 6 * metrics["six/layer_02/expert_load_max"]
    assert f"| layer_02_six | {fullest:.2f} |" in text


def test_a_run_with_parts_of_the_users_is_reported_without_importing_them(tmp_path):
    make_run(tmp_path, num_steps=10)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["parameters"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["sources"] = {"no_such_module:Part": "0"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert "| parameters | not recorded |" in report_of(tmp_path)[0]


def test_a_report_says_where_a_run_starts_and_what_it_trains(tmp_path):
    make_run(tmp_path)
    assert "| trains |" not in report_of(tmp_path)[0]
    record = json.loads((tmp_path / "run.json").read_text())
    record["init_from"] = {"path": "runs/first", "step": 2000, "sha256": "0"}
    record["trained"] = {
        "experts": {"trained": 0, "total": 4096}, "adapters": {"trained": 64, "total": 64},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(record))
    text = report_of(tmp_path)[0]
    assert "| starts from | step 2,000 of `runs/first` |" in text
    assert "| trains | 64 of 4,160 parameters: experts 0 of 4,096, adapters 64 of 64 |" in text


def test_parameters_are_counted_if_they_were_not_recorded(tmp_path):
    make_run(tmp_path, num_steps=10)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["parameters"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    total, active = re.search(
        r"([\d,]+) in all, ([\d,]+) used by a token", report_of(tmp_path)[0]
    ).groups()
    assert int(total.replace(",", "")) > int(active.replace(",", "")) > 100_000


def test_a_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics.jsonl\. Pass the workdir"):
        read_run(tmp_path)
    write_run_record(tmp_path, dataclasses.replace(ExperimentConfig(), name="empty"))
    MetricWriter(tmp_path).close()
    with pytest.raises(ValueError, match=r"metrics.jsonl is empty"):
        read_run(tmp_path)


def test_the_command(tmp_path, capsys):
    make_run(tmp_path, num_steps=20)
    assert command([f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report/report.md\n"


@pytest.mark.slow
def test_the_command_as_a_process_warns_of_nothing(tmp_path):
    make_run(tmp_path, num_steps=20)
    arguments = ["-m", "moe_jax.report", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_a_config_that_is_refused_writes_no_report(tmp_path):
    make_run(tmp_path)
    record, config = (json.loads((tmp_path / n).read_text()) for n in ("run.json", "config.json"))
    record.pop("parameters", None)  # so that the report counts them from the config
    config["model"]["model_dim"] = 0
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model_dim lies in .*model_dim=0"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()
