"""Prompts and answers: ids, targets, weights, packing, splits, refusals, a whole run."""

import dataclasses
import hashlib
import json
import logging
import os
import signal

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import check_data, heldout_batches, open_data, train_batches
from moe_jax.data.conversations import Conversation, conversation_of, pair
from moe_jax.data.objectives import EncoderSupervised, Supervised, supervised
from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.inference.text import stream_text
from moe_jax.training.loop import train
from moe_jax.training.signals import Interrupted
from tests.test_training_loop import at_batch
from tests.tiny_run import assert_same_run, tiny_training

BOS, EOS = 1, 2
A, B, C, X, Y, Z = (3 + byte for byte in b"abcxyz")
PAIRS = [{"prompt": "ab", "answer": "x"}, {"prompt": "c", "answer": "yz"}]
SUMS = [{"prompt": f"{i} + {i} = ", "answer": str(2 * i)} for i in range(60)]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def opened(tmp_path, records, objective, **settings):
    """The data of a folder with these records as train split, and one pair as validation split."""
    write(tmp_path / "pairs" / "train.jsonl", records)
    write(tmp_path / "pairs" / "validation.jsonl", [{"prompt": "?", "answer": "!"}])
    settings = {"sequence_length": 8, "cache_dir": str(tmp_path / "cache"), **settings}
    return open_data(DataConfig(corpus=str(tmp_path / "pairs"), objective=objective, **settings))


def row(data):
    """The first training row as lists, without the padding on the right."""
    (batch,) = [next(train_batches(data, global_batch_size=1))]
    sides = {"": batch["segment_ids"][0], "encoder_": batch.get("encoder_segment_ids", [[]])[0]}
    return {
        name: values[0][: np.count_nonzero(sides["encoder_" if "encoder" in name else ""])].tolist()
        for name, values in batch.items()
        if name != "domain"
    }


@dataclasses.dataclass(frozen=True)
class Mine(Supervised):
    """An objective outside the library, which may encode in its own way."""


def test_tokens_of_the_users_objective_belong_to_its_source(monkeypatch):
    def fingerprints():
        tokenizer = ByteTokenizer()
        return [one.encoder(tokenizer).fingerprint() for one in (Supervised(), Mine())]

    ours, mine = fingerprints()
    monkeypatch.setattr(supervised, "source_hash", lambda kind: f"another {kind}")
    assert fingerprints()[0] == ours and fingerprints()[1] != mine
    said = f"{ByteTokenizer().fingerprint()} ('Supervised', '', False)"
    assert ours == hashlib.sha256(said.encode()).hexdigest()  # as in caches of earlier releases


def test_targets_are_answers_and_their_ends(tmp_path):
    assert row(opened(tmp_path, PAIRS, Supervised())) == {
        "inputs": [BOS, A, B, X, BOS, C, Y, Z],
        "targets": [A, B, X, EOS, C, Y, Z, EOS],
        "loss_weights": [0, 0, 1, 1, 0, 1, 1, 1],
        "segment_ids": [1, 1, 1, 1, 2, 2, 2, 2],
        "positions": [0, 1, 2, 3, 0, 1, 2, 3],
    }


