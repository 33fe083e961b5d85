"""Analysis of a run: the choices of its checkpoints, checked against the evaluation's counts."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import switch_base
from moe_jax.analysis import checkpoint
from moe_jax.analysis.checkpoint import (
    Options,
    analyze_run,
    batches_of,
    check_model,
    file_names,
    read_text,
    settings_of,
    write_analysis,
)
from moe_jax.analysis.measures import Scope, measure_layers
from moe_jax.analysis.routed import flatten, route_batches, routed_layers
from moe_jax.analysis.routing_figures import routing_figures
from moe_jax.analysis.similarity import BlockWeights
from moe_jax.analysis.summary import SIGHT, summary_table, text_table
from moe_jax.analyze import said
from moe_jax.config import from_config_dict
from moe_jax.data import heldout_batches, open_data, open_tokenizer
from moe_jax.models.routing_record import PartRecord, RoutingRecord
from moe_jax.moe.routing import Choices
from moe_jax.training.checkpoints import Checkpoints, DamagedCheckpointError
from moe_jax.training.evaluation import evaluate
from moe_jax.training.loss_labels import SEES
from moe_jax.training.run_record import write_run_record
from moe_jax.training.saved import CHECKPOINTS
from tests.tiny_run import DENSE, files, tiny_moe, tiny_state, tiny_training

# Four experts, and one zero expert.
CONFIG = tiny_training(tiny_moe(num_zero_experts=1, capacity={"eval_factor": 0.0}))
ALL = 10**9
OPTIONS = Options(tokens=2000, shuffles=20, min_count=2)


def make_run(workdir, states, config=CONFIG):
    """Writes a run that kept the given states, keyed by step."""
    write_run_record(workdir, config)
    with Checkpoints(workdir / CHECKPOINTS, keep=9) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state._replace(step=jnp.int32(step)), wait=True)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("analysis")
    last = tiny_state(CONFIG)
    make_run(workdir, {3: tiny_state(CONFIG, seed=1), 6: last, 9: last})
    return workdir


def test_a_text_for_a_model_with_an_encoder_is_refused():
    model = from_config_dict(switch_base.get_config("smoke")).model
    check_model(model, "x", Options())
    with pytest.raises(ValueError, match=r"models without an encoder: .* in x has one\. Leave out"):
        check_model(model, "x", Options(text=("a.txt",)))


@pytest.fixture(scope="module")
def analysis(workdir):
    return analyze_run(workdir, OPTIONS)


def test_choices_are_those_that_an_evaluation_counts():
    state, data = tiny_state(CONFIG), open_data(CONFIG.data)
    batches = list(heldout_batches(data, batch_size=4))
    routed = route_batches(state, CONFIG.model, batches, ALL)
    shares = evaluate(state.params, state.model_state, CONFIG, data)["domain_expert_share"]
    for layer, expert_JK in zip(shares.values(), routed.expert_XJK, strict=True):
        for name, share_E in layer.items():
            is_of_domain_J = routed.domain_J == data.domains.index(name)
            counts_E = np.bincount(expert_JK[is_of_domain_J].ravel(), minlength=5)
            np.testing.assert_allclose(counts_E / counts_E.sum(), share_E, rtol=1e-12)
        assert len(layer) == len(np.unique(routed.domain_J)) > 1
    some = route_batches(state, CONFIG.model, batches, 33)
    assert some.expert_XJK.shape == (2, 33, 2) and len(some.token_J) == 33
    np.testing.assert_array_equal(some.expert_XJK, routed.expert_XJK[:, :33])
    # Two tokens share a document if they are in the same sequence of the same batch.
    assert len(np.unique(routed.document_J)) >= sum(
        (b["segment_ids"] == 1).any(1).sum() for b in batches
    )


def test_a_record_is_flattened_without_its_padding():
    """By hand: two documents in the first sequence, one token and padding in the second."""
    segments_BL = np.array([[1, 1, 2], [1, 0, 0]], np.int32)
    index = np.arange(12, dtype=np.int32).reshape(1, 2, 3, 2)
    chosen = np.ones(index.shape, bool)
    chosen[0, 0, 1, 1] = False
    record = RoutingRecord(
        tokens_BL=np.array([[7, 8, 9], [6, 0, 0]]),
        positions_BL=np.zeros((2, 3), np.int32),
        segments_BL=segments_BL,
        parts={"moe": PartRecord((5,), 12, Choices(index, chosen, index / 10, chosen))},
    )
    routed = flatten(record, np.array([4, 2]))
    assert routed.expert_XJK.tolist() == [[[0, 1], [2, -1], [4, 5], [6, 7]]]
    assert routed.token_J.tolist() == [7, 8, 9, 6]
    assert routed.domain_J.tolist() == [4, 4, 4, 2]
    same = routed.document_J[1:] == routed.document_J[:-1]
    assert same.tolist() == [True, False, False]


def test_parts_of_other_sizes_are_joined_in_the_order_of_the_model():
    """One part has top-1 routing in layers 1 and 2, the other top-2 in layers 0 and 2."""
    segments_BL = np.array([[1, 1, 0]], np.int32)

    def part(layers, num_experts, num_choices):
        index = np.arange(len(layers) * 3 * num_choices, dtype=np.int32) % num_experts
        index = index.reshape(len(layers), 1, 3, num_choices)
        chosen = np.ones(index.shape, bool)
        return PartRecord(layers, num_experts, Choices(index, chosen, index / 10, chosen))

    parts = {"one": part((1, 2), 2, 1), "two": part((0, 2), 12, 2)}
    assert [tuple(layer) for layer in routed_layers({n: p.layers for n, p in parts.items()})] == [
        ("layer_00", "two", 0), ("layer_01", "one", 0),
        ("layer_02_one", "one", 1), ("layer_02_two", "two", 1),
    ]  # fmt: skip
    record = RoutingRecord(segments_BL, segments_BL, segments_BL, parts)
    routed = flatten(record, np.array([0]))
    assert routed.expert_XJK.tolist() == [
        [[0, 1], [2, 3]], [[0, -1], [1, -1]], [[1, -1], [0, -1]], [[6, 7], [8, 9]],
    ]  # fmt: skip
    np.testing.assert_allclose(routed.gate_XJK[1], [[0, 0], [0.1, 0]])


@pytest.mark.slow
def test_a_run_with_parts_of_other_sizes_is_analysed(tmp_path):
    """One part has four experts, top 2, the other six, top 1. The page and figures show both."""
    six = {"kind": "moe", "num_experts": 6, "expert_dim": 8}
    unit = [["attention", "moe"], ["attention", "six"]]
    config = tiny_training({"model": {"parts": {"six": six}, "stack": {"unit": unit}}})
    states = {step: tiny_state(config, seed=step) for step in (1, 2)}
    make_run(tmp_path, states, config)
    analysis = analyze_run(tmp_path, Options(tokens=500, shuffles=1, min_count=2))
    sizes = [len(layer["load"]["share"]) for layer in analysis.layers.values()]
    assert sizes == [4, 6, 4, 6]
    choices = [layer["choices_per_token"] for layer in analysis.layers.values()]
    assert choices == [2, 1, 2, 1]
    parts = analysis.settings["parts"]
    assert {name: part["layers"] for name, part in parts.items()} == {"moe": [0, 2], "six": [1, 3]}
    page = write_analysis(analysis, tmp_path / "analysis")[0].read_text(encoding="utf-8")
    assert "4 or 6 experts a layer" in page and "50.0% or 16.7% at random" in page
    assert page.count("data:image/png;base64,") == 8


def test_earlier_checkpoints_are_compared_with_the_last(analysis):
    assert analysis.settings["step"] == 9 and analysis.settings["earlier_steps"] == [3, 6]
    for layer in analysis.layers.values():
        found = layer["saturation"]
        assert found["step"] == [3, 6]
        assert 0 < found["all"][0] < 0.9 and 0 < found["first"][0] < 0.9
        assert found["all"][1] == found["first"][1] == 1, "the same parameters choose alike"
        assert found["random"] == {"first": 0.2, "all": 0.4}


def test_choices_are_compared_with_what_they_might_as_well_be(analysis):
    for layer in analysis.layers.values():
        found = layer["flips"]
        assert list(found) == [
            "input noise 0.01", "compute in bfloat16", "router in bfloat16", "step 6",
        ]  # fmt: skip
        assert found["step 6"] == {"first": 0, "set": 0}, "the same parameters choose alike"
        # Noise and rounding move few tokens, but more than none.
        for name in list(found)[:3]:
            assert 0 < found[name]["first"] < 0.2 and 0 < found[name]["set"] < 0.2
    assert "input noise 0.01" in said(analysis) and "0.0% (0.0%)" in said(analysis)


def test_numbers_are_in_their_ranges_and_beside_their_baselines(analysis):
    assert list(analysis.layers) == ["layer_00", "layer_01"]
    assert analysis.settings["num_tokens"] == len(analysis.routed.token_J) == 2000
    for layer in analysis.layers.values():
        assert layer["choices_per_token"] == 2
        assert sum(layer["domains"]["num_tokens"].values()) == 2000
        assert sum(layer["load"]["share"]) == pytest.approx(1, abs=1e-5)
        for kind in ("domains", "tokens"):
            found = layer[kind]["information"]
            assert 0 < found["shuffled"] <= found["shuffled_largest"] < found["bits"]
            if kind == "domains":
                assert found["shuffled"] < found["explained_by_ids"] <= found["bits"]
            assert found["bits"] <= found["at_most"] == pytest.approx(np.log2(5 / 2), abs=1e-5)
            assert found["random"] == pytest.approx(found["shuffled"], rel=0.3)
        repeated = layer["repetition"]
        assert repeated["random"]["same_first"] == 0.2
        assert repeated["random"]["any_shared"] == pytest.approx(1 - 3 / 10, abs=1e-5)
        pairs = sum(found["num_pairs"] for found in repeated["domains"].values())
        assert pairs == repeated["num_pairs"] < 2000
        assert layer["coactivation"]["random"] == pytest.approx(1 / 4, abs=1e-5)
        assert np.shape(layer["similarity"]["experts"]) == (4, 4)
        assert np.shape(layer["similarity"]["router"]) == (5, 5)
        assert len(layer["tokens"]["most_routed"]) == len(layer["load"]["share"]) == 5
        # Every occurrence has two experts. The most frequent ids are the same in every layer.
        rows = layer["tokens"]["most_frequent"]
        counts_V = np.bincount(analysis.routed.token_J)
        assert [row["occurrences"] for row in rows] == sorted(counts_V.tolist())[:-51:-1]
        assert all(counts_V[row["id"]] == row["occurrences"] for row in rows)
        np.testing.assert_allclose([sum(row["share"]) for row in rows], 2, atol=1e-4)
    # One row per layer. For top-1 routing, the table omits what two choices share.
    table = summary_table(analysis.layers)
    assert table[0][-1] == "settled at step 3" and table[1][-1].endswith("% (40%)")
    assert len({len(line) for line in text_table(table).splitlines()}) == 1


def test_of_one_choice_a_token_nothing_is_said_of_two(analysis):
    one = analysis.routed._replace(expert_XJK=analysis.routed.expert_XJK[..., :1])
    block = BlockWeights(5, {"wi": np.ones((4, 2, 2))}, None)
    weights = dict.fromkeys(analysis.layers, block)
    scope = Scope(analysis.domains, analysis.tokenizer, num_shuffles=1)
    layers = measure_layers(one, {}, {}, weights, scope)
    assert layers["layer_00"]["coactivation"]["random"] == 0
    assert summary_table(layers)[0][-1] == "repeated first"
    assert not {"coactivation", "saturation", "similarity_router"} & set(
        routing_figures(layers, "")
    )


def test_information_about_two_domains_is_at_most_one_bit(analysis):
    """Each domain has its own expert of five: one bit, where log2(5) would be 2.3."""
    domain_J = np.arange(2000) % 2
    routed = analysis.routed._replace(
        domain_J=domain_J, expert_XJK=np.tile(domain_J[None, :, None], (2, 1, 1))
    )
    block = BlockWeights(5, {"wi": np.ones((4, 2, 2))}, None)
    scope = Scope(analysis.domains, analysis.tokenizer, num_shuffles=1)
    layers = measure_layers(routed, {}, {}, dict.fromkeys(analysis.layers, block), scope)
    found = layers["layer_01"]["domains"]["information"]
    assert found["bits"] == found["at_most"] == 1


def test_files_are_written_and_say_what_they_are_of(analysis, workdir, tmp_path):
    before = files(workdir)
    paths = write_analysis(analysis, tmp_path / "new" / "place")
    assert files(workdir) == before
    assert [path.name for path in paths[:2]] == ["analysis.html", "analysis.json"]
    images = {path.stem for path in paths[2:]}
    assert images == {
        "load", "domains", "information", "repetition", "saturation", "coactivation",
        "similarity_experts", "similarity_router",
    }  # fmt: skip
    for path in paths[2:]:
        assert path.read_bytes().startswith(b"\x89PNG")
    found = json.loads(paths[1].read_text(), parse_constant=pytest.fail)
    assert found["layers"] == analysis.layers
    settings = found["settings"]
    assert (
        settings["config"] == CONFIG.name and settings["text"] == "the held-out split of embedded"
    )
    page = paths[0].read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(images)
    printed = said(analysis)
    assert "saturation against 2 earlier checkpoints that were kept: steps 3, 6" in printed
    assert "step 9: 2,000 tokens of the held-out split of embedded" in printed


def test_given_texts_are_domains_of_their_own(tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("é" * 20)
    other.write_text("x" * 500)
    options = Options(text=(str(one), str(other)), tokens=200)
    texts = [one.read_text(), other.read_text()]
    names, batches = batches_of("", CONFIG, open_tokenizer("byte"), options, texts)
    assert names == ("one.txt", "other.txt")
    tokens = [
        np.sum((b["segment_ids"] > 0).sum(1) * (b["domain"] == d)) for b in batches for d in (0, 1)
    ]
    assert sum(tokens[0::2]) == 41 and sum(tokens[1::2]) == 100
    # More texts than tokens is an error. Texts of equal name in two folders get numbers.
    with pytest.raises(ValueError, match=r"one token of each text: --tokens=1 for 2 files.*Raise"):
        analyze_run(tmp_path, dataclasses.replace(options, tokens=1))
    alike = ("/a/x.txt", "/b/x.txt", "/b/x.txt (2)", "/c/x.txt")
    assert file_names(alike) == ("x.txt", "x.txt (2)", "x.txt (2) (2)", "x.txt (3)")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"--text is a file of text: the file .*x\.txt is blank\. Name another"),
        (b" \r\n\t\n", r"the file .*x\.txt is blank\. Name another"),
        ("un\ncafé".encode("latin-1"), r"x\.txt line 2 has the byte 0xe9.*iconv -f LATIN1"),
        (b"\xff\xfe", r"x\.txt is UTF-16.*iconv -f UTF-16"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path, data, message):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_text(str(tmp_path / "x.txt"))
    # Before a model is loaded: there is no run here.
    with pytest.raises(ValueError, match=message):
        analyze_run(tmp_path, Options(text=(str(tmp_path / "x.txt"),)))


def test_settings_say_how_experts_were_filled_and_not_where_files_are(analysis, tmp_path):
    """The run has expert choice, a corpus, a tokenizer and a text, all with a path."""
    choice = {
        "data": {
            "corpus": f"jsonl:{tmp_path}/mine", "tokenizer": f"sentencepiece:{tmp_path}/x.model",
        },
        "model": {
            "stack": {"allow_lookahead": True},
            "parts": {"moe": {
                "router": "expert_choice", "bias": None, "capacity": {"train_factor": 1.5},
            }},
        },
    }  # fmt: skip
    options = Options(text=(f"{tmp_path}/one.txt",))
    found = settings_of(tmp_path / "run", tiny_training(choice), options, 1, [], analysis.routed)
    assert found["parts"]["moe"]["capacity"] == "slots of training, factor 1.5"
    assert found["mark"] == SEES and analysis.settings["mark"] == ""
    marked = analysis._replace(settings=analysis.settings | {"mark": SEES})
    assert SIGHT[SEES] in said(marked) and "later tokens" not in said(analysis)
    assert (found["run"], found["text"], found["files"]) == ("run", "one.txt", ["one.txt"])
    assert found["tokenizer"] == "sentencepiece:x.model"
    heldout = settings_of(tmp_path, tiny_training(choice), Options(), 1, [], analysis.routed)
    assert heldout["text"] == "the held-out split of jsonl:mine"
    assert str(tmp_path.parent) not in json.dumps([found, heldout])
    assert analysis.settings["parts"]["moe"] == {
        "layers": [0, 1], "num_experts": 5, "of_which_compute_nothing": 1,
        "num_selected_experts": 2, "router": "token_choice", "capacity": "dropless",
    }  # fmt: skip


def test_any_checkpoint_can_be_analysed_while_a_run_deletes_others(workdir, monkeypatch, caplog):
    small = Options(step=6, tokens=200, shuffles=1)
    # Step 1 is listed, and deleted before it is read.
    monkeypatch.setattr(checkpoint, "kept_steps", lambda workdir: [1, 3, 6, 9])
    found = analyze_run(workdir, small)
    assert found.settings["step"] == 6 and found.settings["earlier_steps"] == [3]
    assert "checkpoint of step 1 is left out" in caplog.text
    with pytest.raises(ValueError, match=r"none of step 5 in .*which has 3, 6, 9\. Pass one"):
        analyze_run(workdir, dataclasses.replace(small, step=5))


def test_what_cannot_be_analysed_is_refused_or_left_out(workdir, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"there is neither in"):
        analyze_run(tmp_path)
    dense = tiny_training(DENSE)
    make_run(tmp_path / "dense", {1: tiny_state(dense)}, dense)
    with pytest.raises(ValueError, match=r"MoE layers: .*'attention', 'mlp'.*Pass the --workdir"):
        analyze_run(tmp_path / "dense")
    soft = {"router": "soft", "run_experts": "auto", "bias": None, "group_size": 16}
    stack = {"allow_lookahead": True}
    mixed = tiny_training({"model": {"parts": {"moe": soft}, "stack": stack}})
    make_run(tmp_path / "soft", {1: tiny_state(mixed)}, mixed)
    with pytest.raises(
        ValueError, match=r"choose experts .*moe\.router='soft', which mixes .*Pass the"
    ):
        analyze_run(tmp_path / "soft")
    (workdir / CHECKPOINTS / "3" / "manifest.json").write_text("{}")
    small = Options(tokens=2000, shuffles=1)
    assert analyze_run(workdir, small).settings["earlier_steps"] == [6]
    assert "checkpoint of step 3 is left out" in caplog.text
    with pytest.raises(DamagedCheckpointError, match="Use another step"):
        analyze_run(workdir, Options(step=3))
    alone = analyze_run(workdir, Options(tokens=2000, shuffles=1, checkpoints=0))
    assert alone.layers["layer_00"]["saturation"] is None
    assert "no earlier checkpoint" in said(alone)
