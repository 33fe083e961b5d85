"""Held-out losses against NumPy: by domain, dropless and capacity-limited."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.data import heldout_batches, open_data
from moe_jax.moe.run_experts import buffer
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.evaluation import DomainSums, SequenceSums, evaluate
from moe_jax.training.loss import call_of_batch
from moe_jax.training.placement import state_shardings
from tests.tiny_run import DENSE, quick_jit, tiny_moe, tiny_state, tiny_training

FLOAT32 = {"rtol": 1e-5}  # logits of a small model, in float32
NUM_BATCHES = 5
BIAS = {"moe": {"bias_E": jnp.array([[0.0, 0.2, 0.0, 0.0], [0.1, 0.0, 0.0, -0.1]])}}


def make(eval_factor=0.5, **moe):
    config = tiny_training(tiny_moe(**moe, capacity={"eval_factor": eval_factor}))
    return config, tiny_state(config)


def score(params, model_state, config, **how):
    return evaluate(params, model_state, config, open_data(config.data), **how)


@pytest.fixture(scope="module")
def said():
    config, state = make()
    return score(state.params, BIAS, config, max_batches=NUM_BATCHES)


@pytest.mark.parametrize(("kind", "factor"), [("dropless", 0.0), ("capacity_limited", 0.5)])
def test_losses_are_those_of_numpy(said, kind, factor):
    config, state = make()
    run = quick_jit(config.model.run)
    data = open_data(config.data)
    sums = dict.fromkeys(data.domains, np.zeros(3))
    token_bytes_V = data.tokenizer.token_bytes_V
    for batch in heldout_batches(data, batch_size=4, max_batches=NUM_BATCHES):
        domain_B = batch.pop("domain")
        output = run(state.params, call_of_batch(batch, capacity=factor), state=BIAS)
        logits = np.asarray(output.logits_BLV, np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, domain in enumerate(domain_B):
            name = data.domains[domain]
            for position, target in enumerate(batch["targets"][row]):
                weight = batch["loss_weights"][row, position]
                nats = -log_probs[row, position, target]
                sums[name] = sums[name] + weight * np.array([nats, 1, token_bytes_V[target]])

    def check(got, nats, tokens, num_bytes):
        np.testing.assert_allclose(got["nats_per_token"], nats / tokens, **FLOAT32)
        np.testing.assert_allclose(got["bits_per_byte"], nats / num_bytes / np.log(2), **FLOAT32)
        assert got["tokens"] == tokens
        assert num_bytes < tokens, "the end of a document is a target, but no byte"

    seen = {name: values for name, values in sums.items() if values[1] > 0}
    assert len(seen) > 1 and set(said[kind]["domains"]) == set(seen)
    for name, values in seen.items():
        np.testing.assert_allclose(
            said[kind]["domains"][name]["nats_per_token"], values[0] / values[1], **FLOAT32
        )
    check(said[kind], *sum(sums.values()))


def test_domains_add_up_to_the_whole(said):
    for kind in ("dropless", "capacity_limited"):
        domains = said[kind]["domains"].values()
        tokens = sum(domain["tokens"] for domain in domains)
        nats = sum(domain["nats_per_token"] * domain["tokens"] for domain in domains)
        assert said[kind]["tokens"] == tokens
        np.testing.assert_allclose(said[kind]["nats_per_token"], nats / tokens, rtol=1e-12)


def test_capacity_that_is_tight_shows_and_ample_capacity_does_not(said):
    gap = said["dropless"]["nats_per_token"] - said["capacity_limited"]["nats_per_token"]
    assert abs(gap) > 1e-3
    config, state = make(eval_factor=4.0)  # as many slots as tokens, for each of 4 experts
    ample = score(state.params, BIAS, config, max_batches=NUM_BATCHES)
    assert ample["capacity_limited"] == ample["dropless"] | {"label": "capacity-limited"}


def test_shares_of_experts_are_of_every_layer_and_domain(said):
    shares = said["domain_expert_share"]
    assert set(shares) == {"layer_00", "layer_01"}
    for layer in shares.values():
        assert set(layer) == set(said["dropless"]["domains"])
        for share_E in layer.values():
            assert len(share_E) == 4
            np.testing.assert_allclose(sum(share_E), 1, rtol=1e-12)
    assert len({tuple(share_E) for share_E in shares["layer_00"].values()}) > 1


def test_a_dense_model_has_neither_a_limit_nor_experts():
    config = tiny_training(DENSE)
    said = score(tiny_state(config).params, {}, config, max_batches=1)
    assert set(said) == {"dropless", "domain_expert_share"}
    assert said["domain_expert_share"] == {}


def test_an_eval_factor_of_zero_is_dropless_only():
    config, state = make(eval_factor=0.0)
    assert "capacity_limited" not in score(state.params, BIAS, config, max_batches=1)


def test_sums_by_domain_by_hand():
    sums = DomainSums(("a", "b", "c"))
    assigned_XBE = jnp.array([[[3, 1], [0, 4], [1, 0]]])
    batch = SequenceSums(
        jnp.array([2.0, 4.0, 1.0]), jnp.array([2.0, 4.0, 1.0]), jnp.array([1.0, 4.0, 1.0]),
        {"moe": assigned_XBE},
    )  # fmt: skip
    sums.add(batch, np.array([0, 2, 0]))
    losses = sums.losses()
    assert losses["nats_per_token"] == 1 and losses["tokens"] == 7
    np.testing.assert_allclose(losses["domains"]["a"]["bits_per_byte"], 3 / 2 / np.log(2))
    assert set(losses["domains"]) == {"a", "c"}, "nothing is said of a domain without targets"
    by_domain = {"a": [0.8, 0.2], "c": [0.0, 1.0]}
    assert sums.expert_share({"moe": (5,)}) == {"layer_05": by_domain}


def test_shares_of_two_parts_that_route_are_told_apart():
    """By layer if only one part is in it, otherwise by layer and part."""
    sums = DomainSums(("a",))
    of_a_batch = jnp.ones(1), jnp.ones(1), jnp.ones(1)
    assigned = {"small": jnp.array([[[1, 3]], [[1, 0]]]), "large": jnp.array([[[2, 1, 1]]])}
    sums.add(SequenceSums(*of_a_batch, assigned), np.array([0]))
    assert sums.expert_share({"small": (0, 1), "large": (1,)}) == {
        "layer_00": {"a": [0.25, 0.75]},
        "layer_01_small": {"a": [1.0, 0.0]},
        "layer_01_large": {"a": [0.5, 0.25, 0.25]},
    }


def test_lost_choices_are_summed_over_batches_by_layer():
    sums = DomainSums(("a",))
    of_a_batch = jnp.ones(1), jnp.ones(1), jnp.ones(1), {}
    assert sums.overflow({"moe": (0, 3)}) == {}
    for lost in ([1, 0], [4, 2]):
        sums.add(SequenceSums(*of_a_batch, {"moe": jnp.array(lost)}), np.array([0]))
    assert sums.overflow({"moe": (0, 3)}) == {"buffer_overflow": {"layer_00": 5, "layer_03": 2}}


@pytest.mark.slow
def test_an_evaluation_counts_what_its_buffer_has_no_room_for(monkeypatch):
    """On eight devices, with tiles of one row."""
    monkeypatch.setattr(buffer, "TILE", 1)
    moe = {"num_experts": 8, "run_experts": "ragged", "capacity": {"eval_factor": 0.0}}
    settings = tiny_moe(**moe)
    settings["model"]["stack"] = {"allow_lookahead": True, "repeats": 1}
    settings |= {"mesh": {"expert": 8, "data": 1}, "training": {"batch_size": 8}}
    settings["model"]["parts"]["moe"]["bias"] = None
    found = []
    for factor in (1.0, 8.0):
        settings["model"]["parts"]["moe"]["eval_buffer_factor"] = factor
        config = tiny_training(settings)
        params, mesh = tiny_state(config).params, make_mesh(config.mesh)
        found.append(score(params, {}, config, mesh=mesh, max_batches=1)["dropless"])
    said, expected = found
    assert said["label"] == "bounded buffer" and said["buffer_overflow"]["layer_00"] > 0
    assert expected["buffer_overflow"] == {"layer_00": 0}
    assert said["nats_per_token"] != expected["nats_per_token"]


def test_cutting_the_evaluation_in_other_batches_changes_nothing(said):
    """One batch of an evaluation has as many rows as a microbatch."""
    _, state = make()
    config = tiny_training({
        **tiny_moe(capacity={"eval_factor": 0.5}), "training": {"num_microbatches": 2},
    })  # fmt: skip
    halves = score(state.params, BIAS, config, max_batches=2 * NUM_BATCHES)
    for kind in ("dropless", "capacity_limited"):
        np.testing.assert_allclose(
            halves[kind]["nats_per_token"], said[kind]["nats_per_token"], **FLOAT32
        )
    assert halves["domain_expert_share"] == said["domain_expert_share"]


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
        pytest.param(MeshConfig(data=1, expert=4), marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_on_a_mesh_is_that_on_one_device(said, mesh):
    config, state = make()
    mesh = make_mesh(mesh)
    params = jax.device_put(state.params, state_shardings(config, mesh).params)
    on_mesh = score(params, BIAS, config, mesh=mesh, max_batches=NUM_BATCHES)
    assert set(on_mesh) == set(said)
    for kind in ("dropless", "capacity_limited"):
        assert on_mesh[kind]["tokens"] == said[kind]["tokens"]
        pairs = [(on_mesh[kind], said[kind])]
        pairs += [
            (on_mesh[kind]["domains"][name], domain)
            for name, domain in said[kind]["domains"].items()
        ]
        for got, expected in pairs:
            np.testing.assert_allclose(got["nats_per_token"], expected["nats_per_token"], **FLOAT32)
    assert on_mesh["domain_expert_share"] == said["domain_expert_share"]