def test_an_encoder_reads_the_prompt_and_a_decoder_writes_the_answer(tmp_path):
    assert row(opened(tmp_path, PAIRS, EncoderSupervised(answer_length=5))) == {
        "encoder_inputs": [A, B, EOS, C, EOS],
        "encoder_segment_ids": [1, 1, 1, 2, 2],
        "encoder_positions": [0, 1, 2, 0, 1],
        "inputs": [0, X, 0, Y, Z],
        "targets": [X, EOS, Y, Z, EOS],
        "loss_weights": [1, 1, 1, 1, 1],
        "segment_ids": [1, 1, 2, 2, 2],
        "positions": [0, 1, 0, 1, 2],
    }


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        (Supervised(), [[1, 2], [3]]),  # 4 + 4 of 8 tokens; the third pair needs 5
        (Supervised(packed=False), [[1], [2], [3]]),
        (EncoderSupervised(answer_length=4), [[1], [2], [3]]),  # targets of 2 and 3, of 4 tokens
        (EncoderSupervised(answer_length=5), [[1, 2], [3]]),
    ],
)
def test_a_row_takes_the_next_pair_while_both_sides_have_room(tmp_path, objective, rows):
    data = opened(tmp_path, [*PAIRS, {"prompt": "c", "answer": "zzz"}], objective)
    batch = next(train_batches(data, global_batch_size=len(rows)))
    sizes = {1: 2, 2: 3, 3: 4}  # weighted targets per pair
    found = sorted(
        [np.sum(weights[segments == n]) for n in range(1, segments.max() + 1)]
        for weights, segments in zip(batch["loss_weights"], batch["segment_ids"], strict=True)
    )
    assert found == sorted([sizes[number] for number in numbers] for numbers in rows)


def test_what_is_longer_than_a_row_is_refused_cut_or_left_out(tmp_path, caplog):
    long = [
        {"prompt": "abcabc", "answer": "xyz"},  # 9 inputs: the end of the answer is cut
        {"prompt": "abcabcabc", "answer": "x"},  # no token of the answer would be left
        {"prompt": "a", "answer": "x"},
    ]
    with pytest.raises(
        ValueError,
        match=r"2 of the 3 pairs of 'pairs' \(train\) are longer than data\.sequence_length=8, the "
        r"longest has 11 tokens\. Set config\.data\.sequence_length=11, or config\.data\.objective",
    ):
        check_data(opened(tmp_path, long, Supervised()))
    check_data(opened(tmp_path, long, Supervised(), sequence_length=11))
    supervised.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        data = opened(tmp_path, long, Supervised(too_long="truncate", packed=False))
        batch = next(train_batches(data, global_batch_size=2))
    assert "2 of the 3 pairs" in caplog.text and "1 are cut and 1 left out" in caplog.text
    rows = zip(batch["targets"], batch["loss_weights"], strict=True)
    targets = [targets[weights > 0].tolist() for targets, weights in rows]
    assert sorted(targets) == [[X, EOS], [X, Y]]
    data = opened(tmp_path, long, Supervised(too_long="leave_out"))
    assert row(data)["targets"] == [A, X, EOS]


def test_the_length_that_a_pair_exceeds_is_named(tmp_path):
    long = [{"prompt": "a", "answer": "xyzxyz"}]
    found = r"data\.objective\.answer_length=4, the longest has 7 tokens\. Set config\.data\."
    with pytest.raises(ValueError, match=rf"{found}objective\.answer_length=7, or"):
        check_data(opened(tmp_path, long, EncoderSupervised(answer_length=4)))
    check_data(opened(tmp_path, long, EncoderSupervised(answer_length=7)))
    long = [{"prompt": "abcabcabc", "answer": "xyzxyz"}]
    both = r"Set config\.data\.sequence_length=10 and config\.data\.objective\.answer_length=7, or"
    with pytest.raises(ValueError, match=both):
        check_data(opened(tmp_path, long, EncoderSupervised(answer_length=4)))
    for objective, names in (
        (Supervised(too_long="leave_out"), r"Raise config\.data\.sequence_length\."),
        (EncoderSupervised(answer_length=4, too_long="leave_out"), r"or .*answer_length\."),
    ):
        with pytest.raises(ValueError, match=rf"one pair or more that fits into a row.* {names}"):
            check_data(opened(tmp_path, long, objective))


def test_both_sides_of_a_pair_are_cut(tmp_path):
    long = [{"prompt": "abcabcabc", "answer": "xyz"}]
    data = opened(tmp_path, long, EncoderSupervised(answer_length=2, too_long="truncate"))
    cut = row(data)
    assert cut["encoder_inputs"] == [A, B, C, A, B, C, A, B]
    assert (cut["inputs"], cut["targets"]) == ([0, X], [X, Y])


