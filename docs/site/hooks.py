"""Hooks of MkDocs: pages outside of docs/, and links to files of the repository.

Links in a page are those of the repository, so that they hold where the files are read as they are; here each is
rewritten to what the site has.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE: Mapping[str, str] = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "patches/README.md": "patches.md",
}
"""Pages of the site that lie elsewhere in the repository, and what they are called there. Other pages below
benchmarks/, whose names are in capitals, keep their path and are not in the navigation."""
_TARGET = re.compile(r"(\]\(|\b(?:src|srcset|href)=\")([^)\"\s]+)([)\"])")
_ELSEWHERE = re.compile(r"[a-z]+:|#|/")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/."""
    for place, page in _outside(_root(config)).items():
        files.append(File.generated(config, page, abs_src_path=str(_root(config) / place)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite a page's links to files of the repository."""
    return "\n".join(
        line if code else _TARGET.sub(lambda found: _rewritten(found, page.file.src_uri, config, files), line)
        for line, code in lines(markdown)
    )


def lines(markdown: str) -> Iterator[tuple[str, bool]]:
    """Yield each line of a page, and whether it is code."""
    fence = ""
    for line in markdown.split("\n"):
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and not fence:
            fence = mark[1]
            yield line, True
        elif fence:
            if line.strip() == fence:
                fence = ""
            yield line, True
        else:
            yield line, line.startswith("    ")


def _rewritten(found: re.Match[str], page: str, config: MkDocsConfig, files: Files) -> str:
    before, target, after = found.groups()
    if _ELSEWHERE.match(target):
        return found[0]
    path, mark, anchor = target.partition("#")
    place = posixpath.normpath(posixpath.join(posixpath.dirname(_place_of(page)), path))
    goal = _page_of(place, config, files)
    if goal is None:
        return found[0]  # MkDocs says that it is not there
    return f"{before}{posixpath.relpath(goal, posixpath.dirname(page) or '.')}{mark}{anchor}{after}"


def _place_of(page: str) -> str:
    for place, name in OUTSIDE.items():
        if name == page:
            return place
    return page if page.startswith("benchmarks/") else f"docs/{page}"


def _page_of(place: str, config: MkDocsConfig, files: Files) -> str | None:
    """Return what the site has of a file of the repository, which is put there if it is no page; or None."""
    if (_root(config) / place).is_dir():
        place = f"{place}/README.md"
    if page := _outside(_root(config)).get(place):
        return page
    if place.startswith("docs/") and files.get_file_from_path(place.removeprefix("docs/")):
        return place.removeprefix("docs/")
    if not (_root(config) / place).is_file():
        return None
    name = f"source/{place}"
    if files.get_file_from_path(name) is None:
        files.append(File.generated(config, name, abs_src_path=str(_root(config) / place)))
    return name


def _outside(root: Path) -> dict[str, str]:
    others = (path.relative_to(root).as_posix() for path in root.glob("benchmarks/**/*.md") if path.stem.isupper())
    return {place: place for place in others if place not in OUTSIDE} | dict(OUTSIDE)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent
