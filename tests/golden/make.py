"""Losses of the first steps of a fixed run, as comparable text.

    python -m tests.golden.make

writes `tests/golden/*.txt` anew. Do so only when the numbers are meant to change (another
initialisation, another order of the data), and give the reason in the commit.
"""

import pathlib

from moe_jax.data import open_data, train_batches
from moe_jax.training.state import init_state
from moe_jax.training.step import make_train_step
from tests.tiny_run import cut, quick_jit, tiny_training

HERE = pathlib.Path(__file__).parent
NUM_STEPS = 10
# Runs with pinned losses. Noise is off, because ways to run experts may draw it for other rows.
RUNS = {
    "top1": {"num_selected_experts": 1},
    "top2_shared": {
        "num_selected_experts": 2,
        "shared_expert_dim": 32,
        "activation": "swiglu",
        "router": {"renormalize": True},
        "losses": {"load_balance": {"weight": 0.01}, "router_z": {"weight": 0.001}},
        "bias": {"kind": "sign", "rate": 0.01},
    },
}


def losses(run: str, run_experts: str) -> list[float]:
    """Cross-entropy before each of the first steps, nats per target."""
    moe = {"run_experts": run_experts, "capacity": {"train_factor": 1.0}, **RUNS[run]}
    moe["router"] = {**moe.get("router", {}), "noise": ()}
    config = tiny_training(
        {
            "model": {"parts": {"moe": moe}, "dropout_rate": 0.0},
            "optimizer": {"learning_rate": 0.01},
            "training": {"num_microbatches": 2},
        }
    )
    state = quick_jit(init_state, static_argnums=0)(config)
    step = quick_jit(make_train_step(config))
    batches = train_batches(open_data(config.data), global_batch_size=config.training.batch_size)
    values = []
    for _ in range(NUM_STEPS):
        batch = next(batches)
        batch.pop("domain")
        state, says = step(state, cut(batch, config.training.num_microbatches))
        values.append(float(says.loss))
    return values


def lines(values: list[float]) -> str:
    """One line per step: its number and its loss."""
    return "".join(f"{step} {value:.6f}\n" for step, value in enumerate(values, start=1))


if __name__ == "__main__":
    for name in RUNS:
        (HERE / f"{name}.txt").write_text(lines(losses(name, "einsum")))
