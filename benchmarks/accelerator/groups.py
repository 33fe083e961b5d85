"""What is measured, in order of value: groups of rows, each measured in a process of its own."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A measurement.

    Attributes:
      name: within its group.
      seconds: that it takes on an accelerator, compilation included: a guess, by which a row is
        left out when too little time is left.
      run: measures; returns numbers and texts by name. An exception is a row that says so.
      first: measured before what is not first in any group.
    """

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]
    first: bool = False


class Group(NamedTuple):
    """Rows that share a process.

    Attributes:
      name: of its module too.
      share: of the run's time that it may take in a pass; what is left goes to those left out.
      title: what the page calls it.
      xla_flags: that its process sets.
    """

    name: str
    share: float
    title: str
    xla_flags: str = ""

    def rows(self, dry: bool) -> list[Row]:
        """Its rows, the most valuable first.

        Args:
          dry: at sizes that a CPU computes in a moment.
        """
        module = importlib.import_module(f"benchmarks.accelerator.{self.name}")
        rows: list[Row] = module.rows(dry)
        return rows


FACTS = Group("facts", 0.04, "The machine")
END = Group("facts_again", 0.05, "The machine at the end")
GROUPS = (
    Group("parity", 0.21, "Parity with a CPU in float64"),
    Group("experts", 0.16, "Experts alone"),
    Group("torch_experts", 0.05, "Experts of PyTorch"),
    Group("attention", 0.05, "Attention"),
    Group("step", 0.19, "A training step"),
    Group("quickstart", 0.10, "The quickstart"),
    Group("layers", 0.20, "A layer"),
    Group("other_kernels", 0.10, "One product by kernels that the library does not use"),
    Group(
        "cudnn_fusion",
        0.05,
        "One product by lax.ragged_dot with XLA's experimental fusion for cuDNN",
        xla_flags="--xla_gpu_experimental_use_ragged_dot_fusion=true",
    ),
)
TESTS = Group("repository_tests", 0.50, "Tests")  # only where it is asked for
BY_NAME = {group.name: group for group in (FACTS, *GROUPS, TESTS, END)}
