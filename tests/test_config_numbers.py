"""Every number in a config has a range, and values outside are refused."""

import dataclasses
import math
import types
import typing

import pytest

from moe_jax.config import DataConfig, ExperimentConfig, MeshConfig, OptimizerConfig, TrainingConfig
from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.config.settings import Bounds, Settings

# Pairs of a name and a number, which `check` validates.
PAIRS = {("DataConfig", "domain_weights"), ("OptimizerConfig", "learning_rates")}


def inside(hint):
    """A type and all types inside it."""
    yield hint
    for item in typing.get_args(hint):
        yield from inside(item)


def numbers():
    """All numeric fields of a config and of every kind: class, field, number type, container."""
    waiting = [ExperimentConfig, *(load_kind(f, kind) for f in KINDS for kind in KINDS[f])]
    seen = set()
    while waiting:
        cls = waiting.pop()
        if cls in seen:
            continue
        seen.add(cls)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            found = list(inside(hints[field.name]))
            waiting += [t for t in found if isinstance(t, type) and issubclass(t, Settings)]
            of = {int, float} & {t for t in found if isinstance(t, type)}
            if of and (cls.__name__, field.name) not in PAIRS:
                yield cls, field, of.pop(), typing.get_origin(hints[field.name])


ALL = sorted(numbers(), key=lambda case: (case[0].__qualname__, case[1].name))


def test_the_settings_of_all_sections_and_kinds_are_found():
    names = {f"{cls.__name__}.{field.name}" for cls, field, _, _ in ALL}
    assert len(ALL) > 100
    assert names >= {
        "ExperimentConfig.seed", "MeshConfig.data", "TrainingConfig.profile_steps",
        "OptimizerConfig.b2", "Hash.table", "Capacity.slots", "LanguageModel.embedding_multiplier",
        "Linear.anneal_from", "ExpertGroups.num_groups",
    }  # fmt: skip


FIX = r"(The default is|Use a value within|Name one of them)"


def outside(bounds, kind):
    """Values just outside either end of the range, and values that are never valid."""
    step = 1 if kind is int else 1e-6
    if bounds.at_least is not None:
        yield bounds.at_least - step
    if bounds.above is not None:
        yield bounds.above
    if bounds.at_most is not None:
        yield bounds.at_most + step
    if bounds.below is not None:
        yield bounds.below
    if kind is int and bounds.at_most is None and bounds.below is None:
        yield 2**31
    yield from (math.nan, math.inf, -math.inf, 1e39, True, "1")


@pytest.mark.parametrize(
    "cls, name, word",
    [(DataConfig, "domain_weights", "prose"), (OptimizerConfig, "learning_rates", "router")],
)
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e39, True, "1"])
def test_numbers_of_pairs_are_positive_and_finite(cls, name, word, value):
    with pytest.raises(ValueError, match=rf"\.{name} must be positive and finite: "):
        cls(**{name: ((word, value),)})


@pytest.mark.parametrize(
    ("cls", "field", "kind", "origin"),
    [pytest.param(*case, id=f"{case[0].__name__}.{case[1].name}") for case in ALL],
)
def test_a_number_has_a_range_and_what_lies_outside_is_refused(cls, field, kind, origin):
    bounds = field.metadata.get("bounds")
    assert isinstance(bounds, Bounds)
    if bounds.choices is None:
        assert bounds.at_least is not None or bounds.above is not None, "it has a lower end"
    assert origin in (None, tuple, types.UnionType, typing.Union)
    for value in outside(bounds, kind):
        given = (value, value) if origin is tuple else value
        with pytest.raises(ValueError, match=rf"^{field.name} (lies in|is one of) .*\. {FIX}"):
            cls(**{field.name: given})


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (TrainingConfig, {"evaluation_batches": -1}),
        (TrainingConfig, {"sample_tokens": -1}),
        (OptimizerConfig, {"b1": 1.5}),
        (OptimizerConfig, {"b2": 1.0}),
        (OptimizerConfig, {"final_fraction": 10.0}),
        (ExperimentConfig, {"seed": 2**32}),
        (MeshConfig, {"data": -2}),
        (MeshConfig, {"fsdp": 0}),
    ],
)
def test_what_trained_without_a_word_is_refused(cls, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        cls(**settings)


def test_a_float_is_in_range_on_the_device_too():
    """1 - 1e-9 is 1 in float32, so moments would never be corrected; 1e-50 is 0."""
    with pytest.raises(ValueError, match=r"b2 lies in \[0, 1\): b2=0.999999999, in float32 1\."):
        OptimizerConfig(b2=1 - 1e-9)
    with pytest.raises(ValueError, match=r"epsilon lies in \(0, inf\): .*, in float32 0\."):
        OptimizerConfig(epsilon=1e-50)
    with pytest.raises(ValueError, match=r"num_steps=4294967296, beyond int32\."):
        TrainingConfig(num_steps=2**32)
    with pytest.raises(ValueError, match=r"b2=nan\. The default is 0\.95\.$"):
        OptimizerConfig(b2=math.nan)
    assert OptimizerConfig(b2=0.999999).b2 == 0.999999
