"""Runs side by side: what differs, results, forbidden comparisons, errors."""

import csv
import dataclasses
import html
import json
import math
import os
import statistics

import pytest
from matplotlib.image import imread

from moe_jax import compare as command
from moe_jax.analysis.comparison import compare, differing
from moe_jax.analysis.comparison_figure import comparison_figure
from moe_jax.analysis.comparison_page import comparison_page
from moe_jax.analysis.comparison_pairs import pairs_of
from moe_jax.analysis.runs import find_runs, read_entries
from moe_jax.analysis.table import Column, csv_text, text_of
from moe_jax.config import MeshConfig, write_config
from tests.tiny_run import DENSE, tiny_config

NUM_STEPS = 20


def losses(bits, *, bytes_per_token=1.0, tokens=1000.0):
    """A score of `bits` bits per byte on a text of `tokens * bytes_per_token` bytes."""
    nats = bits * math.log(2) * bytes_per_token
    return {"nats_per_token": nats, "bits_per_byte": bits, "tokens": tokens, "domains": {}}


def make_run(directory, bits=2.0, *, settings=None, steps=NUM_STEPS, score=None, config=None):
    """Writes a run's files: finished with this loss, or stopped after `steps` steps."""
    directory.mkdir(parents=True)
    training = {"num_steps": NUM_STEPS, "evaluation_batches": 1}
    config = config or tiny_config({"training": training, **(settings or {})})
    (directory / "config.json").write_text(json.dumps(write_config(config)))
    record = {
        "parameters": {"total": 1000, "active": 400}, "forward_flops_per_token": {"model": 100.0},
    }  # fmt: skip
    (directory / "run.json").write_text(json.dumps(record))
    rows = []
    for step in range(5, steps + 1, 5):
        speed = {"perf/tokens_per_s": 100.0 + step, "perf/seconds_per_step": 2.0}
        rows.append({"step": step, "train/loss": 3.0 - step / 20, **speed})
        if step % 10 == 0:
            rows.append({"step": step, "heldout/dropless/bits_per_byte": bits + 0.1})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if steps >= NUM_STEPS:
        found = {"step": NUM_STEPS, "dropless": score or losses(bits)}
        (directory / "evaluation.json").write_text(json.dumps(found))
    return directory


def comparison_of(*paths, order="bits_per_byte"):
    return compare(read_entries(find_runs(paths)), order)


def column(columns, name):
    (found,) = [column for column in columns if column.name == name]
    return list(found.values)


def learning_rate(value, **more):
    return {"optimizer": {"learning_rate": value, "warmup_steps": 0}, **more}


def test_the_settings_that_differ_are_columns_and_the_best_run_is_first(tmp_path):
    make_run(tmp_path / "a", 2.5, settings=learning_rate(0.001))
    make_run(tmp_path / "b", 2.0, settings=learning_rate(0.01))
    found = comparison_of(tmp_path)
    assert column(found.columns, "run") == ["b", "a"]
    assert [c.name for c in found.settings_columns] == ["config.optimizer.learning_rate"]
    assert column(found.columns, "config.optimizer.learning_rate") == [0.01, 0.001]
    assert column(found.columns, "heldout/dropless/bits_per_byte") == [2.0, 2.5]
    nats = column(found.columns, "heldout/dropless/nats_per_token")
    assert nats == pytest.approx([2.0 * math.log(2), 2.5 * math.log(2)])
    assert column(found.columns, "tokens_per_s") == [112.5, 112.5]  # median of 105, 110, 115, 120
    assert column(found.columns, "parameters") == [1000, 1000]
    assert column(found.columns, "active_parameters") == [400, 400]
    assert not any("capacity" in c.name for c in found.columns) and found.notes == []
    text = text_of(found.shown_columns)
    assert "--config.optimizer." in text and "learning_rate" in text and "112" in text


def test_parts_differ_by_kind_and_then_by_the_fields_of_those_alike():
    dense = {"model": {"parts": {"mlp": {"kind": "mlp", "dim": 8}}}, "seed": 0}
    experts = [
        {"model": {"parts": {"moe": {"kind": "moe", "num_experts": n, "bias": bias}}}, "seed": 0}
        for n, bias in ((4, None), (8, {"kind": "sign", "rate": 0.1}))
    ]
    assert differing([dense, *experts, {}]) == {
        "config.model.parts.mlp": ("mlp", None, None, None),
        "config.model.parts.moe": (None, "moe", "moe", None),
        "config.model.parts.moe.num_experts": (None, 4, 8, None),
        "config.model.parts.moe.bias": (None, None, "sign", None),
    }
    assert differing([experts[0], experts[0]]) == {}
    assert differing([{"a": {"x": 1}}, {}]) == {}


