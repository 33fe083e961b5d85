"""`python -m moe_jax.generate`: prompts from files, answers kept once they end, speed, memory."""

import json
import pathlib
import time
import types

import jax
import numpy as np
import pytest

from moe_jax import generate
from moe_jax.data import open_tokenizer
from moe_jax.generate import Speed, out_of_memory_explained, read_prompts
from moe_jax.inference import Draft, TextPiece, stream_text, text, writer
from moe_jax.inference.answers import AnswerFile, Answers, RouteFiles
from moe_jax.inference.text import check_draft
from moe_jax.layers.cache import SPARE
from moe_jax.models.token_routes import load_routes
from moe_jax.training import saved
from tests.tiny_run import tiny_config, tiny_state

PROMPTS = ["The king", "日本", "b"]


def test_a_line_of_prompts_ends_at_a_newline_alone(tmp_path):
    """U+2028 and form feeds belong to the text. Windows ends lines with two characters."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028still one\r\n \r\n\ftwo\n".encode())
    assert read_prompts(str(file)) == ["one\u2028still one", "\ftwo"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "", "id": 3}\n', encoding="utf-8")
    assert read_prompts(str(lines)) == ["a\u2028b", ""]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt=a", "--top_p=0"], "error: top_p lies in (0, 1]: top_p=0.0"),
        (["--prompt=caf\udce9"], "UTF-8 can write: 'caf\\udce9'. Correct it."),
        (["--prompt=a", "--stop="], "error: a stop string must not be empty"),
        (["--prompt=a", "--context=1"], "--context"),
        (["--prompt=a", f"--draft_length={SPARE + 1}"], f"[1, {SPARE}]"),
    ],
)
def test_what_is_wrong_is_said_alone(command, capsys, flags, message):
    with pytest.raises(SystemExit):
        command(*flags)
    said = capsys.readouterr()
    assert message in said.err and not said.out and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", " \n\n", "p.txt is blank"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 'p.jsonl line 2 is \'{"text": "b"}\''),
        ("p.jsonl", '{"prompt": 3}', "line 1"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


def answers(first=0, **changed):
    settings = {"seed": 0, "tokens": 3} | changed
    return Answers(PROMPTS, 1, 3, settings, first)


def test_answers_come_whole_and_in_the_order_of_the_prompts():
    """Prompt 1 ends first and waits for prompt 0, which generates all its tokens."""
    pieces = [(1, "x", 1, True), (0, "ab", 2, False), (0, "c", 1, False), (2, "", 0, True)]
    stream = answers()
    came = [[r["text"] for r in stream.add(TextPiece(*piece))] for piece in pieces]
    assert came == [[], [], ["abc", "x"], [""]]
    assert stream.count == 3


def test_an_answer_counts_when_its_record_is_written():
    stream = answers()
    records = stream.add(TextPiece(0, "a", 3, False))
    next(records)
    assert stream.count == 0
    assert list(records) == [] and stream.count == 1


def written(path, count=3):
    file, stream = AnswerFile(path), answers()
    assert file.open(stream) == 0
    for row in range(count):
        for record in stream.add(TextPiece(row, f"text {row}\n", 2, True)):
            file.append(record)
    return path.read_bytes()


def test_a_line_that_a_kill_cut_short_is_written_again(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    content = written(path)
    lines = content.splitlines(keepends=True)
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n")
        assert AnswerFile(path).open(answers()) == whole
        assert path.read_bytes() == b"".join(lines[:whole])


@pytest.mark.parametrize(
    ("content", "changed", "message"),
    [
        (None, {"seed": 1}, r"line 1 has seed=0, not 1\. Name another file, or delete this one"),
        (b"my notes\n", {}, "line 1 is b'my notes'"),
        (b"my notes", {}, "ends with b'my notes'"),
        (b"{}\n", {}, "line 1 is b'{}'"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, content, changed, message):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content or written(path))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        AnswerFile(path).open(answers(**changed))
    assert path.read_bytes() == before


def test_more_answers_than_prompts_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    content = written(path)
    path.write_bytes(content + content.splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="line 4 answers none of the prompts"):
        AnswerFile(path).open(answers())


def test_an_error_of_the_disk_names_the_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        AnswerFile(pathlib.Path("/dev/full")).append({})


def command_on(config, monkeypatch):
    monkeypatch.setattr(saved, "load_run", lambda *args, **kwargs: (config, tiny_state(config)))
    return lambda *flags: generate.command(["--workdir=run", "--tokens=3", *flags])


@pytest.fixture
def command(monkeypatch):
    return command_on(tiny_config({"model": {"tie_embeddings": False}}), monkeypatch)


def test_a_second_start_goes_on_behind_the_answers_that_are_there(command, tmp_path, capsys):
    """Two texts per batch. A file cut inside its second line ends equal to the whole file."""
    prompts, whole, cut = (tmp_path / name for name in ("p.txt", "a.jsonl", "b.jsonl"))
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    flags = (f"--prompts={prompts}", "--samples=2", "--batch_size=2")
    assert command(*flags, f"--output={whole}") == 0
    first = capsys.readouterr()
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(r["prompt_index"], r["sample"]) for r in records] == [
        (i, s) for i in range(3) for s in range(2)
    ]
    assert records[2]["prompt"] == "日本" and records[2]["settings"]["temperature"] == 0.8
    assert first.err.startswith("18 tokens in ") and "tokens/s without it" in first.err

    cut.write_bytes(whole.read_bytes()[: len(whole.read_text().split("\n")[0]) + 30])
    assert command(*flags, f"--output={cut}") == 0
    second = capsys.readouterr()
    assert second.err.startswith(f"1 of 6 answers are in {cut}\n15 tokens in ")
    assert cut.read_bytes() == whole.read_bytes()
    assert "prompt 0, sample 0" in first.out and "prompt 0, sample 0" not in second.out
    assert first.out.endswith(second.out)

    with pytest.raises(SystemExit):
        command(*flags, f"--output={cut}", "--temperature=0.7")
    assert f"{cut} line 1 has temperature=0.8, not 0.7" in capsys.readouterr().err


@pytest.mark.slow
def test_a_draft_proposes_and_the_experts_of_every_token_are_written(command, tmp_path, capsys):
    """The model as its own draft is always right, and changes no output."""
    flags = ["--prompt=ab", "--prompt=c", "--temperature=0"]
    assert command(*flags) == 0
    plain = capsys.readouterr().out
    routes = tmp_path / "routes"
    assert command(*flags, "--draft=small", "--draft_length=2", f"--routes={routes}") == 0
    said = capsys.readouterr()
    assert said.out == plain
    assert said.err.splitlines()[-1] == (
        "draft: 100.0% of 4 proposed tokens were accepted, 2.00 tokens a pass"
    )
    assert sorted(file.name for file in routes.iterdir()) == ["000000.npz", "000001.npz"]
    tokens, experts = load_routes(routes / "000000.npz")
    assert tokens[:3] == [1, *open_tokenizer("byte").encode("ab")] and len(tokens) == 6
    assert experts.shape == (6, 2, 2) and (experts >= 0).all()
    with pytest.raises(ValueError, match=r"p\.txt is not"):
        (tmp_path / "p.txt").write_text("no")
        load_routes(tmp_path / "p.txt")


def test_a_folder_of_experts_is_new_or_that_of_the_answers(tmp_path):
    """Two answers are recorded; a kill came between the experts and the answer of the third."""
    files = RouteFiles(tmp_path / "routes", [[1]] * 4, num_samples=1)
    files.check(0, goes_on=False)
    for row in range(3):
        files.add(TextPiece(row, "a", 1, True, [5], np.zeros((2, 1, 1), np.int32)))
        files.write(row)
    files.check(2, goes_on=True)
    assert load_routes(tmp_path / "routes" / "000002.npz")[0] == [1, 5]
    for first, goes_on, message in (
        (0, False, r"routes has 000000\.npz\. Name another folder\."),
        (1, True, r"has 000002\.npz"),
        (4, True, r"lacks 000003\.npz\. Name another folder, and another file"),
    ):
        with pytest.raises(ValueError, match=message):
            files.check(first, goes_on=goes_on)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft=multi_token"], "it has none, multi_token=None"),
        (["--stop="], "error: a stop string must not be empty"),
        (["--routes=here", "--tokens=0"], "experts can be recorded only while tokens are added"),
        (["--routes=here", "--tokens=20"], "a prompt of 2 tokens, num_tokens=20, context=16"),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_a_file_is_made(
    command, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command("--prompt=a", "--output=a.jsonl", *flags)
    said = capsys.readouterr()
    assert message in said.err and not said.out and not list(tmp_path.iterdir())


def test_a_draft_with_another_tokenizer_is_refused(monkeypatch):
    other = types.SimpleNamespace(fingerprint=lambda: "another")
    monkeypatch.setattr(text, "open_tokenizer_of", lambda data: other)
    draft = Draft(tiny_config({"data": {"tokenizer": "small.model"}}))
    with pytest.raises(ValueError, match=r"draft 'small\.model', model 'byte'"):
        check_draft(tiny_config(), draft, open_tokenizer("byte"))


def test_a_model_that_looks_ahead_writes_one_text_after_another(monkeypatch, capsys):
    moe = {"router": {"kind": "expert_choice"}, "losses": {}}
    config = tiny_config({"model": {"parts": {"moe": moe}, "stack": {"allow_lookahead": True}}})
    command = command_on(config, monkeypatch)
    assert command("--prompt=a", "--prompt=b", "--batch_size=2") == 0
    said = capsys.readouterr()
    assert said.err.startswith("note: the model sees later tokens")
    assert said.out.startswith("--- prompt 0\na") and "--- prompt 1\nb" in said.out
    assert command("--prompt=a", "--tokens=0") == 0
    assert capsys.readouterr().out == "a\n"


def test_a_text_with_its_stop_string_gets_no_more_chunks(monkeypatch):
    config = tiny_config({"model": {"tie_embeddings": False}})
    params = tiny_state(config).params
    calls = []

    def decode(*args, **kwargs):
        calls.append(kwargs["num_tokens"])
        return actual(*args, **kwargs)

    actual = writer.decode
    monkeypatch.setattr(writer, "decode", decode)
    settings = {"context": 16 * writer.CHUNK, "temperature": 1.0}
    [*pieces] = stream_text(config, params, ["a"], 2 * writer.CHUNK, **settings)
    text = "".join(piece.text for piece in pieces)
    assert len(calls) == 2
    stop = next(c for c in text if c.isascii())
    [*pieces] = stream_text(config, params, ["a"], 2 * writer.CHUNK, stop=[stop], **settings)
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert len(calls) == 3 and pieces[-1].ended


def test_running_out_of_memory_is_one_line_with_the_flags_to_change():
    message = (
        r"^8 texts of at most 64 tokens, .*: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\."
        r" Lower --batch_size \(now 8\) or --context \(now 64\), or split the model by --mesh\.$"
    )
    with pytest.raises(MemoryError, match=message), out_of_memory_explained(8, 64):
        said = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers:"
        raise jax.errors.JaxRuntimeError(said)
    with pytest.raises(MemoryError, match="--batch_size"), out_of_memory_explained(8, 64):
        raise MemoryError
    with pytest.raises(RuntimeError, match=r"^other$"), out_of_memory_explained(8, 64):
        raise RuntimeError("other")


def test_compilation_is_no_part_of_the_speed(monkeypatch):
    """Of ten seconds, compilation takes 2 and then 1, including a nested trace of 0.5 s."""
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    speed = Speed()
    for at, event, seconds in (
        (102.0, "/jax/core/compile/backend_compile_duration", 2.0),
        (105.0, "/jax/core/compile/jaxpr_trace_duration", 0.5),
        (105.2, "/jax/core/compile/jaxpr_trace_duration", 1.0),
        (106.0, "/jax/compilation_cache/cache_retrieval_time_sec", 0.5),
    ):
        now = at
        speed.add(event, seconds)
    now = 110.0
    expected = "70 tokens in 10.0 s, 3.0 s of it compilation: 10 tokens/s without it"
    assert speed.line(70) == expected


def test_texts_without_a_token_are_counted():
    answers = Answers(["a", "b"], 1, 5, {})
    for row, said in enumerate(("", "x")):
        list(answers.add(TextPiece(row, said, len(said), ended=True)))
    assert generate.empty(answers) == (
        "1 of 2 texts are empty: their first token ended the document\n"
    )
    assert generate.empty(Answers(["a"], 1, 5, {})) == ""


def test_only_what_runs_in_its_context_is_timed():
    event = "/jax/core/compile/backend_compile_duration"
    with Speed() as speed:
        jax.monitoring.record_event_duration_secs(event, 0.25)
    jax.monitoring.record_event_duration_secs(event, 0.5)
    assert [seconds for _, seconds in speed.spans] == [0.25]
