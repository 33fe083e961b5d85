"""Makes a sparse model dense: `python -m moe_jax.merge_experts --workdir=SPARSE --output=DIR`.

Each block becomes one dense network, the mean of its experts. That is exact for experts that are
copies of each other. Logits on held-out text are compared: a model whose logits differ is refused
without --allow_change. `docs/finetuning.md` explains more.
"""

import pathlib
import sys

from absl import flags

from moe_jax import command_line
from moe_jax.upcycle import define_remodel_flags

FIX = "Merge a model whose experts are copies of each other, use prune_experts instead"


def main() -> None:
    """Makes the new model, compares it with the old one, and writes it."""
    import jax

    from moe_jax.finetune import made
    from moe_jax.finetune.downcycle import merge_experts

    values = flags.FLAGS
    workdir, output = pathlib.Path(values.workdir), pathlib.Path(values.output)
    source = made.open_source(
        workdir, output, command_line.mesh_of_flag(), values.step,
        trust=values.trust, moments=values.optimizer_state, num_batches=values.batches,
        check=merge_experts,
    )  # fmt: skip
    load = source.outputs.load if values.weights == "load" else None
    remodel = merge_experts(source.config, load)
    key = jax.random.key(0)
    state = made.make(source, remodel, key, optimizer_state=values.optimizer_state)
    print(made.describe_names(remodel), end="")
    for old, new in remodel.origins:
        layers = ", ".join(map(str, source.config.model.layers_of[old]))
        print(f"{new}: layers {layers} are means of the experts of {old}")
    apart = made.compare(source, remodel, state)
    print(made.judge(source, apart, allow_change=values.allow_change, fix=FIX))
    origin = {"made_by": "merge_experts", "weights": values.weights, "difference": apart}
    made.save(source, remodel, state, output, origin)
    print(f"{output} is the dense model of {workdir}")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run of the sparse model.")
    flags.DEFINE_string("output", None, "New directory, for the dense model.")
    flags.DEFINE_enum(
        "weights", "load", ["load", "uniform"],
        "How to weight the experts of a layer: load (their share of the choices on held-out text), "
        "or uniform.",
    )  # fmt: skip
    define_shared_flags()


def define_shared_flags() -> None:
    """Defines the flags that merge_experts and prune_experts share."""
    flags.DEFINE_integer(
        "batches", 8, "Batches of held-out text to measure and to compare on.", lower_bound=1
    )
    define_remodel_flags()


command = command_line.Command(main, define_flags, required=("workdir", "output"))

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