def test_runs_that_differ_in_seeds_alone_have_a_mean(tmp_path):
    for seed, bits in enumerate((2.0, 2.2, 2.7)):
        both = {"seed": seed, "data": {"sequence_length": 16, "seed": seed}, "name": f"run {seed}"}
        make_run(tmp_path / f"low_{seed}", bits, settings=learning_rate(0.001, **both))
    make_run(tmp_path / "low_3", steps=10, settings=learning_rate(0.001, seed=3))
    make_run(tmp_path / "again", 9.0, settings=learning_rate(0.001, seed=2, name="run 2",
             data={"sequence_length": 16, "seed": 2}), steps=15)  # fmt: skip
    make_run(tmp_path / "high", 2.1, settings=learning_rate(0.01))
    seeds = comparison_of(tmp_path).seed_columns
    assert column(seeds, "run") == ["low_0"], "the runs' names differ in more than numbers"
    assert column(seeds, "config.optimizer.learning_rate") == [0.001]
    assert column(seeds, "n") == [3]
    assert [c.cells() for c in seeds if c.name == "n"] == [["3 of 4"]]
    name = "heldout/dropless/bits_per_byte"
    assert column(seeds, f"{name}/mean") == pytest.approx([2.3])
    assert column(seeds, f"{name}/sd") == pytest.approx([statistics.stdev((2.0, 2.2, 2.7))])
    assert "config.seed" not in {c.name for c in seeds}


def test_settings_that_change_no_result_make_no_other_group(tmp_path):
    often = {"num_steps": NUM_STEPS, "evaluation_batches": 1, "log_every": 1}
    make_run(tmp_path / "a", 2.0, settings={"seed": 0})
    make_run(tmp_path / "b", 3.0, settings={"seed": 1, "training": often})
    assert column(comparison_of(tmp_path).seed_columns, "n") == [2]


def started_from(source, seed):
    return {"seed": seed, "init_from": {"path": str(source)}}


def test_runs_that_start_from_runs_of_several_seeds_have_a_mean(tmp_path):
    """The usual design of fine-tuning: seed s starts from the pretrained model of seed s."""
    for seed, bits in enumerate((2.0, 2.2)):
        for arm, more in (("slow", 0.0), ("fast", 0.5)):
            settings = learning_rate(0.001 if arm == "slow" else 0.01, seed=seed)
            source = make_run(tmp_path / f"{arm}_source_{seed}", settings=settings)
            make_run(tmp_path / "tuned" / f"{arm}_{seed}", bits + more,
                     settings=started_from(source, seed))  # fmt: skip
    found = comparison_of(tmp_path / "tuned")
    assert column(found.seed_columns, "heldout/dropless/bits_per_byte/mean") == [2.1, 2.6]
    assert not any("No means" in note for note in found.notes)


@pytest.mark.parametrize("fault", ["imported", "gone"])
def test_models_of_one_config_that_were_not_trained_are_not_seeds(tmp_path, fault):
    """For example, a base model and its instruct version share one config."""
    for seed in range(2):
        source = make_run(tmp_path / f"source_{seed}")
        if fault == "imported":
            (source / "imported.json").write_text("{}")
        else:
            (source / "run.json").unlink()
        make_run(tmp_path / "tuned" / f"a_{seed}", settings=started_from(source, seed))
    found = comparison_of(tmp_path / "tuned")
    assert found.seed_columns == []
    [note] = [note for note in found.notes if "No means over seeds" in note]
    assert note.endswith("a_0, a_1.")


def test_runs_in_the_place_of_their_own_sources_are_compared(tmp_path):
    """The first was moved to where its source was, which is gone; the others start from it."""
    first = tmp_path / "tuned" / "a_0"
    for seed, bits in enumerate((2.0, 2.2)):
        settings = started_from(first, seed)
        make_run(tmp_path / "tuned" / f"a_{seed}", bits, settings=settings)
    assert comparison_of(tmp_path / "tuned").groups == [[0, 1]]


def test_the_same_config_and_seed_twice_is_no_spread(tmp_path):
    make_run(tmp_path / "a", 2.0)
    make_run(tmp_path / "b", 2.0)
    assert comparison_of(tmp_path).seed_columns == []


