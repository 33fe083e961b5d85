"""The checks of a part: every registered kind passes them, and each finds its own fault."""

import dataclasses
import itertools
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.check_part import brief, line, part_of, told_once
from moe_jax.checks import CHECKS, FAMILIES, Trial, check
from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.config.settings import Settings
from moe_jax.layers.feed_forward import Mlp
from moe_jax.moe.activations import Activation
from moe_jax.moe.bias import SignUpdate
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.routing.logits import Linear
from moe_jax.moe.routing.noise import Gaussian, Jitter, Learned
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.parallel.rules import mesh_in_use
from moe_jax.parameters import ParameterSpec, linear, ones, scaled_init
from moe_jax.part import Part
from tests.foreign import GatedRecurrence, Peakedness, RoundRobin, SquaredRelu
from tests.slow import slow_but
from tests.tiny_run import ROOT

NO_PARTS = {"loss", "model", "objective", "upcycling"}
OWN = [(family, kind) for family in KINDS if family not in NO_PARTS for kind in KINDS[family]]
FOREIGN = [RoundRobin(), GatedRecurrence(), Peakedness(), SquaredRelu()]


# A quick run checks one kind of each of these families.
QUICK = [
    ("part", "mlp"), ("router", "token_choice"), ("score", "softmax"),
]  # fmt: skip


def assert_passes(part, names=tuple(CHECKS)):
    trial = Trial(part)
    for name in names:
        result = check(name, trial)
        assert result.passed is not False, f"{name}: {result.text}"
        assert "none was seen to look ahead" not in result.text
    jax.clear_caches()


def quick_checks(family, kind):
    """Names of the checks of a kind in a quick run; only whole parts need the check of scans."""
    if (family, kind) not in QUICK:
        return []
    left_out = {"part": set(), "router": {"scan"}}.get(family, {"scan", "mesh"})
    left_out |= {"decoding", "microbatches", "task"}
    return [name for name in CHECKS if name not in left_out]


def test_the_families_that_are_checked_are_those_of_the_table():
    assert set(FAMILIES) == set(KINDS) - NO_PARTS


@pytest.mark.parametrize(("family", "kind"), QUICK)
def test_every_registered_kind_passes(family, kind):
    assert_passes(load_kind(family, kind)(), quick_checks(family, kind))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), OWN)
def test_every_registered_kind_passes_the_rest(family, kind):
    names = [name for name in CHECKS if name not in quick_checks(family, kind)]
    assert_passes(load_kind(family, kind)(), names)


@pytest.mark.parametrize(("family", "kind"), OWN)
def test_every_registered_kind_decodes_from_caches(family, kind):
    model = Trial(load_kind(family, kind)()).model
    assert model.decoder.without_cache(model.dims) == []


# `test_docs` checks such a router, loss and activation.
@pytest.mark.parametrize(
    "part", slow_but([GatedRecurrence()], FOREIGN), ids=lambda part: type(part).__name__
)
def test_parts_from_outside_pass(part):
    assert_passes(part)


def test_what_looks_ahead_is_seen_to():
    result = check("causality, training", Trial(part_of("router.expert_choice", [])))
    assert result.passed
    assert re.match(
        r"declared to look ahead; outputs before 32 other suffixes move by", result.text
    )


def test_several_parts_of_a_family_serialise_in_any_order():
    router = TokenChoice(noise=(Learned(), Gaussian(stddev=0.5), Jitter()))
    assert check("serialises", Trial(router)).passed
    assert router == TokenChoice(noise=(Jitter(), Learned(), Gaussian(stddev=0.5)))


# Parts with one fault each.


@dataclasses.dataclass(frozen=True)
class SeesTheGroup(TokenChoice):
    """Claims to be causal, but adds the mean of the group to every token."""

    def route(self, params, x_GSM, inputs):
        return super().route(params, x_GSM + jnp.mean(x_GSM, axis=1, keepdims=True), inputs)


@dataclasses.dataclass(frozen=True)
class Mixer(Part):
    """A sound mixer of one matrix. Subclasses add faults."""

    def specs(self, dims):
        shape, init = (dims.model_dim, dims.model_dim), scaled_init(1.0, dims.model_dim)
        return {"weight": ParameterSpec(shape, ("model", None), init, "mixer")}

    def looks_ahead(self, training):
        return False

    def apply(self, params, x_BLM, call, own):
        return linear(x_BLM, params["weight"]), None, None


