"""The pages: tables and pictures are what their sources say, the site builds without a warning, and commands parse."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from r3_adapter.errors import R3Error

REPO = Path(__file__).resolve().parents[2]
MOST_LINES = 200


def part_of_the_site(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_site_{name}", REPO / "docs/site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_versions_is_that_of_the_pins() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    versions = part_of_the_site("versions")
    assert versions.with_table(text) == text, "python docs/site/versions.py"
    with pytest.raises(R3Error, match="no marks"):
        versions.with_table(text.replace(versions.END, ""))


def test_the_picture_is_that_of_its_figures() -> None:
    effect = part_of_the_site("effect")
    figures = json.loads(effect.FIGURES.read_text(encoding="utf-8"))
    for name, colors in effect.THEMES.items():
        drawn = (REPO / f"docs/effect-{name}.svg").read_text(encoding="utf-8")
        assert effect.picture(figures, colors) == drawn, "python docs/site/effect.py"


def test_the_readmes_words_for_the_picture_are_its_figures() -> None:
    figures = json.loads(part_of_the_site("effect").FIGURES.read_text(encoding="utf-8"))
    said = re.findall(r"(\d\.\d)e-(\d)", re.findall(r'alt="([^"]*)"', (REPO / "README.md").read_text("utf-8"))[0])
    drawn = [figures[name]["k3"] for name in ("live", "replay", "dense")] + [figures["engine_against_itself_k3"]]
    assert [float(f"{number}e-{power}") for number, power in said] == [float(f"{each:.1e}") for each in drawn]


def test_the_readme_is_short() -> None:
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) < MOST_LINES


def test_the_site_builds_without_a_warning_and_its_links_hold(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    commands = (tmp_path / "site/reference/cli/index.html").read_text(encoding="utf-8")
    assert 'id="r3-patch-apply"' in commands and "--qkv-format" in commands
    assert not list(tmp_path.glob("site/**/*.md"))
    for path in tmp_path.glob("site/**/*.html"):
        loaded = re.findall(r'(?:src|href)="(https?://[^"]+)"', path.read_text(encoding="utf-8"))
        assert not [each for each in loaded if each.endswith((".js", ".css", ".woff2"))], path


def test_arguments_in_docstrings_become_a_list() -> None:
    listed = part_of_the_site("docstrings").listed
    text = "Do it.\n\na, b: of a\n    step.\nc: last\n\nRaises:\n    R3Error: why"
    assert listed(text) == "Do it.\n\n- `a`, `b`: of a\n    step.\n- `c`: last\n\nRaises:\n    R3Error: why"
    assert listed("Rows.\nx: one") == "Rows.\n\n- `x`: one"


def test_a_link_that_leads_nowhere_stops_the_site(tmp_path: Path) -> None:
    """The rewriting of links hides none from MkDocs."""
    here = tmp_path / "repo"
    here.mkdir()
    for name in os.listdir(REPO):
        if name not in {"docs", ".git", "build"}:
            (here / name).symlink_to(REPO / name)
    (here / "docs").mkdir()
    for path in (REPO / "docs").iterdir():
        (here / "docs" / path.name).symlink_to(path)
    (here / "mkdocs.yml").unlink()
    (here / "mkdocs.yml").write_text((REPO / "mkdocs.yml").read_text(encoding="utf-8"), encoding="utf-8")
    page = here / "docs/repack.md"
    text = page.read_text(encoding="utf-8")
    page.unlink()
    page.write_text(f"{text}\n[a](balance.md#no-such-place) [b](../launch/no_such_script.sh)\n", encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "no-such-place" in done.stderr and "no_such_script.sh" in done.stderr


def pages() -> Iterator[Path]:
    yield from (REPO / name for name in ("README.md", "CONTRIBUTING.md", "patches/README.md", "benchmarks/README.md"))
    yield from sorted((REPO / "docs").glob("**/*.md"))


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    """What stands in the first column is what a user sees, but for `...`."""
    paths = [*(REPO / "r3_adapter").glob("**/*.py"), *(REPO / "patches/sglang").glob("*/*.patch")]
    code = "".join(path.read_text(encoding="utf-8") for path in paths)
    code = re.sub(r'"\s*\n\+?\s*f?"', "", code)  # one message over several lines
    page = (REPO / "docs/troubleshooting.md").read_text(encoding="utf-8").replace("\\|", "|")
    told = re.findall(r"^\| ((?:`[^`]*`(?: from [^|]*|, )?)+|`.*?`) \| ", page, re.MULTILINE)
    pieces = [piece.strip(" ;:,()") for cell in told for piece in re.split(r"\.\.\.|`, `", cell.strip("`"))]
    long = [piece for piece in pieces if len(piece) > 5 and " from " not in piece]
    assert len(long) > 60
    assert [piece for piece in long if piece not in code] == []