def test_unfinished_failed_and_damaged_runs_are_shown_as_such(tmp_path, capsys):
    make_run(tmp_path / "done", 2.0)
    make_run(tmp_path / "going", 1.0, steps=10)
    unscored = make_run(tmp_path / "unscored")  # killed in its last evaluation
    (unscored / "evaluation.json").unlink()
    rows = (unscored / "metrics.jsonl").read_text().splitlines(keepends=True)
    (unscored / "metrics.jsonl").write_text("".join(rows[:-1]))
    failed = make_run(tmp_path / "failed", steps=5)
    (failed / "log.txt").write_text("step 5/20\nerror: train/loss is nan at step 6\n\n")
    torn = make_run(tmp_path / "torn", 1.0)
    (torn / "metrics.jsonl").write_text('{"step": 5}\ngarbage\n{"step": 10}\n')
    cut = make_run(tmp_path / "cut", 1.0)
    (cut / "config.json").write_text('{"seed": ')
    never = tmp_path / "never"
    never.mkdir()
    (never / "log.txt").write_text("error: no such corpus\n")
    found = comparison_of(tmp_path)
    states = dict(zip(column(found.columns, "run"), column(found.columns, "state"), strict=True))
    assert states == {
        "done": "finished", "going": "unfinished", "unscored": "not evaluated",
        "failed": "failed", "torn": "damaged", "cut": "damaged", "never": "failed",
    }  # fmt: skip
    assert column(found.columns, "run")[0] == "done"  # a better loss that is not final gets no rank
    marks = {c.name: c.cells() for c in found.columns}
    going = column(found.columns, "run").index("going")
    assert marks["steps"][going] == "10 of 20"
    assert marks["heldout/dropless/bits_per_byte"][going] == "1.1000~"
    command.run([tmp_path], "bits_per_byte", "", "")
    said = capsys.readouterr().out
    assert "failed: failed: train/loss is nan at step 6\n" in said
    assert "config.json is damaged: it is not valid JSON (Expecting value" in said
    assert "line 2 is b'garbage'" in said and "~: no final score." in said
    assert "failed: never: no such corpus; no config.json" in said


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("config.json", '{"training": {"num_steps": "ten"}}', "training.num_steps is 'ten'"),
        ("config.json", "[]", "config.json is damaged: it is not a JSON object"),
        ("config.json", '{"model": 3, "data": 4}', "data is 4"),
        ("run.json", '{"parameters": 3}', "parameters is 3"),
        ("run.json", '{"parameters": {"total": "x"}}', "parameters.total is 'x'"),
        ("run.json", '{"earlier": [3]}', "it is not a JSON object"),
        ("run.json", '{"earlier": [{"num_steps": "9"}]}', "num_steps is '9'"),
        ("evaluation.json", '{"step": null}', "step is None"),
        ("evaluation.json", '{"dropless": {"bits_per_byte": "1"}}', "bits_per_byte is '1'"),
        ("metrics.jsonl", '{"step": 5, "train/loss": [1]}', "train/loss is [1]"),
        ("metrics.jsonl", "\0" * 200, "every line of a metrics file must be a JSON object"),
    ],
)
def test_a_file_with_other_things_in_it_damages_its_run_and_no_other(tmp_path, file, text, wrong):
    make_run(tmp_path / "good")
    rest = '\n{"step": 20}\n' if file == "metrics.jsonl" else ""
    (make_run(tmp_path / "odd") / file).write_text(text + rest)
    found = comparison_of(tmp_path)
    odd = next(entry for entry in found.entries if entry.name == "odd")
    assert odd.state == "damaged" and wrong in odd.note and "\n" not in odd.note
    assert column(found.columns, "run")[0] == "good"
    assert "damaged: odd: " in command.said(found, pairs_of(found))


def test_an_extended_run_is_unfinished_and_its_old_score_is_not_final(tmp_path):
    run = make_run(tmp_path / "run", 2.0)
    longer = tiny_config({"training": {"num_steps": 40, "evaluation_batches": 1}})
    (run / "config.json").write_text(json.dumps(write_config(longer)))
    (entry,) = comparison_of(run).entries
    assert entry.state == "unfinished" and entry.score.step == NUM_STEPS


def extend(run, before, start):
    """Records an earlier end at `before` steps, with an extension from step `start`."""
    record = json.loads((run / "run.json").read_text())
    earlier = [{"start_step": 0, "num_steps": before}]
    record |= {"start_step": start, "num_steps": NUM_STEPS, "earlier": earlier}
    (run / "run.json").write_text(json.dumps(record))


def test_extended_runs_are_marked_and_not_averaged_with_straight_ones(tmp_path):
    for seed, bits in enumerate((2.0, 2.2, 3.0)):
        run = make_run(tmp_path / f"seed_{seed}", bits, settings={"seed": seed})
    extend(run, 10, start=10)
    found = comparison_of(tmp_path)
    name = "heldout/dropless/bits_per_byte/mean"
    assert column(found.seed_columns, name) == pytest.approx([2.1])
    assert column(found.columns, "note") == ["", "", "extended from 10"]
    assert any(note.startswith("Extended runs followed the schedules") for note in found.notes)
    assert "finished: seed_2: extended from 10" in command.said(found, pairs_of(found))

    extend(make_run(tmp_path / "seed_3", 3.2, settings={"seed": 3}), 10, start=10)
    extend(make_run(tmp_path / "seed_4", 9.0, settings={"seed": 4}), 15, start=10)
    seeds = comparison_of(tmp_path).seed_columns
    assert column(seeds, name) == pytest.approx([2.1, 3.1])
    assert column(seeds, "extended") == ["", "extended from 10"]


