"""Saves checkpoints in a loop until it is killed; run by test_training_checkpoints.py.

Every array of a state contains the step number, so a mixture of two states would show.
"""

import sys

import jax
import jax.numpy as jnp

from moe_jax.training.checkpoints import Checkpoints


def main(directory: str) -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = {"step": jnp.int32(0), "w": jnp.zeros((64, 1024)), "v": jnp.zeros((1024,))}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    checkpoints = Checkpoints(directory, keep=2)
    step = checkpoints.newest_whole() or 0
    if step:
        state = checkpoints.restore(step, abstract)
    while True:
        step += 1
        state = jax.tree.map(lambda x: x + 1, state)
        checkpoints.save(step, state)
        if step % 3 == 0:
            checkpoints.wait()
            print("saved", step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
