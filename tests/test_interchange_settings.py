"""What a config.json says beside the sizes of a model: lengths, bases, and how training goes on."""

import json

import pytest

from moe_jax.interchange.family import Reader
from moe_jax.interchange.rope import read_rotary
from moe_jax.layers.rotary_scaling import LinearScaling

LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("settings", "base", "scaling"),
    [
        ({"rope_theta": 3e5}, 3e5, None),
        ({"rope_scaling": {**LINEAR, "rope_theta": 5e5}}, 5e5, LinearScaling(2.0)),
        ({"rope_scaling": {**LINEAR, "rope_theta": 5e5}, "rope_theta": 3e5}, 5e5, LinearScaling(2)),
        ({"rope_scaling": LINEAR, "rope_theta": 3e5}, 3e5, LinearScaling(2.0)),
        ({"rope_parameters": {"rope_theta": 7e5}, "rope_theta": 3e5}, 7e5, None),
        (  # of both the older one counts, alone
            {"rope_parameters": {"rope_theta": 7e5}, "rope_scaling": LINEAR}, 1e4, LinearScaling(2)
        ),
        ({"rope_parameters": None, "rope_scaling": {}}, 1e4, None),
    ],
)  # fmt: skip
def test_the_base_and_scaling_of_positions_are_those_of_transformers(settings, base, scaling):
    transformers = pytest.importorskip("transformers")
    rotary = read_rotary(Reader(settings), 8)
    assert (rotary.base, rotary.scaling) == (base, scaling)
    theirs = transformers.LlamaConfig(**json.loads(json.dumps(settings))).rope_parameters
    assert theirs["rope_theta"] == base and theirs.get("factor") == (scaling and scaling.factor)
