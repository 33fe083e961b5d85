"""What an analysis is told: a module by itself, which imports nothing that takes time."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    """What is analysed, and how much of it; the flags of the command."""

    step: int | None = None  # whose checkpoint, of those that were kept; None: the newest whole one
    tokens: int = 32_768  # at most; padding is not counted
    text: tuple[str, ...] = ()  # files of text; (): the held-out split of the run's corpus
    checkpoints: int = 8  # earlier ones at most, for saturation; evenly spaced ones of more
    noise: float = 0.01  # relative, on the input, to see whose choices flip
    shuffles: int = 5  # of the routing over the tokens, for the baseline
    min_count: int = 10  # occurrences of a token id that is listed with an expert
    encoder: bool = False  # the encoder's tokens and layers in place of the decoder's
    trust: bool = False  # import the modules that the run's config names for parts of its own

    @property
    def stack(self) -> str:
        """The stack whose routers are analysed, in `LanguageModel.stacks`."""
        return "encoder" if self.encoder else "stack"
