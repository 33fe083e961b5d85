"""Writes reports from results: `python -m experiments.report [STUDY]`.

Of each study `README.md` and, once it has results, `curves.png` (of the size base `base.md` and
`curves_base.png`); and `experiments/README.md`, one line a study. Everything in them is computed
from `study.py` and `results.jsonl`: the same results give the same bytes.
"""

import itertools
import pathlib
import statistics
import sys
from collections.abc import Mapping

from experiments.budget import budget_table, check_budget
from experiments.figure import draw
from experiments.results import (
    LOSS,
    RESULTS_FILE,
    Results,
    check_same_text,
    finite,
    read_results,
)
from experiments.study import HERE, SIZES, Study, load_study, study_names
from experiments.top_page import page_name, top_page
from experiments.verdict import INCONCLUSIVE, NOT_RUN, Finding, difference, overall, spread
from moe_jax.analysis.names import in_markdown
from moe_jax.command_line import Parser
from moe_jax.training.files import write_atomically
from moe_jax.training.ways import notes_of
from moe_jax.user_errors import USER_ERRORS, describe


def figure_name(size: str) -> str:
    """The file of its figure."""
    return "curves.png" if size == "small" else f"curves_{size}.png"


def verdict_of(study: Study, results: Results) -> tuple[str, list[Finding]]:
    """The verdict of a study and the findings behind it; "not run" without results.

    Nothing is concluded while runs are missing: what they will say is not known.
    """
    if not results.rows:
        return NOT_RUN, []
    findings = [claim.judge(results) for claim in study.expect]
    missing = study.missing(results)
    if missing:
        note = f" (runs are missing: {len(missing)})"
        findings = [Finding(INCONCLUSIVE, finding.because + note) for finding in findings]
    return overall(findings), findings


def results_of(study: Study, size: str, directory: pathlib.Path | None = None) -> Results:
    """The results of a study that its settings of today gave.

    Raises:
      ValueError: lines of other settings, of an arm that is no more, or of different texts.
    """
    path = (directory or study.directory) / RESULTS_FILE
    rows = read_results(path, size)
    for row in rows:
        study.check_row(row)
    check_same_text(rows)
    return Results(tuple(rows), study.baseline, study.ways(size))


