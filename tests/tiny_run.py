"""Runs, models and batches that are small enough for tests."""

import copy
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ExperimentConfig, from_config_dict
from moe_jax.training.files import METRICS_FILE
from moe_jax.training.metrics import read_metrics
from moe_jax.training.saved import load_run
from moe_jax.training.state import TrainState, init_state

ROOT = pathlib.Path(__file__).parent.parent
CACHE = ROOT / ".cache"  # compiled programs and token files, kept between runs of the tests
SETTINGS: dict[str, Any] = {
    "model": {
        "kind": "language_model",
        "model_dim": 16,
        "parts": {
            "attention": {"kind": "attention", "num_heads": 2, "head_dim": 8},
            # einsum compiles in a third of the time of ragged; tests show that both agree.
            "moe": {
                "kind": "moe", "num_experts": 4, "num_selected_experts": 2, "expert_dim": 32,
                "run_experts": "einsum",
            },
        },
        "stack": {"unit": [["attention", "moe"]], "repeats": 2},
        "scan_layers": False,
    },
    "data": {"sequence_length": 16},
    "optimizer": {"warmup_steps": 0},
    "training": {"num_steps": 100, "batch_size": 4},
    "mesh": {"data": 1},
}  # fmt: skip
JITTER = {"epsilon": 0.1}
MLP = {"kind": "mlp", "dim": 32}
# The model with dense layers in place of the MoE layers.
DENSE: dict[str, Any] = {
    "model": {"parts": {"moe": None, "mlp": MLP}, "stack": {"unit": [["attention", "mlp"]]}}
}

# Tests mostly wait for the compiler: this halves the wait. The programs run only for a moment.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tiny_config(settings: dict[str, Any] | None = None) -> ExperimentConfig:
    """A run of two MoE layers with four experts, top 2, with these (nested) settings changed.

    A part of another kind replaces the existing one; None removes a part.
    """
    merged = _merge(copy.deepcopy(SETTINGS), copy.deepcopy(settings or {}))
    parts = merged["model"]["parts"]
    merged["model"]["parts"] = {name: part for name, part in parts.items() if part is not None}
    return from_config_dict(merged)


def tiny_moe(**settings: Any) -> dict[str, Any]:
    """Settings for `tiny_config` that change its MoE block."""
    return {"model": {"parts": {"moe": settings}}}


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    for name, value in new.items():
        before = old.get(name, {})
        if (
            isinstance(value, dict)
            and isinstance(before, dict)
            and (value.get("kind", before.get("kind")) == before.get("kind"))
        ):
            value = _merge(before, value)
        old[name] = value
    return old


def tiny_state(config: ExperimentConfig, seed: int = 0) -> TrainState:
    """The state before the first step. NumPy draws the parameters, so nothing is compiled.

    Routers are far from uniform, so that experts are overloaded and choices are dropped.
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        names = [getattr(entry, "name", getattr(entry, "key", None)) for entry in path]
        if names[0] == "key_data":
            return jnp.asarray([1, 2], leaf.dtype)
        if names[0] != "params":
            return jnp.zeros(leaf.shape, leaf.dtype)
        is_router = names[-2:] == ["router", "weight"]
        stddev = 0.5 if is_router else leaf.shape[-1] ** -0.5
        offset = 1.0 if names[-1] == "scale" else 0.0
        return jnp.asarray(offset + stddev * rng.normal(size=leaf.shape), leaf.dtype)

    abstract = jax.eval_shape(functools.partial(init_state, config))
    return jax.tree_util.tree_map_with_path(draw, abstract)


def tiny_batch(batch_size: int = 4, length: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    """Random tokens in rows of different lengths: one is empty, the first has two documents.

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


def cut(batch: dict[str, Any], num_parts: int = 1) -> dict[str, jax.Array]:
    """Cuts a batch into microbatches of consecutive sequences, as the training step expects it."""
    return {name: value.reshape(num_parts, -1, *value.shape[1:]) for name, value in batch.items()}


def tiny_training(settings: dict[str, Any] | None = None) -> ExperimentConfig:
    """A whole run of a second on the embedded corpus, which uses every part of the state."""
    return tiny_config(
        _merge(
            {
                "model": {
                    "dropout_rate": 0.1,
                    "parts": {
                        "moe": {
                            "bias": {"kind": "sign", "rate": 0.01},
                            "router": {"kind": "token_choice", "noise": {"jitter": JITTER}},
                        }
                    },
                },
                "data": {"heldout_fraction": 0.001, "cache_dir": str(CACHE / "moe_jax")},
                "optimizer": {"warmup_steps": 2},
                "training": {
                    "num_steps": 12,
                    "log_every": 1,
                    "evaluate_every": 4,
                    "evaluation_batches": 2,
                    "checkpoint_every": 3,
                    "sample_tokens": 4,
                },
            },
            settings or {},
        )
    )


def tiny_flags(**training: int) -> list[str]:
    """Flags of a command for a run of a few seconds, with these training settings."""
    settings = [
        "model.stack.repeats=2", "model.model_dim=16", "model.dropout_rate=0.1",
        "model.parts.attention.num_heads=2", "model.parts.attention.head_dim=8",
        "model.parts.moe.num_experts=4", "model.parts.moe.num_selected_experts=2",
        "model.parts.moe.expert_dim=32", "model.parts.moe.bias=sign",
        "model.parts.moe.run_experts=einsum",
        "data.sequence_length=16", "data.heldout_fraction=0.001",
        f"data.cache_dir={CACHE / 'moe_jax'}",
        "training.log_every=1", "training.evaluation_batches=1",
        *(f"training.{name}={value}" for name, value in training.items()),
    ]  # fmt: skip
    return ["--config=configs/quickstart.py:smoke", *(f"--config.{s}" for s in settings)]


def files(directory: pathlib.Path) -> dict[str, bytes]:
    """Every file under a directory, to show whether anything changed."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_same_run(directory: pathlib.Path, expected: pathlib.Path) -> None:
    """Checks that two runs ended bit-equal: state, metrics except speed, evaluation, any sample."""
    states = [load_run(run, moments=True)[1] for run in (directory, expected)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for (path, a), b in zip(
        jax.tree.leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(a, b, strict=True, err_msg=name)
    rows = [
        [
            {name: value for name, value in row.items() if not name.startswith("perf/")}
            for row in read_metrics(run / METRICS_FILE)
        ]
        for run in (directory, expected)
    ]
    assert rows[0] == rows[1]
    names = ["evaluation.json"]
    names += ["sample.txt"] if (expected / "sample.txt").exists() else []
    for name in names:
        assert (directory / name).read_bytes() == (expected / name).read_bytes(), name
