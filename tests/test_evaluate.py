"""`evaluate` and `generate` with a trained model: which text, step and devices they use."""

import json
import re

import pytest

from moe_jax import evaluate, generate
from moe_jax.data import open_tokenizer
from moe_jax.training.loop import train
from tests.tiny_run import files, tiny_state, tiny_training

TEXT = "It was the best of times, it was the wörst of times.\n" * 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4, and microbatches of four 16-token sequences."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    steps = {"num_steps": 4, "checkpoint_every": 2, "evaluate_every": 4, "evaluation_batches": 1}
    train(tiny_training({"training": steps}), workdir)
    return workdir


@pytest.fixture
def score(finished, capsys):
    """Runs evaluate; returns its first line and each row's dropless bits per byte."""

    def run(*arguments):
        assert evaluate.command([f"--workdir={finished}", *arguments]) == 0
        first, _, _, *rows = capsys.readouterr().out.splitlines()
        found = (re.match(r"(.*?\S) +([\d.]+)( +[\d.]+){5}$", row) for row in rows)
        return first, {match[1]: float(match[2]) for match in found if match}

    return run


def test_another_text_step_or_part_is_said_and_leaves_the_evaluation_of_the_run(
    finished, score, tmp_path
):
    before = files(finished)
    text = tmp_path / "own.txt"
    text.write_text(TEXT)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    documents = [json.dumps({"id": str(n), "text": TEXT, "heldout": "tail"}) for n in range(3)]
    (corpus / "letters.jsonl").write_text("\n".join(documents) + "\n")

    said, whole = score("--batches=2")
    assert said == "step 4: 2 batches of 4 sequences of the held-out split of embedded"
    said, early = score("--batches=2", "--step=2")
    assert said.startswith("step 2: 2 batches of") and early["all"] != whole["all"]
    said, own = score(f"--text={text}", f"--text={text}")
    assert said == f"step 4: the text of {text}, {text}"
    assert own["own.txt"] == own["own.txt (2)"] == own["all"]
    folder = tmp_path / "texts" / "below"
    folder.mkdir(parents=True)
    for name in ("b.md", "a.txt", "c.py"):
        (folder / name).write_text(TEXT)
    said, of_folder = score(f"--text={folder.parent}")
    assert said == f"step 4: the text of {folder.parent}"
    assert of_folder == dict.fromkeys(("all", "a.txt", "b.md"), own["all"])
    said, other = score(f"--corpus=jsonl:{corpus}", "--heldout_fraction=0.3")
    assert said == f"step 4: the held-out split of jsonl:{corpus}"
    assert set(other) == {"all", "letters"}
    assert files(finished) == before


