"""The top page of the experiments: one line per study, one per common claim."""

import json
from collections.abc import Mapping

from experiments.moe_against_dense import run as moe_against_dense
from experiments.study import Study
from experiments.verdict import NOT_RUN, Judged

HEAD = """\
# Experiments

A study is a folder with one file, `study.py`. It holds the question, the published figures, the
arms and the criterion, all written before it is run. `python -m experiments.run STUDY` runs it and
appends to `results.jsonl`. `python -m experiments.report` writes its page and this one from the
results, and computes the verdicts. Studies compose the library. None adds a setting to it.

    python -m moe_jax.data.build --out=runs/corpus
    python -m moe_jax.data.train_tokenizer --corpus=jsonl:runs/corpus \\
        --out=runs/corpus/bpe8192.model
    python -m experiments.run switch_against_dense --jobs=2
    python -m experiments.report switch_against_dense

After a stop, the same command resumes. `--smoke` runs every arm for some steps. `small` is the size
for a CPU. A direction is decided by the differences of paired seeds, by Student's t at 5 %,
corrected for the number of arms. Nothing is concluded before every arm has all of its seeds.
"""


def top_page(studies: list[Study], judged: Mapping[str, Mapping[str, Judged]]) -> str:
    """The page as Markdown.

    Args:
      studies: in the order of the table.
      judged: the claims of each, by its name and size; no size of one without results.
    """
    lines = [HEAD, "| study | question | verdict |", "| --- | --- | --- |"]
    lines += [
        f"| [{study.name}]({study.name}/README.md) | {study.question} | "
        f"{verdicts(study, judged[study.name])} |"
        for study in studies
    ]
    lines += [earlier_study(), "", "| claim | verdict | study |", "| --- | --- | --- |"]
    for study in studies:
        for common in dict.fromkeys(claim.settles for claim in study.expect if claim.settles):
            places = [i for i, claim in enumerate(study.expect) if claim.settles == common]
            said = verdicts(study, {size: j.of(places) for size, j in judged[study.name].items()})
            lines.append(f"| {common} | {said} | [{study.name}]({study.name}/README.md) |")
    return "\n".join(lines) + "\n"


def verdicts(study: Study, judged: Mapping[str, Judged]) -> str:
    """Of some claims of a study together, at each size, and of the rule of the time."""
    said = [
        f"[{found.verdict}]({study.name}/{page_name(size)}) ({size}"
        + f"; {found.older_verdict} by the rule of the time" * bool(found.older_verdict)
        + ")"
        for size, found in judged.items()
    ]
    return ", ".join(said) or NOT_RUN


def page_name(size: str) -> str:
    """The file of a study's page at a size."""
    return "README.md" if size == "small" else f"{size}.md"


def earlier_study() -> str:
    """The line of the study of the quickstart, which has a script and a criterion of its own."""
    path = moe_against_dense.HERE / "results.json"
    said = moe_against_dense.judge(json.loads(path.read_text(encoding="utf-8")))
    passed = "passed" if said["passed"] else "failed"
    return (
        "| [moe_against_dense](moe_against_dense/README.md) | Does the quickstart MoE end below "
        f"its dense twin? | [{passed}: {said['mean_moe']:.3f} against {said['mean_dense']:.3f} "
        "bits/byte](moe_against_dense/report.md) |"
    )
