"""Imports between modules of `moe_jax.data` never form a cycle, imports in functions included."""

import ast
import graphlib
import pathlib

import moe_jax.data

FOLDER = pathlib.Path(moe_jax.data.__file__).parent


def module_name(path):
    parts = path.relative_to(FOLDER.parent.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """Names of modules and of their members that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if name in MODULES]
            # `from package import module` needs nothing from the package itself.
            yield from modules if len(modules) == len(inside) else [node.module, *modules]


MODULES = {module_name(path): path for path in FOLDER.rglob("*.py")}


def test_no_modules_import_each_other():
    graph = {name: MODULES.keys() & set(imported(path)) for name, path in MODULES.items()}
    assert "moe_jax.data.tokenizer" in graph["moe_jax.data.token_files"]  # the graph has edges
    graphlib.TopologicalSorter(graph).prepare()  # raises an error that names the cycle
