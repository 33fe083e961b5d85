"""Plans a run: `python -m moe_jax.plan --config=configs/quickstart.py --topology=v5e:2x2`.

Without a topology, prints parameters, FLOPs, memory and collectives of the config on its mesh, from
arithmetic. With one (v5p:8x16x16, 2*v5e:16x16, h100:4x8), also compiles the real training step for
the machine, which need not be present. docs/planning.md explains each number.

With --serve, prints what serving the model needs instead, on the kind of chip that the topology
names (in any number), or on all known chips.

Exit code 0: it fits, or no machine was named, or --serve. 3: it does not fit. 1: an error.
"""

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from moe_jax import command_line
from moe_jax.config import ExperimentConfig, from_config_dict
from moe_jax.config.check import require
from moe_jax.config.json_text import json_text

if TYPE_CHECKING:
    from moe_jax.planning.report import Plan
    from moe_jax.planning.topology import Topology

DOES_NOT_FIT = 3
# Flags, and the flags that have no use with them.
USELESS = {
    "--serve": ("--sweep", "--forward", "--figures", "--compile_best"),
    "--sweep": ("--forward", "--figures"),
    "--nocompile": ("--forward", "--compile_best"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to plan; the flags of the command."""

    topology: str = ""
    compile: bool = True
    forward: bool = False
    json: bool = False
    sweep: bool = False
    compile_best: int = 0
    figures: str = ""
    serve: bool = False
    context: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        """Checks the flags against each other."""
        if not self.topology and (self.sweep or self.forward):
            raise ValueError(
                "--sweep and --forward need a machine: there is no --topology. Name one, such as "
                "--topology=v5p:4x4x4."
            )
        given = {f"--{field.name}": getattr(self, field.name) for field in dataclasses.fields(self)}
        given["--nocompile"] = not self.compile
        for flag, others in USELESS.items():
            useless = [one for one in others if given[flag] and given[one]]
            require(
                not useless,
                f"a plan must use every flag that is given, and {flag} does not use some",
                f"{', '.join(useless)} with {flag}",
                f"Leave out {flag}, or the others",
            )
        served = [one for one in ("--context", "--batch") if given[one] is not None]
        require(
            self.serve or not served,
            "--context and --batch need --serve",
            f"{', '.join(f'{one}={given[one]}' for one in served)} without --serve",
            "Add --serve, or set data.sequence_length and training.batch_size",
        )
        require(
            self.sweep or not self.compile_best,
            "--compile_best needs --sweep",
            f"--compile_best={self.compile_best} without --sweep",
            "Add --sweep, or leave it out",
        )


def run(config: ExperimentConfig, options: Options) -> int:
    """Prints the plan of a config, or the sweep of its meshes; returns the exit code."""
    from moe_jax.planning.report import describe
    from moe_jax.planning.sweep import describe_sweep, sweep, sweep_text
    from moe_jax.planning.text import plan_text
    from moe_jax.planning.topology import parse_topology

    topology = parse_topology(options.topology) if options.topology else None
    if options.serve:
        from moe_jax.planning.serving import chips_of, describe_serving, serving_text

        chips = chips_of("" if topology is None else topology.chip.name)
        given = (config.model, options.context or 8192, options.batch or 32, chips)
        print(json_text(describe_serving(*given)) if options.json else serving_text(*given))
        return 0
    if options.sweep:
        assert topology is not None
        found = sweep(config, topology, compile_best=options.compile_best)
        print(json_text(describe_sweep(found)) if options.json else sweep_text(found))
        return 0 if found.fitting else DOES_NOT_FIT
    plan = make_plan(config, topology, options)
    print(json_text(describe(plan)) if options.json else plan_text(plan))
    if options.figures:
        from moe_jax.planning.figures import write_figures  # matplotlib takes a second to import

        for path in write_figures(plan, pathlib.Path(options.figures)):
            print(f"wrote {path}", file=sys.stderr)
    return 0 if plan.fits else DOES_NOT_FIT


def make_plan(config: ExperimentConfig, topology: "Topology | None", options: Options) -> "Plan":
    """Plans by arithmetic, and compiles the programs if there is a machine to compile for."""
    from moe_jax.planning.report import Plan
    from moe_jax.planning.workload import resolve

    if topology is None:
        return Plan(resolve(config))
    work = resolve(config, topology.num_devices, topology.chip.platform)
    if not options.compile:
        return Plan(work, topology)
    from moe_jax.planning.aot import compile_forward, compile_training_step

    step = compile_training_step(work, topology)
    forward = compile_forward(work, topology) if options.forward else None
    return Plan(work, topology, step, forward)


def main() -> int:
    """Plans as the flags specify."""
    import jax

    # Only compilers for other machines are needed; any arrays would be on the CPU.
    jax.config.update("jax_platforms", "cpu")
    values = flags.FLAGS
    names = [field.name for field in dataclasses.fields(Options)]
    options = Options(**{name: getattr(values, name) for name in names})
    if options.figures:
        command_line.require_folder("figures", options.figures)
    return run(from_config_dict(values.config), options)


def define_flags() -> None:
    """Defines the flags of the command."""
    command_line.define_config_flag()
    flags.DEFINE_string("topology", "", "The machine, such as v5p:8x16x16, 2*v5e:16x16, h100:4x8.")
    flags.DEFINE_bool("compile", True, "Compile the training step for the machine.")
    flags.DEFINE_bool("forward", False, "Compile the forward pass of a microbatch as well.")
    flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.")
    flags.DEFINE_bool("sweep", False, "Try all meshes of the machine by arithmetic, best first.")
    flags.DEFINE_integer("compile_best", 0, "Of a sweep: compile so many of the best.", 0)
    flags.DEFINE_string("figures", "", "Directory for figures of memory and roofline.")
    flags.DEFINE_bool("serve", False, "Plan serving instead of training.")
    flags.DEFINE_integer("context", None, "With --serve: tokens of a text; 8192.", 1)
    flags.DEFINE_integer("batch", None, "With --serve: texts at once; 32.", 1)


command = command_line.Command(main, define_flags, required=("config",), uses_devices=False)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
