"""Serving costs by hand: caches of known models, experts read per batch, devices."""

import dataclasses
import json

import jax
import pytest

from configs import deepseek_v3, gpt_oss, jamba, mixtral, switch_base
from moe_jax.config import from_config_dict
from moe_jax.layers.attention import Attention
from moe_jax.layers.cross_attention import CrossAttention
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe.part import MoE
from moe_jax.part import Dims
from moe_jax.plan import Options, run
from moe_jax.planning.hardware import CHIPS
from moe_jax.planning.serving import (
    MOST_DEVICES,
    ServingCosts,
    cache_bytes,
    decoding,
    decoding_lines,
    devices_needed,
    first_compute_bound,
    serving_costs,
)
from moe_jax.weights.quantised import Quantisation

H100 = CHIPS["h100"]
# A million weights in 8 experts, of which a token uses 2, and a million other weights.
SMALL = ServingCosts(10**6, 10**6, ((8, 2, 10**6),), context=10, cache=1000, flops=3e6)


def model_of(module, preset=""):
    return from_config_dict(module.get_config(preset)).model


@pytest.mark.parametrize(
    ("model", "tokens", "expected"),
    [
        # 32 layers of 2 x 8 heads x 128 dims in bfloat16, and an int32 position.
        (model_of(mixtral), 1000, 1000 * 32 * (2 * 8 * 128 * 2 + 4)),
        # 61 layers with a latent of 512 and a rotary key of 64.
        (model_of(deepseek_v3), 1000, 1000 * 61 * ((512 + 64) * 2 + 4)),
        # Half of 24 layers see 128 tokens, in a ring of 136: 2 x 8 heads x 64 dims.
        (model_of(gpt_oss), 1000, (12 * 1000 + 12 * 136) * (2 * 8 * 64 * 2 + 4)),
        # 4 of 32 layers attend; the others keep 3 inputs and a float32 state of 16 for 8,192 dims.
        (model_of(jamba), 1000, 4 * 1000 * (2 * 8 * 128 * 2 + 4)
            + 28 * (3 * 8192 * 2 + 3 * 4 + 16 * 8192 * 4)),
    ],
    ids=["mixtral", "deepseek_v3", "gpt_oss", "jamba"],
)  # fmt: skip
def test_the_cache_of_a_text(model, tokens, expected):
    assert cache_bytes(model, tokens) == expected


def test_a_token_alone_reads_its_own_experts():
    """A token reads 2 of 8 experts, a quarter; two tokens read 1 - (3/4)^2, many tokens all."""
    assert SMALL.read("bfloat16", 1) == 2 * (0.25e6 + 1e6) + 1000
    assert SMALL.read("bfloat16", 2) == 2 * (0.4375e6 + 1e6) + 2000
    assert SMALL.read("bfloat16", 1000) == pytest.approx(2 * 2e6 + 1e6)


# M = 8, one layer of attention with 2 heads of 4, E = 4 experts of H = 12, K = 2: 192 weights each.
TINY = LanguageModel(
    vocab_size=32, model_dim=8, compute_dtype="bfloat16",
    parts={
        "attention": Attention(num_heads=2, head_dim=4),
        "moe": MoE(num_experts=4, num_selected_experts=2, expert_dim=12),
    },
    stack=StackLayout(repeats=1),
)  # fmt: skip


def tiny(**moe):
    changed = dataclasses.replace(TINY.part["moe"], **moe)
    return serving_costs(dataclasses.replace(TINY, parts=TINY.part | {"moe": changed}), 16)


@pytest.mark.parametrize("option", ["num_zero_experts", "num_copy_experts"])
def test_choices_of_zero_computation_experts_read_no_expert(option):
    """Two choices fall on 4 experts and 4 of these: one expert is read, and one is computed."""
    costs = tiny(**{option: 4})
    read = costs.read("bfloat16", 1) - costs.cache - 2 * (costs.rest - costs.unread)
    assert read == 2 * 1 * 192
    # The router has 4 columns more, and half of the choices compute.
    assert costs.flops == tiny().flops + 2 * 8 * 4 - 2 * 192


def test_a_decode_computes_the_experts_that_evaluation_selects():
    """Three of four in place of two: one more expert of 192 weights is read and computed."""
    costs, plain = tiny(eval_num_selected_experts=3), tiny()
    assert costs.read("bfloat16", 1) == plain.read("bfloat16", 1) + 2 * 192
    assert costs.flops == plain.flops + 2 * 192


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_count_the_same_if_a_model_stores_them_quantised(bits):
    """The embedding has 32 x 8 weights, whatever arrays hold them."""
    untied = dataclasses.replace(TINY, tie_embeddings=False)
    stored = Quantisation(names=("embedding",), bits=bits, group_size=4)
    quantised = dataclasses.replace(untied, quantisation=stored)
    assert serving_costs(quantised, 16) == serving_costs(untied, 16)
    assert serving_costs(quantised, 16).unread == 32 * 8


