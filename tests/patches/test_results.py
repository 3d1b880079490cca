"""What launch/pins.sh found of a pin: kept, and told in the table of versions with what it was found beside."""

import importlib.util
from pathlib import Path

import pytest

from r3_adapter.errors import PatchError
from r3_adapter.patch.rebase.results import RESULTS, cell_of, put_result, read_results
from r3_adapter.patch.rebase.table import Row, rows, write_rows
from r3_adapter.patch.series import load_series, patches_root, read_lock, write_lock

SPEC = importlib.util.spec_from_file_location("made_engine", Path(__file__).with_name("made_engine.py"))
made = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(made)

VERSIONS = {"engine": "1.0", "torch": "2.0", "Python": "3.11"}
FOUND = {
    "pin": "engine==1.0",
    "day": "2026-01-06",
    "versions": VERSIONS,
    "steps": {name: {"passed": True, "seconds": 1.0} for name in ("setup", "tests", "prove")},
}


@pytest.fixture
def root(tmp_path: Path, diff_trees) -> Path:
    root = made.make_pins(tmp_path, diff_trees)
    write_rows(root / "README.md", Row("engine", "1.0", "pinned", "not run", "2026-01-05"))
    write_rows(root / "README.md", Row("engine", "1.1", "conflicts: 1 of 1 hunks", "not run", "2026-01-05"))
    return root


def row(root: Path) -> Row:
    return rows(root / "README.md")[0]


def test_the_table_says_what_passed_beside_what(root: Path) -> None:
    put_result(root, FOUND)
    write_rows(root / "README.md")
    assert (row(root).tests, row(root).day) == ("passed: tests, prove (torch 2.0, Python 3.11)", "2026-01-06")
    failed = {**FOUND, "steps": {**FOUND["steps"], "prove": {"passed": False, "seconds": 1.0}}}
    put_result(root, failed)
    write_rows(root / "README.md", Row("engine", "1.0", "pinned", "3 passed", "2026-01-07"))
    assert row(root).tests == "failed: prove; passed: tests (torch 2.0, Python 3.11)"
    assert [each.tests for each in rows(root / "README.md")[1:]] == ["not run"]
    assert len((root / RESULTS).read_text().splitlines()) == 1


def test_the_table_says_that_the_patches_changed_since(root: Path) -> None:
    put_result(root, FOUND)
    tables = read_lock(root)
    tables["engine"]["versions"]["1.0"]["engine/scheduler.py"]["after"] = "0" * 64
    write_lock(root, tables)
    write_rows(root / "README.md")
    assert row(root).tests.startswith("before the patches changed, passed: tests")


def test_what_is_not_of_this_pin_is_refused(root: Path) -> None:
    with pytest.raises(PatchError, match=r"engine==1\.1: no pin"):
        put_result(root, {**FOUND, "pin": "engine==1.1"})
    with pytest.raises(PatchError, match=r"engine==1\.0: the environment has 1\.1"):
        put_result(root, {**FOUND, "versions": {**VERSIONS, "engine": "1.1"}})
    assert read_results(root) == {}
    (root / RESULTS).write_text('{"pin": "engine==1.0"\n')
    with pytest.raises(PatchError, match="malformed"):
        write_rows(root / "README.md")


def test_what_is_recorded_is_in_the_table() -> None:
    """As it was then: a patch that changed since says so only when the table is written again."""
    root = patches_root()
    told = {(each.distribution, each.version): each for each in rows(root / "README.md")}
    pins = {(series.distribution, series.version) for group in load_series().values() for series in group}
    for pin, result in read_results(root).items():
        assert pin in pins
        assert told[pin].day == result["day"]
        assert told[pin].tests.removeprefix("before the patches changed, ") == cell_of(root, result).removeprefix(
            "before the patches changed, "
        )