def test_pairs_are_of_one_file_or_several_and_are_held_out_whole(tmp_path):
    for name, records in (("one", SUMS[:30]), ("two", SUMS[30:])):
        write(tmp_path / "sums" / f"{name}.jsonl", records)
    write(tmp_path / "sums" / "other.jsonl", [{"text": "no pair"}])
    config = DataConfig(
        corpus=str(tmp_path / "sums" / "*o*e.jsonl"), objective=Supervised(), sequence_length=24,
        heldout_fraction=0.2, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert open_data(config).domains == ("one",)
    every = dataclasses.replace(config, corpus=str(tmp_path / "sums" / "[ot][nw][eo].jsonl"))
    data = open_data(every)
    assert data.domains == ("one", "two")
    counts = {
        split: sum(count.documents for count in by_domain.values())
        for split, by_domain in data.files.counts.items()
    }
    assert sum(counts.values()) == 60 and 3 < counts["heldout"] < 25
    answers = set()
    for batch in heldout_batches(data, batch_size=2):
        for targets, weights, segments in zip(
            batch["targets"], batch["loss_weights"], batch["segment_ids"], strict=True
        ):
            for number in range(1, segments.max() + 1):
                answer = targets[(segments == number) & (weights > 0)]
                assert answer[-1] == EOS
                answers.add(ByteTokenizer().decode(answer))
    assert len(answers) == counts["heldout"]


def test_a_line_alone_is_not_cut_to_hold_out_its_end(tmp_path):
    path = write(tmp_path / "one.jsonl", [{"prompt": "p", "answer": "a\n" * 50}])
    config = DataConfig(
        corpus=path, objective=Supervised(), heldout_fraction=0.3,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"No text .* is held out.*Add documents, of ids or"):
        check_data(open_data(config))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"such as \{\"prompt\": \"\.\.\.\", \"answer\": .* line 2 is '\{'\. Repair"),
        ("[1]", r"line 2 is '\[1\]'"),
        ('{"prompt": "a"}', r"line 2 has the fields \['prompt'\], and no answer\. Rename its"),
        ('{"text": "a"}', r"line 2 has .* no prompt and no answer\. Rename its fields"),
        ('{"prompt": "a", "answer": ""}', r"must have text: the answer of .* line 2 is empty"),
        ('{"prompt": null, "answer": "b"}', r"text: 'prompt' of .* line 2 is None\. Correct the"),
        ('{"prompt": "a", "answer": "b", "messages": []}', r"not both: .* line 2 .*Remove one"),
        ('{"prompt": "a", "answer": "b", "heldout": "tail"}', r"line 2 has \"heldout\": \"tail\""),
        ('{"messages": []}', r"list of one or more: .* line 2 has \[\]"),
        ('{"messages": [{"role": "bot", "content": "a"}]}',
         r"one of system, user, assistant: message 1 of .* line 2 has 'bot'\. Rename the role"),
        ('{"messages": [{"role": "user", "content": "a", "weight": 0}]}',
         r"A message must be .*: message 1 of .* line 2 is .*weight"),
        ('{"messages": [{"role": "user", "content": "a"}]}',
         r"have an answer.*line 2 has the roles \['user'\]"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', r"after a prompt: .* line 2"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
         r"An answer must have text: the answer of message 2 of .* line 2 is empty"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
         r"line 2: Messages need a chat template to become tokens: .*chat_template=tokenizer"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_pair_is_refused_by_its_number(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(PAIRS[0]) + "\n" + line)
    config = DataConfig(corpus=str(path), objective=Supervised(), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=message) as refused:
        check_data(open_data(config))
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    assert not list((tmp_path / "cache").glob("[!.]*"))  # no half-written files


def test_what_has_no_pairs_is_refused(tmp_path):
    config = DataConfig(objective=Supervised(), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        ValueError, match=r"read only from JSON lines: data.corpus='embedded'. Set config"
    ):
        open_data(config)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ValueError, match=r"JSON lines: .*x\.txt' has files of text"):
        open_data(dataclasses.replace(config, corpus=str(tmp_path / "x.txt")))
    (tmp_path / "empty.jsonl").write_text("\n")
    empty = dataclasses.replace(config, corpus=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"A corpus must have text: .*empty\.jsonl' has none"):
        check_data(open_data(empty))
    with pytest.raises(ValueError, match="reads a prompt as it is, without a chat template"):
        EncoderSupervised(chat_template="tokenizer")


