"""Rows of the run on an accelerator at tiny sizes, its goals and its page."""

import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accelerator import (
    attention,
    experts,
    goals,
    layers,
    page,
    parity,
    quickstart,
    shapes,
    step,
)
from benchmarks.accelerator.kernels import choices
from benchmarks.accelerator.record import Record
from moe_jax.config.kinds import KINDS
from moe_jax.moe.part import MoE
from moe_jax.moe.run_experts.plan import IMPLEMENTATIONS
from moe_jax.planning.arithmetic import count_flops


def test_loads_by_hand():
    shape = shapes.Shape(rows=100, experts=5, model_dim=2, expert_dim=3)
    assert shapes.group_sizes(shape, "even").tolist() == [25, 25, 25, 25, 0]
    zipf = shapes.group_sizes(shape, "zipf")
    # 100 rows times 12, 6, 4 and 3 parts of 25.
    assert zipf.tolist() == [48, 24, 16, 12, 0]
    # 25 slots per expert: the even load keeps all rows, the favourite keeps only 25 of 48.
    assert shape.slots == 25
    assert shapes.kept_in_slots(shape, "even") == 100
    assert shapes.kept_in_slots(shape, "zipf") == 25 + 24 + 16 + 12
    # Three products of 2 x 3 per row, two FLOPs each, tripled by both gradients.
    assert shape.flops(10) == 10 * 3 * (2 * 2 * 3) * 3


def test_pairs_of_attention_by_hand():
    assert attention.seen_pairs(4, None) == 1 + 2 + 3 + 4
    assert attention.seen_pairs(4, 2) == 1 + 2 + 2 + 2
    form = attention.Form(batch=2, length=6, heads=3, kv_heads=3, dim=5, value_dim=7, documents=2)
    whole = form._replace(documents=1)
    assert whole.segments.tolist() == [1] * 6 and whole.pairs == 2 * 21
    # The first document ends at 6 / (2 * 2) = 1; the other has the five remaining tokens.
    assert form.segments.tolist() == [1, 2, 2, 2, 2, 2]
    assert form.pairs == 2 * (1 + 15)
    assert form.flops == 3 * 2 * form.pairs * 3 * (5 + 7)
    positions = attention.positions_of(jnp.asarray([[1, 1, 2, 2, 2, 3]]))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]


@pytest.mark.parametrize("form", ["slots 1.25", "ragged", "dense FFN"])
def test_the_forms_of_experts_are_the_same_function(form):
    """Compares expert 0 on its own rows with the products written out."""
    if form == "ragged":
        form = f"ragged {choices(MoE, 'grouped_matmul')[-1]}"
    shape = shapes.TINY["tiny_E4"]
    made = experts.make(shape, "even", form)
    y = made.function(made.x, made.weights, made.sizes_E)
    count = 32  # fewer than expert 0's 43 rows or 40 slots
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
    monkeypatch.setattr(parity, "reference_case", parity.reference_case.__wrapped__)
    monkeypatch.setattr(parity, "dense_sum", lambda assignment: wrong(assignment))
    assert not parity.compare_way("gather", "", "float32 highest", parity.TINY)["passed"]


def wrong(assignment):
    """The dense sum without the drops."""
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
    """A kernel must handle the last expert with rows and the expert without rows."""
    shape = shapes.TINY["tiny_E4"]
    sizes = jnp.asarray(shapes.group_sizes(shape, "even"))
    made = experts.make(shape, "even", "slots 1.25")._replace(
        x=experts.random(8, (shape.rows, shape.model_dim)), sizes_E=sizes
    )
    dy = experts.random(9, made.x.shape)

    def by_expert(x, weights):
        """Computes each row with the weights of its own expert."""
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
    assert np.isnan(experts.largest([0.003, np.nan])) and np.isnan(experts.largest([np.nan, 0.003]))
    assert experts.largest([0.003, 0.001]) == 0.003


def test_each_form_of_attention_is_of_one_document_but_for_that_of_several():
    for forms in (
        attention.FORMS,
        {n: attention.small(f, False) for n, f in attention.FORMS.items()},
    ):
        found = {name: int(form.segments.max()) for name, form in forms.items()}
        assert found == dict.fromkeys(forms, 1) | {"documents": 3}


