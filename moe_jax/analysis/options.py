"""The options of an analysis, in a module of their own that imports nothing slow."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """What is analysed, and how much of it; the flags of the command."""

    step: int | None = None  # of a kept checkpoint; None: the newest whole one
    tokens: int = 32_768  # at most; padding is not counted
    text: tuple[str, ...] = ()  # files of text; (): the held-out split of the run's corpus
    checkpoints: int = 8  # earlier ones at most, for saturation; evenly spaced if there are more
    noise: float = 0.01  # relative, on the input, to see whose choices flip
    shuffles: int = 5  # of the routing over the tokens, for the baseline
    min_count: int = 10  # fewest occurrences of a token id that is listed with an expert
    encoder: bool = False  # the encoder's tokens and layers in place of the decoder's
    trust: bool = False  # import the modules of custom parts that the run's config names

    @property
    def stack(self) -> str:
        """The stack whose routers are analysed, in `LanguageModel.stacks`."""
        return "encoder" if self.encoder else "stack"
