"""Training steps that several processes take together; see test_parallel_processes.py."""

import json

import jax
from jax.experimental import multihost_utils

from moe_jax.data import open_data
from moe_jax.parallel import processes
from moe_jax.parallel.batches import rows_of_process
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.loop import global_batches
from moe_jax.training.placement import compile_train_step, new_state
from tests.tiny_run import CACHE, tiny_config


def two_steps(order):
    """Takes the first training steps on four devices in this order.

    Returns:
      JSON of a list: the rows of a microbatch that this process reads; the whole first batch; the
      loss and gradient norm at each step.
    """
    settings = {
        "model": {"stack": {"repeats": 1}},
        "data": {"heldout_fraction": 0.001, "cache_dir": str(CACHE / "moe_jax")},
        "training": {"batch_size": 16, "num_microbatches": 2},
        "mesh": {"fsdp": 2, "expert": 2},
    }
    config = tiny_config(settings)
    mesh = make_mesh(config.mesh, [jax.devices()[number] for number in order])
    numbers = []
    with jax.set_mesh(mesh):
        batches = global_batches(config, open_data(config.data), mesh, 0)
        first = batch = next(batches)
        step, state = compile_train_step(config, mesh), new_state(config, mesh)
        processes.compile_in_all(step, state, batch)
        for _ in range(2):
            state, metrics = step(state, batch)
            numbers += [float(metrics.loss), float(metrics.grad_norm)]
            batch = next(batches)
        # JAX knows which process holds which part.
        whole = multihost_utils.process_allgather(first, tiled=True)
    arrays = {name: array.tolist() for name, array in whole.items()}
    return json.dumps([rows_of_process(mesh, 8), arrays, numbers])
