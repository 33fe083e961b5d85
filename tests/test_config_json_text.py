"""Every written JSON file and line is valid for any JSON reader."""

import ast
import json
import pathlib

import numpy as np
import pytest

from moe_jax.config.json_text import finite, json_text

ROOT = pathlib.Path(__file__).parent.parent
NAN, INF = float("nan"), float("inf")


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NAN, None),
        (-INF, None),
        (np.float64("nan"), None),
        ({"a": {"b": [1.5, INF, (NAN, 2)]}}, {"a": {"b": [1.5, None, [None, 2]]}}),
        ([True, None, 7, 0.1, "NaN"], [True, None, 7, 0.1, "NaN"]),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_null(value, expected):
    assert finite(value) == expected
    assert json.loads(json_text(value), parse_constant=refuse) == expected


def test_options_are_those_of_json():
    assert json_text({"b": NAN, "a": 1}, sort_keys=True, indent=1) == '{\n "a": 1,\n "b": null\n}'


def json_writers(path):
    """The lines of a file that call `json.dump` or `json.dumps`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps"):
            if isinstance(node.value, ast.Name) and node.value.id == "json":
                yield f"{path.relative_to(ROOT)}:{node.lineno}"


# These files write no computed numbers, only hashes, round trips, counts and texts of a corpus.
OTHERS = (
    "moe_jax/analysis/comparison.py",  # keys of settings
    "moe_jax/analysis/report.py",
    "moe_jax/analysis/runs.py",
    "moe_jax/checks/",
    "moe_jax/config/json_text.py",
    "moe_jax/data/",
    "moe_jax/interchange/tensor_files.py",  # names, shapes and offsets
    "moe_jax/parallel/processes.py",
    "moe_jax/sweep.py",
    "benchmarks/clean_starts.py",  # counts and seconds
    "benchmarks/llama_cpp.py",  # ids, to a process
    "moe_jax/training/checkpoints.py",
    "moe_jax/training/files.py",  # sizes and hashes
    "moe_jax/training/loop.py",  # messages between processes
    "experiments/study.py",
)


def test_files_with_numbers_are_written_by_one_function():
    found = [
        line
        for folder in ("moe_jax", "experiments", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in json_writers(path)
        if not line.startswith(OTHERS)
    ]
    assert not found
