"""Scores a trained model on the held-out text: `python -m moe_jax.evaluate --workdir=DIR`.

Prints nats a token and bits a byte, overall and by domain, dropless and capacity-limited side by
side, and writes them to `DIR/evaluation.json`. Losses of a model that sees later tokens are marked.
"""

import pathlib
from typing import Any

import jax
from absl import flags

from moe_jax import command_line
from moe_jax.analysis.names import printable
from moe_jax.config.json_text import json_text
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.evaluation import evaluate
from moe_jax.training.metrics import write_atomically
from moe_jax.training.saved import load_run, open_run_data
from moe_jax.training.ways import CAPACITIES, notes_of, way_of

UNITS = {"bits/B": "bits_per_byte", "nats/tok": "nats_per_token"}


def table(said: dict[str, Any]) -> str:
    """An evaluation as a table of text: a row a domain, bits/byte and nats/token by kind."""
    kinds = [kind for kind in CAPACITIES if kind in said]
    rows = [("all", [said[kind] for kind in kinds])]
    rows += [
        (printable(domain), [said[kind]["domains"][domain] for kind in kinds])
        for domain in said[kinds[0]]["domains"]
    ]
    width = max(16, *(len(name) for name, _ in rows))
    ways = [way_of(kind, said[kind]) for kind in kinds]
    names = [f"{way.label} {unit}" for way in ways for unit in UNITS]
    lines = [" ".join([f"{'domain':<{width}}", *(f"{name:>27}" for name in names)])]
    if any(way.mark for way in ways):
        marks = [f"{way.mark:>27}" for way in ways for _ in UNITS]
        lines.append(" ".join([" " * width, *marks]))
    for domain, losses in rows:
        values = [loss[key] for loss in losses for key in UNITS.values()]
        lines.append(" ".join([f"{domain:<{width}}", *(f"{value:>27.4f}" for value in values)]))
    return "\n".join([*lines, *notes_of(way.mark for way in ways)])


def main() -> None:
    """Loads the newest checkpoint and evaluates it."""
    workdir = pathlib.Path(flags.FLAGS.workdir)
    config, state = load_run(workdir, command_line.mesh_of_flag(), trust=flags.FLAGS.trust)
    said = evaluate(
        state.params,
        state.model_state,
        config,
        open_run_data(workdir, config),
        mesh=make_mesh(config.mesh),
        max_batches=flags.FLAGS.batches or None,
        step=state.step,
    )
    said = {"step": int(state.step), **said}
    if jax.process_index() != 0:
        return
    print(f"step {said['step']}")
    print(table(said))
    if not flags.FLAGS.batches:
        write_atomically(workdir / "evaluation.json", json_text(said, indent=2) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    command_line.define_mesh_flag()
    command_line.define_trust_flag()
    flags.DEFINE_integer("batches", 0, "Held-out batches to use; 0: all.", lower_bound=0)
    command_line.run(main, required=("workdir",), several_processes=True)