def test_nats_of_different_tokenizers_are_not_ranked(tmp_path):
    make_run(tmp_path / "bytes", 2.0)
    data = {"sequence_length": 16, "tokenizer": "sentencepiece:other.model"}
    score = losses(1.9, bytes_per_token=4.0, tokens=249.9)  # over 999.6 bytes
    make_run(tmp_path / "pieces", settings={"data": data}, score=score)
    found = comparison_of(tmp_path)
    assert column(found.columns, "run") == ["pieces", "bytes"]
    assert found.texts == ("A", "A")
    assert any("nats/token of different tokenizers do not compare" in n for n in found.notes)
    with pytest.raises(ValueError, match=r"one tokenizer: the runs have 2: .*Sort by bits_per_byt"):
        comparison_of(tmp_path, order="nats_per_token")


def bind(run, **content):
    """Records the content that a run was bound to, as `training.workdir` does."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"content": content}))


def test_the_same_content_at_another_path_is_the_same(tmp_path):
    for name, corpus in (("a", "jsonl:one"), ("b", "jsonl:two")):
        data = {"sequence_length": 16, "corpus": corpus, "tokenizer": f"sentencepiece:{name}.model"}
        run = make_run(tmp_path / name, settings={"data": data})
        bind(run, corpus="c" * 64, tokenizer="t" * 64)
    # A run of an earlier release, which did not record its content.
    make_run(tmp_path / "old", settings={"data": data})
    found = comparison_of(tmp_path / "a", tmp_path / "b")
    assert found.notes == [] and found.texts == ("A", "A")
    found = comparison_of(tmp_path / "b", tmp_path / "old")
    assert found.notes == [] and found.texts == ("A", "A")


@pytest.mark.parametrize("change", ["fraction", "objective", "bytes", "content"])
def test_scores_on_different_text_are_marked_and_not_ranked_together(tmp_path, change):
    make_run(tmp_path / "one", 3.0)
    make_run(tmp_path / "two", 2.0)
    other = {"fraction": {"heldout_fraction": 0.5}, "objective": {"objective": "prefix_lm"}}
    settings, score = {"data": {"sequence_length": 16, **other.get(change, {})}}, losses(1.0)
    if change not in other:  # the same path with another text
        settings, score = {}, losses(1.0, tokens=1000.0 + (change == "bytes"))
    make_run(tmp_path / "zoo", settings=settings, score=score)
    if change == "content":
        for run, sign in (("one", "a"), ("two", "a"), ("zoo", "b")):
            bind(tmp_path / run, corpus=sign * 64)
    found = comparison_of(tmp_path)
    assert dict(zip(column(found.columns, "run"), found.texts, strict=True)) == {
        "one": "A", "two": "A", "zoo": "B",
    }  # fmt: skip
    assert column(found.columns, "run") == ["two", "one", "zoo"]
    (note,) = [note for note in found.notes if "different held-out text" in note]
    assert "A: 1,000 bytes of data.corpus='embedded'" in note
    assert "heldout_text" in {c.name for c in found.shown_columns}


def test_a_loss_that_is_not_causal_is_marked_and_ranked_apart(tmp_path):
    stack = {"unit": [["attention", "moe"]], "repeats": 2, "allow_lookahead": True}
    make_run(tmp_path / "old", 1.0, settings={"model": {"stack": stack}})  # causality unset
    for name, label, mark in (
        ("leaks", "slots of training", "sees later tokens"),
        ("trained", "dropless", "saw later tokens in training"),
        ("causal", "dropless", ""),
    ):
        run = make_run(tmp_path / name, 1.0 + 0.1 * len(name), settings={"model": {"stack": stack}})
        said = {"losses": {"dropless": {"label": label, "mark": mark}}}
        (run / "run.json").write_text(json.dumps(said))
    found = comparison_of(tmp_path)
    assert column(found.columns, "run") == ["causal", "trained", "old", "leaks"]
    bits = next(c for c in found.columns if c.name == "heldout/dropless/bits_per_byte")
    assert bits.title == "dropless or slots of training, bits/byte"
    assert bits.cells() == ["1.6000", "1.7000*", "1.0000*", "1.5000*"]
    saw, sees = found.notes
    assert saw == "*: saw later tokens in training: trained."
    assert sees.startswith("*: sees later tokens, so that ") and sees.endswith(": old, leaks.")


def test_where_runs_are_found(tmp_path):
    for name in ("a/lr2", "a/lr10", "b/one"):
        make_run(tmp_path / name)
    (tmp_path / "a" / "config.json").write_text("{}")  # not a run's config
    (tmp_path / "a" / "lr2" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "a" / "lr2" / "checkpoints" / "5" / "config.json").write_text("{}")

    def names(*paths):
        return [str(path.relative_to(tmp_path)) for path in find_runs(paths)]

    assert names(tmp_path) == ["a/lr2", "a/lr10", "b/one"]
    assert names(tmp_path / "a" / "lr2", tmp_path / "a") == ["a/lr2", "a/lr10"]
    assert names(f"{tmp_path}/*/lr*") == ["a/lr2", "a/lr10"]
    assert [e.name for e in read_entries(find_runs([tmp_path / "a"]))] == ["lr2", "lr10"]
    with pytest.raises(ValueError, match=r"there is no .*nowhere\. Pass a workdir"):
        find_runs([tmp_path / "nowhere"])
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"config.json and metrics.jsonl: there is none in .*/c"):
        find_runs([tmp_path / "a", tmp_path / "c"])


def test_names_with_mathematics_and_markup_are_text(tmp_path, monkeypatch):
    drawn = []
    draw = comparison_figure
    monkeypatch.setattr(
        "moe_jax.analysis.comparison_figure.comparison_figure",
        lambda comparison: drawn.append(draw(comparison)) or drawn[0],
    )
    odd = ["_a$b^$", "<script>alert(1)</script>".replace("/", "|"), "c\x1b[31m\nd", "文$x"]
    for number, name in enumerate(odd):
        make_run(tmp_path / name, 2.0 + number, settings={"optimizer": {
            "learning_rate": 0.001 * (number + 1), "warmup_steps": 0}})  # fmt: skip
    found = comparison_of(tmp_path)
    page = command.write(found, pairs_of(found), tmp_path / "out").read_text()
    assert "<script>" not in page and html.escape(odd[1]) in page
    assert "\x1b" not in page and "c\\x1b[31m\\nd" in page
    shown = [text.get_text().strip() for text in drawn[0].legends[0].texts]
    assert len(shown) == 4 and shown[0] == r"_a\$b^\$"
    pixels = imread(tmp_path / "out" / "compare.png")
    assert pixels.shape[0] > 500 and pixels[..., :3].std() > 0.05
    assert len(find_runs([tmp_path])) == 4  # written files are not runs


def test_the_figure_has_every_run_against_every_measure(tmp_path):
    make_run(tmp_path / "a", 2.0, settings=learning_rate(0.001))
    make_run(tmp_path / "b", 2.5, settings=learning_rate(0.01))
    make_run(tmp_path / "later", steps=0, settings=learning_rate(0.1))
    figure = comparison_figure(comparison_of(tmp_path))
    heldout, training = figure.axes[:4], figure.axes[4:]
    ends = [axis.lines[0].get_xdata()[-1] for axis in training]
    assert ends == [20, 20 * 4 * 16, 20 * 4 * 16 * 300, 40.0]
    # A line of samples during the run, and a dot of the whole split at the end.
    dot, line = heldout[0].lines[0], heldout[0].lines[1]
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([20], [2.0])
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10], [2.1])
    assert all(len(axis.lines) == 2 for axis in training)
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "a", "b", "later (unfinished)",
    ]  # fmt: skip


def test_the_csv_file_has_numbers_in_full_and_every_run(tmp_path):
    make_run(tmp_path / "a, b", 2.0 / 3, settings=learning_rate(1e-5))
    make_run(tmp_path / "c", steps=10, settings=learning_rate(1e-4))
    command.run([tmp_path], "name", str(tmp_path / "out" / "runs.csv"), "")
    with (tmp_path / "out" / "runs.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert first["run"] == "a, b" and second["state"] == "unfinished"
    assert float(first["heldout/dropless/bits_per_byte"]) == 2.0 / 3
    assert float(first["config.optimizer.learning_rate"]) == 1e-5
    assert (second["steps"], second["num_steps"]) == ("10", "20")
    assert len(list((tmp_path / "out").iterdir())) == 1, "no means without several seeds"


def test_a_file_of_another_kind_is_not_replaced(tmp_path, capsys):
    workdir = make_run(tmp_path / "a", 2.0)
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        command.command([str(workdir), f"--csv={workdir / 'metrics.jsonl'}"])
    assert "--csv is a new file or one that this command wrote" in capsys.readouterr().err
    assert (workdir / "metrics.jsonl").read_bytes() == before
    for _ in range(2):
        assert command.command([str(workdir), f"--csv={tmp_path / 'runs.csv'}"]) == 0


def test_means_and_pairs_have_csv_files_of_their_own(tmp_path):
    for seed, bits in enumerate((2.0, 2.2, 2.7)):
        make_run(tmp_path / f"low_{seed}", bits, settings=learning_rate(0.001, seed=seed))
        make_run(tmp_path / f"high_{seed}", bits + 0.5, settings=learning_rate(0.01, seed=seed))
    command.run([tmp_path], "name", str(tmp_path / "out" / "runs.csv"), "")
    means, pairs = (
        list(csv.DictReader((tmp_path / "out" / f"runs_{name}.csv").read_text().splitlines()))
        for name in ("means", "pairs")
    )
    assert [float(row["heldout/dropless/bits_per_byte/mean"]) for row in means] == pytest.approx(
        [2.8, 2.3]
    )
    [difference] = [value for name, value in pairs[0].items() if name.endswith("/mean")]
    assert len(pairs) == 1 and float(difference) == pytest.approx(-0.5)


def test_runs_of_different_kinds_are_one_table(tmp_path):
    training = {"training": {"num_steps": NUM_STEPS}}
    make_run(tmp_path / "dense", 2.0, config=tiny_config({**DENSE, **training}))
    moe = tiny_config(training)
    make_run(tmp_path / "moe", 1.0, config=moe)
    make_run(
        tmp_path / "mesh", 1.0, config=dataclasses.replace(moe, mesh=MeshConfig(data=1, expert=2))
    )
    score = json.loads((tmp_path / "moe" / "evaluation.json").read_text())
    score["capacity_limited"] = losses(1.5)
    (tmp_path / "moe" / "evaluation.json").write_text(json.dumps(score))
    found = comparison_of(tmp_path)
    runs = column(found.columns, "run")
    limited = column(found.columns, "heldout/capacity_limited/bits_per_byte")
    assert dict(zip(runs, limited, strict=True)) == {"dense": None, "moe": 1.5, "mesh": None}
    assert {"config.model.parts.moe", "config.model.parts.mlp", "config.mesh.expert"} <= {
        c.name for c in found.settings_columns
    }
    assert "<table>" in comparison_page(found, pairs_of(found), b"")


def test_tables():
    columns = [
        Column("name", "name", ("a", "long")),
        Column("n", "how many, of all", (1, None), "", (" of 3", "")),
    ]
    assert (
        text_of(columns) == "name  how many, of all\na               1 of 3\nlong                 -"
    )
    assert csv_text(columns) == "name,n\na,1\nlong,\n"


def test_a_table_that_is_wider_than_the_terminal_is_continued_below():
    columns = [
        Column("name", "name", ("a", "long")),
        Column("x", "x", (1, 2)),
        Column("y", "a.title_in.two_long_lines.of_it", ("seven", "six")),
        Column("z", "z", (3, 4)),
    ]
    first = "name  x\na     1\nlong  2"
    second = "      a.title_in.\nname  two_long_lines.of_it\na     seven\nlong  six"
    third = "name  z\na     3\nlong  4"
    assert text_of(columns, 20) == "\n\n".join([first, second, third])
    assert text_of(columns, 29).count("\n\n") == 1  # the columns before the last fill 29
    assert len(text_of(columns).splitlines()) == 4


def test_a_figure_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("no space left on device")

    found = comparison_of(make_run(tmp_path / "run"))
    (tmp_path / "compare.png").write_bytes(b"old")
    monkeypatch.setattr("moe_jax.analysis.comparison_figure.comparison_png", lambda _: b"new")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        command.write(found, pairs_of(found), tmp_path)
    assert (tmp_path / "compare.png").read_bytes() == b"old"


def make_seeds(directory, name, losses, **settings):
    for seed, bits in enumerate(losses):
        both = {"seed": seed, "data": {"sequence_length": 16, "seed": seed}}
        make_run(directory / f"{name}_{seed}", bits, settings={**both, **settings})


LOW = {"optimizer": {"learning_rate": 0.002, "warmup_steps": 0}}
LOWER = {"optimizer": {"learning_rate": 0.003, "warmup_steps": 0}}


def test_configs_are_compared_seed_by_seed_with_the_first_by_name(tmp_path):
    """By hand: differences -0.1, -0.2 and -0.3 have mean -0.2 and t with two degrees of freedom."""
    make_seeds(tmp_path, "a", (2.0, 3.0, 4.0))
    make_seeds(tmp_path, "b", (1.9, 2.8, 3.7), **LOW)
    make_seeds(tmp_path, "c", (1.5, 2.501, 3.5, 9.0), **LOWER)  # the fourth seed has no partner
    make_run(tmp_path / "alone", 1.0, settings={"training": {"num_steps": NUM_STEPS,
             "evaluation_batches": 1, "batch_size": 16}})  # fmt: skip
    found = pairs_of(comparison_of(tmp_path))
    by_name = {name[0]: place for place, name in enumerate(column(found.columns, "run"))}
    assert set(by_name) == {"b", "c"} and "less a_*" in found.columns[0].title

    def value(name, config):
        return column(found.columns, f"heldout/paired/{name}")[by_name[config]]

    assert column(found.columns, "pairs") == [3, 3]
    assert value("mean", "b") == pytest.approx(-0.2)
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert value("low", "b") == pytest.approx(-0.2 - half)
    assert value("high", "b") == pytest.approx(-0.2 + half)
    # t = -2 sqrt(3), so p = 1 - t / sqrt(2 + t^2) = 0.0742 with two degrees of freedom. No other p
    # is larger, so Holm's correction leaves it unchanged.
    assert value("p", "b") == pytest.approx(1 - math.sqrt(12 / 14))
    assert value("size", "b") == pytest.approx(-0.2 / math.sqrt((1 + 0.9**2) / 2))
    (note,) = found.notes
    assert "for 2 compared configs" in note and "a direction: c_* is lower." in note
    other = pairs_of(comparison_of(tmp_path), "b_1")
    assert other.columns[0].title.endswith("less b_*") and len(other.others) == 2
    with pytest.raises(ValueError, match=r"--baseline must name a finished run.*: d\. Name"):
        pairs_of(comparison_of(tmp_path), "d")


def test_the_baseline_does_not_depend_on_which_runs_are_finished(tmp_path):
    make_seeds(tmp_path, "a", (2.0, 3.0))
    make_seeds(tmp_path, "b", (1.9, 2.8), **LOW)
    (tmp_path / "a_0" / "evaluation.json").unlink()
    rows = (tmp_path / "a_0" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a_0" / "metrics.jsonl").write_text("".join(rows[:2]))
    found = pairs_of(comparison_of(tmp_path))
    assert "less a_*" in found.columns[0].title
    assert column(found.columns, "pairs") == [1]


def test_a_baseline_among_runs_without_a_score_is_refused(tmp_path):
    make_run(tmp_path / "a", steps=5)
    with pytest.raises(ValueError, match=r": a\. There is none: leave out --baseline\.$"):
        pairs_of(comparison_of(tmp_path), "a")


def test_no_pairs_are_made_of_one_seed_or_of_different_text(tmp_path):
    make_seeds(tmp_path, "a", (2.0, 3.0, 4.0))
    make_seeds(tmp_path, "b", (1.9,), **LOW)
    longer = losses(2.0, tokens=9000.0)
    for seed in range(3):
        make_run(tmp_path / f"c_{seed}", score=longer, settings={"seed": seed, "data": {
            "sequence_length": 16, "seed": seed}, **LOWER})  # fmt: skip
    found = pairs_of(comparison_of(tmp_path))
    assert found.columns == [] and found.notes == []


def test_a_config_that_sees_later_tokens_is_compared_with_its_mark(tmp_path):
    make_seeds(tmp_path, "b", (2.0, 3.0, 4.0))
    make_seeds(tmp_path, "a", (1.0, 2.0, 3.001), **LOW)
    for path in tmp_path.glob("a_*"):
        said = json.loads((path / "evaluation.json").read_text())
        said["dropless"] |= {"label": "slots of training", "mark": "sees later tokens"}
        (path / "evaluation.json").write_text(json.dumps(said))
    found = pairs_of(comparison_of(tmp_path))
    assert column(found.columns, "run") == ["a_* (sees later tokens)"]
    assert "a_* (sees later tokens) is lower" in found.notes[0]


def test_runs_without_a_score_make_no_pairs(tmp_path):
    for seed in range(2):
        run = make_run(tmp_path / f"a_{seed}", settings={"seed": seed})
        (run / "evaluation.json").unlink()
        rows = (run / "metrics.jsonl").read_text().splitlines()
        kept = [row for row in rows if "heldout" not in row]
        (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    found = comparison_of(tmp_path)
    assert found.evaluations == [] and pairs_of(found).columns == []


PAIRED = "heldout/paired"
A, B = (2.0, 3.0, 4.0), (1.9, 2.9, 3.8999)  # b is lower in each seed, by nearly equal amounts


def diverge(run, step=10):
    """Makes a run of a sweep diverge after `step` steps."""
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(rows[: step // 5]))
    (run / "evaluation.json").unlink(missing_ok=True)
    (run / "log.txt").write_text(f"error: train/loss is nan at step {step + 1}; nothing saved\n")


def seeds_and_pairs(path):
    """The tables of means and pairs by column name, and both notes, in every order."""
    found = []
    for order in ("bits_per_byte", "name", "tokens_per_s"):
        comparison = comparison_of(path, order=order)
        pairs = pairs_of(comparison)
        tables = [
            {c.name: c.cells() for c in columns}
            for columns in (comparison.seed_columns, pairs.columns)
        ]
        found.append((*tables, comparison.notes, pairs.notes))
    return found


def test_two_results_of_one_config_and_seed_make_no_mean_and_no_pair(tmp_path):
    """If either result were used, the table's order or the reader would decide on p."""
    make_seeds(tmp_path, "a", A)
    make_seeds(tmp_path, "b", B, **LOW)
    again = {"seed": 2, "data": {"sequence_length": 16, "seed": 2}}
    make_run(tmp_path / "b_2_again", 9.0, settings={**again, **LOW})
    for means, pairs, notes, _ in seeds_and_pairs(tmp_path):
        name = "heldout/dropless/bits_per_byte/mean"
        assert sorted(zip(means["n"], means[name], strict=True)) == [
            ("2 of 3", "2.4000"), ("3", "3.0000"),
        ]  # fmt: skip
        assert pairs["pairs"] == ["2 of 3"] and pairs[f"{PAIRED}/mean"] == ["-0.1000"]
        assert notes == [
            "Means and pairs are of seeds with one final score. Not: b_2 and b_2_again (one config "
            "and seed: compare one of them)."
        ]
    one = [tmp_path / f"{name}_{seed}" for name in "ab" for seed in range(3)]
    chosen = pairs_of(comparison_of(*one))
    assert column(chosen.columns, "pairs") == [3] and "b_* is lower" in chosen.notes[0]


