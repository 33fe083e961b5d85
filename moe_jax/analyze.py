"""Looks into the routers of a trained model: `python -m moe_jax.analyze --workdir=DIR`.

Measures which experts the held-out text, or --text, goes to, layer by layer: load, what domain and
token tell about the expert, repetition, saturation over the kept checkpoints, co-activation,
similarity of weights, and how easily the choices flip. Prints two tables and writes
`analysis.json`, figures, and `analysis.html`, a self-contained page with a text in which each token
has the colour of its expert. docs/analysis.md explains each number.
"""

import dataclasses
import pathlib
import sys
import textwrap
from typing import TYPE_CHECKING

from absl import flags

from moe_jax import command_line
from moe_jax.analysis.options import Options

if TYPE_CHECKING:
    from moe_jax.analysis.checkpoint import Analysis


def said(analysis: "Analysis") -> str:
    """What the command prints."""
    from moe_jax.analysis.summary import (
        FLIPS_NOTE,
        NOTE,
        SIGHT,
        flips_table,
        summary_table,
        text_table,
    )

    settings = analysis.settings
    earlier = [f"{step:,}" for step in settings["earlier_steps"]]
    saturation = (
        f"saturation against {len(earlier)} earlier checkpoints that were kept: steps "
        f"{', '.join(earlier)}"
        if earlier
        else "no saturation: no earlier checkpoint was kept (training.keep_every)"
    )
    lines = [
        f"{settings['config']}, step {settings['step']:,}: {settings['num_tokens']:,} tokens of "
        f"{settings['text']}",
        saturation,
        *filter(None, [SIGHT[settings["mark"]]]),
        "",
        text_table(summary_table(analysis.layers)),
        "",
        textwrap.fill(NOTE, 100),
        "",
        text_table(flips_table(analysis.layers)),
        "",
        textwrap.fill(FLIPS_NOTE, 100),
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs the analysis that the flags specify."""
    from moe_jax.analysis.checkpoint import analyze_run, write_analysis

    values = flags.FLAGS
    names = [field.name for field in dataclasses.fields(Options)]
    given = {name: getattr(values, name) for name in names}
    options = Options(**given | {"text": tuple(values.text or ())})
    if not values.out:
        command_line.require_folder("workdir", values.workdir)
    out = values.out or str(pathlib.Path(values.workdir) / "analysis")
    command_line.require_folder("out", out)
    analysis = analyze_run(values.workdir, options)
    paths = write_analysis(analysis, out)
    print(said(analysis))
    print(f"\nwrote {paths[0]}, {paths[1].name} and {len(paths) - 2} figures")


def define_flags() -> None:
    """Defines the flags of the command."""
    default = Options()
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    flags.DEFINE_string("out", "", "Where to write; by default WORKDIR/analysis.")
    command_line.define_step_flag()
    flags.DEFINE_integer("tokens", default.tokens, "How many tokens at most.", lower_bound=1)
    flags.DEFINE_multi_string(
        "text", [], "A file of text in place of the held-out split; may be given again."
    )
    flags.DEFINE_integer(
        "checkpoints", default.checkpoints, "Earlier checkpoints at most, for saturation.", 0
    )
    flags.DEFINE_float(
        "noise", default.noise, "Relative, on the embeddings, to see whose choices flip.", 0.0
    )
    flags.DEFINE_integer(
        "shuffles", default.shuffles, "Of routing over tokens, for the baseline.", lower_bound=1
    )
    flags.DEFINE_integer(
        "min_count", default.min_count, "Occurrences of a token id that is listed.", lower_bound=1
    )
    flags.DEFINE_boolean(
        "encoder", default.encoder, "The tokens and layers of the encoder, not of the decoder."
    )
    command_line.define_trust_flag()


command = command_line.Command(main, define_flags, required=("workdir",))

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
