"""Kinds: every name of every table, user-defined classes, and refusals."""

import dataclasses
import hashlib
import importlib
import inspect
import sys
from typing import Literal, Optional

import pytest

from moe_jax.config import (
    ExperimentConfig,
    build,
    config_dict,
    from_config_dict,
    read_config,
    to_dict,
    write_config,
)
from moe_jax.config.convert import InFamily, difference
from moe_jax.config.kinds import KINDS, is_foreign, kind_of, load_kind, source_hash
from moe_jax.config.settings import Settings
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.models.layer import Layer
from moe_jax.moe.activations import SwiGLU
from moe_jax.moe.balance import RouterZ, named_losses
from moe_jax.moe.bias import ErrorUpdate
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.load_balance import LoadBalance, SwitchLoadBalance
from moe_jax.moe.part import MoE
from moe_jax.moe.queues import ChoiceMajor
from moe_jax.moe.routing import Router
from moe_jax.moe.routing.cosine import Cosine
from moe_jax.moe.routing.logits import Sigmoid
from moe_jax.moe.routing.noise import Gaussian, Jitter, Learned
from moe_jax.moe.routing.selection import ExpertGroups, FirstChoice, RandomChoices, Sampled
from moe_jax.moe.routing.token_choice import TokenChoice

ALL = [(family, kind) for family, table in KINDS.items() for kind in table]


@pytest.mark.parametrize(("family", "kind"), ALL)
def test_every_kind_loads_and_its_defaults_survive_the_round_trip(family, kind):
    cls = load_kind(family, kind)
    assert issubclass(cls, Settings) and cls.family == family and cls.__doc__
    assert kind_of(cls) == kind and not is_foreign(kind)
    part = cls()
    assert kind_of(part) == kind
    assert build(InFamily(family), to_dict(part), "part") == part
    # A config accepts either the name or the import path.
    path = f"{cls.__module__}:{cls.__qualname__}"
    assert build(InFamily(family), kind, "part") == part
    assert load_kind(family, path) is cls and build(InFamily(family), path, "part") == part
    assert hash(part) == hash(cls())


@pytest.mark.parametrize("family", KINDS)
def test_a_table_lists_every_class_of_its_family_that_a_config_can_name(family):
    """A missing class could be named only by its import path."""
    listed = {load_kind(family, kind) for kind in KINDS[family]}
    modules = {inspect.getmodule(cls) for cls in listed}
    for module in modules:
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != module.__name__ or getattr(cls, "family", "") != family:
                continue
            is_base = any(cls is not other and issubclass(other, cls) for other in listed)
            assert cls in listed or is_base, cls


