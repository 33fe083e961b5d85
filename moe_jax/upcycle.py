"""Makes a dense model sparse: `python -m moe_jax.upcycle --workdir=DENSE --output=DIR`.

Feed-forward networks become experts; everything else is carried. The new directory is that of a run
of 0 steps, which train (config.init_from), generate, evaluate and convert accept. Logits on
held-out text are always compared: a model whose logits differ is refused without --allow_change.
`docs/finetuning.md` describes the changes.
"""

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from moe_jax import command_line
from moe_jax.config.check import require

if TYPE_CHECKING:
    from moe_jax.finetune.remodel import Remodel
    from moe_jax.finetune.upcycle import Upcycling

FIX = (
    "Leave out --change=noise and --change=drop, which change any model; use gates that sum to 1 "
    "(--top_k of 2 or more and a multiple of the shards, --block=router.renormalize=true), or with "
    "other gates --router_stddev=0 or --change=shared"
)


def main() -> None:
    """Makes the new model, compares it with the old one, and writes it."""
    import jax

    from moe_jax.config import to_dict
    from moe_jax.finetune import made
    from moe_jax.finetune.upcycle import upcycle

    values = flags.FLAGS
    workdir, output = pathlib.Path(values.workdir), pathlib.Path(values.output)
    upcycling = upcycling_of_flags()
    source = made.open_source(
        workdir, output, command_line.mesh_of_flag(), values.step,
        trust=values.trust, moments=values.optimizer_state,
        check=lambda config: upcycle(config, upcycling),
    )  # fmt: skip
    remodel = upcycle(source.config, upcycling)
    key = jax.random.key(values.seed)
    state = made.make(source, remodel, key, optimizer_state=values.optimizer_state)
    print(made.describe_names(remodel) + description(remodel))
    apart = made.compare(source, remodel, state)
    print(made.judge(source, apart, allow_change=values.allow_change, fix=FIX))
    origin = {"made_by": "upcycle", "upcycling": to_dict(upcycling), "seed": values.seed,
              "difference": apart}  # fmt: skip
    made.save(source, remodel, state, output, origin)
    print(f"{output} is the sparse model of {workdir}")


def description(remodel: "Remodel") -> str:
    """Describes the new parts with their layers, and the parameters before and after."""
    from moe_jax.planning.parameters import count_parameters

    new = remodel.new.model
    lines = []
    for _, name in remodel.origins:
        moe: Any = new.part[name]
        shared = f", a shared one of {moe.shared_expert_dim}" if moe.shared_expert_dim else ""
        lines.append(
            f"{name}: layers {', '.join(map(str, new.layers_of[name]))} have {moe.num_experts} "
            f"experts of {moe.expert_dim} hidden units{shared}, top {moe.num_selected_experts}"
        )
    old, after = (count_parameters(one.model, one.lengths) for one in (remodel.old, remodel.new))
    lines.append(
        f"{old.total:,} parameters become {after.total:,}; a token uses {after.active:,} of them"
    )
    return "\n".join(lines)


def upcycling_of_flags() -> "Upcycling":
    """The settings in the flags.

    Raises:
      ValueError: a flag has an invalid value.
    """
    from moe_jax.finetune.upcycle import Upcycling

    values = flags.FLAGS
    require(
        all(one.isdecimal() for one in values.layers),
        "--layers must be a list of numbers",
        ",".join(values.layers),
        "Write, for example, --layers=1,3",
    )
    return Upcycling(
        moe=block_of(values.experts, values.top_k, values.block),
        changes=tuple(map(change_of, values.change)),
        every=values.every,
        layers=tuple(map(int, values.layers)),
        rescale=values.rescale,
        router_stddev=values.router_stddev,
    )


def block_of(num_experts: int, top_k: int, settings: list[str]) -> Any:
    """The block of --experts, --top_k and --block; dropless, and gates sum to 1 if K > 1."""
    from moe_jax.config import build, config_dict
    from moe_jax.config.convert import InFamily
    from moe_jax.config.file import override
    from moe_jax.finetune.upcycle import Upcycling
    from moe_jax.moe.routing.token_choice import TokenChoice

    moe = dataclasses.replace(
        Upcycling().moe,
        num_experts=num_experts,
        num_selected_experts=top_k,
        router=TokenChoice(renormalize=top_k > 1),
    )
    block = config_dict(moe)
    for text in settings:
        name, equals, value = text.partition("=")
        require(bool(equals), "--block must be SETTING=VALUE", repr(text), "Correct it")
        try:
            override(block, f"config.{name}", value)
        except ValueError as error:
            raise ValueError(str(error).replace("--config.", "--block=")) from error
    return build(InFamily("part"), block.to_dict(), "--block")


def change_of(text: str) -> Any:
    """Parses --change: KIND, or KIND:NAME=VALUE,NAME=VALUE; a kind may be the path of a class."""
    import ast

    from moe_jax.config import build
    from moe_jax.config.convert import InFamily

    kind, _, rest = text.rpartition(":") if "=" in text else (text, "", "")
    fields: dict[str, Any] = {"kind": kind}
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        require(
            bool(equals), "--change must be KIND:NAME=VALUE,NAME=VALUE", repr(text), "Correct it"
        )
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
    return build(InFamily("upcycling"), fields, "--change")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run of the dense model.")
    flags.DEFINE_string("output", None, "New directory, for the sparse model.")
    flags.DEFINE_integer("experts", 8, "Experts of a layer.", lower_bound=1)
    flags.DEFINE_integer("top_k", 2, "Experts that a token uses.", lower_bound=1)
    flags.DEFINE_multi_string(
        "change", [],
        "What happens to copies of the dense network, as KIND or KIND:NAME=VALUE,NAME=VALUE: "
        "noise, drop:ratio=0.5, granular:shards=2, shared:dim=0, package.module:Class; may be "
        "given again, in order.",
    )  # fmt: skip
    flags.DEFINE_integer("every", 1, "Make every Nth layer of a stack sparse.", lower_bound=1)
    flags.DEFINE_list(
        "layers", [], "In place of --every: numbers of layers, from 0; an encoder's come first."
    )
    flags.DEFINE_multi_string(
        "block", [],
        "A setting of the block, such as router.renormalize=false or capacity.train_factor=2; may "
        "be given again.",
    )  # fmt: skip
    flags.DEFINE_boolean(
        "rescale", True, "Divide what experts give by the sum of gates of a router without choice."
    )
    flags.DEFINE_float(
        "router_stddev", None,
        "Standard deviation of the router's weights; by default router.init_stddev.",
        lower_bound=0.0,
    )  # fmt: skip
    flags.DEFINE_integer(
        "seed", 0, "Random seed of the router and of redrawn weights.",
        lower_bound=0, upper_bound=2**32 - 1,
    )  # fmt: skip
    define_remodel_flags()


def define_remodel_flags() -> None:
    """Defines the flags of every command that makes one model from another."""
    flags.DEFINE_boolean(
        "optimizer_state", False, "Carry moments of the optimizer, made as parameters are."
    )
    flags.DEFINE_boolean("allow_change", False, "Write the model even if its logits change.")
    command_line.define_mesh_flag()
    command_line.define_step_flag()
    command_line.define_trust_flag()


command = command_line.Command(main, define_flags, required=("workdir", "output"))

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
