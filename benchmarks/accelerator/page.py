"""Makes docs/accelerators.md from the records in docs/accelerators/, one file per card."""

import datetime
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from benchmarks.accelerator.goals import GOALS
from benchmarks.accelerator.groups import GROUPS, TESTS
from benchmarks.accelerator.record import FAILED, MEASURED, NOT_REACHED, ROOT, START, Line, Record
from moe_jax.config.json_text import json_text

PAGE = ROOT / "docs" / "accelerators.md"
FOLDER = ROOT / "docs" / "accelerators"
TEXT = pathlib.Path(__file__).with_name("page.md")

Rows = dict[tuple[str, str], Line]


def publish(record: Record) -> str:
    """Puts a record into `FOLDER`, if it is from an accelerator, and makes the page.

    Returns:
      One line about the result.
    """
    rows = record.last() | record.last(MEASURED)  # a measured line overrides later failures
    said = "no rows: the page is made of what is there"
    if rows:
        device = rows.get(("facts", "device"), {})
        if device.get("platform") in (None, "cpu"):
            said = f"{record.path} is of no accelerator, and is left out"
        else:
            path = FOLDER / f"{slug(device['kind'])}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json_text(list(rows.values()), indent=1) + "\n", encoding="utf-8")
            said = f"{path}: {len(rows)} rows"
    PAGE.write_text(make_page(), encoding="utf-8")
    return said


