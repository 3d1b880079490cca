"""Patched files of a source tree that do not hold are refused before the tree is changed."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from r3_adapter.errors import PatchError
from r3_adapter.patch import checkout
from r3_adapter.patch.checkout import TreeOutcome
from r3_adapter.patch.holds import check
from r3_adapter.patch.names import undefined_names

SPEC = importlib.util.spec_from_file_location("patched_world", Path(__file__).with_name("patched_world.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)
World = made.World

OLD = {
    "alpha/core/a.py": b"import os\n\n\ndef f():\n    return os.sep\n",
    "alpha/core/sub/b.py": b"def g():\n    return 1\n",
    "alpha/core/sub/c.py": b"import alpha.core.a\n",
}
TEST = "tests/unit/test_a.py"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def apply(
    world: World, folder: Path, old: dict[str, bytes], new: dict[str, bytes], python: str = sys.executable
) -> TreeOutcome:
    """Make a series of one patch and apply it to a tree of the old files."""
    for path in (world.root / "alpha/1.0").iterdir():
        path.unlink()
    world.add_patch("alpha/1.0", "0001-x.patch", OLD, {**OLD, **new})
    tree = made.make_tree(folder, OLD)
    if old:
        made.commit_files(tree, old, "theirs")
    before = made.files_below(tree.top)
    try:
        found = checkout.open_checkout(tree.top, (), world.root)
        return checkout.apply(found, lambda files: check(files, Path(python)))
    except PatchError:
        keep = {path for path in before if not path.startswith(".git")}
        assert {path: made.files_below(tree.top).get(path) for path in keep} == {path: before[path] for path in keep}
        assert tree.line("status", "--porcelain") == ""
        raise


def test_imports_and_tests_are_tried(world: World, tmp_path: Path) -> None:
    new = {
        "alpha/core/sub/b.py": b"import alpha.core.sub.c\nimport alpha.core.sub.new\n\n\ndef g():\n    return 2\n",
        "alpha/core/sub/new.py": b"N = 1\n",
        TEST: b"import pytest\nfrom alpha.core.sub.b import g\n\n\ndef test_g():\n    assert g() == 2\n\n\n"
        b"@pytest.mark.skip\ndef test_h():\n    assert False\n",
    }
    said = apply(world, tmp_path / "tree", {}, new).said
    assert f"all 2 patched modules can be imported with {sys.executable}" in said
    assert "the series' own tests: 1 passed, 1 skipped" in said
    assert list(tmp_path.glob("tree/**/__pycache__")) == []


def test_a_failing_test_is_named(world: World, tmp_path: Path) -> None:
    new = {
        "alpha/core/sub/b.py": b"def g():\n    return 2\n",
        TEST: b"from alpha.core.sub.b import g\n\n\ndef test_g():\n    assert g() == 3\n",
    }
    with pytest.raises(PatchError, match=r"do not hold; nothing changed:\n.*test_a\.py::test_g: assert 2 == 3"):
        apply(world, tmp_path / "tree", {}, new)


def test_a_module_that_cannot_be_imported_any_more_is_named(world: World, tmp_path: Path) -> None:
    new = {"alpha/core/sub/b.py": b"from alpha.core.a import gone\n\n\ndef g():\n    return gone\n"}
    with pytest.raises(PatchError, match=r"alpha\.core\.sub\.b cannot be imported any more: ImportError: .*'gone'"):
        apply(world, tmp_path / "tree", {}, new)


def test_what_could_not_be_imported_before_is_no_fault(world: World, tmp_path: Path) -> None:
    new = {"alpha/core/sub/b.py": b"def g():\n    return 2\n", TEST: b"def test_g():\n    assert 0\n"}
    missing = {"alpha/core/__init__.py": b"import not_installed_here\n"}
    said = apply(world, tmp_path / "tree", missing, new).said
    why = "(ModuleNotFoundError: No module named 'not_installed_here')"
    assert f"no engine that can be imported with {sys.executable} {why}: only syntax and names were checked" in said
    assert any("own tests were not run" in line for line in said)
    half = {"alpha/core/sub/b.py": b"import not_installed_here\n" + OLD["alpha/core/sub/b.py"]}
    new = {"alpha/core/sub/b.py": b"def g():\n    return 2\n", "alpha/core/sub/new.py": b"N = 1\n"}
    said = apply(world, tmp_path / "other", half, new).said
    assert any(line.startswith("1 of 2 patched modules cannot be imported") for line in said)


def test_names_that_nothing_defines_are_found_without_an_engine(world: World, tmp_path: Path) -> None:
    new = {"alpha/core/a.py": b"def f():\n    return os.sep\n"}
    with pytest.raises(PatchError, match=r"alpha/core/a\.py: os is not defined"):
        apply(world, tmp_path / "tree", {}, new, python="/no/such/python")
    with pytest.raises(PatchError, match=r"alpha/core/a\.py: no Python: "):
        apply(world, tmp_path / "other", {}, {"alpha/core/a.py": b"def f(:\n"})
    with pytest.raises(PatchError, match=r"/no/such/python: cannot be run: No such file"):
        apply(world, tmp_path / "third", {}, {"alpha/core/a.py": b"def f():\n    return 1\n"}, python="/no/such/python")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (
            "import a\nfrom b import c as d\n\ndef f(x, *y, **z):\n"
            "    return a, d, x, y, z, f, len, __name__, __file__\n",
            set(),
        ),
        ("def f():\n    global g\n    g = 1\n\ndef h():\n    return g\n", set()),
        ("class A:\n    x = 1\n    def f(self):\n        return __class__, super().f, x\n", {"x"}),
        ("def f():\n    y = 1\n    return lambda: (y, [z for z in w])\n", {"w"}),
        ("from a import *\n\nprint(anything)\n", set()),
        ("try:\n    import a\nexcept ImportError:\n    a = None\nfor b in a:\n    pass\nprint(b, c)\n", {"c"}),
        ("def f(x: T) -> T:\n    return x\n", {"T"}),
    ],
)
def test_undefined_names(text: str, names: set[str]) -> None:
    found = undefined_names("x.py", text.encode())
    assert found.keys() == names
    for name, lines in found.items():
        assert lines == [at + 1 for at, line in enumerate(text.splitlines()) if name in re.split(r"\W+", line)]
