"""Continues a text: `python -m moe_jax.generate --workdir=DIR --prompt="The king"`."""

import sys
from typing import TYPE_CHECKING

from absl import flags

from moe_jax import command_line

if TYPE_CHECKING:
    from moe_jax.models.model import LanguageModel


def note_on(model: "LanguageModel") -> str:
    """A line on a model that looks, or has looked, at later tokens; empty for a causal one."""
    from moe_jax.training.ways import SEES, ways_of

    mark = ways_of(model)["dropless"].mark
    loss = ", and a loss with them is not that of a causal language model" * (mark == SEES)
    return f"note: the model {mark}; when it writes a text there are none{loss}.\n" if mark else ""


def main() -> None:
    """Loads a checkpoint and samples."""
    import jax

    from moe_jax.inference import continue_text
    from moe_jax.training.saved import load_run

    config, state = load_run(
        flags.FLAGS.workdir,
        command_line.mesh_of_flag(),
        flags.FLAGS.step,
        trust=flags.FLAGS.trust,
    )
    if jax.process_index() == 0:
        print(note_on(config.model), end="", file=sys.stderr)
    text = continue_text(
        state.params,
        state.model_state,
        config,
        flags.FLAGS.prompt,
        num_tokens=flags.FLAGS.tokens,
        temperature=flags.FLAGS.temperature,
        seed=flags.FLAGS.seed,
        step=state.step,
    )
    if jax.process_index() == 0:
        print(flags.FLAGS.prompt + text)


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    command_line.define_mesh_flag()
    command_line.define_trust_flag()
    command_line.define_step_flag()
    flags.DEFINE_string("prompt", None, "The text to continue.")
    flags.DEFINE_integer("tokens", 200, "How many tokens to add at most.", lower_bound=0)
    flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.", lower_bound=0.0)
    flags.DEFINE_integer(
        "seed", 0, "Equal seeds give equal texts.", lower_bound=0, upper_bound=2**32 - 1
    )


command = command_line.Command(
    main, define_flags, required=("workdir", "prompt"), several_processes=True
)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