def test_a_record_comes_back_from_its_text():
    messages = [{"role": "user", "content": 'é "q"\n'}, {"role": "assistant", "content": "\t"}]
    for record in (PAIRS[0], {"prompt": "", "answer": "a"}, {"messages": messages, "id": 3}):
        conversation = conversation_of(record, "here")
        assert Conversation.of_text(conversation.to_text()) == conversation
    assert pair("ab", "x") == conversation_of(PAIRS[0] | {"source": "web"}, "here")


def test_files_of_pairs_are_another_cache_than_those_of_text_and_follow_the_settings(tmp_path):
    made = {
        opened(tmp_path, PAIRS, objective).files.directory
        for objective in (
            Supervised(), Supervised(packed=False), Supervised(last_answer_only=True),
            EncoderSupervised(), EncoderSupervised(answer_length=3),
        )
    }  # fmt: skip
    assert len(made) == 3  # packing and lengths do not change the cache key


def test_ids_above_half_of_uint16_keep_their_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 40_000)
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: np.full(len(text), 39_999))
    data = opened(tmp_path, PAIRS, Supervised())
    assert data.files.dtype == np.uint32
    assert row(data)["targets"] == [39_999] * 3 + [EOS] + [39_999] * 3 + [EOS]


def test_a_kill_while_pairs_are_encoded_leaves_no_half_cache(tmp_path, monkeypatch):
    def stop(self, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supervised.AnswerEncoder, "encode_document", stop)
        _ = opened(tmp_path, PAIRS, Supervised()).files
    assert not list((tmp_path / "cache").glob("[!.]*"))
    assert row(opened(tmp_path, PAIRS, Supervised()))["targets"][2:4] == [X, EOS]


def test_a_prompt_is_read_as_in_training():
    config = tiny_training({"data": {"objective": "supervised"}})
    seen = []

    def read(config, params, prompts, num_tokens, **how):
        seen.append((prompts, how["stop_tokens"]))
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_jax.inference.text.stream_tokens", read)
        list(stream_text(config, {}, ["ab"], 4))
    assert seen == [([[BOS, A, B]], (EOS,))]


def run_of(folder, **data):
    return tiny_training(
        {
            "data": {
                "corpus": str(folder), "objective": "supervised", "sequence_length": 24,
                "heldout_fraction": 0.2, "cache_dir": str(folder.parent / "cache"), **data,
            },
            "training": {"num_steps": 6, "evaluate_every": 3, "checkpoint_every": 2},
        }
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_that_is_stopped_ends_like_one_that_was_not(tmp_path, monkeypatch):
    write(tmp_path / "sums" / "a.jsonl", SUMS)
    config = run_of(tmp_path / "sums")
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="SIGTERM after step 4"):
        at_batch(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")

    said = json.loads((tmp_path / "whole" / "evaluation.json").read_text())["dropless"]
    data = open_data(config.data)
    batches = list(heldout_batches(data, batch_size=4))
    assert said["tokens"] == sum(batch["loss_weights"].sum() for batch in batches)
    answers = [
        Conversation.of_text(document.text).messages[1].content
        for split, document in data.corpus.documents("a", 0.2)
        if split == "heldout"
    ]
    assert said["tokens"] == sum(len(answer) + 1 for answer in answers)  # answers and their ends
    nats = said["nats_per_token"] * said["tokens"]
    per_byte = nats / np.log(2) / sum(map(len, answers))
    assert said["bits_per_byte"] == pytest.approx(per_byte, rel=1e-6)
