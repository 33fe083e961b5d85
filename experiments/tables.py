"""The tables of a study's page, as Markdown."""

import math
import statistics
from collections.abc import Iterable, Mapping

from experiments.budget import cost_of
from experiments.results import LOSS, Results, finite
from experiments.study import Study
from experiments.verdict import NOT_RUN, Judged, difference
from moe_jax.analysis.names import in_markdown
from moe_jax.analysis.paired import Paired, holm, spread


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table as Markdown, without a line break at its end."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def criterion_text(study: Study, results: Results, judged: Judged) -> str:
    """The claims, each with its finding, and the finding of the earlier rule."""
    lines = ["Reproduced if every claim is:", ""]
    for number, claim in enumerate(study.expect):
        lines.append(f"{number + 1}. {claim.statement}")
        found = [("", finding) for finding in judged.findings[number : number + 1]]
        older = judged.older[number : number + 1]
        if older and older != judged.findings[number : number + 1]:
            found += [("Under the earlier rule: ", older[0])]
        for rule, finding in found:
            because = results.marked(finding.because)
            lines.append(f"   {rule}**{finding.verdict}**: {because}.")
    return "\n".join(lines)


def published_table(study: Study, results: Results) -> str:
    """The table of published figures and ours."""
    here = [
        results.marked(entry.here(results)) if results.rows else NOT_RUN
        for entry in study.published
    ]
    return table(
        ("what", "published", "source", "here"),
        (
            (entry.what, entry.figure, entry.source, ours)
            for entry, ours in zip(study.published, here, strict=True)
        ),
    )


def budget_table(study: Study, size: str, arms: Iterable[str] | None = None) -> str:
    """The table of the costs of the arms."""
    marks = Results((), study.baseline, study.loss_labels(size))
    rows = []
    for arm in study.arms_at(size):
        if arms is None or arm.name in arms:
            cost = cost_of(study, size, arm.name)
            slots = "dropless" if cost.slots is None else f"{cost.slots:.2f}"
            counts = (cost.total_parameters, cost.active_parameters)
            rows.append(
                (marks.named(arm.name), arm.budget, f"{cost.active:,.0f}", f"{cost.computed:,.0f}",
                 slots, *(f"{count:,}" for count in counts))
            )  # fmt: skip
    head = ("arm", "budget", "active FLOPs per token", "with padding, dispatch",
            "slots per token", "total parameters", "active parameters")  # fmt: skip
    return table(head, rows) + "\n"


def results_table(study: Study, results: Results) -> str:
    """The table of mean +- sd of every arm, over the seeds that all arms have."""
    names = [LOSS, *study.measures]
    seeds = results.shared_seeds
    rows = []
    for arm in study.arms:
        values = results.values(arm.name)
        if not values:
            continue
        diverged = len(values) - len(finite(values))
        cells = [label_of(study, results, arm.name)]
        cells += [f"{len(values)}" + f", {diverged} diverged" * bool(diverged)]
        for name in names:
            here = results.values(arm.name, name)
            shared = {seed: here[seed] for seed in seeds if seed in here}
            mark = marked(results.mark(arm.name, name)) * (name != LOSS)
            cells.append(mean_and_spread(shared) + mark)
        minutes = [row["minutes"] for row in results.rows if row["arm"] == arm.name]
        rows.append([*cells, f"{statistics.fmean(minutes):.1f}"])
    head = ("arm", "seeds run", *(name.replace("_", " ") for name in names), "minutes")
    return table(head, rows)


def difference_table(study: Study, results: Results) -> str:
    """The table of paired differences of every arm to the arm that it is compared with."""
    found: dict[str, dict[str, Paired]] = {}
    for arm in study.arms:
        other = arm.against or study.baseline
        of_arm = difference(results, arm.name, other, study.outcome[0])
        if arm.name != other and of_arm.by_seed:
            found.setdefault(other, {})[arm.name] = of_arm
    rows = []
    for other, arms in found.items():
        corrected = holm([of_arm.p_value() for of_arm in arms.values()])
        for (arm_name, of_arm), p_value in zip(arms.items(), corrected, strict=True):
            low, high = of_arm.interval
            rows.append(
                (label_of(study, results, arm_name), results.named(other), str(of_arm.num_seeds),
                 known(of_arm.mean, "+.4f"),
                 "unknown" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}",
                 known(of_arm.size, "+.1f"),
                 known(p_value, ".2g") + ", by signs: a run diverged" * of_arm.diverged,
                 known(of_arm.smallest_visible, ".4f"))
            )  # fmt: skip
    head = ("arm", "less", "pairs", "difference", "95 % interval", "seed sd", "p",
            "could have been seen")  # fmt: skip
    return table(head, rows)


def known(value: float, spec: str) -> str:
    """A number in a table; "unknown" for nan."""
    return "unknown" if math.isnan(value) else format(value, spec)


def label_of(study: Study, results: Results, arm: str) -> str:
    """The label of an arm in a table, with its mark."""
    return in_markdown(study.arm(arm).label) + marked(results.mark(arm))


def marked(mark: str) -> str:
    """A mark as written after a label or a number."""
    return f" ({mark})" if mark else ""


def mean_and_spread(by_seed: Mapping[int, float], spec: str = ".4f") -> str:
    """Text such as 1.2345 +- 0.0012, over seeds that did not diverge; "" without any."""
    values = list(finite(by_seed).values())
    sd = f"{spread(values):.4f}" if len(values) > 1 else "?"
    return f"{statistics.fmean(values):{spec}} +- {sd}" if values else ""
