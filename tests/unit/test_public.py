"""The public names are there, say what they take and raise, and are all that the README, docs and examples use."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from r3_adapter.public import ENTRIES, NAMES

REPO = Path(__file__).parents[2]
PAGES = sorted([REPO / "README.md", *(REPO / "docs").rglob("*.md"), *(REPO / "examples").glob("*.py")])
ARRAY = re.compile(r"NDArray|Tensor\b|Logprobs")
IMPORT = re.compile(r"^ *from (r3_adapter[\w.]*) import ([\w, ]+)", re.MULTILINE)
DEFINED = [(module, name) for module, names in NAMES.items() for name in names if module != "r3_adapter"]
Definition = ast.FunctionDef | ast.ClassDef


def file_of(module: str) -> Path:
    path = REPO / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def definitions(module: str, name: str) -> Iterator[tuple[str, Definition]]:
    """Yield a public function; or a class and its public methods."""
    body = tree_of(module).body
    if any(isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node) for node in body):
        return
    for node in body:
        if isinstance(node, ast.ImportFrom) and name in {each.name for each in node.names}:
            yield from definitions(str(node.module), name)
            return
    (found,) = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
    yield name, found
    for method in found.body if isinstance(found, ast.ClassDef) else ():
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            yield f"{name}.{method.name}", method


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    return [ast.unparse(each) for each in (node.targets if isinstance(node, ast.Assign) else [node.target])]


def arrays(node: Definition) -> list[str]:
    """Return the names of a function's arguments, or a class's public fields, that are arrays."""
    if isinstance(node, ast.FunctionDef):
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return [each.arg for each in given if each.annotation and ARRAY.search(ast.unparse(each.annotation))]
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    names = [ast.unparse(each.target) for each in fields if ARRAY.search(ast.unparse(each.annotation))]
    return [name for name in names if not name.startswith("_")]


@pytest.mark.parametrize(("module", "name"), DEFINED)
def test_a_public_name_says_what_it_is(module: str, name: str) -> None:
    for full, node in definitions(module, name):
        said = ast.get_docstring(node)
        assert said, f"{module}.{full} has no docstring"
        for array in arrays(node):
            shape = re.search(rf"(?m)^ *(?:\w+, )*{array}(?:, \w+)*: [^\n]*\[\w[^\]]*\] +\w+", said)
            assert shape, f"{module}.{full}: no shape and dtype of {array}"
        if isinstance(node, ast.FunctionDef) and any(isinstance(each, ast.Raise) for each in ast.walk(node)):
            assert "Raises:\n" in said, f"{module}.{full}: raises, and does not say what"


def test_the_reference_has_every_public_name_and_no_other() -> None:
    page = (REPO / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    listed = [tuple(name.rsplit(".", 1)) for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)]
    errors = re.search(r"members: \[([\w, ]+)\]", page)
    listed.remove(("r3_adapter", "errors"))
    listed += [("r3_adapter.errors", name) for name in (errors[1] if errors else "").split(", ")]
    assert sorted(listed) == sorted(DEFINED)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_pages_and_examples_use_public_names_alone(path: Path) -> None:
    for module, names in IMPORT.findall(path.read_text(encoding="utf-8")):
        private = set(re.split(r",\s*", names.strip())) - set(NAMES.get(module, ()))
        assert not private, f"{path.name}: {module} has no public {', '.join(sorted(private))}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_is_there(entry: str) -> None:
    module, _, name = entry.rpartition(".")
    if file_of(entry).is_file():
        return
    body = tree_of(module).body
    names = [each.name for node in body if isinstance(node, ast.ImportFrom) for each in node.names]
    assert name in [*names, *(node.name for node in body if isinstance(node, ast.FunctionDef))]