@dataclasses.dataclass(frozen=True)
class IgnoresParameter(Mixer):
    """Declares a scale and ignores it."""

    def specs(self, dims):
        scale = ParameterSpec((dims.model_dim,), (None,), ones, "mixer", decays=False)
        return {**super().specs(dims), "scale": scale}


class Undecorated(Mixer):
    """Has a setting that no config can set, because the class is no dataclass."""

    width: int = 3


@dataclasses.dataclass(frozen=True)
class LosesKind(Mixer):
    """Holds a part in an untyped field: building it from its dict leaves a dict."""

    inner: Any = Linear(temperature=2.0)


@dataclasses.dataclass(frozen=True)
class Forgets(Mixer):
    """Has a field that its constructor does not accept."""

    width: int = dataclasses.field(default=3, init=False)


@dataclasses.dataclass(frozen=True)
class StartsAnew(Mixer):
    """Draws initial values from a generator that ignores the key."""

    def specs(self, dims):
        def init(key, shape, dtype):
            return jnp.asarray(np.random.default_rng().normal(size=shape), dtype)

        spec = super().specs(dims)["weight"]
        return {"weight": dataclasses.replace(spec, init=init)}


@dataclasses.dataclass(frozen=True)
class NamesNoAxis(Mixer):
    """Names an axis that no sharding rule knows."""

    def specs(self, dims):
        spec = super().specs(dims)["weight"]
        return {"weight": dataclasses.replace(spec, axes=("embed", None))}


@dataclasses.dataclass(frozen=True)
class ReadsPadding(Mixer):
    """Adds the mean of a sequence, including padding."""

    def looks_ahead(self, training):
        return True

    def apply(self, params, x_BLM, call, own):
        mean_B1M = jnp.mean(x_BLM, axis=1, keepdims=True)
        return linear(x_BLM + mean_B1M, params["weight"]), None, None


@dataclasses.dataclass(frozen=True)
class MixesSequences(Mixer):
    """Adds the mean of the batch, like batch normalisation."""

    def apply(self, params, x_BLM, call, own):
        mean_1LM = jnp.mean(x_BLM, axis=0, keepdims=True)
        return linear(x_BLM + mean_1LM, params["weight"]), None, None


@dataclasses.dataclass(frozen=True)
class OfEachMicrobatch(LoadBalance):
    """A product of two means of a microbatch, which claims to be a sum over tokens."""

    depends_on_microbatches = False


@dataclasses.dataclass(frozen=True)
class CountsDevices(Mixer):
    """Multiplies by the number of devices."""

    def apply(self, params, x_BLM, call, own):
        mesh = mesh_in_use()
        y_BLM, aux, cache = super().apply(params, x_BLM, call, own)
        return y_BLM * (1 if mesh is None else mesh.size), aux, cache


CALLS = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class CountsCalls(Mixer):
    """Computes another function at each trace."""

    def apply(self, params, x_BLM, call, own):
        y_BLM, aux, cache = super().apply(params, x_BLM, call, own)
        return y_BLM * next(CALLS), aux, cache


@dataclasses.dataclass(frozen=True)
class ForgetsThePast(Mixer):
    """Adds the previous token without caching it, and claims to be pointwise."""

    pointwise = True

    def apply(self, params, x_BLM, call, own):
        before_BLM = jnp.pad(x_BLM, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        same_BL1 = (call.positions_BL > 0)[..., None]
        return linear(x_BLM + before_BLM * same_BL1, params["weight"]), None, None


@dataclasses.dataclass(frozen=True)
class ByPlace(RoundRobin):
    """Counts tokens from the start of each input, padding included, instead of by position."""

    def route(self, params, x_GSM, inputs):
        place_GS = jnp.broadcast_to(jnp.arange(x_GSM.shape[1]), x_GSM.shape[:2])
        return super().route(params, x_GSM, inputs._replace(positions_GS=place_GS))


@dataclasses.dataclass(frozen=True)
class ForgetsItsDtype(Mixer):
    """Returns float32 for any input dtype."""

    def apply(self, params, x_BLM, call, own):
        y_BLM, aux, cache = super().apply(params, x_BLM, call, own)
        return y_BLM.astype(jnp.float32), aux, cache


@dataclasses.dataclass(frozen=True)
class Raises(Mixer):
    """Raises an error when applied."""

    def apply(self, params, x_BLM, call, own):
        raise KeyError("no such parameter")


@dataclasses.dataclass(frozen=True)
class RaisesInJax(Mixer):
    """Makes JAX raise an error, in a file of JAX."""

    def apply(self, params, x_BLM, call, own):
        return jnp.max(params)  # the line that the report names


@dataclasses.dataclass(frozen=True)
class IgnoresReplay(TokenChoice):
    """Claims to replay, but chooses anew."""

    def route(self, params, x_GSM, inputs):
        return super().route(params, x_GSM, inputs._replace(replay=None))


@dataclasses.dataclass(frozen=True)
class RawSigmoid(TokenChoice):
    """Returns sigmoids of all experts as probabilities, and the first choice twice."""

    def route(self, params, x_GSM, inputs):
        routing = super().route(params, x_GSM, inputs)
        index_GSK = jnp.broadcast_to(
            routing.expert_index_GSK[..., :1], routing.expert_index_GSK.shape
        )
        return routing._replace(
            probs_GSE=jax.nn.sigmoid(routing.logits_GSE), expert_index_GSK=index_GSK,
            gate_GSK=routing.gate_GSK - 1,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SumsToOne(TokenChoice):
    """Divides gates by their sum, and does not refuse one choice per token."""

    def route(self, params, x_GSM, inputs):
        routing = super().route(params, x_GSM, inputs)
        sum_GS1 = jnp.sum(routing.gate_GSK, axis=-1, keepdims=True)
        return routing._replace(gate_GSK=routing.gate_GSK / sum_GS1)


@dataclasses.dataclass(frozen=True)
class OneTooFar(RoundRobin):
    """Counts experts from 1."""

    def route(self, params, x_GSM, inputs):
        routing = super().route(params, x_GSM, inputs)
        return routing._replace(expert_index_GSK=routing.expert_index_GSK + 1)


@dataclasses.dataclass(frozen=True)
class LosesItsState(SignUpdate):
    """Returns only the bias of the first layer."""

    def update(self, bias_E, assigned_E, measured, rate, num_selected):
        return super().update(bias_E, assigned_E, measured, rate, num_selected)[:1]


@dataclasses.dataclass(frozen=True)
class Overflows(Activation):
    """Divides by 0."""

    def apply(self, inner, gate):
        return inner / jnp.zeros_like(inner)


FAULTS = [
    (SeesTheGroup(), "causality, training", r"declared causal; .* move by \d"),
    (SeesTheGroup(), "causality, evaluation", r"declared causal; .* move by \d"),
    (IgnoresParameter(), "gradients", r"always 0.*: stack/unit/0/checked/scale$"),
    (Undecorated(), "serialises", r"Undecorated\.width is not a setting: decorate"),
    (LosesKind(), "serialises", r"LosesKind.*is written as.*which builds LosesKind"),
    (Forgets(), "serialises", r"Forgets\.width is not a setting"),
    (StartsAnew(), "specs", r"initial values differ between draws with one key"),
    (NamesNoAxis(), "specs", r"checked/weight of shape \(2, 8, 8\) has the axes .*'embed'"),
    (ReadsPadding(), "padding", r"other tokens in the padding move .*in training.*in evaluation"),
    (CountsDevices(), "mesh", r"on fsdp=2, expert=2, tensor=2 and on one device these differ"),
    (MixesSequences(), "microbatches", r"^logits and loss: not the same when"),
    (OfEachMicrobatch(1.0, scope="microbatch"), "microbatches", r"^loss: not the same"),
    (CountsCalls(), "scan", r"in a scan and one after another these differ"),
    (ForgetsThePast(), "decoding", r"logits from caches move by \d"),
    (ByPlace(), "decoding", r"logits from caches move by \d"),
    (ForgetsItsDtype(), "values", r"^the residual has dtype float32 for bfloat16 inputs$"),
    (Raises(), "values", r"KeyError at .*test_check_part\.py:\d+: 'no such parameter'"),
    (RaisesInJax(), "values", r"TypeError at .*test_check_part\.py:\d+: "),
    (IgnoresReplay(), "replay", r"the chosen experts are not those that are replayed"),
    (RawSigmoid(), "routing", r"an expert twice; a gate is negative.*; probabilities .* sum to"),
    (SumsToOne(), "task", r"^with one expert per token the task does not train the router"),
    (OneTooFar(), "routing", r"^experts are not in \[0, 4\): 1 to 4$"),
    (LosesItsState(), "values", r"the next state is .*, where the state is .*[^,]$"),
    (
        Overflows(),
        "values",
        r"logits_PBLV of training is not finite; loss_P of training is",
    ),
]


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [pytest.param(*fault, marks=[pytest.mark.slow] * (fault[0] == ByPlace()),
                  id=f"{type(fault[0]).__name__}-{fault[1]}")
     for fault in FAULTS],
)  # fmt: skip
def test_a_fault_is_found_by_the_check_that_is_for_it(part, name, message):
    result = check(name, Trial(part))
    assert result.passed is False
    assert re.search(message, result.text), result.text


def test_a_fault_of_several_checks_is_told_once():
    results = [("a", True, "x"), ("b", False, "x"), ("c", False, "y"), ("d", False, "x")]
    assert list(told_once(results)) == [*results[:3], ("d", False, "as in 'b'")]


def test_a_sound_mixer_passes_what_its_spoiled_copies_fail():
    assert_passes(Mixer())
    result = check("decoding", Trial(Mixer()))
    assert result.passed is None and result.text.startswith("checked: no cache_specs")


@dataclasses.dataclass(frozen=True)
class OfNoFamily(Settings):
    """A class outside all families."""


def test_a_class_of_no_family_is_refused():
    with pytest.raises(ValueError, match=r"OfNoFamily is of ''\. Derive it from"):
        Trial(OfNoFamily())


# The command.


def test_a_part_is_named_by_its_path_or_its_kind_and_flags_set_fields():
    flags = ["--projection.temperature=0.5", "--score=sigmoid", "--renormalize=True"]
    expected = part_of("moe_jax.moe.routing.token_choice:TokenChoice", flags)
    assert part_of("router.token_choice", flags) == expected
    assert (expected.projection.temperature, expected.renormalize) == (0.5, True)
    assert part_of("tests.foreign:RoundRobin", ["--offset=2"]) == RoundRobin(offset=2)
    assert part_of("router.token_choice", ["--selection.kind=sampled"]).selection is not None


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("nothing", [], r"named by 'package\.module:Class' or 'family\.kind': 'nothing'"),
        ("router.nothing", [], r"'router\.nothing'\. Did you mean 'router\.\w+'"),
        ("tests.foreign:Nothing", [], r"a class that can be imported.*has no attribute 'Nothing'"),
        ("part.mlp", ["--dim"], r"A field is set by --field=value: '--dim'"),
        ("part.mlp", ["--dim=0"], r"dim lies in \[1, inf\): dim=0"),
        ("part.mlp", ["--dims=8"], r"Did you mean 'dim'\?"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(name, flags, message):
    with pytest.raises(ValueError, match=message):
        part_of(name, flags)


def test_a_part_is_shown_by_what_is_not_at_its_default():
    router = TokenChoice(projection=Linear(temperature=0.5))
    assert brief(router) == "TokenChoice(projection=Linear(temperature=0.5))"
    assert brief(Mlp()) == "Mlp()"
    assert line("mesh", None, "there is one device") == f"{'-':7}{'mesh':23}there is one device"


def test_the_command_prints_a_line_a_check_and_fails_if_one_does():
    outcome = subprocess.run(
        [sys.executable, "-m", "moe_jax.check_part", "tests.test_check_part:IgnoresParameter"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert outcome.returncode == 1, outcome.stderr
    for name in CHECKS:
        not_for_a_mixer = dict.fromkeys(("routing", "task", "replay", "decoding"), "-")
        word = {"gradients": "FAILED", **not_for_a_mixer}.get(name, "ok")
        assert re.search(rf"^{word} +{name} ", outcome.stdout, re.MULTILINE), outcome.stdout
    assert outcome.stdout.endswith("1 of 14 checks failed: gradients\n")
    assert len(outcome.stdout.splitlines()) < 40
