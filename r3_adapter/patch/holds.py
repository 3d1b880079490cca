"""Whether patched files of a source tree hold: names, imports, and the tests that the series brings.

The files are looked at in a folder of links beside the tree, before anything of the tree is changed.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import environ, pathsep
from pathlib import Path, PurePosixPath
from typing import Any

from r3_adapter.errors import PatchError, R3Error
from r3_adapter.patch.checkout import Made
from r3_adapter.patch.names import undefined_names
from r3_adapter.patch.series import Series, write_upstream_tests
from r3_adapter.processes import run_together

TIMEOUT = 1200.0
"""Seconds for the imports and the tests together; engines take long to import, and compile."""


_SHOWN = 20


@dataclass(frozen=True)
class Tree:
    """A tree of an engine's source: the folder that upstream's paths start from, and what imports start from."""

    folder: Path
    prefix: str

    @property
    def root(self) -> Path:
        """What goes to PYTHONPATH."""
        return self.folder / self.prefix


def check(made: Made, python: Path, *, tests: bool = True) -> list[str]:
    """Say in lines what was checked of patched files, in the order of how much it tells.

    python: the interpreter that the engine is installed for.
    tests: run the series' own tests too, as far as they can run there.

    Raises:
        PatchError: Names are not defined, modules cannot be imported that could be before, or tests fail.
    """
    series, sources = made.series, _sources(made)
    with tempfile.TemporaryDirectory(prefix="r3-patch-") as temporary:
        folder = Path(temporary)
        before, after = (Tree(place, series.prefix) for place in (made.checkout.folder, folder / "tree"))
        link_tree(before.folder, after.folder, series, made.files)
        wrong = [
            f"{path}: {name} is not defined"
            for path, data in sources.items()
            for name in undefined_names(path, data).keys() - undefined_names(path, _bytes(before.folder / path)).keys()
        ]
        if wrong:
            raise PatchError(
                f"{made.checkout}: the patched files do not hold; nothing changed:\n" + "\n".join(sorted(wrong))
            )
        written = write_upstream_tests(series, folder / "tests") if tests else []
        modules = [_module(series, path) for path in sources]
        files = [str(path) for path in written if path.name.startswith("test_")]
        found = _probe(made, after, modules, files, python, folder / "after")
        said, wrong = _imports(made, before, found["imports"], python, folder / "before")
        if tests:
            more, failed = _tests(found["tests"], python)
            said, wrong = said + more, wrong + failed
    if wrong:
        raise PatchError(f"{made.checkout}: the patched files do not hold; nothing changed:\n" + _shortened(wrong))
    return said


def _shortened(lines: Sequence[str]) -> str:
    """Return the first lines: one cause can fail hundreds of tests."""
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([*lines[:_SHOWN], *more])


def link_tree(source: Path, target: Path, series: Series, files: Mapping[str, bytes | None]) -> None:
    """Make a folder of links to a package's files, but for those that have other bytes, None for no file."""
    top = PurePosixPath(series.prefix, series.package.partition("/")[0])
    mine = {path for path in files if PurePosixPath(path).is_relative_to(top)}
    real = {parent for path in mine for parent in PurePosixPath(path).parents} | {top}
    _link(source, target, top, mine, real)
    for path in mine:
        data = files[path]
        if data is not None:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(data)


def _link(source: Path, target: Path, folder: PurePosixPath, mine: set[str], real: set[PurePosixPath]) -> None:
    (target / folder).mkdir(parents=True, exist_ok=True)
    for entry in (source / folder).iterdir():
        here = folder / entry.name
        if entry.name == "__pycache__" or str(here) in mine:
            continue
        if here in real and entry.is_dir():
            _link(source, target, here, mine, real)
        else:
            (target / here).symlink_to(entry.resolve())


def _sources(made: Made) -> dict[str, bytes]:
    """Return the patched modules of the package, by upstream path."""
    inside = f"{made.series.prefix}{made.series.package}/"
    return {
        path: data
        for path, data in made.files.items()
        if path.startswith(inside) and path.endswith(".py") and data is not None
    }


def _module(series: Series, path: str) -> str:
    return path.removeprefix(series.prefix).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _probe(
    made: Made, tree: Tree, modules: Sequence[str], tests: Sequence[str], python: Path, folder: Path
) -> dict[str, Any]:
    """Ask an interpreter about a tree."""
    folder.mkdir()
    here = Path(__file__).resolve().parents[1]
    shutil.copyfile(here / "patch/probe.py", folder / "probe.py")
    # Of the folder that this package is in nothing else may be found there: it may be another interpreter's.
    (folder / "r3_adapter").symlink_to(here)
    question = {"distribution": made.series.distribution, "modules": modules, "tests": tests}
    (folder / "question.json").write_text(json.dumps(question), encoding="utf-8")
    paths = [str(tree.root), str(folder.parent / "tests"), *filter(None, [environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(python), *(str(folder / name) for name in ("probe.py", "question.json", "answer.json"))]
    try:
        run_together([command], env=[variables], timeout=TIMEOUT, what=f"check with {python}")
    except OSError as error:
        raise PatchError(f"{python}: cannot be run: {error.strerror}") from error
    except R3Error as error:
        raise PatchError(f"{made.checkout}: {error}; nothing changed") from error
    found: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return found


def _imports(
    made: Made, before: Tree, after: Mapping[str, str], python: Path, folder: Path
) -> tuple[list[str], list[str]]:
    """Return what the imports say, and which fail that did not before."""
    failed = {module: error for module, error in after.items() if error}
    if not failed:
        return [f"all {len(after)} patched modules can be imported with {python}"], []
    there = [module for module in failed if _is_there(before, module)]
    was = _probe(made, before, there, [], python, folder)["imports"]
    known = {error for error in was.values() if error}
    wrong = {module: error for module, error in failed.items() if not was.get(module) and error not in known}
    left = {module: error for module, error in failed.items() if module not in wrong}
    said = []
    if len(left) == len(after):
        _, error = next(iter(left.items()))
        said = [f"no engine that can be imported with {python} ({error}): only syntax and names were checked"]
    elif left:
        named = "; ".join(f"{module} ({error})" for module, error in list(left.items())[:3])
        said = [f"{len(left)} of {len(after)} patched modules cannot be imported with {python}, as before: {named}"]
    return said, [f"{module} cannot be imported any more: {error}" for module, error in wrong.items()]


def _tests(found: Mapping[str, Any] | None, python: Path) -> tuple[list[str], list[str]]:
    """Return what the tests say, and which fail."""
    if found is None:
        return [f"the series' own tests were not run: modules or pytest cannot be imported with {python}"], []
    if not (found["passed"] or found["failed"] or found["skipped"]):
        return ["the series brings no tests"], []
    said = f"the series' own tests: {len(found['passed'])} passed, {len(found['skipped'])} skipped"
    return [said], [f"{test}: {why}" for test, why in found["failed"].items()]


def _is_there(tree: Tree, module: str) -> bool:
    path = tree.root / module.replace(".", "/")
    return path.with_name(f"{path.name}.py").is_file() or (path / "__init__.py").is_file()


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