def test_a_run_begun_again_gives_way_to_the_one_that_is_finished(tmp_path):
    make_seeds(tmp_path, "a", A)
    make_seeds(tmp_path, "b", B, **LOW)
    again = {"seed": 2, "data": {"sequence_length": 16, "seed": 2}}
    make_run(tmp_path / "b_2_again", 9.0, settings={**again, **LOW}, steps=10)
    for _, pairs, _, (note,) in seeds_and_pairs(tmp_path):
        assert pairs["pairs"] == ["3"] and "b_* is lower" in note


@pytest.mark.parametrize("kind", ["log", "score", "log beside a score"])
def test_seeds_that_diverged_are_counted_and_no_direction_is_shown_without_them(tmp_path, kind):
    """The remaining seeds were selected by their results."""
    make_seeds(tmp_path, "a", (*A, 5.0, 6.0))
    make_seeds(tmp_path, "b", (*B, 5.0, 6.0), **LOW)
    assert "b_* is lower" not in pairs_of(comparison_of(tmp_path)).notes[0]
    for seed in (3, 4):
        run = tmp_path / f"b_{seed}"
        if kind == "score":
            (run / "evaluation.json").write_text(
                json.dumps({"step": NUM_STEPS, "dropless": {"nats_per_token": None,
                            "bits_per_byte": None, "tokens": 1000.0, "domains": {}}})
            )  # fmt: skip
        else:
            diverge(run)
        if kind == "log beside a score":  # tried again until it succeeded
            again = {"seed": seed, "data": {"sequence_length": 16, "seed": seed}}
            make_run(tmp_path / f"b_{seed}_again", 1.0, settings={**again, **LOW})
    for means, pairs, notes, (note, lacking) in seeds_and_pairs(tmp_path):
        assert sorted(means["n"]) == ["3 of 5", "5"]
        assert pairs["pairs"] == ["3 of 5"] and pairs[f"{PAIRED}/mean"] == ["-0.1000"]
        for name in ("low", "high", "p", "smallest_visible"):
            assert pairs[f"{PAIRED}/{name}"] == ["-"]
        assert "a direction: none here" in note
        name = "b_0" if kind == "log beside a score" else "b_*"  # a name more than a number apart
        assert lacking.startswith(f"No direction is shown of {name}, with 3 of 5 pairs: b_3 ")
        if kind != "log beside a score":
            assert lacking.endswith(": b_3 (diverged); b_4 (diverged).")
            assert notes[-1].endswith("Not: b_3 (diverged); b_4 (diverged).")
    page = comparison_page(comparison_of(tmp_path), pairs_of(comparison_of(tmp_path)), b"")
    assert "3 of 5" in page and "b_3" in page.split("No direction is shown of")[1]


