"""The top page of the experiments: one line a study, one line a common claim."""

import json
from collections.abc import Mapping

from experiments.moe_against_dense import run as moe_against_dense
from experiments.study import Study

HEAD = """\
# Experiments

A study is a folder with one file, `study.py`: the question, the published figures, the arms, and
the criterion, all written before it is run. `python -m experiments.run STUDY` runs it and appends
to `results.jsonl`; `python -m experiments.report` writes its page, and this one, from those.
Verdicts are computed. Studies compose the library; none adds a setting to it.

    python -m moe_jax.data.build --out=runs/corpus
    python -m moe_jax.data.train_tokenizer --corpus=jsonl:runs/corpus \\
        --out=runs/corpus/bpe8192.model
    python -m experiments.run switch_against_dense --jobs=2
    python -m experiments.report switch_against_dense

Stopped, the same command goes on where it was. `--smoke` runs a study in some minutes.
A direction counts if the mean difference of paired seeds is more than twice the noise: the larger
of the arms' pooled standard deviation and that of the baseline over five seeds.
"""


def top_page(studies: list[Study], verdicts: Mapping[str, str]) -> str:
    """The page as Markdown.

    Args:
      studies: in the order of the table.
      verdicts: of each, by name.
    """
    lines = [HEAD, "| study | question | verdict |", "| --- | --- | --- |"]
    lines += [
        f"| [{study.name}]({study.name}/README.md) | {study.question} | {verdicts[study.name]} |"
        for study in studies
    ]
    lines += [earlier_study(), "", "| claim | verdict | study |", "| --- | --- | --- |"]
    lines += [
        f"| {claim} | {verdicts[study.name]} | [{study.name}]({study.name}/README.md) |"
        for study in studies
        for claim in study.claims
    ]
    return "\n".join(lines) + "\n"


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
