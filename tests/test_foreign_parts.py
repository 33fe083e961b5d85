"""A router, a mixer, a balance loss and an activation from outside, in every command."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import plan
from moe_jax.analysis.checkpoint import Options, analyze_run
from moe_jax.config import config_dict, from_config_dict, read_config, to_dict
from moe_jax.config.run import ExperimentConfig
from moe_jax.data import open_data, open_tokenizer
from moe_jax.inference import generate_tokens, stream_text
from moe_jax.parallel.mesh import make_mesh
from moe_jax.part import Call
from moe_jax.train import run
from moe_jax.training.evaluation import evaluate
from moe_jax.training.files import METRICS_FILE
from moe_jax.training.metrics import read_metrics
from moe_jax.training.saved import load_run
from tests.foreign import GatedRecurrence, Peakedness, RoundRobin, SquaredRelu
from tests.tiny_run import CACHE

EXPERTS = {
    "kind": "moe",
    "num_experts": 4,
    "num_selected_experts": 2,
    "run_experts": "einsum",
    "activation": "tests.foreign:SquaredRelu",
    "losses": {
        "load_balance": {"weight": 0.01},
        "peakedness": {"kind": "tests.foreign:Peakedness", "weight": 0.1},
    },
}
SETTINGS = {
    "model": {
        "kind": "language_model",
        "vocab_size": 384,
        "model_dim": 16,
        "parts": {
            "mixer": {"kind": "tests.foreign:GatedRecurrence", "dim": 8},
            "in_turn": {
                **EXPERTS, "expert_dim": 16,
                "router": {"kind": "tests.foreign:RoundRobin", "offset": 1},
            },
            "learned": {**EXPERTS, "expert_dim": 32},
        },
        "stack": {"unit": [["mixer", "in_turn"], ["mixer", "learned"]], "repeats": 1},
    },
    "data": {
        "sequence_length": 16, "heldout_fraction": 0.001, "cache_dir": str(CACHE / "moe_jax"),
    },
    "optimizer": {"warmup_steps": 1},
    "training": {
        "num_steps": 4, "batch_size": 4, "log_every": 1, "evaluate_every": 4,
        "evaluation_batches": 1, "checkpoint_every": 2, "sample_tokens": 4,
    },
}  # fmt: skip
MESHES = {
    "one device": {"data": 1},
    "a mesh": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
}


def foreign_config(mesh="one device"):
    return from_config_dict({**SETTINGS, "mesh": MESHES[mesh]})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the directory of a trained run, by the name of its mesh."""

    @functools.cache
    def train_on(mesh):
        workdir = tmp_path_factory.mktemp("foreign") / mesh.replace(" ", "_")
        run(foreign_config(mesh), workdir)
        return workdir

    return train_on


def test_a_config_names_them_and_gives_them_back():
    config = foreign_config()
    assert config.model.part["mixer"] == GatedRecurrence(dim=8)
    assert config.model.part["in_turn"].router == RoundRobin(offset=1)
    assert config.model.part["learned"].activation == SquaredRelu()
    assert Peakedness(weight=0.1) in config.model.part["learned"].losses
    assert from_config_dict(config_dict(config)) == config
    assert from_config_dict(to_dict(config)) == config


def test_a_flag_sets_a_field_of_a_foreign_part():
    config = config_dict(foreign_config())
    config.model.parts.in_turn.router.offset = 3
    config.model.parts.mixer.dim = 4
    built = from_config_dict(config).model
    assert (built.part["in_turn"].router.offset, built.part["mixer"].dim) == (3, 4)


@pytest.mark.slow
def test_training_is_the_same_on_a_mesh(trained):
    one, several = (read_metrics(trained(mesh) / METRICS_FILE) for mesh in MESHES)
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in (one, several)]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_metrics_are_logged_of_each(trained):
    row = read_metrics(trained("one device") / METRICS_FILE)[0]
    # Two of four experts with half the probability each: 4 * (1/4 + 1/4).
    assert row["in_turn/layer_00/peakedness_loss"] == 2
    assert row["in_turn/layer_00/expert_load"] == [0.25] * 4
    assert 1 <= row["learned/layer_01/peakedness_loss"] < 2


def test_a_run_with_parts_from_outside_is_loaded_with_trust_alone(trained):
    workdir = trained("one device")
    with pytest.raises(ValueError, match=r"outside this library.*--trust"):
        load_run(workdir)
    config, _ = load_run(workdir, trust=True)
    assert config.model == foreign_config().model
    written = json.loads((workdir / "config.json").read_text())
    assert set(written["sources"]) == {
        f"tests.foreign:{name}"
        for name in ("GatedRecurrence", "Peakedness", "RoundRobin", "SquaredRelu")
    }
    assert read_config(written, ExperimentConfig, trust=True) == foreign_config()


def test_evaluation_is_the_same_on_a_mesh(trained):
    losses = []
    for mesh in MESHES:
        config, state = load_run(trained("one device"), foreign_config(mesh).mesh, trust=True)
        said = evaluate(
            state.params, state.model_state, config, open_data(config.data),
            mesh=make_mesh(config.mesh), max_batches=1, step=state.step,
        )  # fmt: skip
        losses.append(said["dropless"]["nats_per_token"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_it_generates_what_one_pass_finds_likeliest(trained):
    """The recurrence has no cache, so the whole text is read again for every token."""
    config, state = load_run(trained("one device"), trust=True)
    pieces = stream_text(config, state.params, ["The "], 4, state=state.model_state, temperature=0)
    drawn = [token for piece in pieces for token in piece.tokens]
    tokenizer = open_tokenizer("byte")
    text = [tokenizer.bos_id, *tokenizer.encode("The "), *drawn]
    call = Call(tokens_BL=jnp.asarray([text]), capacity=0.0)
    output = jax.jit(config.model.run)(state.params, call, state=state.model_state)
    likeliest_L = np.argmax(output.logits_BLV[0], axis=-1)
    assert drawn == likeliest_L[-5:-1].tolist()
    assert (trained("one device") / "sample.txt").read_text().startswith("The ")
    with pytest.raises(ValueError, match=r"has no cache: \['mixer'\] have no cache_specs"):
        generate_tokens(config, state.params, [[1, 2]], 2, state=state.model_state)


def test_it_is_analysed(trained):
    analysis = analyze_run(trained("one device"), Options(tokens=64, shuffles=2, trust=True))
    assert len(analysis.layers) == 2


def test_it_is_planned(capsys):
    assert plan.run(foreign_config("a mesh"), plan.Options()) == 0
    printed = capsys.readouterr().out
    assert "mixer" in printed
    assert plan.run(foreign_config(), plan.Options(json=True)) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]