def study_page(study: Study, size: str, results: Results) -> str:
    """The README of a study."""
    verdict, findings = verdict_of(study, results)
    command = f"python -m experiments.run {study.name} --size={size}"
    parts = [
        f"# {study.question}",
        f"Verdict: **{verdict}**. Written by `python -m experiments.report {study.name}`.",
        "## Criterion",
        criterion_text(study, findings),
        "## Published and measured",
        published_table(study, results),
        "## Arms",
        f"Size `{size}`. Forward FLOPs; arms of one budget match within {study.tolerance:.1%}, "
        "and share the order of the data by seed.",
        budget_table(study, size).rstrip(),
    ]
    if results.rows:
        arms, losses = [arm.name for arm in study.arms], [LOSS, *study.measures]
        parts += [
            "## Results",
            "Held-out bits per byte on the whole held-out split after the last step, "
            f"{way_text(results)}; mean +- standard deviation over seeds. Difference: to "
            f"`{study.baseline}`, or the arm that is named, of the same seeds. Noise floor, the "
            f"spread of `{study.baseline}`: "
            f"{spread(results.values(study.baseline).values()):.4f} over "
            f"{len(results.values(study.baseline))} seeds.",
            results_table(study, results),
            *notes_of(itertools.starmap(results.mark, itertools.product(arms, losses))),
            f"![Held-out bits per byte by step and at the end]({figure_name(size)})",
        ]
    parts += ["## Run", f"    {command}", circumstances_text(results)]
    if study.notes:
        parts += ["## Notes", study.notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def criterion_text(study: Study, findings: list[Finding]) -> str:
    """The claims, each with what was found."""
    lines = ["Reproduced if every claim is:", ""]
    for number, claim in enumerate(study.expect, start=1):
        lines.append(f"{number}. {claim.statement}")
        if findings:
            finding = findings[number - 1]
            lines.append(f"   **{finding.verdict}**: {finding.because}.")
    return "\n".join(lines)


def published_table(study: Study, results: Results) -> str:
    """Published figures beside ours."""
    lines = ["| what | published | source | here |", "| --- | --- | --- | --- |"]
    for entry in study.published:
        here = entry.here(results) if results.rows else NOT_RUN
        lines.append(f"| {entry.what} | {entry.figure} | {entry.source} | {here} |")
    return "\n".join(lines)


def results_table(study: Study, results: Results) -> str:
    """Mean +- sd of every arm, and its paired difference to the baseline."""
    names = [LOSS, *study.measures]
    head = ["arm", "seeds", *(name.replace("_", " ") for name in names), "difference", "minutes"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for arm in study.arms:
        values = results.values(arm.name)
        if not values:
            continue
        diverged = len(values) - len(finite(values))
        label = in_markdown(arm.label) + marked(results.mark(arm.name))
        cells = [label, f"{len(values)}" + f", {diverged} diverged" * bool(diverged)]
        cells += [
            mean_and_spread(results.values(arm.name, name))
            + marked(results.mark(arm.name, name)) * (name != LOSS)
            for name in names
        ]
        other = arm.against or study.baseline
        found = difference(results, arm.name, other)
        text = mean_and_spread(found.by_seed, "+.4f")
        text += f" ({other})" * (other != study.baseline)
        cells.append(text if arm.name != other else "")
        minutes = [row["minutes"] for row in results.rows if row["arm"] == arm.name]
        cells.append(f"{statistics.fmean(minutes):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def way_text(results: Results) -> str:
    """How the arms are evaluated: dropless, but for those whose experts fill their slots."""
    filled = [arm for arm, ways in results.ways.items() if ways["dropless"].label != "dropless"]
    return f"dropless (with the slots of training: {', '.join(filled)})" if filled else "dropless"


def marked(mark: str) -> str:
    """A mark as it stands behind a label or a number."""
    return f" ({mark})" if mark else ""


def mean_and_spread(by_seed: Mapping[int, float], spec: str = ".4f") -> str:
    """Such as 1.2345 +- 0.0012, of the seeds that did not diverge; empty without any."""
    values = list(finite(by_seed).values())
    sd = f"{spread(values):.4f}" if len(values) > 1 else "?"
    return f"{statistics.fmean(values):{spec}} +- {sd}" if values else ""


def circumstances_text(results: Results) -> str:
    """Commits, hardware and versions of the runs."""
    if not results.rows:
        return "It has not been run."
    lines = ["| commit | hardware | versions | runs |", "| --- | --- | --- | --- |"]
    counts: dict[tuple[str, str, str], int] = {}
    for row in results.rows:
        marks = "" if not row["dirty"] else " (files changed)"
        hardware = row["hardware"]
        key = (
            ", ".join(commit[:12] for commit in row["commits"]) + marks,
            f"{hardware['num_devices']} x {hardware['device_kind']} ({hardware['platform']}, "
            f"{hardware['machine']}, {hardware['cores']} cores per run)",
            ", ".join(f"{name} {version}" for name, version in sorted(row["versions"].items())),
        )
        counts[key] = counts.get(key, 0) + 1
    lines += [f"| {' | '.join(key)} | {count} |" for key, count in sorted(counts.items())]
    return "\n".join(lines)


def write_study(study: Study, size: str, directory: pathlib.Path | None = None) -> str:
    """Writes the page and the figure of a study at one size; returns its verdict.

    Args:
      study: the study.
      size: whose results are reported; `README.md` is the page of "small", `base.md` that of
        "base".
      directory: of the results, and of what is written; None: the study's own.
    """
    directory = directory or study.directory
    check_budget(study, size)
    results = results_of(study, size, directory)
    write_atomically(directory / page_name(size), study_page(study, size, results))
    if results.rows:
        path = directory / figure_name(size)
        draw(study, results).savefig(path, dpi=110, metadata={"Software": None})
    return verdict_of(study, results)[0]


def sizes_of(study: Study, directory: pathlib.Path | None = None) -> list[str]:
    """The sizes that a study has results of, and in its own directory always "small"."""
    there = {row["size"] for row in read_results((directory or study.directory) / RESULTS_FILE)}
    return [size for size in SIZES if size in there or (size == "small" and directory is None)]


def findings_of(study: Study) -> dict[str, list[Finding]]:
    """The findings of a study by size, of those with results."""
    found = {size: verdict_of(study, results_of(study, size))[1] for size in sizes_of(study)}
    return {size: findings for size, findings in found.items() if findings}


def main(arguments: list[str] | None = None) -> int:
    """Writes the report of one study or of all, and the top page; returns the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument("study", nargs="?", help="one study; all by default")
    parser.add_argument("--out", help="directory with results; the study's own by default")
    args = parser.parse_args(arguments)
    try:
        directory = pathlib.Path(args.out) if args.out else None
        if directory and not args.study:
            raise ValueError("--out is of one study: none is named. Name it before --out.")
        if directory and not directory.is_dir():
            raise ValueError(
                f"--out is a directory that `python -m experiments.run` wrote to: there is none at "
                f"{directory}. Pass the --out that it was given."
            )
        studies = [load_study(name) for name in study_names()]
        for study in [load_study(args.study)] if args.study else studies:
            for size in sizes_of(study, directory):
                print(f"{study.name} ({size}): {write_study(study, size, directory)}")
        if directory is None:
            findings = {study.name: findings_of(study) for study in studies}
            write_atomically(HERE / "README.md", top_page(studies, findings))
    except USER_ERRORS as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
