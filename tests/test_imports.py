"""Imports of packages run one way: packages that describe parts never import their users."""

import ast
import pathlib

import pytest

import moe_jax

FOLDER = pathlib.Path(moe_jax.__file__).parent
PARTS = {"config", "costs", "parallel", "parameters", "part"}
MODELS = PARTS | {"layers", "models", "moe", "weights"}
TRAINING = MODELS | {"data", "files", "training"}
# Other packages of moe_jax that a package may import, even in functions and for types.
MAY_IMPORT = {
    "config": set(),
    "parallel": {"config"},
    "jobs": {"config", "interrupts"},
    "weights": PARTS,
    "moe": PARTS,
    "layers": PARTS | {"moe"},
    "models": PARTS | {"layers", "moe", "weights"},
    "checks": MODELS,
    "data": {"config", "files", "command_line"},  # the last for its commands
    "training": MODELS | {"data", "files", "interrupts", "user_errors"},
    "interchange": MODELS | {"files"},
    "inference": TRAINING,
    "finetune": TRAINING | {"interchange"},
    "planning": TRAINING,
    "analysis": TRAINING | {"jobs", "planning"},
}


def imported(path):
    """Modules and packages of moe_jax that a file imports, by first name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "moe_jax":
                yield rest[0] if rest else "__init__"


def test_every_package_is_in_the_table():
    assert {path.parent.name for path in FOLDER.glob("*/__init__.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package):
    """For example, training imports neither planning, analysis nor inference."""
    for path in (FOLDER / package).rglob("*.py"):
        others = set(imported(path)) - {package}
        assert others <= MAY_IMPORT[package], f"{path.name} imports {others - MAY_IMPORT[package]}"
