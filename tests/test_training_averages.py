"""A run whose optimizer averages parameters is evaluated and loaded with the average."""

import pytest

from moe_jax.data import open_data
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.evaluation import evaluate
from moe_jax.training.loop import train
from moe_jax.training.saved import CHECKPOINTS, load_run, restore
from tests.tiny_run import tiny_training

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "optimizer",
    [{"ema_decay": 0.999}, {"name": "schedule_free", "schedule": "constant"}],
    ids=["ema", "schedule_free"],
)
def test_a_run_is_evaluated_by_its_average(tmp_path, optimizer):
    rate = {"learning_rate": 0.05, **optimizer}
    config = tiny_training({"optimizer": rate, "training": {"num_steps": 4, "sample_prompt": ""}})
    said = train(config, tmp_path)["dropless"]["nats_per_token"]
    loaded_config, loaded = load_run(tmp_path)
    data, mesh = open_data(config.data), make_mesh(loaded_config.mesh)

    def score(state):
        scored = evaluate(state.params, state.model_state, config, data, mesh=mesh, step=state.step)
        return scored["dropless"]["nats_per_token"]

    assert score(loaded) == said
    with Checkpoints(tmp_path / CHECKPOINTS, keep=None) as checkpoints:
        last = restore(loaded_config, checkpoints, mesh)
    assert abs(score(last) - said) > 1e-3, "the parameters of the last step are others"
    assert loaded.opt_state == ()
