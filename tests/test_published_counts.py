"""Configs of published models: exact parameter counts, equal to their config.json, planned."""

import importlib
import re
import sys

import jax
import pytest

from moe_jax.config import difference, from_config_dict, to_dict
from moe_jax.interchange.family import OF_TRAINING, load_family
from moe_jax.plan import Options, run
from moe_jax.planning.parameters import count_parameters
from moe_jax.training.state import init_state
from tests.published_models import MODELS

NAMES = sorted(MODELS)


def module(name):
    """The module of a config."""
    return f"configs.{name.partition(':')[0]}"


def config_of(name):
    """The config of a file with its preset."""
    settings = importlib.import_module(module(name)).get_config(name.partition(":")[2])
    return from_config_dict(settings)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_published(name):
    """Total and active parameters; the total is that of the arrays that training makes."""
    config, published = config_of(name), MODELS[name]
    state = jax.eval_shape(lambda: init_state(config))
    assert published.total == sum(
        leaf.size for leaf in jax.tree.leaves((state.params, state.model_state))
    )
    count = count_parameters(config.model, 128)
    assert tuple(active for _, active in count.by_convention().values()) == published.active


@pytest.mark.parametrize("name", [name for name in NAMES if MODELS[name].settings])
def test_the_config_is_the_model_of_the_published_settings(name):
    """Except training settings. The model can also be written as its family."""
    model, settings = config_of(name).model, MODELS[name].settings
    family = load_family(settings["model_type"])
    ours, theirs = (to_dict(one, only_results=True) for one in (model, family.read(settings)))
    lines = difference(ours, theirs, "model")
    assert not [line for line in lines if not set(line.split(":")[0].split(".")) & set(OF_TRAINING)]
    assert family.written(model)["model_type"] == settings["model_type"]


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_planned_for_the_machine_that_its_file_names(name, capsys):
    config = config_of(name)
    machine = re.search(r"moe_jax.plan .*--topology=(\S+)", sys.modules[module(name)].__doc__)[1]
    assert run(config, Options(topology=machine, compile=False)) == 0
    assert f"{MODELS[name].active[0]:,}" in capsys.readouterr().out
