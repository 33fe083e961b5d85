"""An analysis as one self-contained HTML page: no network, images as data URIs.

Everything from a text, a config or a file name is escaped; the script's data is embedded as JSON.
"""

import base64
import html
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.analysis.drawing import layer_title
from moe_jax.analysis.reading import readable_cells, token_name
from moe_jax.analysis.routed import Routed
from moe_jax.analysis.summary import FLIPS_NOTE, NOTE, SIGHT, flips_table, summary_table
from moe_jax.config.json_text import json_text
from moe_jax.data import Tokenizer

TEMPLATE = pathlib.Path(__file__).parent / "page.html"
# Paul Tol's scheme "light": the colour-blind can tell its colours apart and read black letters on
# them.
EXPERT_COLORS = (
    "#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00",
)  # fmt: skip
MAX_NUMBERS = 300_000  # experts of tokens that the page carries: tokens * layers * choices
MAX_TOKENS = 6_000
MAX_CELLS = 60_000  # of the tables of token ids and experts: ids * experts * layers


class Passage(NamedTuple):
    """Consecutive tokens to read.

    Attributes:
      title: of the text.
      routed: the tokens and their experts.
    """

    title: str
    routed: Routed


def choose_passages(routed: Routed, domains: Sequence[str]) -> list[Passage]:
    """The first tokens of each domain, as many as a page can carry, equally many for each."""
    num_layers, _, num_choices = routed.expert_XJK.shape
    there = np.unique(routed.domain_J)
    limit = min(MAX_TOKENS, MAX_NUMBERS // (num_layers * num_choices)) // len(there)
    passages = []
    for domain in there:
        tokens = np.flatnonzero(routed.domain_J == domain)[: max(limit, 1)]
        by_layer = [values[:, tokens] for values in routed[:2]]
        passages.append(
            Passage(domains[domain], Routed(*by_layer, *(values[tokens] for values in routed[2:])))
        )
    return passages


def analysis_page(
    analysis: Mapping[str, Any],
    figures: Mapping[str, tuple[bytes, str]],
    passages: Sequence[Passage],
    tokenizer: Tokenizer,
) -> str:
    """The page.

    Args:
      analysis: the settings and the layers, as in `analysis.json`.
      figures: PNG files by name, each with a caption.
      passages: the passages to read on the page, at least one.
      tokenizer: the model's tokenizer.
    """
    settings, layers = analysis["settings"], analysis["layers"]
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    # An expert's share by chance, by number of experts, from the first layer with that number.
    chance: dict[int, str] = {}
    for measures in layers.values():
        chance.setdefault(_num_experts(measures), f"{measures['tokens']['random']:.1%}")
    return template.substitute(
        title=html.escape(f"Routing of {settings['config']}"),
        facts=html.escape(
            f"Checkpoint of step {settings['step']:,}; {settings['num_tokens']:,} tokens of "
            f"{settings['text']}; {' or '.join(map(str, chance))} experts a layer; "
            f"commit {settings['commit'] or 'unknown'}."
            f" {SIGHT[settings['mark']]}"
        ),
        summary=_table(summary_table(layers)),
        note=html.escape(NOTE),
        flips=_table(flips_table(layers)),
        flips_note=html.escape(FLIPS_NOTE),
        passages="\n".join(_passage_html(passage, tokenizer) for passage in passages),
        figures="\n".join(_figure(name, *figure) for name, figure in figures.items()),
        min_count=settings["min_count"],
        chance_share=" or ".join(dict.fromkeys(chance.values())),
        tokens="\n".join(_tokens_of(layer, measures) for layer, measures in layers.items()),
        shares="\n".join(
            _shares_of(layer, measures, MAX_CELLS // len(layers))
            for layer, measures in layers.items()
        ),
        settings=_table([["setting", "value"], *([k, _plain(v)] for k, v in settings.items())]),
        # "<" could end the script element.
        data=json_text(_page_data(passages, layers, tokenizer)).replace("<", "\\u003c"),
    )


def _num_experts(measures: Mapping[str, Any]) -> int:
    return len(measures["tokens"]["most_routed"])


def _page_data(
    passages: Sequence[Passage], layers: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """What the script reads: the experts and gates of all tokens, passage after passage."""
    expert_XJK = np.concatenate([passage.routed.expert_XJK for passage in passages], axis=1)
    gate_XJK = np.concatenate([passage.routed.gate_XJK for passage in passages], axis=1)
    tokens = np.concatenate([passage.routed.token_J for passage in passages])
    return {
        "layers": [layer_title(layer) for layer in layers],
        "num_experts": [_num_experts(measures) for measures in layers.values()],
        "choices": expert_XJK.shape[2],
        "colors": EXPERT_COLORS,
        "names": [token_name(tokenizer, int(token)) for token in tokens],
        "experts": expert_XJK.reshape(len(layers), -1).tolist(),
        "gates": [
            [round(gate, 3) for gate in row] for row in gate_XJK.reshape(len(layers), -1).tolist()
        ],
    }


def _passage_html(passage: Passage, tokenizer: Tokenizer) -> str:
    """The text as one element per cell; the script colours them."""
    routed = passage.routed
    pieces = [tokenizer.bytes_of(int(token)) for token in routed.token_J]
    begins = np.append(True, routed.document_J[1:] != routed.document_J[:-1])
    spans = []
    for cell in readable_cells(pieces, begins.tolist()):
        text = _shown(cell.text) or token_name(tokenizer, int(routed.token_J[cell.first]))
        classes = [*["begins"] * bool(begins[cell.first]), *["sign"] * (not cell.text)]
        attributes = f' class="{" ".join(classes)}"' if classes else ""
        attributes += f' data-n="{cell.num_tokens}"' if cell.num_tokens > 1 else ""
        spans.append(f"<i{attributes}>{html.escape(text)}</i>")
    heading = f"<h3>{html.escape(passage.title)}</h3>"
    text = f'<div class="text">{"".join(spans)}</div>'
    return f'<section class="passage">{heading}{text}</section>'


def _shown(text: str) -> str:
    """A text with visible signs for its line ends and tabs; line ends still break the line."""
    signs = {"\n": "↵\n", "\t": "⇥\t"}
    return "".join(signs.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text)


def _plain(value: Any) -> str:
    """A setting as text, without Python's syntax."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_plain(part)}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _figure(name: str, png: bytes, sentence: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    caption = html.escape(sentence)
    return (
        f'<figure id="{html.escape(name)}"><img src="{source}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _tokens_of(layer: str, measures: Mapping[str, Any]) -> str:
    rows = []
    for expert, found in enumerate(measures["tokens"]["most_routed"]):
        listed = " ".join(
            f"<code>{html.escape(token['name'])}&nbsp;{token['share']:.0%}"
            f"&nbsp;<small>{token['occurrences']}</small></code>"
            for token in found
        )
        rows.append(f"<tr><td>{expert}</td><td>{listed or 'none'}</td></tr>")
    return (
        f"<details><summary>{html.escape(layer_title(layer))}</summary>"
        '<table class="tokens"><tr><th>expert</th><th>tokens</th></tr>'
        f"{''.join(rows)}</table></details>"
    )


def _shares_of(layer: str, measures: Mapping[str, Any], max_cells: int) -> str:
    """The most frequent token ids by experts, in percent, without the optional end tags.

    Shares from a quarter, a half and three quarters on have their own backgrounds.
    """
    found = measures["tokens"]["most_frequent"]
    num_experts = len(found[0]["share"])
    lines = []
    for token in found[: max(1, max_cells // num_experts)]:
        cells = []
        for share in token["share"]:
            shade = min(int(4 * share), 3)
            cells.append(f"<td class=q{shade}>" if shade else "<td>")
            cells.append(f"{100 * share:.0f}" if share >= 0.005 else "")
        name = f"<code>{html.escape(token['name'])}</code>"
        lines.append(f"<tr><td>{name}<td>{token['occurrences']}{''.join(cells)}")
    header = "".join(f"<th>{expert}" for expert in range(num_experts))
    return (
        f"<details><summary>{html.escape(layer_title(layer))}</summary>"
        f'<table class="shares"><tr><th>token<th>occurs{header}{"".join(lines)}</table></details>'
    )


def _table(rows: list[list[str]]) -> str:
    """A table whose first row is its header."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"