def test_weights_by_precision():
    """Scales take half a bit per weight."""
    assert SMALL.weights("float32") == 8e6
    assert SMALL.weights("int8") == 2e6 * 8.5 / 8
    assert SMALL.weights("int4 experts, rest bfloat16") == 1e6 * 4.5 / 8 + 2e6


def test_mixtral_reads_its_active_parameters():
    costs = serving_costs(model_of(mixtral), 1)
    # All except the input embedding, 32,000 x 4,096, of which it reads one row.
    read = costs.read("bfloat16", 1) - costs.cache
    assert read == pytest.approx(2 * (12_879_925_248 - 131_072_000))
    assert costs.experts + costs.rest == 46_702_792_704


def test_scores_of_a_decode_are_of_what_its_caches_hold():
    """By hand: the FLOPs that a longer context adds."""

    def added(module, tokens, more):
        model = model_of(module)
        return serving_costs(model, tokens + more).flops - serving_costs(model, tokens).flops

    # 32 layers with 32 heads; keys and values of 128 dims.
    assert added(mixtral, 1000, 8) == 8 * 32 * 2 * 32 * 2 * 128
    # 61 layers with 128 heads, a latent of 512 and a rotary key of 64.
    assert added(deepseek_v3, 1000, 8) == 8 * 61 * 2 * 128 * (2 * 512 + 64)
    # 12 of 24 layers have rings, which do not grow. 64 heads of 64 dims.
    assert added(gpt_oss, 1000, 8) == 8 * 12 * 2 * 64 * 2 * 64


def test_a_decode_leaves_an_encoder_alone():
    model = model_of(switch_base)
    costs = serving_costs(model, 512)
    specs = model.specs()
    of_decoder = jax.tree.leaves([specs[name] for name in ("stack", "embedding", "final_norm")])
    rest = sum(spec.size for spec in of_decoder if spec.component != "experts")
    keys_and_values = 12 * 2 * 768 * 768  # of cross-attention, which only the prefill reads
    assert costs.rest - costs.unread == rest - keys_and_values
    assert len(costs.sparse) == 1 and costs.sparse[0][:2] == (8, 1)
    assert costs.sparse[0][2] == costs.experts // 2


def test_a_decode_reads_keys_and_values_of_the_memory_from_the_cache():
    """M = 8, 2 heads of 4: products with two of four matrices, and scores of 20 places."""
    part, dims = CrossAttention(num_heads=2, head_dim=4), Dims(8, memory_length=20)
    assert part.decode_flops(dims, 10, "bfloat16") == 2 * 2 * 8 * 8 + 2 * 2 * 20 * 8


def test_a_long_context_is_never_bound_by_flops():
    """One byte of cache takes fewer FLOPs than the chip does in the time of reading it."""
    short = SMALL._replace(cache=0)
    bound = first_compute_bound(short, H100, "bfloat16")
    before, after = (decoding(short, H100, "bfloat16", n) for n in (bound // 2, bound))
    assert before.compute_ms < before.memory_ms and after.compute_ms >= after.memory_ms
    long = SMALL._replace(cache=10**5)
    assert first_compute_bound(long, H100, "bfloat16") is None
    assert list(decoding_lines(long, {"h100": H100}))[-1].endswith("  never: caches")


def test_a_batch_beyond_the_table_is_not_called_impossible():
    """A thousand times the weights, no cache: 4 GB in 1.2 ms, and 16,384 texts in 0.05 ms."""
    large = SMALL._replace(experts=10**9, rest=10**9, sparse=((8, 2, 10**9),), cache=0)
    assert first_compute_bound(large, H100, "bfloat16") is None
    assert list(decoding_lines(large, {"h100": H100}))[-1].endswith("  over 16,384")


def test_devices_by_hand():
    """Chips of 3 MB: 4 MB of bfloat16 weights and 1,000 bytes per text."""
    chip = dataclasses.replace(H100, usable_hbm_bytes=3e6)
    assert devices_needed(SMALL, chip, "bfloat16", 1, experts_alone=False) == 2
    # Each holds 2 MB and a share of 2 MB.
    assert devices_needed(SMALL, chip, "bfloat16", 1, experts_alone=True) == 4
    assert devices_needed(SMALL, chip, "int4", 1, experts_alone=True) == 1
    assert devices_needed(SMALL, chip, "bfloat16", 8000, experts_alone=False) == 4  # 12 MB
    small = dataclasses.replace(chip, usable_hbm_bytes=2e6)
    assert devices_needed(SMALL, small, "bfloat16", 1, experts_alone=True) is None
    assert MOST_DEVICES == 4096


def test_the_command_says_it_as_text_and_as_json(capsys):
    config = from_config_dict(mixtral.get_config())
    options = Options(topology="h100:8x1", serve=True, context=4096, batch=4)
    assert run(config, options) == 0
    text = capsys.readouterr().out
    assert "weights: 46,702,792,704, 45,097,156,608 of them in routed experts" in text
    assert "h100" in text and "v5p" not in text
    assert run(config, dataclasses.replace(options, json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache_bytes"]["4096"] == 4096 * 131_200
    assert found["chips"]["h100"]["devices"]["bfloat16"] == {"all_split": 2, "experts_split": 2}