def other_corpus(tmp_path, differ=False, **record):
    """Three records with one text, or with three."""
    path = tmp_path / "letters.jsonl"
    records = [
        {name: f"{n} {text}" if differ else text for name, text in record.items()} | {"id": n}
        for n in range(3)
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def test_another_corpus_has_fields_and_a_fraction_of_its_own(tmp_path):
    """Field names of the run, such as `body`, do not apply to another corpus."""
    data = {"corpus": "x.jsonl", "text_field": "body", "id_field": "key", "group_field": "page"}
    config = tiny_training({"data": data})
    corpus = other_corpus(tmp_path, text=TEXT)
    found = evaluate.open_other(config, evaluate.Options(corpus=corpus))
    assert [d.id for _, d in found.corpus.documents("letters", 0.0)] == ["0", "1", "2"]
    assert found.config.heldout_fraction == config.data.heldout_fraction
    with pytest.raises(ValueError, match=r"heldout_fraction lies in \(0, 1\).*0"):
        evaluate.open_other(config, evaluate.Options(corpus=corpus, heldout_fraction=0.0))
    corpus = other_corpus(tmp_path, letter=TEXT)
    options = evaluate.Options(corpus=corpus, text_field="letter", heldout_fraction=0.3)
    found = evaluate.open_other(config, options)
    assert {d.text for _, d in found.corpus.documents("letters", 0.0)} == {TEXT}


def test_advice_on_another_corpus_names_flags_of_the_command(tmp_path):
    config = tiny_training()
    for record, pattern in (
        ({"letter": TEXT}, r"Set --text_field, here to one of \['letter'\]"),
        ({"text": TEXT}, r"at heldout_fraction=1e-05\. Set --heldout_fraction=0\.\d+\.$"),
    ):
        corpus = other_corpus(tmp_path, differ=True, **record)
        options = evaluate.Options(corpus=corpus, heldout_fraction=1e-5)
        with pytest.raises(ValueError, match=pattern):
            evaluate.evaluate_run(tmp_path, config, tiny_state(config), options)


def test_a_text_is_encoded_with_the_special_tokens_of_the_run(tmp_path, monkeypatch):
    class OpenedError(Exception):
        pass

    def opened(*arguments):
        raise OpenedError(arguments)

    data = {"tokenizer": "a.json", "bos_token": "<b>", "eos_token": "<e>"}
    config = tiny_training({"data": data})
    monkeypatch.setattr("moe_jax.data.opened.open_tokenizer", opened)
    with pytest.raises(OpenedError, match=r"'a\.json', '<b>', '<e>'"):
        evaluate.evaluate_run(
            tmp_path, config, tiny_state(config), evaluate.Options(text=("a.txt",))
        )


def test_the_evaluation_of_a_later_step_stays(tmp_path):
    path = tmp_path / "evaluation.json"
    assert evaluate.write_evaluation(tmp_path, {"step": 4}) == f"wrote {path}"
    assert evaluate.write_evaluation(tmp_path, {"step": 2}) == f"left {path}: it is of step 4"
    assert json.loads(path.read_text()) == {"step": 4}
    for there in ('{"step": 2}', "{", '{"step": null}'):
        path.write_text(there)
        evaluate.write_evaluation(tmp_path, {"step": 4})
        assert json.loads(path.read_text()) == {"step": 4}


def test_bits_per_byte_of_a_text_are_of_its_bytes(finished, tmp_path):
    """54 bytes in 53 characters, three times: each byte is a target, plus the document's end."""
    from moe_jax.training.saved import load_run

    text = tmp_path / "own.txt"
    text.write_text(TEXT)
    config, state = load_run(finished)
    found = evaluate.evaluate_run(finished, config, state, evaluate.Options(text=(str(text),)))
    losses = found["dropless"]
    num_bytes = len(TEXT.encode())
    assert num_bytes == 3 * 54 and losses["tokens"] == num_bytes + 1
    nats = losses["nats_per_token"] * losses["tokens"]
    assert losses["bits_per_byte"] == pytest.approx(nats / num_bytes / 0.6931471805599453)
    assert open_tokenizer(config.data.tokenizer).vocab_size <= config.model.vocab_size


@pytest.mark.slow
def test_inference_has_its_own_batch(score, finished, tmp_path, capsys):
    """Microbatches of four sequences do not divide over eight devices, and need not."""
    _, one = score("--batches=2")
    said, eight = score("--batches=1", "--mesh=fsdp=8")
    assert said == "step 4: 1 batches of 8 sequences of the held-out split of embedded"
    assert eight == pytest.approx(one, abs=2e-4)
    said, _ = score("--batches=1", "--mesh=data=2", "--batch_size=5")
    assert "1 batches of 6 sequences" in said, "as few more as the mesh takes"
    arguments = [f"--workdir={finished}", "--prompt=The ", "--tokens=3"]
    texts = []
    answers = tmp_path / "answers.jsonl"
    for more in ([], ["--mesh=fsdp=8"], ["--step=4", f"--output={answers}"]):
        assert generate.command([*arguments, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("The ") and texts[0] == texts[1] == texts[2]
    record = json.loads(answers.read_text())
    assert record["prompt"] + record["text"] + "\n" == texts[2]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--mesh=data=16"], "not have more devices than there are: .* need 16, there are 8"),
        (["--step=3"], r"none of step 3 in .*, which has 2, 4"),
        (["--text=a", "--corpus=embedded"], "--text=a, --corpus=embedded. Leave one out"),
        (["--text=/nowhere/a.txt"], "No such file or directory: /nowhere/a.txt. Correct the path"),
        (["--text=/dev/null"], "the file /dev/null is blank. Name another"),
        # Before the checkpoint is read: there is none of step 3.
        (["--text=/dev/null", "--step=3"], "the file /dev/null is blank. Name another"),
        (["--corpus=embeded"], "embeded"),
        (["--heldout_fraction=0.3"], "--heldout_fraction needs another --corpus"),
        (["--text_field=body"], "--text_field needs another --corpus"),
        (["--corpus=embedded", "--heldout_fraction=2"], r"heldout_fraction lies in \(0, 1\)"),
        (["--batch_size=0"], "--batch_size=0"),
        (["--mesh=dta=2"], "Did you mean 'data'"),
        (["--text=launch"], r"launch has none\. Name the files, or pass --corpus"),
        (["--output=tests"], "--output=tests is a folder"),
        (
            ["--output=README.md"],
            "--output is a new file or one that this command wrote: --output=R",
        ),
        (["--text="], "--text is not empty"),
        (["--context=8"], "--context needs --choices"),
        (["--choices=a.jsonl", "--text=a.txt"], "--choices=a.jsonl beside --text"),
        (["--choices=setup.py"], "setup.py line 1 is '"),
        (["--choices=/nowhere.jsonl"], "No such file or directory: /nowhere.jsonl"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(finished, capsys, arguments, pattern):
    before = files(finished)
    with pytest.raises(SystemExit) as ended:
        evaluate.command([f"--workdir={finished}", *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and re.search(pattern, said), said
    assert files(finished) == before


def test_a_damaged_config_is_named(finished, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes()[:100])
    with pytest.raises(SystemExit):
        generate.command([f"--workdir={tmp_path}", "--prompt=x"])
    said = capsys.readouterr().err
    assert f"{tmp_path / 'config.json'} is damaged: it is not valid JSON" in said


def test_a_table_has_a_dash_where_targets_are_no_bytes():
    losses = {"nats_per_token": 2.5, "bits_per_byte": float("nan")}
    said = {"dropless": {**losses, "domains": {"prose": losses}}}
    rows = evaluate.table(said).splitlines()
    cells = ["-", "2.5000", "12.182"]
    assert [row.split() for row in rows[2:]] == [["all", *cells], ["prose", *cells]]
    assert max(map(len, rows)) <= 80


def test_output_has_the_numbers_of_the_table(finished, tmp_path, capsys):
    """A whole evaluation of the run matches `evaluation.json` too."""
    path = tmp_path / "found.json"
    assert evaluate.command([f"--workdir={finished}", "--batches=1", f"--output={path}"]) == 0
    found, said = json.loads(path.read_text()), capsys.readouterr().out.splitlines()
    assert said[0] == f"step {found['step']}: {found['text']}"
    numbers = [
        f"{found[kind][name]:{form}}"
        for kind in ("dropless", "capacity_limited")
        for name, form in (
            ("bits_per_byte", ".4f"), ("nats_per_token", ".4f"), ("perplexity", ".5g")
        )
    ]  # fmt: skip
    assert said[3].split() == ["all", *numbers]
    assert found["dropless"]["label"] == "dropless" and found["dropless"]["mark"] == ""
    assert found["domain_expert_share"]["layer_00"]


def test_questions_are_answered_by_likelihood(finished, tmp_path, capsys):
    path, out = tmp_path / "questions.jsonl", tmp_path / "answers.json"
    record = {"question": "It was the", "choices": ["best", "q\x00\x01 of times"], "answer": 0}
    path.write_text(f"{json.dumps(record)}\n" * 2)
    before = files(finished)
    assert evaluate.command([f"--workdir={finished}", f"--choices={path}", f"--output={out}"]) == 0
    said, found = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert said[:2] == [f"step 4: {path}", "2 questions, dropless"]
    assert said[2].split() == ["accuracy", f"{found['accuracy']:.4f}"] and len(said) == 4
    first, second = found["questions"]
    assert first == second and first["question"] == "It was the" and first["chosen"] == 0
    assert (
        first["num_tokens"] == [5, 13]
        and first["choices"] == record["choices"]
        and first["log_likelihoods"][0] < 0
    )
    assert files(finished) == before
