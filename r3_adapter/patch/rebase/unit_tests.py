"""Run the unit tests that a series brings, in an environment that has the release, without changing that."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from r3_adapter.errors import PatchError
from r3_adapter.patch import packages
from r3_adapter.patch.record import record_path
from r3_adapter.patch.series import TEST_FOLDERS, Contents, Series, write_tests

_TIMEOUT = 1800
_WHERE = """
import json, sys
from importlib.metadata import distribution
found = distribution(sys.argv[1])
folders = sorted({file.parts[0] for file in found.files or () if file.parts[0].endswith(".dist-info")})
print(json.dumps([found.version, str(found.locate_file("")), folders]))
"""
# What runs the engine on a machine without a GPU: variables for SGLang, stand-ins for Megatron.
_VARIABLES = """
import json
from r3_adapter.sglang.cpu import cpu_environment
print(json.dumps(cpu_environment()))
"""
_STAND_INS = """
from r3_adapter.megatron import cpu
cpu.install()
"""
_RUN = """
import sys
import pytest
options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--noconftest", "--import-mode=importlib", "-c", "/dev/null"]
sys.exit(pytest.main([*options, *sys.argv[1:]]))
"""


def run_unit_tests(python: Path, series: Series, version: str, changed: Contents, folder: Path) -> tuple[bool, str]:
    """Run the tests of a series on the release that a Python has; return whether they passed, and what was said last.

    changed: the bytes of the files that the series touches or adds, by upstream path.
    folder: an empty one.

    Raises:
        PatchError: That Python does not have this release.
    """
    site = _mirror(python, series, version, changed, folder / "site")
    brought = {path: data for path, data in changed.items() if path.startswith(TEST_FOLDERS) and data is not None}
    written = write_tests(series.distribution, brought, folder / "tests")
    tests = [str(path) for path in written if path.name.startswith("test_")]
    if not tests:
        return True, "has none"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (site, folder / "tests")))}
    script = _RUN
    if series.distribution == "sglang":
        env |= json.loads(_asked(python, env, _VARIABLES))
    elif series.distribution == "megatron-core":
        script = _STAND_INS + _RUN
    command = [str(python), "-c", script, *tests]
    try:
        ran = subprocess.run(
            command, env=env, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"did not end within {_TIMEOUT} s"
    last = (ran.stdout.strip() or ran.stderr.strip() or f"exit code {ran.returncode}").splitlines()
    failed = [line for line in last if line.startswith(("FAILED", "ERROR"))]
    summary = re.sub(r" in [\d.]+s.*", "", last[-1])
    return ran.returncode == 0, "; ".join([summary, *failed])


def _asked(python: Path, env: Mapping[str, str], script: str, *args: str) -> str:
    """Return what a script prints.

    Raises:
        PatchError: It fails.
    """
    ran = subprocess.run([str(python), "-c", script, *args], env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        raise PatchError(f"{python}: {said[-1]}")
    return ran.stdout


def _mirror(python: Path, series: Series, version: str, changed: Contents, site: Path) -> Path:
    """Make a folder for PYTHONPATH that has the package as links to what is installed, with the series' files."""
    found, place, folders = json.loads(_asked(python, os.environ, _WHERE, series.distribution))
    if found != version:
        raise PatchError(f"{python}: has {series.distribution} {found} != {version}")
    source = Path(place)
    for part in (series.package, *folders):
        shutil.copytree(source / part, site / part, copy_function=os.symlink)
    record = record_path(source, series.distribution)
    if record.exists():
        shutil.copyfile(record, record_path(site, series.distribution))
        packages.revert([series.distribution], site=site)
    for path, data in changed.items():
        target = site / path.removeprefix(series.prefix)
        if path.startswith(f"{series.prefix}{series.package}/"):
            target.unlink(missing_ok=True)
            if data is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
    return site
