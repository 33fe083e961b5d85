"""The top page of the experiments: findings first, then the studies, then the log."""

import json
from collections.abc import Mapping

from experiments.from_plans import exchange_text, memory_text, read_plans
from experiments.moe_against_dense import run as moe_against_dense
from experiments.study import HERE, Study
from experiments.tables import table
from experiments.top_figure import NAME as FIGURE
from experiments.verdict import NOT_RUN, Judged

# Common claims about MoE, worded as in `Claim.settles` of the studies; other claims follow these.
CLAIMS = (
    "A larger model is better at the same active cost.",
    "At equal active parameters an MoE has the quality of a larger dense model.",
    "Without balancing, routing collapses onto a few experts.",
    "Load can be balanced without a loss of quality.",
    "A bias balances the load more than a load-balance loss of 0.01.",
    "Finer experts are better at the same cost and parameters.",
    "Shared experts carry general knowledge.",
    "Experts specialise by domain or token.",
    "Two experts a token are no worse than one, at the same cost.",
    "Learned routing is worth more than experts by position or at random.",
    "Router jitter makes little difference to the loss.",
    "A router z-loss keeps logits small at no cost.",
    "After training with little capacity, evaluating with more is better.",
    "Expert choice, Soft MoE and batch-prioritised queues look ahead in a decoder; top-K with "
    "token-major queues does not.",
)
MEMORY, EXCHANGE = (
    "An MoE pays memory for compute.",
    "At scale the exchange of tokens, all-to-all, takes most of the time.",
)
HEAD = f"""\
# Studies of mixtures of experts

Each study asks one question, and its criterion was written before it was run. A failed one stays on
this page. Where part of the answer was known before, the study's page says so. The size is in
brackets: `small` took two CPU cores one to five hours, with 0.1 to 0.2 M active parameters;
`medium` is for two cores and a night, 0.8 M; `gpu` for one card, 14 M; `base` for several.

![Held-out loss against active FLOPs per token]({FIGURE})

A point is an arm, its mean over the seeds that all arms of its study share. Points compare within
one colour: studies differ in tokens and in text. Students of distillation and upcycled models
inherit trained parameters; those steps are not in the figure.

## Claims
"""
FOOT = """\
## How a verdict is reached

A direction is decided by the differences of runs that share a seed, by Student's t at 5 %. Arms
are alike where they differ by less than 0.03 bits a byte, tested from one side. A failure of one
among several arms is corrected for their number. Nothing is concluded before every arm has all of
its seeds. A study is as good as its worst claim. Runs made under an earlier rule keep its verdict
beside the new one. [docs/studies.md](../docs/studies.md) says more, and how to write a study.

## Run

    python -m moe_jax.data.build --out=runs/corpus  # 212 MB of text; needs apt-get, npm and pip
    python -m experiments.run multi_token --jobs=2
    python -m experiments.report

Runs whose results are here already are not run again: `--out=DIR` of both commands keeps yours
apart. After a stop, the same command resumes. `--smoke` runs every arm for some steps. The last
command writes all pages from results alone. Sizes above `medium` need a tokenizer:

    python -m moe_jax.data.train_tokenizer --corpus=jsonl:runs/corpus \\
        --out=runs/corpus/bpe8192.model

The size `gpu` may read a packed corpus, which is small enough to take along: see
[docs/data.md](../docs/data.md#pack).

## Log

What was tried, and what failed.
"""


def top_page(studies: list[Study], judged: Mapping[str, Mapping[str, Judged]]) -> str:
    """The page as Markdown.

    Args:
      studies: the studies, in the order of the table.
      judged: judged claims by study name and size; only sizes with results.
    """
    questions = [
        (f"[{study.name}]({study.name}/README.md)", study.question,
         verdicts(study, judged[study.name]) or NOT_RUN)
        for study in studies
    ]  # fmt: skip
    parts = [
        HEAD,
        table(("claim", "verdict", "study"), claim_lines(studies, judged)),
        "\n## Studies\n",
        table(("study", "question", "verdict"), [*questions, earlier_study()]),
        f"\n{FOOT}",
        (HERE / "log.md").read_text(encoding="utf-8").rstrip(),
    ]
    return "\n".join(parts) + "\n"


def claim_lines(
    studies: list[Study], judged: Mapping[str, Mapping[str, Judged]]
) -> list[tuple[str, str, str]]:
    """A table row for each common claim: claim, verdicts and studies."""
    lines = []
    settled = [claim.settles for study in studies for claim in study.expect if claim.settles]
    for common in dict.fromkeys((*CLAIMS, *settled)):
        found, links = [], []
        for study in studies:
            places = [i for i, claim in enumerate(study.expect) if claim.settles == common]
            if places:
                of_claim = {size: j.of(places) for size, j in judged[study.name].items()}
                of_claim = {s: j for s, j in of_claim.items() if j.is_run}
                found += [verdicts(study, of_claim)] * bool(of_claim)
                links.append(f"[{study.name}]({study.name}/README.md)")
        lines.append((common, "; ".join(found) or NOT_RUN, ", ".join(links)))
    plans = read_plans()
    plan = "[plan](from_plans.py)"
    return [*lines, (MEMORY, memory_text(plans), plan), (EXCHANGE, exchange_text(plans), plan)]


def verdicts(study: Study, judged: Mapping[str, Judged]) -> str:
    """The joint verdict on claims of a study at each size, also under the earlier rule."""
    return ", ".join(
        f"[{found.verdict}]({study.name}/{page_name(size)}) ({size}"
        + f"; {found.older_verdict} under the earlier rule" * bool(found.older_verdict)
        + ")"
        for size, found in judged.items()
    )


def page_name(size: str) -> str:
    """The file name of a study's page at a size."""
    return "README.md" if size == "small" else f"{size}.md"


def earlier_study() -> tuple[str, str, str]:
    """The row of the quickstart study, which has its own script and criterion."""
    path = moe_against_dense.HERE / "results.json"
    judgement = moe_against_dense.judge(json.loads(path.read_text(encoding="utf-8")))
    passed = "passed" if judgement["passed"] else "failed"
    return (
        "[moe_against_dense](moe_against_dense/README.md)",
        "Does the quickstart MoE end below its dense twin?",
        f"[{passed}: {judgement['mean_moe']:.3f} against {judgement['mean_dense']:.3f} "
        "bits/byte](moe_against_dense/report.md)",
    )
