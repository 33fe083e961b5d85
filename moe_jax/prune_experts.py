"""Drops experts: `python -m moe_jax.prune_experts --workdir=SPARSE --output=DIR`.

By default it drops experts that held-out text does not use. Layers of one part keep the same number
of experts. Logits on that text are compared: a model whose logits differ is refused without
--allow_change. `docs/finetuning.md` explains more.
"""

import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from moe_jax import command_line
from moe_jax.config.check import require
from moe_jax.merge_experts import define_shared_flags

if TYPE_CHECKING:
    from moe_jax.config import ExperimentConfig
    from moe_jax.finetune.downcycle import Load
    from moe_jax.finetune.made import Source

FIX = "Drop experts that the text does not use, of a router whose gates they do not change"


def main() -> None:
    """Makes the new model, compares it with the old one, and writes it."""
    import jax

    from moe_jax.finetune import made
    from moe_jax.finetune.downcycle import prune_experts

    values = flags.FLAGS
    require(
        not (values.drop and values.keep),
        "--drop and --keep both say which experts stay",
        f"--drop={','.join(values.drop)}, --keep={values.keep}",
        "Leave one out",
    )
    require(
        all(one.isdecimal() for one in values.drop),
        "--drop must be a list of numbers",
        ",".join(values.drop),
        "Write, for example, --drop=1,3",
    )
    workdir, output = pathlib.Path(values.workdir), pathlib.Path(values.output)
    source = made.open_source(
        workdir, output, command_line.mesh_of_flag(), values.step,
        trust=values.trust, moments=values.optimizer_state, num_batches=values.batches,
        check=check_kept,
    )  # fmt: skip
    kept = experts_to_keep(source)
    remodel = prune_experts(source.config, kept)
    lines = description(source, kept)
    key = jax.random.key(0)
    state = made.make(source, remodel, key, optimizer_state=values.optimizer_state)
    print(lines)
    apart = made.compare(source, remodel, state)
    print(made.judge(source, apart, allow_change=values.allow_change, fix=FIX))
    origin = {
        "made_by": "prune_experts",
        "kept": {part: kept_XE.tolist() for part, kept_XE in kept.items()},
        "difference": apart,
    }
    made.save(source, remodel, state, output, origin)
    print(f"{output} is the smaller model of {workdir}")


def check_kept(config: "ExperimentConfig") -> None:
    """Checks --drop and --keep against a model, and that its experts can be dropped.

    Raises:
      ValueError: an expert number does not exist, or too few or all experts are left.
    """
    import numpy as np

    from moe_jax.finetune.downcycle import (
        num_groups,
        prune_experts,
        routed_parts,
        used_experts,
        without_experts,
    )

    values, model = flags.FLAGS, config.model
    num_experts = {name: moe.num_experts for name, moe in routed_parts(model).items()}
    require(
        not values.keep or values.keep < max(num_experts.values()),
        "an expert must be dropped",
        f"--keep={values.keep} keeps all of {num_experts}",
        "Lower --keep",
    )
    kept = used_experts(
        {name: np.ones((len(model.layers_of[name]), count)) for name, count in num_experts.items()},
        num_experts, values.keep,
        {name: num_groups(moe) for name, moe in routed_parts(model).items()},
    )  # fmt: skip
    if values.drop:
        kept = without_experts(model, list(map(int, values.drop)))
    prune_experts(config, kept)


def experts_to_keep(source: "Source") -> "Load":
    """The experts that each layer keeps, by part.

    Raises:
      ValueError: no expert is dropped, or an expert number does not exist.
    """
    from moe_jax.finetune.downcycle import num_groups, routed_parts, used_experts, without_experts

    values, model = flags.FLAGS, source.config.model
    parts = routed_parts(model)
    if values.drop:
        kept = without_experts(model, list(map(int, values.drop)))
    else:
        load = {
            part: source.outputs.load[part][:, : moe.num_experts] for part, moe in parts.items()
        }
        at_least = {
            part: max(moe.num_selected_experts, moe.eval_num_selected_experts)
            for part, moe in parts.items()
        }
        groups = {part: num_groups(moe) for part, moe in parts.items()}
        kept = used_experts(load, at_least, values.keep, groups)
    fewer = [part for part, moe in parts.items() if kept[part].shape[1] < moe.num_experts]
    require(
        bool(fewer),
        "an expert must be dropped",
        f"in some layer all of them are used by {source.outputs.num_tokens} tokens",
        "Pass --drop or --keep, and perhaps --allow_change",
    )
    return {part: kept[part] for part in fewer}


def description(source: "Source", kept: "Load") -> str:
    """Describes the dropped experts, their share of the load, and the possible expert axes."""
    model = source.config.model
    lines = []
    for part, kept_XE in kept.items():
        load_XE = source.outputs.load[part]
        num_experts, count = model.moe_parts[part].num_experts, kept_XE.shape[1]
        for layer, own_E, load_E in zip(model.layers_of[part], kept_XE, load_XE, strict=True):
            dropped = [one for one in range(num_experts) if one not in own_E]
            share = load_E[dropped].sum() / max(load_E.sum(), 1)
            lines.append(
                f"layer {layer}: drops {', '.join(map(str, dropped))}, {share:.2%} of the choices"
            )
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        lines.append(
            f"{part}: {count} of {num_experts} experts are left; an expert axis of the mesh can "
            f"have {', '.join(map(str, divisors))} devices"
        )
    return "\n".join(lines)


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run of the sparse model.")
    flags.DEFINE_string("output", None, "New directory, for the smaller model.")
    flags.DEFINE_list("drop", [], "Numbers of experts to drop from every layer.")
    flags.DEFINE_integer(
        "keep", None, "Number of experts that each layer keeps, the most loaded ones.",
        lower_bound=1,
    )  # fmt: skip
    define_shared_flags()


command = command_line.Command(main, define_flags, required=("workdir", "output"))

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