def slug(kind: str) -> str:
    """The file name of a card: nvidia-h100-80gb-hbm3 for "NVIDIA H100 80GB HBM3"."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def measured_cards() -> list[Rows]:
    """The rows of every file in `FOLDER`."""
    files = sorted(FOLDER.glob("*.json")) if FOLDER.exists() else []
    lines = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    return [{(line["group"], line["row"]): line for line in one} for one in lines]


def make_page(cards: list[Rows] | None = None) -> str:
    """The page of these cards; None: the cards in `FOLDER`."""
    cards = measured_cards() if cards is None else cards
    text = TEXT.read_text(encoding="utf-8")
    parts = [
        text.replace("<!-- where -->\n", where(cards)).replace("<!-- goals -->\n", goals(cards))
    ]
    parts += [of_card(rows) for rows in cards]
    return "\n".join(parts)


def where(cards: list[Rows]) -> str:
    """The table of runs by card."""
    if not cards:
        return (
            "**Never run.** No GPU and no TPU was at hand yet. "
            "On a machine with one, the commands below fill this page.\n"
        )
    made = [
        (device["kind"], device["versions"].get("jax", "?"), ", ".join(commits(rows)),
         day(device), counts(rows))
        for rows in cards for device in [rows["facts", "device"]]
    ]  # fmt: skip
    return table(("card", "jax", "commit", "date", "rows"), made)


def day(line: Line) -> str:
    """The date of a line."""
    return datetime.datetime.fromtimestamp(line["at"], datetime.UTC).date().isoformat()


def commits(rows: Rows) -> list[str]:
    """The commits of the measured rows."""
    return sorted({line["commit"] for line in rows.values() if line.get("commit")})


def counts(rows: Rows) -> str:
    """Numbers of rows measured, failed and left out."""
    states = [line["state"] for line in rows.values()]
    left = len(states) - states.count(MEASURED) - states.count(FAILED)
    return f"{states.count(MEASURED)} measured, {states.count(FAILED)} failed, {left} left out"


def goals(cards: list[Rows]) -> str:
    """The table of every goal on every card."""
    kinds = [rows["facts", "device"]["kind"] for rows in cards] or ["any card"]
    found = cards or [{}]
    lines = [(goal.text, *(goal.verdict(rows) for rows in found)) for goal in GOALS]
    return table(("goal", *kinds), lines)


def table(head: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    head = list(head)
    rows = [head, ["---"] * len(head), *([cell(value) for value in line] for line in lines)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def cell(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value).replace("|", "/")


def of_card(rows: Rows) -> str:
    """The section of a card."""
    device = rows["facts", "device"]
    parts = [f"## {device['kind']}\n", machine(rows)]
    for group in (*GROUPS, TESTS):
        own = {name: line for (of, name), line in rows.items() if of == group.name}
        if own:
            parts += [f"### {group.title}\n", TABLES[group.name](own), left_out(own)]
    return "\n".join(part for part in parts if part)


def machine(rows: Rows) -> str:
    """Device, versions, and rates at the beginning and the end."""
    device = rows["facts", "device"]
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
    lines = [
        ("devices", f"{device['devices']}, of which one is measured; {device['memory_gb']} GB"),
        ("card, at the beginning", device["card"]),
        ("versions", f"Python {device['python']}, {versions}"),
        ("published bfloat16 rate", f"{device['peak_tflops'] or 'not known'} TFLOP/s"),
    ]
    kernels = rows.get(("facts", "kernels"), {})
    for what in ("grouped", "attention"):
        unfit = kernels.get(what, {})
        lines += [(f"{what}: {name}", why or "can run") for name, why in unfit.items() if name]
    lines += [(f"run_experts={way!r}", plan) for way, plan in kernels.get("plans", {}).items()]
    for (group, name), line in rows.items():
        end = " at the end" if group == "facts_again" else ""
        if group.startswith("facts") and line["state"] == MEASURED:
            if "tflops" in line:
                lines.append((name + end, f"{line['tflops']:.1f} TFLOP/s"))
            if "gb_per_s" in line:
                lines.append((name + end, f"{line['gb_per_s']:,.0f} GB/s, read and written"))
    return table(("what", "found"), lines)


def left_out(own: dict[str, Line]) -> str:
    """The rows without numbers: tried rows, each with its reason, and others."""
    lines, others = [], []
    for name, line in own.items():
        if line.get("reason") == NOT_REACHED:
            others.append(name)
        elif line["state"] == FAILED or (line["state"] != MEASURED and name != START):
            lines.append(f"- {name}: {line['state']}, {line.get('error') or line.get('reason')}\n")
    return "".join(lines) + (f"- {NOT_REACHED}: {'; '.join(others)}\n" if others else "")


def measured(own: dict[str, Line]) -> dict[str, Line]:
    """The rows with numbers."""
    return {name: line for name, line in own.items() if line["state"] == MEASURED}


def of_speed(own: dict[str, Line]) -> str:
    """The table of time, rate and memory of every row."""
    head = ("row", "ms", "range", "TFLOP/s", "of the matmul rate", "MB", "error")
    lines = [
        (name, line["ms"], f"{line['ms_low']:.3g} to {line['ms_high']:.3g}", line["tflops"],
         percent(line["share"]), line.get("program_mb"), wrong_in(line))
        for name, line in measured(own).items()
    ]  # fmt: skip
    return table(head, lines)


def wrong_in(line: Line) -> str:
    """The error of a checked row, and a mark if it is wrong."""
    found = [error_of(line, "error")] if "error" in line else []
    if line.get("empty_expert", 0.0) != 0.0:
        found.append(f"**empty expert {error_of(line, 'empty_expert')}**")
    if not line.get("finite", True):
        found.append("**not finite**")
    return ", ".join(found)


def of_layers(own: dict[str, Line]) -> str:
    """The table of every form, relative to the dense FFN."""
    head = ("row", "over a dense FFN", "range", "ms", "of the matmul rate", "kept", "MB")
    lines = [
        (name, f"{line['over_dense']:.2f}",
         f"{line['over_dense_low']:.2f} to {line['over_dense_high']:.2f}", line["ms"],
         percent(line["share"]), percent(line["kept"]), line.get("program_mb"))
        for name, line in measured(own).items()
    ]  # fmt: skip
    return table(head, lines)


def of_parity(own: dict[str, Line]) -> str:
    """The table of errors, tolerances and verdicts."""
    head = ("row", "largest error", "of", "tolerance", "verdict")
    lines = [
        (name, error_of(line, "error"), line["of"], f"{line['tolerance']:.0e}", passed(line))
        for name, line in measured(own).items()
    ]
    return table(head, lines)


def passed(line: Line) -> str:
    """The verdict on a parity row."""
    cpu = f", a CPU in this dtype has {error_of(line, 'cpu_error')}" if "cpu_error" in line else ""
    return ("pass" if line["passed"] else "**fail**") + cpu


def of_steps(own: dict[str, Line]) -> str:
    """The table of the speed of training steps."""
    head = (
        "row",
        "what fits",
        "tokens/s",
        "MFU",
        "half square",
        "of the matmul rate",
        "dropped",
        "MB",
        "loss",
    )
    lines = [
        (name, f"{line['parameters'] / 1e9:.2f} B, {line['config']}",
         f"{line['tokens_per_s']:,.0f}", percent(line["mfu"]), percent(line["mfu_causal"]),
         percent(line["share"]),
         percent(line["dropped"]), line.get("program_mb"), loss_of(line))
        for name, line in measured(own).items()
    ]  # fmt: skip
    return table(head, lines)


def error_of(line: Line, name: str) -> str:
    """A relative error; in JSON, null is nan or infinity."""
    return "nan" if line[name] is None else f"{line[name]:.1e}"


def loss_of(line: Line) -> str:
    """The first and the last loss, and a note if they are wrong."""
    first, *_, last = line["losses"]
    wrong = "" if line["finite"] else ", **not finite**"
    return f"{first} to {last}" + (wrong or ("" if line["falls"] else ", **does not fall**"))


def of_quickstart(own: dict[str, Line]) -> str:
    """Losses on the device and on the CPU, step by step."""
    found = measured(own)
    steps = sorted({step for line in found.values() for step in line["losses"]}, key=int)
    head = ("where", *(f"loss at {step}" for step in steps), "tokens/s")
    lines = [
        (name, *(line["losses"].get(step) for step in steps), line["tokens_per_s"])
        for name, line in found.items()
    ]
    return table(head, lines)


def of_tests(own: dict[str, Line]) -> str:
    """Numbers of passed tests, and failed tests by name."""
    lines = [
        (name, line["tests_passed"], line["tests_failed"], ", ".join(line["failed_by_name"]))
        for name, line in measured(own).items()
    ]
    return table(("file", "passed", "failed", "which failed"), lines)


def percent(share: float | None) -> str:
    """A share in percent."""
    return "" if share is None else f"{share:.0%}"


TABLES = {
    "parity": of_parity, "experts": of_speed, "torch_experts": of_speed, "layers": of_layers,
    "attention": of_speed, "step": of_steps, "quickstart": of_quickstart,
    "repository_tests": of_tests, "other_kernels": of_speed, "cudnn_fusion": of_speed,
}  # fmt: skip
