"""Merges adapters into weights: `python -m moe_jax.merge_adapters --workdir=RUN --output=OUT`.

The output is the directory of a run without adapters, in float32, at the step of its source.
Quantised weights under an adapter are dequantised and merged. `docs/finetuning.md` describes
adapters; `convert --to-peft` writes only the adapters.
"""

import pathlib
import sys

from absl import flags

from moe_jax import command_line


def main() -> None:
    """Reads a checkpoint and writes the merged model."""
    from moe_jax.config import ExperimentConfig, read_config
    from moe_jax.files import require_absent
    from moe_jax.finetune.made import save_made
    from moe_jax.finetune.remodel import dense_model
    from moe_jax.models.wrapping import describe_dense
    from moe_jax.training.saved import load_run
    from moe_jax.training.workdir import recorded_run

    values = flags.FLAGS
    workdir, output = pathlib.Path(values.workdir), pathlib.Path(values.output)
    require_absent(output)
    record, _ = recorded_run(workdir, values.step)
    if record and read_config(record, ExperimentConfig, trust=values.trust).model.adapters is None:
        raise ValueError(
            f"only a run with adapters can be merged: {workdir} has none. Train one with "
            "model.adapters."
        )
    config, state = load_run(workdir, step=values.step, trust=values.trust)
    step = int(state.step)
    print(describe_dense(config.model), end="")
    merged, params = dense_model(config, state.params)
    state = state._replace(params=params, opt_state=())
    save_made(workdir, merged, state, output, {"made_by": "merge_adapters", "step": step})
    print(f"step {step} of {workdir} is in {output}, without adapters")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run with adapters.")
    flags.DEFINE_string("output", None, "New directory of the merged model.")
    command_line.define_step_flag()
    command_line.define_trust_flag()


command = command_line.Command(main, define_flags, required=("workdir", "output"))

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
