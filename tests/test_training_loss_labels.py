"""How losses are labelled, and which of them saw later tokens."""

import dataclasses
import math

import pytest

from moe_jax.evaluate import table
from moe_jax.generate import note_on
from moe_jax.training.loss_labels import SAW, SEES, LossLabel, loss_labels, notes_of, recorded_label
from moe_jax.training.rows import evaluation_line, evaluation_row
from moe_jax.training.run_record import write_run_record
from tests.tiny_run import DENSE, tiny_config, tiny_moe

EXPERT_CHOICE = {"router": "expert_choice", "bias": None}
PREDICTED = {"router": {"kind": "expert_choice", "predictor_loss_weight": 0.1}, "bias": None}
SOFT = {"router": "soft", "run_experts": "auto", "bias": None, "group_size": 16}
QUEUE = {"queue": "batch_prioritized", "train_factor": 1.0, "eval_factor": 1.0}


def config_of(**moe):
    settings = tiny_moe(**moe)
    settings["model"]["stack"] = {"allow_lookahead": True}
    return tiny_config(settings)


# Training, evaluation without a capacity, and evaluation with the parts' own capacity.
@pytest.mark.parametrize(
    ("moe", "train", "dropless", "limited"),
    [
        ({}, "", ("dropless", ""), ""),
        (EXPERT_CHOICE, SEES, ("slots of training", SEES), None),
        (PREDICTED, SEES, ("dropless", SAW), SAW),
        (SOFT, SEES, ("slots of training", SEES), None),
        ({"capacity": QUEUE}, SEES, ("dropless", SAW), SEES),
        ({"capacity": QUEUE | {"eval_factor": 0.0}}, SEES, ("dropless", SAW), None),
        ({"capacity": QUEUE | {"train_factor": 0.0}}, "", ("dropless", ""), SEES),
        ({"capacity": {"slots": 3, "queue": "choice_major"}}, SEES, ("dropless", SAW), SEES),
    ],
)
def test_marks_are_what_the_model_says_of_itself(moe, train, dropless, limited):
    expected = {"train": LossLabel("train", train), "dropless": LossLabel(*dropless)}
    if limited is not None:
        expected["capacity_limited"] = LossLabel("capacity-limited", limited)
    assert loss_labels(config_of(**moe).model) == expected


BUFFER = {"run_experts": "ragged", "buffer_factor": 1.5}


@pytest.mark.parametrize(
    ("moe", "train", "dropless"),
    [
        (BUFFER, SEES, ("dropless", SAW)),  # an evaluation has room for all, unless set otherwise
        (BUFFER | {"stop_at_overflow": True}, "", ("dropless", "")),
        (BUFFER | {"eval_buffer_factor": 2.0}, SEES, ("bounded buffer", SEES)),
    ],
)
def test_what_may_lose_choices_on_the_way_is_not_called_dropless(moe, train, dropless):
    labels = loss_labels(config_of(**moe).model)
    assert (labels["train"].mark, labels["dropless"]) == (train, LossLabel(*dropless))
    limited = "capacity-limited, bounded buffer" if "eval_buffer_factor" in moe else ""
    assert labels["capacity_limited"].label == (limited or "capacity-limited")


def test_lost_choices_stand_beside_an_evaluation():
    said = {
        "dropless": losses(1.5, label="bounded buffer", mark=SEES)
        | {"buffer_overflow": {"layer_00": 1200, "layer_01": 34}}
    }
    assert "\nbounded buffer: 1,234 choices lost\n" in table(said)
    assert evaluation_line(3, said).endswith("1.5000 bits/byte, 1,234 choices lost")
    assert evaluation_row(said)["heldout/dropless/buffer_overflow"] == 1234
    assert "lost" not in table({"dropless": losses(1.5)})


def test_a_stack_that_is_not_causal_sees_later_tokens():
    model = tiny_config(DENSE).model
    encoder = dataclasses.replace(model, stack=dataclasses.replace(model.stack, causal=False))
    assert loss_labels(encoder)["dropless"] == LossLabel("dropless", SEES)
    assert loss_labels(model) == {
        "train": LossLabel("train", ""),
        "dropless": LossLabel("dropless", ""),
    }


def losses(nats, **label):
    loss = {"nats_per_token": nats, "bits_per_byte": nats, "tokens": 1.0}
    return {**loss, "domains": {"a" * 30: loss, "<b>\n": loss}, **label}


def test_evaluate_marks_what_it_prints():
    said = {"dropless": losses(1.5, label="slots of training", mark=SEES)}
    lines = table(said).splitlines()
    assert lines[0].strip() == "slots of training" and lines[1].strip() == SEES
    assert lines[2].split() == ["domain", "bits/B", "nats/tok", "ppl/tok"]
    assert lines[3].split() == ["all", "1.5000", "1.5000", "4.4817"]
    assert lines[5].startswith("<b>\\n ") and len({len(line) for line in lines[:6]}) == 1
    assert lines[6:] == notes_of([SEES]) and "not that of a causal" in lines[6]
    assert "dropless" not in table(said)
    assert evaluation_line(3, said).startswith(f"held-out after step 3: slots of training ({SEES})")


def test_generate_says_what_later_tokens_mean_for_a_text():
    assert note_on(tiny_config().model) == ""
    mark, anew = note_on(config_of(**SOFT).model).splitlines()
    assert mark.startswith(f"note: the model {SEES}; when it writes") and "causal" in mark
    assert anew.startswith("note: ['moe'] look at later tokens") and "read anew" in anew
    assert "causal" not in note_on(config_of(**PREDICTED).model)


def test_an_evaluation_of_an_earlier_version_is_read_as_it_was():
    said = {"dropless": losses(1.5), "capacity_limited": losses(math.nan)}
    assert table(said).splitlines()[0].split() == ["dropless", "capacity-limited"]
    assert recorded_label("capacity_limited", said["capacity_limited"]).name == "capacity-limited"
    assert "sees" not in table(said)


def test_a_run_records_how_its_losses_are_measured(tmp_path):
    record = write_run_record(tmp_path, config_of(**EXPERT_CHOICE))
    assert record["losses"]["dropless"] == {"label": "slots of training", "mark": SEES}
    assert record["losses"]["train"]["mark"] == SEES
