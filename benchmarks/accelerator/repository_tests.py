"""Runs test files that are useful on an accelerator; results are by name.

They use the highest precision of products, since their tolerances are for float32.
"""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from typing import Any

from benchmarks.accelerator.groups import Row
from benchmarks.accelerator.record import ROOT

FILES = (
    "tests/test_moe_run_experts.py",
    "tests/test_moe_block.py",
    "tests/test_moe_capacity.py",
    "tests/test_moe_experts.py",
    "tests/test_layers_attention.py",
    "tests/test_training_step.py",
)
DRY_FILES = ("tests/test_moe_capacity.py",)


def rows(dry: bool) -> list[Row]:
    """A row for each file."""
    files = DRY_FILES if dry else FILES
    return [Row(name, 60, functools.partial(run_tests, name)) for name in files]


def run_tests(name: str) -> dict[str, Any]:
    """Runs the quick tests of a file.

    Raises:
      RuntimeError: pytest ended without results.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = pathlib.Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", name, "-q", "-m", "not slow",
                   "-p", "no:cacheprovider", f"--junitxml={results}"]  # fmt: skip
        environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        outcome = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if not results.exists():
            raise RuntimeError((outcome.stderr or outcome.stdout).strip()[-250:])
        return counted(results)


def counted(results: pathlib.Path) -> dict[str, Any]:
    """The number of passed tests, and failed tests with the first line of their error."""
    passed, failed = 0, {}
    for case in ElementTree.parse(results).iter("testcase"):
        problems = [one for one in case if one.tag in ("failure", "error")]
        if problems:
            message = problems[0].get("message") or ""
            failed[str(case.get("name"))] = message.splitlines()[0][:150] if message else ""
        elif not case.findall("skipped"):
            passed += 1
    return {"tests_passed": passed, "tests_failed": len(failed), "failed_by_name": failed}
