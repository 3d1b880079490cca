"""What an sdist holds, and the wheel that is built from it: all of the package and the patches, and nothing else.

The wheel is built without the compiled module; the program that tries wheels is run with the checkout's.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from sysconfig import get_path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from r3_adapter.patch.series import load_series

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INFO = f"r3_adapter-{PROJECT['version']}.dist-info"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of a copy of the checkout's files, since other tests write beside them meanwhile."""
    pytest.importorskip("scikit_build_core")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for path in tracked("."):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / path, source / path)
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    options = ["--config-settings=cmake.define.R3_CORE=OFF", "--disable-pip-version-check"]
    done = subprocess.run([*command, *options, "-w", folder, sdist], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def tracked(folder: str) -> set[str]:
    """Return the files of a folder of the checkout, those that were not committed yet among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    said = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return {path for path in said.splitlines() if (REPO / path).is_file()}


def test_the_sdist_has_what_the_checkout_has(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {member.name for member in archive.getmembers() if member.isfile()}
    top = f"r3_adapter-{PROJECT['version']}"
    assert files == {f"{top}/{path}" for path in tracked(".") | {"PKG-INFO"}}


def test_it_has_the_package_and_the_patches_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.startswith(f"{INFO}/")}
    assert files == tracked("r3_adapter") | {f"r3_adapter/{path}" for path in tracked("patches")}


def test_its_metadata_is_the_projects(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        said = message_from_bytes(archive.read(f"{INFO}/METADATA"))
        entries = archive.read(f"{INFO}/entry_points.txt").decode()
        assert archive.read(f"{INFO}/licenses/LICENSE") == (REPO / "LICENSE").read_bytes()
    assert (said["Name"], said["Version"]) == ("r3-adapter", PROJECT["version"])
    assert set(said.get_all("Provides-Extra", [])) == PROJECT["optional-dependencies"].keys()
    assert "r3 = r3_adapter.cli:main" in entries and "sglang.srt.plugins" in entries


def test_its_r3_takes_the_patches_that_came_with_it(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from r3_adapter.patch import series; print(series.patches_root()); import r3_adapter.cli as c; c.main()"
    # Without site, since that of this environment leads to the checkout.
    paths = os.pathsep.join([str(tmp_path / "site"), get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-S", "-c", code, "patch", "status", "--site", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    root, *engines = done.stdout.splitlines() or [done.stderr]
    assert Path(root) == tmp_path / "site" / "r3_adapter" / "patches"
    pins = {name: ", ".join(series.version for series in found) for name, found in load_series().items()}
    assert engines == [f"{name}: not installed (installed: -; pinned: {pins[name]})" for name in sorted(pins)]


def test_the_program_that_tries_a_wheel_brings_routes_back(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "launch" / "try_wheel.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"8 ranks hold each route once: CPython {platform.python_version()}, ")


@pytest.mark.parametrize(
    ("compiler", "targets", "said"),
    [
        ("gcc", (), "COMPILER=gcc is neither zig nor system"),
        ("zig", ("arm64",), "arm64 is neither x86_64 nor aarch64"),
        ("system", ("aarch64",), "COMPILER=system compiles for x86_64 alone, not for aarch64"),
    ],
)
def test_the_script_refuses_what_it_cannot_build(compiler: str, targets: tuple[str, ...], said: str) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the words are those of an x86-64 machine")
    command = [str(REPO / "launch" / "wheels.sh"), *targets]
    environment = {**os.environ, "COMPILER": compiler}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""


def test_the_extra_for_gpus_takes_nothing_newer_than_the_pins() -> None:
    gpu = {found.name: found.specifier for found in map(Requirement, PROJECT["optional-dependencies"]["gpu"])}
    for name, series in load_series().items():
        pins = sorted(Version(each.version) for each in series if not each.source)
        assert all(pin in gpu[name] for pin in pins)
        newer = Version(re.sub(r"\d+$", lambda last: str(int(last[0]) + 1), str(pins[-1])))
        assert newer not in gpu[name] and pins[-1] in gpu[name]
