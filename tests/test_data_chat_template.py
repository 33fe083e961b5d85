"""Chat templates: tokens equal those of transformers, answers are found by ids, and refusals."""

import dataclasses
import datetime
import json
import sys

import numpy as np
import pytest
import tokenizers as hugging_face
from tokenizers import decoders, models, pre_tokenizers

from moe_jax.data import open_tokenizer_of
from moe_jax.data.chat_template import open_chat_template
from moe_jax.data.conversations import Message
from moe_jax.data.objectives import CausalLM, Supervised
from moe_jax.data.tokenizers import open_tokenizer
from moe_jax.training.imported import save_imported
from moe_jax.training.saved import load_run
from tests.tiny_run import tiny_config, tiny_state

CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Like Llama 2 and Mistral: `eos_token` ends an answer, and roles alternate.
TURNS = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles take turns') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}
{% endfor %}
"""
# Like Qwen3: the thinking of an answer disappears once a later answer follows.
FORGETS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {{- message['content'] if loop.last else message['content'].split('</think>')[-1] }}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Like Phi-3.5: text without a generation prompt ends with the end of a document.
ENDS = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- else %}{{ '<|endoftext|>' }}{% endif %}
"""
SPECIAL = ("<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
TALK = (
    Message("system", "Be brief."),
    Message("user", " What  is 2+2?\n"),
    Message("assistant", "4, caf\u00e9"),
    Message("user", "Sure?"),
    Message("assistant", "\n\nYes"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE whose only merge joins line ends, with the files next to it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "\u010a"  # a line end, as byte-level BPE writes it
    vocab = {token: n for n, token in enumerate([*alphabet, end + end])}
    tokenizer = hugging_face.Tokenizer(models.BPE(vocab, [(end, end)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": CHATML}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return open_tokenizer(str(folder / "tokenizer.json"))


def opened(source, tokenizer, tmp_path):
    (tmp_path / "one.jinja").write_text(source)
    return open_chat_template(str(tmp_path / "one.jinja"), tokenizer)


def shown(tokenizer, ids):
    """The tokens as text, with special tokens by name."""
    names = {id_: name.encode() for name, id_ in tokenizer.special_tokens.items()}
    return b"".join(names.get(int(i)) or tokenizer.bytes_of(int(i)) for i in ids).decode()


def test_the_answers_and_their_ends_are_marked(tokenizer):
    template = open_chat_template("tokenizer", tokenizer)
    ids, is_answer = template.encode(TALK)
    assert shown(tokenizer, ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n What  is 2+2?\n<|im_end|>\n"
        "<|im_start|>assistant\n4, caf\u00e9<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n\n\nYes<|im_end|>\n"
    )
    answers = np.split(ids[is_answer], [len("4, caf\u00e9".encode()) + 1])
    # The line end before "Yes" merges with the prompt's line end; the token counts as answer.
    assert [shown(tokenizer, answer) for answer in answers] == [
        "4, caf\u00e9<|im_end|>", "\n\n\nYes<|im_end|>"
    ]  # fmt: skip
    last = template.encode(TALK, last_only=True)
    assert np.array_equal(last.ids, ids)
    assert np.array_equal(last.ids[last.is_answer], answers[1])
    assert template.stop_ids == (tokenizer.special_tokens["<|im_end|>"],)


@pytest.mark.parametrize("source", [CHATML, TURNS, ENDS])
def test_the_tokens_are_those_of_transformers(folder, tokenizer, tmp_path, source):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="<|im_end|>"
    )
    talk = TALK[1:] if source == TURNS else TALK
    told = [message._asdict() for message in talk]
    expected = theirs.apply_chat_template(
        told, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    template = opened(source, tokenizer, tmp_path)
    ids, is_answer = template.encode(talk)
    assert ids.tolist() == expected["input_ids"]
    prompt = theirs.apply_chat_template(
        told[:-1], chat_template=source, add_generation_prompt=True, return_dict=False
    )
    assert template.prompt_ids(talk[:-1]).tolist() == prompt
    if source == CHATML:  # only this template marks its answers
        marked = np.array(expected["assistant_masks"]) == 1
        assert np.array_equal(marked, is_answer)


def test_what_ends_an_answer_may_be_the_end_of_a_document(tokenizer, tmp_path):
    template = opened(TURNS, tokenizer, tmp_path)
    ids, is_answer = template.encode(TALK[1:])
    answers = " 4, caf\u00e9<|im_end|> Yes<|im_end|>"
    assert shown(tokenizer, ids[is_answer]) == answers
    assert shown(tokenizer, ids).startswith("<s>[INST] What  is 2+2? [/INST] 4")


@pytest.mark.parametrize("talk", [TALK, TALK[:3]])
def test_the_end_of_a_document_is_of_no_answer(tokenizer, tmp_path, talk):
    template = opened(ENDS, tokenizer, tmp_path)
    ids, is_answer = template.encode(talk)
    assert shown(tokenizer, ids).endswith("<|im_end|>\n<|endoftext|>")
    answers = ["4, caf\u00e9<|im_end|>", "\n\n\nYes<|im_end|>"][: len(talk) // 2]
    assert shown(tokenizer, ids[is_answer]) == "".join(answers)
    last = template.encode(talk, last_only=True)
    assert shown(tokenizer, last.ids[last.is_answer]) == answers[-1]
    assert template.stop_ids == (tokenizer.special_tokens["<|im_end|>"],)


def test_special_tokens_that_take_spaces_end_answers_too(folder, tmp_path):
    """As in Phi-3.5, where every special token strips spaces: following line ends give no token."""
    transformers = pytest.importorskip("transformers")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [token | {"rstrip": True} for token in spec["added_tokens"]]
    spec["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.path))
    told = [message._asdict() for message in TALK]
    expected = theirs.apply_chat_template(told, chat_template=ENDS, return_dict=False)
    ids, is_answer = opened(ENDS, tokenizer, tmp_path).encode(TALK)
    assert ids.tolist() == expected
    assert shown(tokenizer, ids).endswith("assistant\n\n\nYes<|im_end|><|endoftext|>")
    assert shown(tokenizer, ids[is_answer]) == "4, caf\u00e9<|im_end|>\n\n\nYes<|im_end|>"


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        # A special token before the content, and none or two after it.
        ("{{ '<|im_start|>' + m.content + '\\n' }}", "<|im_start|>4\n"),
        ("{{ '<|im_start|>' + m.content | trim + '<|im_end|><s>' }}", "<|im_start|>4<|im_end|>"),
        # The content includes a part of its end.
        ("{{ m.content + '4<|im_end|>' }}", "44<|im_end|>"),
        ("{{ 'nothing' }}", ""),
    ],
)
def test_an_answer_ends_behind_its_content(tokenizer, tmp_path, source, answer):
    source = "{% for m in messages if m.role == 'assistant' %}" + source + "{% endfor %}"
    template = opened(source, tokenizer, tmp_path)
    ids, is_answer = template.encode((Message("user", "2+2?"), Message("assistant", "4")))
    assert shown(tokenizer, ids[is_answer]) == (answer or "nothing")
    end = tokenizer.special_tokens["<|im_end|>"]
    assert template.stop_ids == ((end,) if answer.endswith("<|im_end|>") else ())


def test_a_template_that_forgets_takes_the_last_answer_alone(tokenizer, tmp_path):
    template = opened(FORGETS, tokenizer, tmp_path)
    thought = Message("assistant", "hm</think>4")
    talk = (TALK[1], thought, TALK[3], TALK[4])
    with pytest.raises(
        ValueError, match=r"render messages the same way.* message 2 of 4\. Set .*last_a"
    ):
        template.encode(talk)
    ids, is_answer = template.encode(talk, last_only=True)
    assert "hm" not in shown(tokenizer, ids)
    assert shown(tokenizer, ids[is_answer]) == "\n\n\nYes<|im_end|>"


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        (CHATML, "a<|im_end|>", r"the name of a special token.*'<\|im_end\|>' is in the message"),
        (TURNS, "", r"one\.jinja with the roles \['user', 'user'\]: roles take turns\. Change the"),
        ("{{ messages[9].content.x }}", "", r"must render the messages: .*one\.jinja"),
        ("{{ ''.__class__.__mro__ }}", "", r"must render the messages: .*unsafe"),
        ("{% for x in %}", "", r"program in Jinja: .*one\.jinja: .*Set config\.data\.objective\."),
    ],
)
def test_what_cannot_be_rendered_is_refused_in_one_line(
    tokenizer, tmp_path, source, content, message
):
    messages = (Message("user", content), Message("user", "b"))
    with pytest.raises(ValueError, match=message) as refused:
        opened(source, tokenizer, tmp_path).render(messages, prompts=True)
    assert "\n" not in str(refused.value)


def test_a_template_has_no_clock(tokenizer, tmp_path):
    source = "{{ strftime_now('%Y') if strftime_now is defined else 'never' }}"
    assert opened(source, tokenizer, tmp_path).render(TALK, prompts=False) == "never"


def test_a_template_is_told_the_date_of_the_objective(folder, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}"
    (tmp_path / "t.jinja").write_text(source)
    undated = Supervised(chat_template=str(tmp_path / "t.jinja"))
    with pytest.raises(
        ValueError, match=r"t\.jinja .*today's date\. Set config\.data\.objective\.d"
    ):
        undated.prompt_ids(tokenizer, "Hi")
    today = datetime.date.today()
    dated = dataclasses.replace(undated, date=today.isoformat())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "Hi"}], chat_template=source, return_dict=False
    )
    assert dated.prompt_ids(tokenizer, "Hi") == expected
    fixed = dataclasses.replace(undated, date="2026-01-31")
    assert shown(tokenizer, fixed.prompt_ids(tokenizer, "Hi")) == "31 Jan 2026Hi"
    assert fixed.fingerprints(tokenizer) != dated.fingerprints(tokenizer)
    with pytest.raises(ValueError, match="date must be YYYY-MM-DD: date='31 Jan'"):
        Supervised(chat_template="tokenizer", date="31 Jan")
    with pytest.raises(ValueError, match="date needs a chat template: date='2026-01-31'"):
        Supervised(date="2026-01-31")


def test_what_a_model_writes_ends_where_its_generation_config_says(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    file = tmp_path / "generation_config.json"
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    named, end = tokenizer.special_tokens, tokenizer.eos_id
    # A letter's id, an id outside the vocabulary and None are not special tokens.
    for said, ids in [
        ([named["<|im_start|>"], end, 3, 9999], (end, named["<|im_start|>"])),
        (named["<s>"], (end, named["<s>"])),
        (None, (end,)),
    ]:
        file.write_text(json.dumps({"eos_token_id": said}))
        assert CausalLM().stop_ids(tokenizer) == ids
        chat = Supervised(chat_template="tokenizer")
        assert chat.stop_ids(tokenizer) == (*ids, named["<|im_end|>"])
    file.write_text("[]")
    with pytest.raises(
        ValueError, match=r"generation_config\.json must be a JSON object: .*Copy it ag"
    ):
        CausalLM().stop_ids(tokenizer)


def test_a_file_beside_the_tokenizer_comes_before_its_config(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    first = Supervised(chat_template="tokenizer").fingerprints(tokenizer)["chat_template"]
    (tmp_path / "chat_template.jinja").write_text(TURNS)
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    objective = Supervised(chat_template="tokenizer")
    assert objective.fingerprints(tokenizer)["chat_template"] != first
    assert shown(tokenizer, objective.prompt_ids(tokenizer, "Hi")) == "<s>[INST] Hi [/INST]"
    names = ("<|endoftext|>", "<|im_end|>")  # the ends of a document and of an answer
    assert objective.stop_ids(tokenizer) == tuple(tokenizer.special_tokens[n] for n in names)


def test_a_tokenizer_without_a_template_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"needs a tokenizer\.json.* is 'byte'\. Set config\.data\."
    ):
        open_chat_template("tokenizer", open_tokenizer("byte"))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"there is none in .*Set config.data.objective.chat_t"):
        open_chat_template("tokenizer", tokenizer)
    with pytest.raises(
        ValueError, match=r"A chat template must be a file: there is none at 'no.jinja'"
    ):
        open_chat_template("no.jinja", tokenizer)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"be a JSON object: .*config\.json is not\. Copy it ag"):
        open_chat_template("tokenizer", tokenizer)
    (tmp_path / "tokenizer_config.json").unlink()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    (tmp_path / "t.jinja").write_text(CHATML)
    with pytest.raises(ValueError, match=r"jinja2, which is not installed.*pip install jinja2"):
        open_chat_template(str(tmp_path / "t.jinja"), tokenizer)


def test_a_run_is_used_with_the_template_that_it_was_trained_with(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    objective = {"kind": "supervised", "chat_template": "tokenizer"}
    data = {"tokenizer": str(tmp_path / "tokenizer.json"), "objective": objective}
    config, run = tiny_config({"data": data}), tmp_path / "run"
    tokenizer = open_tokenizer_of(config.data)
    content = {"tokenizer": tokenizer.fingerprint()}
    content |= config.data.objective.fingerprints(tokenizer)
    run.mkdir()
    save_imported(run, config, tiny_state(config).params, {}, content, {})
    load_run(run)
    (tmp_path / "chat_template.jinja").write_text(TURNS)
    with pytest.raises(ValueError, match=r"content of chat_template: sha256 .* Bring back the"):
        load_run(run)