BLOCKS = {
    "every option": MoE(
        num_experts=4,
        num_selected_experts=2,
        activation=SwiGLU(),
        router=TokenChoice(
            projection=Cosine(dim=8, temperature=0.3),
            score=Sigmoid(),
            groups=ExpertGroups(num_groups=2, num_selected=1),
            selection=Sampled(),
            choices=RandomChoices(0.25),
            eval_choices=FirstChoice(),
        ),
        capacity=Capacity(slots=6, queue=ChoiceMajor()),
    ),
    "several parts of one family": MoE(
        num_selected_experts=2,
        router=TokenChoice(noise=(Learned(), Jitter(epsilon=0.1), Gaussian(), Learned())),
        losses=(
            RouterZ(weight=1e-3),
            SwitchLoadBalance(weight=0.1),
            LoadBalance(weight=0.2, scope="sequence"),
            LoadBalance(weight=0.1, scope="global"),
        ),
        bias=ErrorUpdate(rate=0.01, centered=True),
    ),
    "none": MoE(losses=()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_survive_the_round_trip(name):
    moe = BLOCKS[name]
    assert build(InFamily("part"), to_dict(moe), "moe") == moe
    assert build(InFamily("part"), config_dict(moe).to_dict(), "moe") == moe


def test_the_order_in_which_parts_of_a_family_are_given_does_not_matter():
    """A config keys them by name; parameters and metrics index them by position."""
    noise = (Learned(), Gaussian(stddev=0.5), Jitter())
    assert TokenChoice(noise=noise) == TokenChoice(noise=noise[::-1])
    losses = (RouterZ(weight=0.1), LoadBalance(weight=0.2), LoadBalance(weight=0.1))
    assert MoE(losses=losses) == MoE(losses=losses[::-1])


def test_a_part_of_several_is_named_by_its_kind_unless_another_is_given():
    losses = {"router_z": {"weight": 0.1}, "first": {"kind": "load_balance", "weight": 0.2}}
    moe = build(InFamily("part"), {"kind": "moe", "losses": losses}, "moe")
    assert moe.losses == (LoadBalance(weight=0.2), RouterZ(weight=0.1))


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("router", ":Mine", r"named 'package\.module:Class': kind=':Mine'\. Write both halves"),
        ("router", "best", r"a kind of router is one of \['base', .*: kind='best'\. Use a known"),
        ("queue", "TokenMajor", r"a kind of queue is one of \['batch_prioritized', "),
        (
            "router",
            "__main__:Mine",
            r"'__main__' does not allow: kind='__main__:Mine'\. Move the class",
        ),
        (
            "router",
            "no.such:Router",
            r"kind='no\.such:Router' gives ModuleNotFound.*PYTHONPATH",
        ),
        ("router", "moe_jax.moe.routing.soft:Hard", r"gives AttributeError"),
        (
            "router",
            "moe_jax.moe.balance:RouterZ",
            r"a kind of router must be a class .*kind='moe_jax\.",
        ),
        ("router", "moe_jax.moe.routing:top_k", r"a kind of router must be a class derived from"),
        ("score", "moe_jax.moe.capacity:Capacity", r"a kind of score must be a class derived from"),
    ],
)
def test_what_is_no_kind_of_the_family_is_refused_in_one_sentence(family, kind, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_kind(family, kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r"^r must name its kind: kind=None\. Set the kind\.$"),
        ({"kind": 3}, r"^r must name its kind: kind=3\."),
        ("best", r"^r: a kind of router is one of"),
        (7, r"^r must be a section of settings: 7\."),
        (
            {"kind": "uniform", "top_p": 0.5},
            r"^r has the fields .*: r\.top_p\. Remove the field",
        ),
        ({"kind": "token_choice", "renormalise": True}, r"Did you mean 'renormalize'\?$"),
        ({"kind": "token_choice", "top_p": 2.0}, r"^r: top_p lies in \(0, 1\]: top_p=2\.0\."),
        ({"kind": "token_choice", "top_p": "1"}, r"^r\.top_p is of type float: '1' of type str\."),
        ({"kind": "token_choice", "score": "best"}, r"^r\.score: a kind of score is one of"),
        ({"kind": "token_choice", "noise": {"loud": {}}}, r"^r\.noise\.loud: a kind of noise is"),
        (
            {"kind": "token_choice", "noise": {"jitter": {"std": 1}}},
            r"^r\.noise\.jitter has the fields",
        ),
    ],
)
def test_a_message_says_which_setting_is_wrong(value, message):
    with pytest.raises(ValueError, match=message):
        build(Router, value, "r")


