"""The names that `import moe_jax` gives."""

import ast
import inspect
import operator
import pathlib
import subprocess
import sys

import pytest
import yaml

import moe_jax

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("name", [name for name in moe_jax.__all__ if name != "__version__"])
def test_a_public_name_can_be_imported_and_is_documented(name):
    value = getattr(moe_jax, name)
    assert value.__name__ == name
    assert inspect.getdoc(value), name
    assert value.__module__.startswith("moe_jax.")


def test_type_checkers_know_the_same_names():
    tree = ast.parse(inspect.getsource(moe_jax))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    known = {(f"{node.module}", alias.name) for node in block.body for alias in node.names}
    assert known == {(module, name) for name, module in moe_jax.MODULE_OF.items()}


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        operator.attrgetter("nothing")(moe_jax)


def test_the_version_is_that_of_the_package_and_of_the_citation():
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == moe_jax.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == moe_jax.__version__


def test_importing_the_package_alone_imports_neither_jax_nor_flax():
    code = "import sys, moe_jax; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
