"""The held-out losses that a run has written, in `evaluation.json` and among its metrics."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

HELDOUT_METRIC = re.compile(
    r"heldout/(?P<evaluation>[^/]+)/(domain/(?P<domain>.+)/)?(?P<metric>nats_per_token|bits_per_byte)"
)
Row = dict[str, Any]


def newest_heldout(evaluation: Row, rows: Sequence[Row]) -> Row:
    """The newest held-out losses of a run, in the form of `evaluation.json`.

    After a run was extended, or an older checkpoint was evaluated, its metrics have later losses.

    Args:
      evaluation: the content of `evaluation.json`; {} if absent.
      rows: the rows of its metrics.

    Returns:
      `evaluation` itself, unless the metrics have losses of a later step; {} if there are none.
    """
    last = last_evaluation(rows)
    return last if last.get("step", 0) > evaluation.get("step", 0) else evaluation


def last_evaluation(rows: Sequence[Mapping[str, Any]]) -> Row:
    """The newest held-out losses among the metrics, in the form of `evaluation.json`."""
    for row in reversed(rows):
        found = [(HELDOUT_METRIC.fullmatch(name), value) for name, value in row.items()]
        evaluation: Row = {"step": row["step"]}
        for match, value in found:
            if match:
                losses = evaluation.setdefault(match["evaluation"], {"domains": {}})
                if match["domain"]:
                    losses = losses["domains"].setdefault(match["domain"], {})
                losses[match["metric"]] = value
        if len(evaluation) > 1:
            return evaluation
    return {}