FOREIGN = '''
"""A queue of the user's."""
import dataclasses
from moe_jax.config.settings import setting
from moe_jax.moe.queues import TokenMajor

IMPORTED = []

@dataclasses.dataclass(frozen=True)
class Mine(TokenMajor):
    """First come, first served, with a setting that nothing reads."""

    patience: int = setting(3, at_least=0)
'''


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module outside the library; yields its name and its file."""
    path = tmp_path / "kinds_of_mine.py"
    path.write_text(FOREIGN)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield "kinds_of_mine", path
    sys.modules.pop("kinds_of_mine", None)
    load_kind.cache_clear()
    source_hash.cache_clear()


def with_queue(queue):
    config = config_dict(ExperimentConfig())
    moe = config.model.parts.moe
    with config.unlocked(), config.ignore_type():
        moe.capacity.queue = queue
    return config


def test_a_class_of_the_users_is_named_by_its_import_path(foreign):
    module, path = foreign
    kind = f"{module}:Mine"
    assert is_foreign(kind)
    config = from_config_dict(with_queue({"kind": kind, "patience": 5}))
    queue = config.model.part["moe"].capacity.queue
    assert queue == load_kind("queue", kind)(patience=5) and kind_of(queue) == kind
    assert from_config_dict(config_dict(config)) == config
    with pytest.raises(ValueError, match=r"queue: patience lies in \[0, inf\): patience=-1\."):
        from_config_dict(with_queue({"kind": kind, "patience": -1}))
    written = source_hash(kind)
    path.write_text(FOREIGN + "\n")
    source_hash.cache_clear()
    assert source_hash(kind) != written


def test_the_hash_of_a_kind_is_of_the_files_of_its_class_and_of_its_bases(foreign, monkeypatch):
    module, path = foreign
    assert source_hash(f"{module}:Mine") == hashlib.sha256(path.read_bytes()).hexdigest()
    heir = path.with_name("kinds_of_an_heir.py")
    heir.write_text(f"import {module}\n\n\nclass Heir({module}.Mine):\n    pass\n")
    monkeypatch.delitem(sys.modules, "kinds_of_an_heir", raising=False)
    before = source_hash("kinds_of_an_heir:Heir")
    for changed in (heir, path):
        changed.write_text(changed.read_text() + "\n")
        source_hash.cache_clear()
        after = source_hash("kinds_of_an_heir:Heir")
        assert after != before, changed.name
        before = after
    sys.modules.pop("kinds_of_an_heir")


def test_a_written_config_imports_a_foreign_module_with_trust_alone(foreign):
    module, _ = foreign
    kind = f"{module}:Mine"
    config = from_config_dict(with_queue({"kind": kind, "patience": 5}))
    written = write_config(config)
    assert written["sources"] == {kind: source_hash(kind)}
    sys.modules.pop(module)
    load_kind.cache_clear()
    with pytest.raises(ValueError, match=rf"queue is of a kind outside .*'{kind}'\. Pass --trust"):
        read_config(written, ExperimentConfig)
    assert module not in sys.modules, "nothing of it has run"
    read = read_config(written, ExperimentConfig, trust=True)
    assert module in sys.modules and to_dict(read) == to_dict(config)


def test_a_written_config_of_the_library_needs_no_trust():
    written = write_config(ExperimentConfig())
    assert written["sources"] == {}
    assert read_config(written, ExperimentConfig) == ExperimentConfig()


def test_a_config_of_the_layout_before_parts_is_refused():
    with pytest.raises(
        ValueError, match=r"layouts of formats 2 to 5 can be read: this one is of format 1"
    ):
        read_config({"model": {"num_layers": 2}}, ExperimentConfig)


def test_branches_keep_their_order_and_are_not_a_dict():
    layer = Layer(branches=(("self", Attention()), ("mlp", Mlp())))
    assert build(InFamily("part"), config_dict(layer).to_dict(), "block") == layer
    branches = {"self": "attention", "mlp": "mlp"}
    with pytest.raises(ValueError, match=r"block\.branches needs ordered pairs, not a dict"):
        build(InFamily("part"), {"kind": "layer", "branches": branches}, "block")


@pytest.mark.parametrize("value", [MoE(), Capacity()])
def test_a_part_of_another_family_is_refused(value):
    with pytest.raises(ValueError, match=r"config\.model must be a model"):
        from_config_dict({"model": value})


def test_what_cannot_be_none_is_refused():
    with pytest.raises(ValueError, match=r"config\.model\.parts"):
        from_config_dict({"model": {"kind": "language_model", "parts": None}})


@dataclasses.dataclass(frozen=True)
class Typed(Settings):
    """Settings with types that the library itself does not use."""

    size: Optional[int] = None  # noqa: UP045 (the old spelling is what is tested)
    width: int | str = 1
    mode: Literal["a", "b"] = "a"


def test_settings_of_a_users_part_may_be_unions_and_literals():
    read = build(Typed, {"size": 3, "width": "wide", "mode": "b"}, "mine")
    assert read == Typed(3, "wide", "b")
    assert build(Typed, {"size": None}, "mine") == Typed()
    with pytest.raises(ValueError, match=r"mine\.mode is one of \['a', 'b'\]: 'c'"):
        build(Typed, {"mode": "c"}, "mine")
    with pytest.raises(ValueError, match=r"mine\.size is of type int"):
        build(Typed, {"size": "x"}, "mine")


def test_trust_may_be_in_some_kinds_alone(foreign):
    module, _ = foreign
    kind = f"{module}:Mine"
    written = write_config(from_config_dict(with_queue({"kind": kind, "patience": 5})))
    sys.modules.pop(module)
    load_kind.cache_clear()
    with pytest.raises(ValueError, match=r"kind outside this library"):
        read_config(written, ExperimentConfig, trust=frozenset({"another:Kind"}))
    assert module not in sys.modules
    assert read_config(written, ExperimentConfig, trust=frozenset({kind}))


def test_losses_of_one_kind_are_ordered_by_what_they_measure():
    for weights in ((0.01, 0.1), (0.2, 0.1)):
        losses = (LoadBalance(weights[0], "sequence"), LoadBalance(weights[1], "global"))
        named = dict(named_losses(MoE(losses=losses).losses))
        assert named["load_balance_loss"].scope == "global"
        assert named["load_balance__2_loss"].scope == "sequence"


def test_differences_of_branches_are_named_and_their_order_is_one():
    attention, mlp = ("attention", {"dim": 1}), ("mlp", {"dim": 2})
    wider = ("mlp", {"dim": 3})
    old = {"branches": (attention, mlp)}
    assert difference(old, {"branches": (attention, wider)}, "layer") == [
        "layer.branches.mlp.dim: 2 -> 3"
    ]
    assert difference(old, {"branches": (attention, mlp)}, "layer") == []
    assert len(difference(old, {"branches": (mlp, attention)}, "layer")) == 1
    assert len(difference({"unit": (("a", "b"),)}, {"unit": (("a", "c"),)}, "stack")) == 1
