"""Continues texts: `python -m moe_jax.generate --workdir=DIR --prompt="The king"`.

One text is printed as it comes, several of them each when it is whole, and the speed at the end on
stderr. --output also writes them as JSON lines.
"""

import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from moe_jax import command_line
from moe_jax.config.check import require
from moe_jax.config.json_text import json_text

if TYPE_CHECKING:
    from moe_jax.inference import TextPiece
    from moe_jax.models.model import LanguageModel

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def note_on(model: "LanguageModel") -> str:
    """A line on a model that looks, or has looked, at later tokens; empty for a causal one."""
    from moe_jax.training.ways import SEES, ways_of

    mark = ways_of(model)["dropless"].mark
    loss = ", and a loss with them is not that of a causal language model" * (mark == SEES)
    return f"note: the model {mark}; when it writes a text there are none{loss}.\n" if mark else ""


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: of .jsonl the field `prompt` of every line, else every line.

    Blank lines are skipped.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not UTF-8, has no prompt, or a line has no such field.
    """
    from moe_jax.data.open_file import decode

    lines = decode(pathlib.Path(path).read_bytes(), path).splitlines()
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    require(bool(numbered), "--prompts is a file of prompts", f"{path} is blank", "Name another")
    if not path.endswith(".jsonl"):
        return [line for _, line in numbered]
    return [prompt_of(line, f"{path} line {i}") for i, line in numbered]


def prompt_of(line: str, where: str) -> str:
    """The field `prompt` of a line of JSON."""
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    require(
        isinstance(prompt, str),
        'a line of a .jsonl of prompts is an object such as {"prompt": "The king"}',
        f"{where} is {line[:60]!r}",
        "Correct it",
    )
    assert isinstance(prompt, str)
    return prompt


class Answers:
    """Texts as their pieces come: printed, and kept for the file."""

    def __init__(self, prompts: Sequence[str], num_samples: int):
        self.prompts, self.num_samples = prompts, num_samples
        self.texts = ["" for _ in range(len(prompts) * num_samples)]
        self.tokens, self.ended = [0] * len(self.texts), [False] * len(self.texts)

    def show(self, pieces: "Iterator[TextPiece]") -> None:
        """Prints one text as it comes, or all when they are there."""
        alone = len(self.texts) == 1
        if alone:
            print(self.prompts[0], end="", flush=True)
        for piece in pieces:
            self.texts[piece.row] += piece.text
            self.tokens[piece.row] += piece.num_tokens
            self.ended[piece.row] |= piece.ended
            if alone:
                print(piece.text, end="", flush=True)
        if alone:
            print()
            return
        for record in self.records():
            sample = f", sample {record['sample']}" if self.num_samples > 1 else ""
            print(f"--- prompt {record['prompt_index']}{sample}")
            print(record["prompt"] + record["text"])

    def records(self) -> Iterator[dict[str, Any]]:
        """One for each text."""
        for row, text in enumerate(self.texts):
            index, sample = divmod(row, self.num_samples)
            yield {
                "prompt_index": index, "sample": sample, "prompt": self.prompts[index],
                "text": text, "num_tokens": self.tokens[row], "ended": self.ended[row],
            }  # fmt: skip


def main() -> None:
    """Loads a checkpoint and continues the prompts."""
    import jax

    from moe_jax.inference import stream_text
    from moe_jax.training.files import write_atomically
    from moe_jax.training.saved import load_run

    values = flags.FLAGS
    require(
        bool(values.prompt) != bool(values.prompts),
        "prompts come from --prompt or from --prompts",
        "both are given" if values.prompt else "neither is given",
        "Give one of them",
    )
    prompts = values.prompt or read_prompts(values.prompts)
    if values.output:
        command_line.require_file("output", values.output)
    config, state = load_run(
        values.workdir, command_line.mesh_of_flag(), values.step, trust=values.trust
    )
    answers, first = Answers(prompts, values.samples), jax.process_index() == 0
    if first:
        print(note_on(config.model), end="", file=sys.stderr)
    settings: dict[str, Any] = {name: getattr(values, name) for name in SAMPLING}
    pieces = stream_text(
        config, state.params, prompts, values.tokens,
        state=state.model_state, step=state.step, num_samples=values.samples, stop=values.stop,
        context=values.context, batch_size=values.batch_size, **settings,
    )  # fmt: skip
    begin = time.perf_counter()
    if not first:
        for _ in pieces:
            pass
        return
    answers.show(pieces)
    seconds, count = time.perf_counter() - begin, sum(answers.tokens)
    print(f"{count} tokens in {seconds:.1f} s with compilation", file=sys.stderr)
    if values.output:
        lines = [json_text(record) for record in answers.records()]
        write_atomically(pathlib.Path(values.output), "\n".join(lines) + "\n")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run.")
    command_line.define_mesh_flag()
    command_line.define_trust_flag()
    command_line.define_step_flag()
    flags.DEFINE_multi_string("prompt", [], "The text to continue; may be given again.")
    flags.DEFINE_string(
        "prompts", "", "A file of prompts: one a line, or .jsonl with the field prompt."
    )
    flags.DEFINE_string("output", "", "A .jsonl file for the answers, beside what is printed.")
    flags.DEFINE_integer("tokens", 200, "How many tokens to add at most.", lower_bound=0)
    flags.DEFINE_integer("samples", 1, "Texts for each prompt.", lower_bound=1)
    flags.DEFINE_multi_string("stop", [], "A string before which a text ends; may be given again.")
    flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.", lower_bound=0.0)
    flags.DEFINE_integer("top_k", 0, "Draw among the k likeliest tokens; 0: all.", lower_bound=0)
    flags.DEFINE_float(
        "top_p", 1.0, "Draw among the fewest likeliest tokens of so much probability."
    )
    flags.DEFINE_float("min_p", 0.0, "Leave out tokens below this share of the likeliest's.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Above 1 tokens seen before are less likely.")
    flags.DEFINE_integer(
        "seed", 0, "Equal seeds give equal texts.", lower_bound=0, upper_bound=2**32 - 1
    )
    flags.DEFINE_integer(
        "context", None,
        "Tokens that are seen at most: a longer text goes on from its last half. By default the "
        "sequence_length of the run.",
        lower_bound=2,
    )  # fmt: skip
    flags.DEFINE_integer("batch_size", 32, "Texts at once.", lower_bound=1)


command = command_line.Command(main, define_flags, required=("workdir",), several_processes=True)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
