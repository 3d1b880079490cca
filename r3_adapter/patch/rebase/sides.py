"""A release with a series on it, and what the finders of breaks say of it.

Three trees are compared: the new release with the series, the same release without it, and the release that the series
is pinned to, with it. A break is what the first has and neither of the others: not upstream's own, and new.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path, PurePosixPath

from r3_adapter.patch.patchfile import split_lines
from r3_adapter.patch.series import TEST_FOLDERS, Contents, Series


@dataclass(frozen=True)
class Side:
    """A release and the same release with a series.

    folder, released: the files with and without the series, below upstream's paths.
    prefix, package: as in `series.Series`.
    version: of the release.
    ours: the lines that the series adds, from 1, by upstream path.
    """

    folder: Path
    released: Path
    prefix: str
    package: str
    version: str
    ours: Mapping[str, frozenset[int]]

    @property
    def dotted(self) -> str:
        """The package as an import names it."""
        return self.package.replace("/", ".")

    def files(self) -> list[str]:
        """Return the Python files that the series touches or adds."""
        return sorted(path for path in self.ours if path.endswith(".py") and (self.folder / path).is_file())

    def sources(self) -> list[str]:
        """Return those of them that are not tests."""
        return [path for path in self.files() if not path.startswith(TEST_FOLDERS)]


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that is not as it was on the pinned release.

    kind: what finds it: names, imports, types, uses, traps or hooks.
    line: from 1; 0 for none.
    breaks: whether the patched engine would fail or do something else; otherwise a maintainer is to read it.
    """

    path: str
    line: int
    kind: str = field(compare=False)
    text: str
    breaks: bool = field(default=True, compare=False)

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else self.path
        return f"{place}: {self.text} ({self.kind})"


def fresh(found: Iterable[Finding], *known: Iterable[Finding]) -> list[Finding]:
    """Return what is found more often in a file than in each of the others; lines may have moved."""
    left = sorted(found)
    for others in known:
        counts = Counter((other.path, other.text) for other in others)
        kept = []
        for each in left:
            key = (each.path, each.text)
            if counts[key]:
                counts[key] -= 1
            else:
                kept.append(each)
        left = kept
    return left


def make_side(folder: Path, series: Series, version: str, released: Contents, changed: Contents) -> Side:
    """Write both trees of a side below a folder.

    released: the source files of the release, by upstream path.
    changed: the bytes of those that the series touches or adds; None for one that it removes.
    """
    for name, files in (("patched", released | changed), ("released", released)):
        for path, data in files.items():
            if data is not None:
                target = folder / name / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
    ours = {path: _added(released.get(path) or b"", data) for path, data in changed.items() if data is not None}
    return Side(folder / "patched", folder / "released", series.prefix, series.package, version, ours)


def _added(old: bytes, new: bytes) -> frozenset[int]:
    """Return the lines of new bytes that are not in the old ones, from 1."""
    blocks = SequenceMatcher(None, split_lines(old), split_lines(new)).get_opcodes()
    return frozenset(line + 1 for tag, _, _, start, end in blocks if tag != "equal" for line in range(start, end))


@cache
def parsed(path: Path) -> ast.Module | None:
    """Return the syntax tree of a file; None for one that is not Python of this interpreter's grammar, or not there."""
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (OSError, SyntaxError, ValueError):
        return None


def module_file(root: Path, dotted: str) -> Path | None:
    """Return the file or folder of a module below a root of imports; None if there is none."""
    place = root.joinpath(*PurePosixPath(dotted.replace(".", "/")).parts)
    for path in (place / "__init__.py", place.with_name(f"{place.name}.py"), place):
        if path.exists():
            return path
    return next(iter(place.parent.glob(f"{place.name}*.so")), None)
