"""Every file in configs/, with every preset: it builds and initialises; smoke presets train."""

import importlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import config_dict, from_config_dict
from moe_jax.config.file import load_config, override
from moe_jax.data import open_data, train_batches
from moe_jax.planning.report import Plan
from moe_jax.planning.topology import parse_topology
from moe_jax.planning.workload import resolve
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step
from tests.slow import slow_but
from tests.tiny_run import CACHE, ROOT, cut, quick_jit

FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
MAX_SMOKE_STEPS = 20


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config


def presets(name):
    """The presets of a config file, as listed in the error for an unknown preset."""
    with pytest.raises(ValueError, match="The presets of this config are") as error:
        get_config(name)("no_such_preset")
    return re.findall(r"'(\w+)'", str(error.value).split("got")[0])


CASES = [(name, preset) for name in FILES for preset in ("", *presets(name))]
SMOKE = [
    (name, "smoke" if preset in ("", "smoke") else f"{preset},smoke")
    for name, preset in CASES
    if preset != "smoke"
]
TINY = [(name, preset) for name, preset in CASES if preset.endswith("tiny")]
# `test_published_counts` covers the full sizes of published models.
SMALL = [(name, preset) for name, preset in CASES if (name, "tiny") not in TINY] + TINY


def test_there_are_configs_and_each_has_a_smoke_preset():
    assert {"base", "quickstart"} <= set(FILES)
    assert all("smoke" in presets(name) for name in FILES)


@pytest.mark.parametrize(("name", "preset"), slow_but(SMALL, CASES))
def test_every_preset_builds_and_initialises(name, preset):
    config = from_config_dict(get_config(name)(preset))
    state = jax.eval_shape(lambda: init_state(config))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert (
        "\n    python -m moe_jax.train --config=configs/" in sys.modules[f"configs.{name}"].__doc__
    )


PLAN = r"moe_jax\.plan --config=configs/\w+\.py(?::(\S+))? --topology=(\S+)$"
PLANNED = [
    (name, preset, topology)
    for name in FILES
    for preset, topology in re.findall(
        PLAN, (ROOT / "configs" / f"{name}.py").read_text(), re.MULTILINE
    )
]


@pytest.mark.parametrize(("name", "preset", "topology"), PLANNED)
def test_a_step_fits_the_machine_that_the_file_names(name, preset, topology):
    """The plan estimates memory by arithmetic."""
    machine = parse_topology(topology)
    config = from_config_dict(get_config(name)(preset))
    work = resolve(config, machine.num_devices, machine.chip.platform)
    assert Plan(work, machine).fits


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_every_field_is_there_and_an_unknown_one_refused(name, preset):
    config = get_config(name)(preset)
    assert config.to_dict() == config_dict(from_config_dict(config)).to_dict()
    for section in (config.model, *config.model.parts.values()):
        with pytest.raises((AttributeError, KeyError), match="num_layerz"):
            section.num_layerz = 3


# `test_readme` trains quickstart:smoke.
QUICK = [("quickstart", "dense,smoke"), ("mixtral", "tiny,smoke")]


@pytest.mark.parametrize(("name", "preset"), slow_but(QUICK, SMOKE))
def test_smoke_is_small_and_trains(name, preset):
    config = config_of(name, preset)
    assert config.training.num_steps <= MAX_SMOKE_STEPS
    losses, (before, after) = train(config, 2)
    np.testing.assert_allclose(losses, np.log(config.model.vocab_size), atol=2)
    moved = jax.tree.map(lambda old, new: np.any(old != new), before, after)
    assert any(jax.tree.leaves(moved)), "the steps changed no parameter"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preset"), TINY)
def test_tiny_learns(name, preset):
    config = config_of(name, preset)
    losses, _ = train(config, min(config.training.num_steps, 150))
    assert losses[0] > 5 and np.mean(losses[-10:]) < 3.1, "bytes by their frequency have 3.3 nats"


def config_of(name, preset):
    """The config of a file, with its corpus in the cache of the tests."""
    settings = get_config(name)(preset)
    settings.data.cache_dir = str(CACHE / "moe_jax")
    config = from_config_dict(settings)
    assert config.data.corpus == "embedded"
    return config


def train(config, num_steps):
    """Losses of the first steps, and the parameters before and after them."""
    state = first = quick_jit(init_state, static_argnums=0)(config)
    step = quick_jit(make_train_step(config))
    batches = train_batches(open_data(config.data), global_batch_size=config.training.batch_size)
    losses = []
    for expected_step in range(1, num_steps + 1):
        batch = next(batches)
        batch.pop("domain")
        state, says = step(state, cut(batch, config.training.num_microbatches))
        assert int(state.step) == expected_step
        assert np.isfinite(says.total_loss) and says.grad_norm > 0
        losses.append(float(says.loss))
    return losses, (first.params, state.params)


def test_presets_may_be_joined():
    config = get_config("quickstart")("dense,smoke")
    assert config.name == "quickstart_dense_smoke"
    assert "moe" not in config.model.parts and config.training.num_steps <= MAX_SMOKE_STEPS


def test_settings_can_be_overridden_by_flags():
    loaded = load_config(f"{ROOT}/configs/quickstart.py:smoke")
    for flag, text in {
        "model.parts.moe.num_experts": "16",
        "model.parts.moe.losses.load_balance.weight": "0.5",
        "optimizer.learning_rate": "0.5",
        "model.stack.repeats": "3",
        "data.domain_weights": "(('prose', 1.0),)",
        "training.sample_prompt": "It was",
    }.items():
        override(loaded, f"config.{flag}", text)
    config = from_config_dict(loaded)
    moe = config.model.part["moe"]
    assert moe.num_experts == 16
    assert [loss.weight for loss in moe.losses] == [0.5, 0.0]
    assert config.optimizer.learning_rate == 0.5
    assert config.model.moe_layers == {"moe": (0, 1, 2)}
    assert config.data.domain_weights == (("prose", 1.0),)
    assert config.training.sample_prompt == "It was"
    assert config.training.num_steps <= MAX_SMOKE_STEPS


def test_a_config_file_imports_nothing_that_trains():
    """Reading settings is quick: config files import only settings, parts and each other."""
    for name in FILES:
        source = (ROOT / "configs" / f"{name}.py").read_text()
        imported = set(re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE))
        allowed = {"collections.abc", "itertools", "ml_collections", "moe_jax.config"}
        of = ("moe_jax.moe.", "moe_jax.layers.", "moe_jax.models.", "moe_jax.data.objectives.")
        parts = ("configs.", *of)
        assert {name for name in imported if not name.startswith(parts)} <= allowed, name
