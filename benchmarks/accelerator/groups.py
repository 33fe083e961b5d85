"""Groups of rows to measure, in order of value; each group is measured in its own process."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A measurement.

    Attributes:
      name: name within its group.
      seconds: estimated seconds on an accelerator, including compilation; the row is left out if
        less time is left.
      run: measures; returns numbers and texts by name. An exception makes a failed row.
      first: whether it is measured before all rows of any group that are not first.
    """

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]
    first: bool = False


class Group(NamedTuple):
    """Rows that share a process.

    Attributes:
      name: name of the group and its module.
      share: fraction of the run's time that the group may take in a pass; remaining time goes to
        rows left out.
      title: its title on the page.
      xla_flags: XLA flags of its process.
    """

    name: str
    share: float
    title: str
    xla_flags: str = ""

    def rows(self, dry: bool) -> list[Row]:
        """The rows of the group, the most valuable first.

        Args:
          dry: whether to use tiny sizes for a CPU.
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
TESTS = Group("repository_tests", 0.50, "Tests")  # only on request
BY_NAME = {group.name: group for group in (FACTS, *GROUPS, TESTS, END)}
