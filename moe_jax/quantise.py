"""Quantises a model: `python -m moe_jax.quantise --workdir=RUN --output=OUT --bits=4`.

The output is a run directory at step 0, which generate, evaluate, convert and analyze accept.
"""

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from moe_jax import command_line

if TYPE_CHECKING:
    from moe_jax.config import ExperimentConfig
    from moe_jax.weights.quantised import Quantisation


def main() -> None:
    """Reads a checkpoint, quantises it, and writes it."""
    from moe_jax.config import ExperimentConfig, read_config, to_dict
    from moe_jax.files import require_absent
    from moe_jax.finetune.made import save_made
    from moe_jax.models.wrapping import quantised_params
    from moe_jax.training.saved import load_run
    from moe_jax.training.workdir import recorded_run
    from moe_jax.weights.quantised import Quantisation

    values = flags.FLAGS
    workdir, output = pathlib.Path(values.workdir), pathlib.Path(values.output)
    how = Quantisation(tuple(values.names), values.bits, values.group_size)
    require_absent(output)
    if record := recorded_run(workdir, values.step)[0]:  # without one, `load_run` refuses it
        quantised_config(read_config(record, ExperimentConfig, trust=values.trust), how)
    config, state = load_run(workdir, step=values.step, trust=values.trust)
    config = quantised_config(config, how)
    step, params, before = int(state.step), state.params, num_bytes(state.params)
    state = state._replace(params=None, opt_state=())
    params = quantised_params(params, config.model.plain_specs(), how)
    state = state._replace(params=params)
    origin = {"made_by": "quantise", "step": step, "quantisation": to_dict(how)}
    save_made(workdir, config, state, output, origin)
    print(
        f"step {step} of {workdir} is in {output}, {', '.join(how.names)} in {how.bits} bits: "
        f"{before / 1e6:,.1f} MB became {num_bytes(params) / 1e6:,.1f} MB"
    )


def quantised_config(config: "ExperimentConfig", how: "Quantisation") -> "ExperimentConfig":
    """The config of a run with its weights quantised.

    Raises:
      ValueError: they are quantised already, or cannot be quantised.
    """
    if config.model.quantisation is not None:
        raise ValueError(
            f"a model can be quantised only once: it is {config.model.quantisation}. Quantise the "
            "run that it was made from."
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, quantisation=how))


def num_bytes(params: Any) -> int:
    """Total bytes of all arrays."""
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run to read.")
    flags.DEFINE_string("output", None, "New directory of the quantised model.")
    flags.DEFINE_list(
        "names", ["experts"],
        "Parameters to quantise, by component or part; all is every matrix except those of the "
        "embedding, the head and routers, which are quantised only if they are named.",
    )  # fmt: skip
    flags.DEFINE_integer("bits", 8, "Bits of a weight: 8, 4, or 16 for bfloat16.")
    flags.DEFINE_integer(
        "group_size", 32, "Weights that share a scale; 0: a whole output channel.", lower_bound=0
    )
    command_line.define_step_flag()
    command_line.define_trust_flag()


command = command_line.Command(main, define_flags, required=("workdir", "output"))

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