def test_a_baseline_that_diverged_and_runs_that_are_missing_are_named(tmp_path):
    make_seeds(tmp_path, "a", A)
    make_seeds(tmp_path, "b", B, **LOW)
    make_seeds(tmp_path, "c", B, **LOWER)
    diverge(tmp_path / "a_0")
    (tmp_path / "b_1" / "log.txt").write_text("error: out of memory\n")  # it stopped after 10 steps
    for name in ("b_1", "c_2"):
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / name / "metrics.jsonl").write_text("".join(rows[:2]))
        (tmp_path / name / "evaluation.json").unlink()
    for _, pairs, _, notes in seeds_and_pairs(tmp_path):
        assert sorted(zip(pairs["run"], pairs["pairs"], strict=True)) == [
            ("b_*", "1 of 3"), ("c_*", "1 of 3"),
        ]  # fmt: skip
        assert sorted(notes[1:]) == [
            "No direction is shown of b_*, with 1 of 3 pairs: a_0 (diverged); b_1 (failed).",
            "No direction is shown of c_*, with 1 of 3 pairs: a_0 (diverged); c_2 (unfinished).",
        ]


def test_a_config_of_which_every_seed_diverged_has_its_line(tmp_path):
    make_seeds(tmp_path, "a", A)
    make_seeds(tmp_path, "b", B, **LOW)
    for seed in range(3):
        diverge(tmp_path / f"b_{seed}")
    for means, pairs, _, (_, lacking) in seeds_and_pairs(tmp_path):
        assert sorted(means["n"]) == ["0 of 3", "3"]
        assert pairs["pairs"] == ["0 of 3"] and pairs[f"{PAIRED}/mean"] == ["-"]
        assert "b_0 (diverged); b_1 (diverged); b_2 (diverged)" in lacking
