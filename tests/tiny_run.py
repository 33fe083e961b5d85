"""Runs, models and batches small enough to test with."""

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ExperimentConfig, from_config_dict
from moe_jax.training.state import TrainState, init_state

SETTINGS: dict[str, Any] = {
    "model": {
        "num_layers": 2,
        "model_dim": 16,
        "num_heads": 2,
        "head_dim": 8,
        "ffn_dim": 32,
        "scan_layers": False,
        "moe": {"num_experts": 4, "num_selected_experts": 2, "expert_dim": 32},
    },
    "data": {"sequence_length": 16},
    "optimizer": {"warmup_steps": 0},
    "training": {"num_steps": 100, "batch_size": 4},
}

# Tests mostly wait for the compiler: this halves it, and the programs run but a moment.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tiny_config(settings: dict[str, Any] | None = None) -> ExperimentConfig:
    """A run of two MoE layers of four experts, top 2, with these (nested) settings changed."""
    return from_config_dict(_merge(copy.deepcopy(SETTINGS), settings or {}))


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    for name, value in new.items():
        old[name] = _merge(old.get(name, {}), value) if isinstance(value, dict) else value
    return old


def tiny_state(config: ExperimentConfig, seed: int = 0) -> TrainState:
    """The state before the first step, with parameters drawn by NumPy: nothing is compiled.

    Routers are far from uniform, so that experts are overloaded and choices are dropped.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = [getattr(entry, "name", getattr(entry, "key", None)) for entry in path]
        if names[0] == "key_data":
            return jnp.asarray([1, 2], leaf.dtype)
        if names[0] != "params":
            return jnp.zeros(leaf.shape, leaf.dtype)
        stddev = 0.5 if names[-1] == "router" else leaf.shape[-1] ** -0.5
        offset = 1.0 if names[-1] == "scale" else 0.0
        return jnp.asarray(offset + stddev * rng.normal(size=leaf.shape), leaf.dtype)

    abstract = jax.eval_shape(functools.partial(init_state, config))
    return jax.tree_util.tree_map_with_path(draw, abstract)


def tiny_batch(batch_size: int = 4, length: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    """Random tokens with rows of different lengths, one empty, two documents in the first row.

    Loss weights are uneven, and 0 on some valid tokens.
    """
    rng = np.random.default_rng(seed)
    lengths = [length, length - 3, 0, length // 3]
    rows = np.array([lengths[row % 4] for row in range(batch_size)])
    valid = np.arange(length) < rows[:, None]
    segments = valid.astype(np.int32)
    positions = np.tile(np.arange(length), (batch_size, 1))
    segments[0, length // 2 :] += valid[0, length // 2 :]
    positions[0, length // 2 :] -= length // 2
    weights = rng.choice([0.0, 0.25, 1.0], (batch_size, length)) * valid
    return {
        "inputs": jnp.asarray(rng.integers(3, 259, (batch_size, length)) * valid, jnp.int32),
        "targets": jnp.asarray(rng.integers(3, 259, (batch_size, length)) * valid, jnp.int32),
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.asarray(positions * valid, jnp.int32),
        "loss_weights": jnp.asarray(weights, jnp.float32),
    }
