"""A text as an HTML page, token by token: cells, names, and markup that no text can break."""

import base64
import html.parser
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.analysis import page as page_module
from moe_jax.analysis.page import MAX_NUMBERS, MAX_TOKENS, Passage, analysis_page, choose_passages
from moe_jax.analysis.reading import Cell, readable_cells, token_name
from moe_jax.analysis.routed import Routed, text_batches
from moe_jax.analysis.summary import SIGHT
from moe_jax.data import ByteTokenizer, corpora, open_tokenizer, train_tokenizer
from moe_jax.training.loss_labels import SEES

BYTE = ByteTokenizer()
NASTY = "</script><script>alert('é')</script>&amp; <b>\"ü\"\n\t\0</b> ${title} $title"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tokenizer") / "bpe.model")
    return train_tokenizer.train(
        corpora.EmbeddedCorpus(), path, vocab_size=400, heldout_fraction=0.03, max_bytes=50_000
    )


def cells_of(tokenizer, ids, begins=None):
    pieces = [tokenizer.bytes_of(id_) for id_ in ids]
    return readable_cells(pieces, begins or [True] + [False] * (len(ids) - 1))


def test_bytes_are_put_together_to_characters_by_hand():
    ids = [BYTE.bos_id, *BYTE.encode("aé€b").tolist(), BYTE.eos_id]
    assert cells_of(BYTE, ids) == [
        Cell("", 0, 1), Cell("a", 1, 1), Cell("é", 2, 2), Cell("€", 4, 3), Cell("b", 7, 1),
        Cell("", 8, 1),
    ]  # fmt: skip


def test_a_character_that_is_cut_ends_with_its_document():
    e_acute = BYTE.encode("é").tolist()
    # The window ends inside a character, and the next window begins with its remaining bytes.
    cut = [*e_acute[:1], *e_acute[1:], BYTE.encode("x")[0]]
    assert cells_of(BYTE, cut, [True, True, False]) == [
        Cell("\ufffd", 0, 1), Cell("\ufffd", 1, 1), Cell("x", 2, 1),
    ]  # fmt: skip
    # Cut before a special token, and at the very end.
    assert cells_of(BYTE, [e_acute[0], BYTE.eos_id, e_acute[0]]) == [
        Cell("\ufffd", 0, 1), Cell("", 1, 1), Cell("\ufffd", 2, 1),
    ]  # fmt: skip


@given(ids=st.lists(st.integers(0, 260), min_size=1), data=st.data())
def test_cells_cover_all_tokens_in_order_and_stay_in_their_document(ids, data):
    begins = [True] + [data.draw(st.booleans()) for _ in ids[1:]]
    cells = cells_of(BYTE, ids, begins)
    assert [i for c in cells for i in range(c.first, c.first + c.num_tokens)] == list(
        range(len(ids))
    )
    for cell in cells:
        assert not any(begins[cell.first + 1 : cell.first + cell.num_tokens])


@given(text=st.text())
def test_cells_of_a_whole_document_are_its_text(text):
    assert (
        "".join(cell.text for cell in cells_of(BYTE, BYTE.encode_document(text).tolist())) == text
    )


def test_bpe_tokens_are_their_own_cells_and_rare_characters_are_put_together(bpe):
    text = "the king 🐝 said"
    ids = bpe.encode_document(text).tolist()
    cells = cells_of(bpe, ids)
    assert "".join(cell.text for cell in cells) == text
    bee = next(cell for cell in cells if cell.text == "🐝")
    assert bee.num_tokens == 4
    names = [token_name(bpe, id_) for id_ in ids]
    assert names[0] == "[bos]" and names[-1] == "[eos]"
    assert names[bee.first : bee.first + 4] == ["<F0>", "<9F>", "<90>", "<9D>"]
    assert "␣" in "".join(names)


def test_names_of_byte_tokens():
    ids = BYTE.encode("a \n\t\x07é").tolist()
    names = [token_name(BYTE, id_) for id_ in [BYTE.pad_id, 300, *ids]]
    assert names == ["[pad]", "[300]", "a", "␣", "↵", "⇥", "\\x07", "<C3>", "<A9>"]