def test_dropped_choices_of_a_layer_are_no_useful_work():
    found = layers.measure(layers.TINY["tiny"], "gather", "", 0.25, True)
    assert 0 < found["kept"] < 0.5
    choices = 2 * 16 * 2  # two experts for each token of two sequences
    flops = found["kept"] * choices * 3 * (3 * 2 * 16 * 32)
    assert found["tflops"] * 1e12 * found["ms"] / 1e3 == pytest.approx(flops, rel=0.01)


def test_every_way_and_every_router_has_a_row():
    names = {row.name for row in parity.rows(dry=True)}
    for precision in ("bfloat16", "float32 highest"):
        assert {f"{way}/{precision}" for way in ("einsum", "gather")} <= names
        assert {f"router {kind}/{precision}" for kind in KINDS["router"]} <= names
    ragged = [name for name in names if name.startswith("ragged")]
    assert ragged and {"auto", "einsum", "gather", "ragged"} == set(IMPLEMENTATIONS)


def test_a_kernel_is_not_held_to_a_dtype_that_it_refuses(monkeypatch):
    monkeypatch.setattr(parity, "usable_kernels", lambda: ["triton", "mosaic_gpu"])
    names = [row.name for row in parity.rows(dry=True) if row.name.startswith("ragged")]
    assert sorted(names) == [
        "ragged mosaic_gpu/bfloat16", "ragged triton/bfloat16", "ragged triton/float32 highest",
    ]  # fmt: skip


def test_what_fits_is_chosen_by_memory():
    size = step.SIZES["Mixtral-shaped"]
    small, large = (next(step.fitting(size, step.DEFAULT, gb * 1e9)) for gb in (73, 130))
    assert small.training.batch_size * small.data.sequence_length >= step.ENOUGH
    assert large.model.stack.repeats >= small.model.stack.repeats
    assert not list(step.fitting(size, step.DEFAULT, 5e9))


def test_half_the_square_of_attention_is_what_no_causal_query_sees():
    size = step.TINY["tiny"]
    config = step.config_of(size, step.DEFAULT, layers=2, batch=2, remat="none")
    forward = count_flops(config.model, config.lengths).attention
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=64))
    # At twice the length, only the square of scores and values grows per token.
    grown = count_flops(longer.model, longer.lengths).attention - forward
    assert step.unseen_flops(config) == 3 * grown / 2


