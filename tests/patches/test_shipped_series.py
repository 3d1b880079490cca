"""Every series in `patches/` is described, locked, and applies to the released files and back."""

import ast
import re
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from r3_adapter.patch import packages
from r3_adapter.patch.packages import State
from r3_adapter.patch.patchfile import trailers
from r3_adapter.patch.record import record_path
from r3_adapter.patch.series import (
    LOCK_NAME,
    SOURCE,
    Series,
    digest,
    is_release,
    listed,
    load_series,
    patches_root,
    read_patches,
    unlisted,
    write_upstream_tests,
)

pytestmark = pytest.mark.megatron

MAX_CHANGED = 250  # lines of files that upstream has
MAX_ADDED = 400  # lines of a file that upstream lacks
SHIPPED = [series for group in load_series().values() for series in group]

each_series = pytest.mark.parametrize("series", SHIPPED, ids=lambda series: f"{series.distribution}-{series.version}")


@pytest.fixture
def released(series: Series, tmp_path: Path) -> Path:
    """A folder with the released files that the series touches, and the distribution's metadata."""
    try:
        installed = distribution(series.distribution)
    except PackageNotFoundError:
        pytest.skip(f"{series.distribution} is not installed")
    if installed.version != series.version:
        pytest.skip(f"{series.distribution} {series.version} is not installed, but {installed.version}")
    metadata = [str(file) for file in installed.files or () if file.parts[0].endswith(".dist-info")]
    record = record_path(Path(), series.distribution)
    for path in [*metadata, record, *series.files]:
        source, target = Path(str(installed.locate_file(path))), tmp_path / "site" / path
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    if packages.status([series.distribution], site=tmp_path / "site")[0].state is not State.NOT_APPLIED:
        packages.revert([series.distribution], site=tmp_path / "site")
    return tmp_path / "site"


def test_each_folder_with_a_series_is_locked() -> None:
    root = patches_root()
    folders = {path.parent.relative_to(root) for path in root.glob("*/*/series")}
    assert folders == {series.folder.relative_to(root) for series in SHIPPED}
    assert [path for folder in root.iterdir() if folder.is_dir() for path in unlisted(folder)] == []


@each_series
def test_a_version_that_no_registry_has_names_its_commit(series: Series) -> None:
    if (series.folder / SOURCE).exists():
        assert re.fullmatch(r"https://\S+ [0-9a-f]{40}", series.source)
    else:
        assert is_release(series.version)


@each_series
def test_numbers_give_the_order_over_both_folders(series: Series) -> None:
    numbers = [path.name[:5] for path in listed(series)]
    assert all(re.fullmatch(r"\d{4}-", number) for number in numbers)
    assert numbers == sorted(set(numbers))


@each_series
def test_each_patch_is_small_and_says_why(series: Series) -> None:
    rows = (series.folder.parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    lengths: dict[str, int] = {}
    for patch in read_patches(series):
        message = re.split(r"^Origin: ", patch.header, maxsplit=1, flags=re.MULTILINE)[0]
        assert len(message.split()) >= 40, (
            f"{patch.name}: the header must say why, why not in the adapter, when it can go"
        )
        lengths |= {diff.path: 0 for diff in patch.diffs if diff.creates}
        changed = sum(diff.added + diff.removed for diff in patch.diffs if diff.path not in lengths)
        assert changed <= MAX_CHANGED, f"{patch.name}: {changed} changed lines in files that upstream has"
        for diff in patch.diffs:
            if diff.path in lengths:
                lengths[diff.path] += diff.added - diff.removed
        # A number and a total would be wrong as soon as the series grows.
        assert re.findall(r"^Subject: (\[.*?\]) ", patch.header, re.MULTILINE) == ["[PATCH]"], patch.name
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", trailers(patch.header)["Last-Update"]), patch.name
        (row,) = [row for row in rows if row.startswith("|") and f"{series.distribution} `{patch.name}`" in row]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        assert all(cells), row
        assert re.search(rf"(?<![\w.]){re.escape(series.version)}(?![\w.]*\w)", cells[1]), row
    assert [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MAX_ADDED] == []


@each_series
def test_upstream_tests_come_along(series: Series, tmp_path: Path) -> None:
    written = write_upstream_tests(series, tmp_path)
    assert any(path.name.startswith("test_") for path in written)
    for path in written:
        if path.suffix == ".py":
            ast.parse(path.read_bytes(), str(path))


@each_series
def test_series_applies_to_the_release_and_back(series: Series, released: Path) -> None:
    names = [series.distribution]
    paths = [path for path in released.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in paths}
    (outcome,) = packages.apply(names, site=released)
    assert len(outcome.changed) == len(series.files)
    for path, pin in series.files.items():
        data = (released / path).read_bytes() if (released / path).exists() else None
        assert digest(data) == pin.after
        if data is not None and path.endswith(".py"):
            ast.parse(data, path)
    (outcome,) = packages.apply(names, site=released)
    assert outcome.changed == ()
    packages.revert(names, site=released)
    assert {path: path.read_bytes() for path in released.rglob("*") if path.is_file()} == before


@each_series
def test_lock_is_what_the_release_gives(series: Series, released: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(series.folder.parents[1], tmp_path / "patches"))
    assert packages.lock(series.distribution, series.version, site=released, root=root).files == series.files
    assert (root / LOCK_NAME).read_bytes() == (series.folder.parents[1] / LOCK_NAME).read_bytes()
