"""Trains a model: `python -m moe_jax.train --config=configs/quickstart.py --workdir=DIR`.

The same command again goes on where the run was stopped. Any setting can be overridden:
`--config.model.moe.num_experts=16`. Presets follow a colon: `--config=configs/quickstart.py:smoke`.
"""

import shlex
import sys

import jax
from absl import flags
from ml_collections import config_flags

from moe_jax import command_line
from moe_jax.config import from_config_dict
from moe_jax.training.loop import train
from moe_jax.training.signals import Interrupted


def main() -> None:
    """Checks the config and trains."""
    config = from_config_dict(flags.FLAGS.config.to_dict())
    try:
        train(config, flags.FLAGS.workdir)
    except Interrupted as interruption:
        if jax.process_index() == 0:
            count = jax.process_count()
            again = "run again" if count == 1 else f"run all {count} processes again, this one as"
            print(
                f"\nstopped by {interruption}; its checkpoint is saved. To go on, {again}:\n  "
                + shlex.join(sys.orig_argv),
                flush=True,
            )
        sys.exit(128 + interruption.signal_number)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The experiment: FILE or FILE:PRESET,PRESET.")
    flags.DEFINE_string("workdir", None, "Directory of the run; made if absent.")
    command_line.run(
        main, required=("config", "workdir"), several_processes=True, saves_on_sigterm=True
    )
