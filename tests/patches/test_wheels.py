"""Every series fits the wheel that it is for: by `r3 patch` and back, and by `git am` in a plain tree of it."""

import ast
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from r3_adapter.errors import PatchError
from r3_adapter.patch import packages
from r3_adapter.patch.packages import State
from r3_adapter.patch.series import Series, digest, listed, load_series
from r3_adapter.patch.wheels import download

SHIPPED = [series for group in load_series().values() for series in group]
NOBODY = {f"GIT_{who}_{what}": "nobody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


@pytest.fixture(scope="module", params=SHIPPED, ids=lambda series: f"{series.distribution}-{series.version}")
def series(request: pytest.FixtureRequest) -> Series:
    found: Series = request.param
    return found


@pytest.fixture(scope="module")
def site(series: Series, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel installs: its source files and its metadata."""
    folder = tmp_path_factory.mktemp("wheel")
    if series.source:
        pytest.skip(f"no registry has it, it is {series.source}")
    try:
        wheel = download(series.distribution, series.version, folder)
    except PatchError as error:
        pytest.skip(f"not tested on its wheel: {error}")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py") or ".dist-info/" in name]
        archive.extractall(folder / "site", names)
    wheel.unlink()
    return folder / "site"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(series: Series, site: Path) -> State:
    (found,) = packages.status([series.distribution], site=site)
    return found.state


def test_the_series_goes_on_the_wheel_and_leaves_it_as_it_was(series: Series, site: Path) -> None:
    before = contents(site)
    for _ in range(2):
        (outcome,) = packages.apply([series.distribution], site=site)
        assert len(outcome.changed) == len(series.files)
        assert state(series, site) is State.APPLIED
        for path in series.files:
            ast.parse((site / path).read_bytes(), path)
        packages.revert([series.distribution], site=site)
        assert state(series, site) is State.NOT_APPLIED
        assert contents(site) == before


def test_git_takes_the_series_as_mails(series: Series, site: Path, tmp_path: Path) -> None:
    """In the order of the series, shared patches among it, in a checkout that has upstream's paths and no history."""
    tree = tmp_path / "tree"
    package = series.package.split("/", maxsplit=1)[0]
    shutil.copytree(site / package, tree / series.prefix / package)
    env = {**os.environ, **NOBODY, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*args: str) -> list[str]:
        ran = subprocess.run(["git", *args], cwd=tree, env=env, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"git {args[0]}: {ran.stdout}{ran.stderr}"
        return ran.stdout.splitlines()

    git("init", "--quiet")
    git("add", "--all", "--force")
    git("commit", "--quiet", "--message", "released")
    patches = listed(series)
    git("am", "-3", "--keep-non-patch", *map(str, patches))
    assert len(git("rev-list", "HEAD")) == 1 + len(patches)
    assert git("status", "--porcelain") == []
    for path, pin in series.files.items():
        assert digest((tree / series.prefix / path).read_bytes()) == pin.after, path
