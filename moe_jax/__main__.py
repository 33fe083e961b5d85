"""The entry point of all commands: `moe-jax train ...` is `python -m moe_jax.train ...`."""

import difflib
import importlib
import importlib.util
import os
import sys

from absl import flags

from moe_jax import __version__
from moe_jax.command_help import print_help
from moe_jax.config.installed import home

# Per command: module and function, which takes arguments and returns the exit code; description.
COMMANDS = {
    "train": ("moe_jax.train:command", "train a model, or go on with a run"),
    "evaluate": ("moe_jax.evaluate:command", "score a trained model on held-out text or another"),
    "generate": ("moe_jax.generate:command", "continue a text"),
    "analyze": ("moe_jax.analyze:command", "look into the routers of a trained model"),
    "sweep": ("moe_jax.sweep:command", "train a grid of settings and seeds, and compare them"),
    "compare": ("moe_jax.compare:command", "a table and a page of runs side by side"),
    "merge_adapters": ("moe_jax.merge_adapters:command", "add low-rank adapters to their weights"),
    "quantise": ("moe_jax.quantise:command", "store weights in 8 or 4 bits"),
    "convert": ("moe_jax.convert:command", "move weights in and out: Hugging Face, GGUF"),
    "upcycle": ("moe_jax.upcycle:command", "make a dense model sparse"),
    "merge_experts": ("moe_jax.merge_experts:command", "make a sparse model dense"),
    "prune_experts": ("moe_jax.prune_experts:command", "drop experts of a sparse model"),
    "report": ("moe_jax.report:command", "write the report of a run again"),
    "plan": ("moe_jax.plan:command", "what a run costs and whether it fits, before it runs"),
    "check_part": ("moe_jax.check_part:main", "check a part of your own; list kinds and settings"),
    "build_corpus": ("moe_jax.data.build:command", "fetch and build the large corpus"),
    "train_tokenizer": ("moe_jax.data.train_tokenizer:command", "train a SentencePiece tokenizer"),
    "pack": ("moe_jax.data.pack:command", "pack tokens of a corpus into a portable folder"),
    "study": ("experiments.run:main", "run the arms of a study of experiments/"),
    "study_report": ("experiments.report:main", "write what came out of a study"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, *others = arguments or [""]
    if name in ("--version", "version"):
        print(f"moe_jax {__version__}")
        return 0
    if name in ("", "--help", "-h", "help"):
        print_help(usage())
        return 0 if name else 2
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else "`moe-jax --help` lists the commands."
        print(f"error: there is no command {name!r}. {fix}", file=sys.stderr)
        return 1
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # like `python -m`: for parts and configs of the user
    flags.FLAGS.mark_as_parsed()  # before that, libraries cannot read absl flags
    path, _, function = COMMANDS[name][0].partition(":")
    if path.startswith("experiments."):
        sys.path.append(str(home()))
        if importlib.util.find_spec("experiments") is None:
            rule = (
                f"studies run in a checkout of moe_jax: {os.getcwd()} and {home()} have no "
                "folder experiments. Clone the repository."
            )
            if {"--help", "-h"} & set(others):
                return print_help(f"{name}: {COMMANDS[name][1]}\n\nNot here: {rule}")
            print(f"error: {rule}", file=sys.stderr)
            return 1
    code: int = getattr(importlib.import_module(path), function)(others)
    return code


def usage() -> str:
    """The commands, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {said}" for name, (_, said) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: moe-jax COMMAND --FLAG=VALUE ...   (or python -m moe_jax COMMAND)",
            "",
            *lines,
            "",
            "`moe-jax COMMAND --help` lists the flags and settings of one.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
