"""Writes the table of models in docs/models.md from the configs: `python -m docs.make_models`."""

import importlib
import pathlib
from typing import NamedTuple

from moe_jax.config import from_config_dict
from moe_jax.planning.parameters import CONVENTIONS, count_parameters

PAGE = pathlib.Path(__file__).parent / "models.md"
BEGIN, END = "<!-- models -->\n", "<!-- end of models -->\n"


class Row(NamedTuple):
    """A model of the table.

    Attributes:
      name: of the model.
      config: the file in configs/, and its presets.
      special: what sets it apart.
      checked: what it was compared with.
    """

    name: str
    config: str
    special: str
    checked: str


HF = "transformers"
SWITCH = "top-1, capacity 1.25, span corruption"
ROWS = (
    Row("Mixtral 8x7B", "mixtral", "softmax over the two chosen logits", HF),
    Row("Mixtral 8x22B", "mixtral:8x22b", "the same, larger", HF),
    Row("DBRX", "dbrx", "top-4 of 16, fused projections, clipped queries, keys, values", HF),
    Row("Grok-1", "grok1", "sandwich norms, capped scores, tanh GEGLU", "a NumPy model"),
    Row("Jamba-v0.1", "jamba", "Mamba, attention in every 8th layer, no positions", HF),
    Row("Llama 4 Scout (text)", "llama4", "chunks, layers without positions, gated inputs", HF),
    Row("Llama 4 Maverick (text)", "llama4:maverick", "experts in every 2nd layer", HF),
    Row("DeepSeek-V2", "deepseek_v2", "latent attention, 2 + 160 experts, groups", HF),
    Row("DeepSeek-V2-Lite", "deepseek_v2:lite", "queries not compressed, no groups", HF),
    Row(
        "DeepSeek-V3",
        "deepseek_v3",
        "sigmoid scores, loss-free bias; 11.6 B more to predict on",
        HF,
    ),
    Row("OLMoE-1B-7B", "olmoe", "64 experts, QK-norm over the whole projection", HF),
    Row("Qwen1.5-MoE-A2.7B", "qwen2_moe", "a gated shared expert", HF),
    Row("Qwen3-30B-A3B", "qwen3_moe", "QK-norm per head, 128 experts", HF),
    Row("Qwen3-235B-A22B", "qwen3_moe:235b", "the same, larger", HF),
    Row("gpt-oss-20b", "gpt_oss", "sinks, windows, clamped experts, biases throughout", HF),
    Row("gpt-oss-120b", "gpt_oss:120b", "the same, larger", HF),
    Row("Granite 3.1 1B-A400M", "granite_moe", "four multipliers, tied head", HF),
    Row("Phi-3.5-MoE", "phi_moe", "SparseMixer, LayerNorm, LongRoPE", HF),
    Row("Switch-Base-8", "switch_base", f"encoder-decoder, {SWITCH}", HF),
    Row("Switch-Base-128", "switch_base:e128", "the same, 128 experts", HF),
    Row("Switch-Base-256", "switch_base:e256", "the same, 256 experts", HF),
    Row("T5-Base", "switch_base:dense", "the dense twin of Switch-Base", HF),
    Row("Switch-Large-128", "switch_large", "24 + 24 layers", HF),
    Row("Switch-XXL", "switch_xxl", "GEGLU, untied head", "-"),
    Row("Switch-C", "switch_c", "2,048 experts in every layer", "-"),
    Row("ST-MoE-L", "st_moe", "top-2, router z-loss, a dense FFN behind the experts", "-"),
    Row("ST-MoE-32B", "st_moe:32b", "the same, larger", "-"),
    Row(
        "GPT-4, a rumour",
        "gpt4_rumour",
        "8 experts of 220 B, top-2; nothing is published",
        "-",
    ),
    Row("mixed parts", "mixed_parts", "latent attention, Mamba, expert choice: no model's", "-"),
)


def make_table() -> str:
    """The table as Markdown."""
    lines = [
        "| model | config | total | active | what is special | checked against |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        file, _, presets = row.config.partition(":")
        config = from_config_dict(importlib.import_module(f"configs.{file}").get_config(presets))
        count = count_parameters(config.model, config.data.sequence_length)
        total, active = count.by_convention()[CONVENTIONS[0]]
        link = f"[{row.config}](../configs/{file}.py)"
        lines.append(
            f"| {row.name} | {link} | {total:,} | {active:,} | {row.special} | {row.checked} |"
        )
    return "\n".join(lines) + "\n"


def make_page() -> str:
    """The page with a new table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + make_table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
