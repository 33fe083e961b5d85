"""The matmul rate after everything else, which shows whether the card has slowed down."""

import functools

from benchmarks.accelerator.facts import SMI, matmul_rate, said_by
from benchmarks.accelerator.groups import Row


def rows(dry: bool) -> list[Row]:
    """The bfloat16 reference matmul, and the card's clocks."""
    size = 128 if dry else 8192
    return [
        Row(
            f"matmul bfloat16 {size}",
            4,
            functools.partial(matmul_rate, "bfloat16", size, None, dry),
        ),
        Row("card", 1, lambda: {"card": said_by(SMI)}),
    ]
