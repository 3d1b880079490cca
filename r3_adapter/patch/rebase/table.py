"""The table of versions in patches/README.md, and the pins in its table of patches."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from packaging.version import Version

from r3_adapter.errors import PatchError
from r3_adapter.marks import cut
from r3_adapter.patch.rebase.results import cell_of, put_result, read_results
from r3_adapter.patch.series import patches_root

START, END = "<!-- versions: written by `r3 patch rebase` -->", "<!-- end of versions -->"
_HEAD = "| Distribution | Version | State | Tests of the series | Looked at |\n| --- | --- | --- | --- | --- |\n"
_COLUMNS = 5


@dataclass(frozen=True)
class Row:
    """What became of a series on a release: pinned, clean, conflicts or breaks; what tests said; the day."""

    distribution: str
    version: str
    state: str
    tests: str
    day: str

    def __str__(self) -> str:
        """Return the row as it is in the table."""
        return f"| {' | '.join(astuple(self))} |"


def write_rows(readme: Path, *more: Row) -> None:
    """Write the table of versions again: rows that are new, and what launch/pins.sh found of the pins since.

    A row takes the place of what the table said of its release.

    Raises:
        PatchError: The file has no such table.
    """
    before, rows, after = _split(readme)
    by_release = {(row.distribution, row.version): row for row in (*rows, *more)}
    for release, result in read_results(readme.parent).items():
        if release in by_release:
            found = cell_of(readme.parent, result)
            by_release[release] = replace(by_release[release], tests=found, day=result["day"])
    ordered = sorted(by_release.values(), key=lambda each: (each.distribution, Version(each.version)))
    lines = "".join(f"{each}\n" for each in ordered)
    readme.write_text(f"{before}{START}\n{_HEAD}{lines}{END}{after}", encoding="utf-8", newline="\n")


def add_pins(readme: Path, distribution: str, version: str, patches: Iterable[str]) -> list[str]:
    """Name a version in the rows of patches that it has; return the patches that have no row."""
    text = readme.read_text(encoding="utf-8")
    missing = []
    for name in patches:
        head = f"| {distribution} `{name}` | "
        found = re.search(rf"^{re.escape(head)}([^|]*) \|", text, re.MULTILINE)
        if not found:
            missing.append(name)
        elif version not in re.split(r"[,:\s]+", found[1]):
            text = text.replace(found[0], f"{head}{found[1]}, {version} |")
    readme.write_text(text, encoding="utf-8", newline="\n")
    return missing


def rows(readme: Path) -> list[Row]:
    """Return the rows of the table of versions."""
    return _split(readme)[1]


def _split(readme: Path) -> tuple[str, list[Row], str]:
    before, table, after = cut(readme.read_text(encoding="utf-8"), START, END, str(readme), PatchError)
    found = []
    for line in table.strip().splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != _COLUMNS:
            raise PatchError(f"{readme}: {line!r} has {len(cells)} columns != {_COLUMNS}")
        found.append(Row(*cells))
    return before, found, after


def main() -> None:
    """Record what is on stdin, as launch/pins.py found it of a pin, and write the table."""
    root = patches_root()
    put_result(root, json.load(sys.stdin))
    write_rows(root / "README.md")


if __name__ == "__main__":
    main()
