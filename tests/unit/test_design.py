"""docs/design.md is the package as it is: each part has its line, each file exists, no part imports one above it."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "r3_adapter"
LINES = re.findall(r"^\| (`.*`) \| (.+) \|$", (REPO / "docs/design.md").read_text(encoding="utf-8"), re.MULTILINE)
NAMED = [[name.removesuffix("/") for name in re.findall(r"`([^`]+)`", names)] for names, _ in LINES]
RANK = {
    name.split("/")[0].removesuffix(".py"): at for at, names in enumerate(NAMED) for name in names if "/" not in name
}
"""By part, which line it has; the first is the top."""

TOGETHER = {("commands", "cli")}
"""The reference of the command line is written from its parser."""

ROUTES = (
    "rollout",
    "codec",
    "repack",
    "layout",
    "trace",
    "compiled",
    "wire",
    "arena",
    "frozen",
    "metrics",
    "reference",
)
ENGINES = ("torch", "megatron", "sglang", "ray")


def parts() -> set[str]:
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that are imported, also inside of functions, but not for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "r3_adapter":
            yield from (f"r3_adapter.{each.name}" for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        yield from imports(node)


def imported_by(part: str) -> set[tuple[str, str]]:
    """Return what a part imports, each with the file that does."""
    folder = PACKAGE / part
    files = folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{part}.py"]
    trees = [(str(path.relative_to(REPO)), ast.parse(path.read_text(encoding="utf-8"))) for path in files]
    return {(path, module) for path, tree in trees for module in imports(tree)}


def test_each_part_has_its_line_and_no_other_has() -> None:
    assert set(RANK) == parts()


@pytest.mark.parametrize("name", [name for names in NAMED for name in names])
def test_what_is_named_exists(name: str) -> None:
    assert (PACKAGE / name).exists()


def test_each_folder_of_the_trainers_side_has_its_line() -> None:
    named = {name.removeprefix("megatron/") for names in NAMED for name in names if name.startswith("megatron/")}
    found = {path.parent.name for path in PACKAGE.glob("megatron/*/__init__.py")}
    assert found <= named


@pytest.mark.parametrize("part", sorted(RANK))
def test_no_part_imports_one_above_it(part: str) -> None:
    for path, module in imported_by(part):
        name = [*module.split("."), ""][1] if module.startswith("r3_adapter.") else ""
        if name in RANK and name != part and (part, name) not in TOGETHER:
            assert RANK[name] >= RANK[part], f"{path} imports {module}, which is above it"


def test_no_modules_import_each_other() -> None:
    """As they are loaded, or for types: imports inside of functions do not count."""
    files = {".".join(path.relative_to(REPO).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in files.items():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        nodes = [
            each for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef) for each in ast.walk(node)
        ]
        found = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        graph[name] = {module for module in found if module in files}
    assert graph["r3_adapter.megatron.replay"]
    # Raises CycleError, which has the circle.
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("part", ROUTES)
def test_routes_know_no_engine(part: str) -> None:
    for path, module in imported_by(part):
        assert module.split(".")[0] not in ENGINES, f"{path} imports {module}"


@pytest.mark.parametrize("part", sorted(RANK))
def test_the_oracle_is_for_tests_alone(part: str) -> None:
    assert "r3_adapter.reference" not in {module for _, module in imported_by(part)}
