"""Trains a model: `python -m moe_jax.train --config=configs/quickstart.py --workdir=DIR`.

Run the same command again to resume a stopped run. Any setting can be overridden:
`--config.model.parts.moe.num_experts=16`. Presets follow a colon:
`--config=configs/quickstart.py:smoke`.
"""

import contextlib
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from moe_jax import command_line
from moe_jax.config import ExperimentConfig, from_config_dict
from moe_jax.user_errors import in_one_line


def run(config: ExperimentConfig, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Trains, then writes a sample and the report.

    Args:
      config: the run's config.
      workdir: its directory; adds `sample.txt` and `report/` to the files of `training.loop.train`.

    Returns:
      The last evaluation.
    """
    import jax

    from moe_jax.analysis.report import write_report
    from moe_jax.files import write_atomically
    from moe_jax.planning.arithmetic import summary
    from moe_jax.training.files import SAMPLE_FILE
    from moe_jax.training.loop import train

    workdir = pathlib.Path(workdir)
    if jax.process_index() == 0:
        print(summary(config.model, config.lengths), flush=True)
    evaluation = train(config, workdir, facts_of(config))
    if config.training.sample_prompt:
        text = ""
        with failure_is_a_warning("sample", together=True):
            text = sample(config, workdir)
        if text and jax.process_index() == 0:
            with failure_is_a_warning("sample"):
                write_atomically(workdir / SAMPLE_FILE, text + "\n")
                print(f"\nsample:\n{text}\n")
    if jax.process_index() == 0:
        with failure_is_a_warning("report"):
            print(f"report: {write_report(workdir)}", flush=True)
    return evaluation


@contextlib.contextmanager
def failure_is_a_warning(what: str, *, together: bool = False) -> Iterator[None]:
    """Turns an error in a block into a warning: the run is already trained and saved.

    With `together`, the block has collectives. If only one process left it, the others would hang,
    so the error is raised again. A `ValueError` is a refusal, which all processes raise.
    """
    import jax

    try:
        yield
    except Exception as error:
        why = in_one_line(error)
        print(f"warning: the run is saved, but there is no {what}: {why}", file=sys.stderr)
        if together and jax.process_count() > 1 and not isinstance(error, ValueError):
            raise


def facts_of(config: ExperimentConfig) -> dict[str, Any]:
    """The known facts of a run before it starts: tokens, parameters, FLOPs, a device's peak."""
    from moe_jax.planning.arithmetic import count_flops, count_parameters
    from moe_jax.planning.hardware import peak_flops

    of = (config.model, config.lengths)
    parameters, flops = count_parameters(*of), count_flops(*of)
    return {
        "tokens_per_step": config.training.batch_size * sum(config.lengths),
        "parameters": {"total": parameters.total, "active": parameters.active},
        "forward_flops_per_token": {"model": flops.model, "computed": flops.computed},
        "peak_flops": peak_flops(),
    }


def sample(config: ExperimentConfig, workdir: pathlib.Path) -> str:
    """The prompt of the config, continued by the trained model; all processes compute it."""
    from moe_jax.inference import continue_text
    from moe_jax.training.saved import load_run

    trained, state = load_run(workdir, config.mesh, trust=True)
    prompt, num_tokens = config.training.sample_prompt, config.training.sample_tokens
    text = continue_text(
        state.params, state.model_state, trained, prompt, num_tokens=num_tokens, step=state.step
    )
    return prompt + text


def main() -> None:
    """Checks the config and trains."""
    import jax

    from moe_jax.training.signals import Interrupted

    config = from_config_dict(flags.FLAGS.config)
    command_line.require_folder("workdir", flags.FLAGS.workdir)
    try:
        run(config, flags.FLAGS.workdir)
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


def define_flags() -> None:
    """Defines the flags of the command."""
    command_line.define_config_flag()
    flags.DEFINE_string("workdir", None, "Directory of the run; made if absent.")


command = command_line.Command(
    main,
    define_flags,
    required=("config", "workdir"),
    several_processes=True,
    saves_on_sigterm=True,
)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
