"""Writes reports from results: `python -m experiments.report [STUDY]`.

Each study gets `README.md` and, if it has results, `curves.png` (for the size base, `base.md` and
`curves_base.png`). Without STUDY the page of all studies, `experiments/README.md`, is written too.
Reports are computed from `study.py` and `results.jsonl`: the same results give the same bytes.
"""

import dataclasses
import itertools
import pathlib
import sys

from experiments.budget import check_budget
from experiments.figure import DPI, draw
from experiments.results import (
    LOSS,
    RESULTS_FILE,
    UNPAIRED,
    Results,
    check_same_text,
    read_results,
)
from experiments.study import HERE, SIZES, Study, load_study, study_names
from experiments.tables import (
    budget_table,
    criterion_text,
    difference_table,
    published_table,
    results_table,
)
from experiments.top_figure import NAME as FIGURE
from experiments.top_figure import draw_all
from experiments.top_page import page_name, top_page
from experiments.verdict import INCONCLUSIVE, NOT_RUN, Finding, Judged
from moe_jax.command_line import Parser
from moe_jax.files import write_atomically
from moe_jax.training.loss_labels import notes_of
from moe_jax.user_errors import USER_ERRORS, describe

DIFFERENCES = (
    "Paired differences in {outcome}, of the seeds that both arms have. The interval covers "
    "the mean with 95 %. The size is in standard deviations of a seed. p is corrected, by Holm, "
    "for all arms that are compared with the same one; a failure in a claim above, for its own "
    "arms. Could have been seen: of studies with as many pairs, four in five would find a "
    "difference of that size."
)
OLDER_RULE = (
    "It was run while a direction asked for a mean difference of more than twice an unpaired "
    "noise: the larger of the two arms' pooled standard deviation and that of the baseline over "
    "five seeds. What that rule found stands beside what the paired one finds."
)


def figure_name(size: str) -> str:
    """The file name of the figure of a size."""
    return "curves.png" if size == "small" else f"curves_{size}.png"


def judge_study(study: Study, size: str, results: Results) -> Judged:
    """The findings behind the verdict of a study, by the current rule and by the earlier rule.

    While runs are missing, no claim is decided.
    """
    if not results.rows:
        return Judged([], [])
    findings = findings_by(study, size, results)
    if not results.has_older_rule:
        return Judged(findings, [])
    return Judged(findings, findings_by(study, size, dataclasses.replace(results, rule=UNPAIRED)))


def findings_by(study: Study, size: str, results: Results) -> list[Finding]:
    """The findings of all claims under one rule.

    A claim counts as not run if its finding is the same without any rows.
    """
    findings = [claim.judge(results) for claim in study.expect]
    missing = study.missing(size, results)
    if missing:
        without = dataclasses.replace(results, rows=())
        note = f" (runs are missing: {len(missing)})"
        findings = [
            Finding(
                NOT_RUN if finding == claim.judge(without) else INCONCLUSIVE,
                finding.because + note,
            )
            for claim, finding in zip(study.expect, findings, strict=True)
        ]
    return findings


def results_of(study: Study, size: str, directory: pathlib.Path | None = None) -> Results:
    """The results of a study at one size, checked against its settings.

    Raises:
      ValueError: a line is from other settings, a removed arm, or a different corpus.
    """
    path = (directory or study.directory) / RESULTS_FILE
    rows = read_results(path, size)
    for row in rows:
        study.check_row(row)
    check_same_text(rows)
    return Results(tuple(rows), study.baseline, study.loss_labels(size), study.least_seeds)


def study_page(study: Study, size: str, results: Results) -> str:
    """The README of a study."""
    judged = judge_study(study, size, results)
    older = judged.older_verdict
    command = f"python -m experiments.run {study.place} --size={size}"
    parts = [
        f"# {study.question}",
        f"Verdict: **{judged.verdict}**"
        + f"; under the earlier rule, by which it was run, **{older}**" * bool(older)
        + f". Written by `python -m experiments.report {study.place}`.",
        OLDER_RULE if older else "",
        "## Criterion",
        criterion_text(study, results, judged),
        "## Published and measured",
        published_table(study, results),
        "## Arms",
        f"Size `{size}`. Forward FLOPs; arms of one budget match within {study.tolerance:.1%}, "
        "and share the order of the data by seed.",
        budget_table(study, size).rstrip(),
    ]
    if results.rows:
        arms, losses = [arm.name for arm in study.arms], [LOSS, *study.measures]
        seeds = results.shared_seeds
        parts += [
            "## Results",
            "Held-out bits per byte on the whole held-out split after the last step, "
            f"{way_text(results)}; mean +- standard deviation over the seeds that all arms have: "
            f"{', '.join(map(str, seeds)) or 'none'}.",
            results_table(study, results),
            DIFFERENCES.format(outcome=study.outcome[1]),
            difference_table(study, results),
            *notes_of(itertools.starmap(results.mark, itertools.product(arms, losses))),
            f"![Held-out {study.outcome[1]}]({figure_name(size)})",
        ]
    parts += ["## Run", f"    {command}", circumstances_text(results)]
    if study.notes:
        parts += ["## Notes", study.notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def way_text(results: Results) -> str:
    """How the arms are evaluated: dropless, except arms whose experts fill their slots."""
    filled = [
        arm for arm, labels in results.labels.items() if labels["dropless"].label != "dropless"
    ]
    arms = ", ".join(map(results.named, filled))
    return f"dropless (with the slots of training: {arms})" if filled else "dropless"


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
      size: size to report; `README.md` is the page of "small", `base.md` of "base".
      directory: directory of the results and of the output; None: the study's own.
    """
    directory = directory or study.directory
    check_budget(study, size)
    results = results_of(study, size, directory)
    write_atomically(directory / page_name(size), study_page(study, size, results))
    if results.rows:
        path = directory / figure_name(size)
        draw(study, results).savefig(path, dpi=DPI, metadata={"Software": None})
    return judge_study(study, size, results).verdict


def sizes_of(study: Study, directory: pathlib.Path | None = None) -> list[str]:
    """The sizes with results; without `directory` "small" is always included."""
    there = {row["size"] for row in read_results((directory or study.directory) / RESULTS_FILE)}
    return [size for size in SIZES if size in there or (size == "small" and directory is None)]


def judged_sizes(study: Study) -> dict[str, Judged]:
    """The findings of a study by size, for sizes with results."""
    found = {size: judge_study(study, size, results_of(study, size)) for size in sizes_of(study)}
    return {size: judged for size, judged in found.items() if judged.findings}


def main(arguments: list[str] | None = None) -> int:
    """Writes the report of one study, or of all with the top page; returns the exit code."""
    parser = Parser(description=__doc__)
    parser.add_argument("study", nargs="?", help="a study, or the path of your own; all by default")
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
        studies = [load_study(name) for name in [args.study] if name] or [
            load_study(name) for name in study_names()
        ]
        for study in studies:
            for size in sizes_of(study, directory):
                print(f"{study.name} ({size}): {write_study(study, size, directory)}")
        if not args.study:
            judged = {study.name: judged_sizes(study) for study in studies}
            write_atomically(HERE / "README.md", top_page(studies, judged))
            found = {
                study.name: {size: results_of(study, size) for size in judged[study.name]}
                for study in studies
            }
            figure = draw_all(studies, found)
            figure.savefig(HERE / FIGURE, dpi=DPI, metadata={"Software": None})
    except USER_ERRORS as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
