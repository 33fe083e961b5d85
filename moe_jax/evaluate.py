"""Scores a trained model on the held-out text: `python -m moe_jax.evaluate --workdir=DIR`.

Prints nats a token and bits a byte, overall and by domain, dropless and capacity-limited side by
side, and writes them to `DIR/evaluation.json`.
"""

import json
import pathlib
import sys
from typing import Any

from absl import flags

from moe_jax import command_line


def table(said: dict[str, Any]) -> str:
    """An evaluation as a table of text: a row a domain, bits/byte and nats/token by kind."""
    kinds = [kind for kind in ("dropless", "capacity_limited") if kind in said]
    names = [
        f"{kind.replace('_', ' ')} {unit}" for kind in kinds for unit in ("bits/B", "nats/tok")
    ]
    rows = [("all", [said[kind] for kind in kinds])]
    rows += [
        (domain, [said[kind]["domains"][domain] for kind in kinds])
        for domain in said[kinds[0]]["domains"]
    ]
    lines = [" ".join([f"{'domain':<16}", *(f"{name:>27}" for name in names)])]
    for domain, losses in rows:
        values = [loss[key] for loss in losses for key in ("bits_per_byte", "nats_per_token")]
        lines.append(" ".join([f"{domain:<16}", *(f"{value:>27.4f}" for value in values)]))
    return "\n".join(lines)


def main() -> None:
    """Loads the newest checkpoint and evaluates it."""
    import jax

    from moe_jax.parallel.mesh import make_mesh
    from moe_jax.training.evaluation import evaluate
    from moe_jax.training.metrics import write_atomically
    from moe_jax.training.saved import load_run, open_run_data

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
        write_atomically(workdir / "evaluation.json", json.dumps(said, indent=2) + "\n")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    command_line.define_mesh_flag()
    command_line.define_trust_flag()
    flags.DEFINE_integer("batches", 0, "Held-out batches to use; 0: all.", lower_bound=0)


command = command_line.Command(main, define_flags, required=("workdir",), several_processes=True)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