def test_a_step_that_does_not_fit_says_what_was_said(monkeypatch):
    said = ["RESOURCE_EXHAUSTED: out of memory, 90 GB", "RESOURCE_EXHAUSTED: Shared memory size"]

    def train(config, dry):
        raise jax.errors.JaxRuntimeError(said.pop(0))

    monkeypatch.setattr(step, "train", train)
    monkeypatch.setattr(step, "memory_limit", lambda: 1e12)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory"):  # not a lack of HBM
        step.measure(step.TINY["tiny"], step.DEFAULT, dry=True)
    said += ["RESOURCE_EXHAUSTED: out of memory, 90 GB"] * step.TRIES
    with pytest.raises(RuntimeError, match=r"2 layers, .* remat none: .* out of memory, 90 GB; "):
        step.measure(step.TINY["tiny"], step.DEFAULT, dry=True)


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
            for step in range(10, 101, 10)]  # fmt: skip
    rows.append({"step": 100, "checkpoint/seconds": 1.0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = quickstart.summary(quickstart.read(path))
    assert found["losses"] == {"10": 4.9, "20": 4.8, "40": 4.6, "60": 4.4, "80": 4.2, "100": 4.0}
    assert found["tokens_per_s"] == 55
    assert list(quickstart.summary({5: {"train/loss": 1.0}})["losses"]) == ["5"]


def a_card(**changes):
    """Rows as a run records them."""
    device = {"platform": "gpu", "kind": "NVIDIA H100 80GB HBM3", "devices": 1, "memory_gb": 73.0,
              "peak_tflops": 989.4, "versions": {"jax": "0.11.2"}, "python": "3.12", "card": "",
              "at": 1.8e9, "commit": "abc1234"}  # fmt: skip
    speed = {"ms": 10.0, "ms_low": 9.9, "ms_high": 10.4, "tflops": 500.0, "share": 0.63,
             "program_mb": 17.0}  # fmt: skip
    right = speed | {"error": 4e-3, "empty_expert": 0.0}
    rows = {
        ("facts", "device"): device,
        ("experts", "mixtral_E8/even/ragged triton"): right,
        ("experts", "mixtral_E8/even/ragged dense"): right | {"ms": 1.0, "share": 0.99},
        ("experts", "fine_E64/even/ragged triton"): right | {"share": 0.44},
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


def verdicts_with(**rows):
    """Verdicts of the goals on a card with changed rows, named GROUP__ROW."""
    card = a_card()
    for name, line in rows.items():
        key = tuple(name.split("__"))
        card[key] = {"group": key[0], "row": key[1], **line}
    return [goal.verdict(card) for goal in goals.GOALS]


def test_parity_passes_only_if_every_row_does():
    failed, skipped = {"state": "failed", "error": "aborted"}, {"state": "skipped"}
    assert verdicts_with(parity__einsum=failed)[0] == "**fail**: 1 of 2"
    assert verdicts_with(parity__einsum=skipped)[0] == "open: 1 of 1, 1 not reached"
    both = verdicts_with(parity__einsum=skipped, parity__soft=failed)
    assert both[0] == "**fail**: 1 of 2, 1 not reached"
    assert verdicts_with(parity__start=failed)[0] == "pass: 1 of 1", "no row"


def test_a_kernel_that_is_wrong_reaches_no_goal():
    key = "experts", "mixtral_E8/even/ragged mosaic_gpu"
    fast = {**a_card()["experts", "mixtral_E8/even/ragged triton"], "ms": 1.0, "share": 0.9}
    for wrong in ({"error": None}, {"error": 0.03}, {"empty_expert": None}, {"empty_expert": 1.0}):
        card = a_card() | {key: fast | wrong}
        assert goals.GOALS[1].verdict(card) == "pass: 63% by ragged triton"
        del card["experts", "mixtral_E8/even/ragged triton"]
        assert goals.GOALS[1].verdict(card) == "**fail**: 90% by ragged mosaic_gpu, which is wrong"
        assert goals.GOALS[3].verdict(card) == "**fail**: 1 ms, PyTorch 11 ms"
    assert goals.GOALS[1].verdict(a_card() | {key: fast}) == "pass: 90% by ragged mosaic_gpu"


def test_a_step_whose_loss_does_not_fall_reaches_no_goal():
    line = {"state": "measured", "mfu_causal": 0.5, "finite": True, "falls": True}
    assert verdicts_with(step__fast=line)[-1] == "pass: 50%, fast"
    for bad in ({"finite": False}, {"falls": False}):
        assert verdicts_with(step__fast=line | bad)[-1] == "not measured"
    of_unknown_peak = verdicts_with(step__fast=line | {"mfu_causal": None})[-1]
    assert of_unknown_peak == "open: this card's peak is not in planning/hardware.py"


def test_the_page_shows_what_is_wrong_with_a_row():
    assert page.wrong_in({}) == ""
    assert page.wrong_in({"error": 4e-3, "empty_expert": 0.0}) == "4.0e-03"
    assert page.wrong_in({"error": None, "empty_expert": None}) == "nan, **empty expert nan**"
    assert page.wrong_in({"finite": False}) == "**not finite**"


def test_the_page_says_what_was_left_out_and_why():
    card = a_card()
    card["experts", "dsv3_E32/even/ragged triton"] = {
        "state": "failed", "error": "stopped after 74 s",
    }  # fmt: skip
    for name in ("a", "b"):
        card["layers", name] = {"state": "skipped", "reason": "not reached"}
    card["experts", "start"] = {"state": "skipped", "reason": "a later process started"}
    text = page.make_page([card])
    assert "Never run" not in text and "later process" not in text
    assert "| NVIDIA H100 80GB HBM3 | 0.11.2 | abc1234 |" in text
    assert "| mixtral_E8/even/ragged triton | 10 | 9.9 to 10.4 | 500 | 63% | 17 | 4.0e-03 |" in text
    assert "- dsv3_E32/even/ragged triton: failed, stopped after 74 s" in text
    assert "- not reached: a; b\n" in text


def test_the_page_in_docs_is_made_of_the_records_in_docs():
    assert page.PAGE.read_text(encoding="utf-8") == page.make_page()
    assert ("Never run" in page.make_page()) == (not page.measured_cards())


def test_a_dry_run_is_never_published(tmp_path, monkeypatch):
    record = Record(tmp_path / "accelerator.jsonl")
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
