"""Writes docs/api.md from the docstrings of the public names: `python -m docs.make_api`."""

import ast
import importlib
import inspect
import itertools
import pathlib
import re
from collections.abc import Iterator

import moe_jax

PAGE = pathlib.Path(__file__).parent / "api.md"
HEAD = """\
# API

The names that `import moe_jax` gives, by module. `python -m docs.make_api` writes this page from
their docstrings. [The legend](../moe_jax/moe/__init__.py) explains the letters of shapes. Methods
that do what [Part](#part) says are listed there alone.
"""


def make_page() -> str:
    """The page as Markdown."""
    lines = [HEAD]
    for module, names in moe_jax.MODULES.items():
        path = pathlib.Path(str(importlib.import_module(module).__file__))
        link = path.relative_to(PAGE.parent.parent).as_posix()
        lines += [f"## {module}\n", f"Source: [{link}](../{link})\n"]
        for name in names:
            value = getattr(moe_jax, name)
            [node] = ast.parse(source := inspect.getsource(value)).body
            if isinstance(node, ast.ClassDef):
                lines += [f"### {name}\n", *describe_class(node, source.splitlines())]
            elif isinstance(node, ast.FunctionDef):
                lines += [f"### {name}\n", *describe_function(node, name)]
    return "\n".join(lines).rstrip() + "\n"


def describe_class(node: ast.ClassDef, source: list[str]) -> Iterator[str]:
    """The docstring of a class, a table of its settings, and its methods."""
    yield markdown(node)
    if rows := list(setting_rows(node, source)):
        head = "| setting | default | bounds | meaning |\n| --- | --- | --- | --- |"
        yield "\n".join([head, *rows, ""])
    for child in node.body:
        if not isinstance(child, ast.FunctionDef) or child.name.startswith("_"):
            continue
        if not (ast.get_docstring(child) or "").startswith("See "):
            yield from describe_function(child, f"{node.name}.{child.name}")


def setting_rows(node: ast.ClassDef, source: list[str]) -> Iterator[str]:
    """A row for each field, except those that the docstring describes."""
    described = re.findall(r"^  (\w+): ", ast.get_docstring(node) or "", re.MULTILINE)
    for field in node.body:
        if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
            continue
        name, value, bounds = ast.unparse(field.target), field.value, ""
        if name in described or value is None:
            continue
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "setting" and value.args:
            bounds = ", ".join(map(ast.unparse, value.keywords))
            value = value.args[0]
        elif isinstance(value, ast.Call) and ast.unparse(value.func) == "dataclasses.field":
            value = value.keywords[0].value
        _, _, comment = source[field.end_lineno - 1][field.end_col_offset :].partition("# ")
        meaning = comment or comment_above(source[: field.lineno - 1])
        cells = (f"`{name}`", f"`{ast.unparse(value)}`", bounds, meaning)
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def comment_above(source: list[str]) -> str:
    """The lines of comment that end these lines of source, joined."""
    above = itertools.takewhile(lambda line: line.startswith("#"), map(str.strip, reversed(source)))
    return " ".join(reversed([line.lstrip("# ") for line in above]))


def describe_function(node: ast.FunctionDef, name: str) -> Iterator[str]:
    """The signature and the docstring of a function, a method or a property."""
    call = "" if node.decorator_list else f"({ast.unparse(node.args)})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    yield f"`{name}{call.replace('(self, ', '(').replace('(self)', '()')}{returns}`\n"
    yield markdown(node)


def markdown(node: ast.ClassDef | ast.FunctionDef) -> str:
    """A Google-style docstring as Markdown: entries as lists, examples as code."""
    doc = ast.get_docstring(node) or ""
    doc = re.sub(r"^([A-Z]\w+):\n", r"**\1**\n\n", doc, flags=re.MULTILINE)
    doc = re.sub(r"^  (\w+): ", r"- `\1`: ", doc, flags=re.MULTILINE)
    doc = re.sub(r"^>>> (?:.+\n?)*", lambda m: f"```python\n{m[0].rstrip()}\n```", doc, flags=re.M)
    return re.sub(r"^  (?=\w)", "", doc, flags=re.MULTILINE) + "\n"


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