class Page(html.parser.HTMLParser):
    """A page as a browser parses it."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.scripts, self.sources = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag == "i":
            self.cells.append([int(named.get("data-n", 1)), ""])
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "i":
            self.cells[-1][1] += data
        if self.lasttag == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self.lasttag = ""


def routed_text(tokenizer, text, num_layers=2, num_choices=2, num_experts=4):
    ids = tokenizer.encode_document(text).astype(np.int32)
    rng = np.random.default_rng(0)
    order = rng.random((num_layers, len(ids), num_experts)).argsort(axis=-1)
    return Routed(
        expert_XJK=order[..., :num_choices],
        gate_XJK=rng.random((num_layers, len(ids), num_choices)),
        token_J=ids,
        domain_J=np.zeros(len(ids), np.int32),
        document_J=np.zeros(len(ids), np.int64),
    )


def said_of(title):
    """The smallest results that a page accepts."""
    information = {"bits": 1.0, "shuffled": 0.5}
    layer = {
        "load": {"fullest": 1.5, "effective_experts": 3.0},
        "domains": {"information": information},
        "tokens": {
            "information": information,
            "random": 0.5,
            "most_routed": [[{"name": title, "share": 0.5, "occurrences": 3}]] * 4,
            "most_frequent": [{"name": title, "share": [1, 0.25, 0.004, 0], "occurrences": 7}] * 3,
        },
        "repetition": {
            "same_first": 0.2, "any_shared": 0.4,
            "shuffled": {"same_first": 0.1, "any_shared": 0.3},
        },
        "saturation": None,
        "coactivation": {"random": 0.3},
        "flips": {title: {"first": 0.1, "set": 0.2}},
    }  # fmt: skip
    settings = {
        "config": title, "step": 3, "num_tokens": 10, "text": title,
        "parts": {"moe": {"layers": [0, 1], "router": title}}, "commit": None, "min_count": 3,
        "mark": SEES,
    }  # fmt: skip
    return {"settings": settings, "layers": {"layer_00": layer, "layer_01": layer}}


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_nothing_in_a_text_or_a_name_can_break_the_page(kind, bpe):
    tokenizer = BYTE if kind == "byte" else open_tokenizer(bpe.name)
    routed = routed_text(tokenizer, NASTY)
    figures = {"load": (b"\x89PNG", NASTY)}
    text = analysis_page(said_of(NASTY), figures, [Passage(NASTY, routed)] * 2, tokenizer)
    page = Page(text)
    assert page.tags.count("script") == 2 and "b" not in page.tags
    assert page.sources == ["data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()]
    assert SIGHT[SEES] in text
    assert "http:" not in text and "https:" not in text and "default-src 'none'" in text

    shown = "".join(cell for _, cell in page.cells)
    assert (
        shown
        == ("[bos]" + NASTY.replace("\n", "↵\n").replace("\t", "⇥\t") + "[eos]").replace(
            "\0", "\\x00"
        )
        * 2
    )
    row = "</code><td>7<td class=q3>100<td class=q1>25<td><td>"
    assert text.count(row) == 2 * 3 and page.tags.count("details") == 4
    data = json.loads(page.scripts[0])
    num_tokens = 2 * len(routed.token_J)
    assert sum(n for n, _ in page.cells) == num_tokens == len(data["names"])
    assert data["layers"] == ["layer 0", "layer 1"] and data["choices"] == 2
    for layer in (0, 1):
        assert data["experts"][layer] == routed.expert_XJK[layer].ravel().tolist() * 2
        np.testing.assert_allclose(
            data["gates"][layer][:4], routed.gate_XJK[layer, :2].ravel(), atol=6e-4
        )
    assert "${title}" in page.cells[-1][1] or "$title" in shown


def test_a_page_of_many_experts_has_the_most_frequent_tokens_alone(monkeypatch):
    monkeypatch.setattr(page_module, "MAX_CELLS", 2 * 2 * 4 + 3)
    text = analysis_page(said_of("x"), {}, [Passage("x", routed_text(BYTE, "x"))], BYTE)
    assert text.count("</code><td>7<") == 2 * 2


def test_a_page_has_the_first_tokens_of_every_domain():
    long = routed_text(BYTE, "x" * 20_000)
    domain_J = np.arange(len(long.token_J)) % 3
    passages = choose_passages(long._replace(domain_J=domain_J), ("a", "b", "c", "unused"))
    assert [passage.title for passage in passages] == ["a", "b", "c"]
    for domain, passage in enumerate(passages):
        assert len(passage.routed.token_J) == MAX_TOKENS // 3
        assert (passage.routed.domain_J == domain).all()
        expected = long.expert_XJK[:, domain::3][:, : MAX_TOKENS // 3]
        np.testing.assert_array_equal(passage.routed.expert_XJK, expected)
    # Many numbers per token leave room for fewer tokens.
    many = routed_text(BYTE, "x" * 2000, num_layers=8, num_choices=32, num_experts=32)
    (passage,) = choose_passages(many, ("a",))
    assert len(passage.routed.token_J) == MAX_NUMBERS // (8 * 32)


def test_texts_become_windows_like_documents_in_training():
    batches = text_batches(["abcde", "fg"], BYTE, sequence_length=4, batch_size=2, max_tokens=100)
    assert len(batches) == 2
    ids = BYTE.encode("abcdefg").tolist()
    # The last token of "[bos]abcde[eos]" is only a target. The last row is padding.
    rows = [[BYTE.bos_id, *ids[:3]], [*ids[3:5], 0, 0], [BYTE.bos_id, *ids[5:], 0], [0] * 4]
    np.testing.assert_array_equal(np.concatenate([b["inputs"] for b in batches]), rows)
    segments = np.concatenate([b["segment_ids"] for b in batches])
    np.testing.assert_array_equal(segments > 0, [[1] * 4, [1, 1, 0, 0], [1, 1, 1, 0], [0] * 4])
    assert [b["domain"].tolist() for b in batches] == [[0, 0], [1, 0]]
    # Each text gets at most half of six tokens.
    (batch,) = text_batches(["abcde", "fg"], BYTE, sequence_length=4, batch_size=2, max_tokens=6)
    assert (batch["segment_ids"] > 0).sum(axis=1).tolist() == [3, 3]
