"""launch/setup.sh gets the engines to the right state whatever was done to the installed ones."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from r3_adapter.patch import packages
from r3_adapter.patch.packages import State
from r3_adapter.patch.record import record_path
from r3_adapter.patch.series import load_series

REPO = Path(__file__).parents[2]
ENGINES = ("sglang", "megatron-core")
MEGATRON_PINS = sorted(series.version for series in load_series()["megatron-core"] if not series.source)

pytestmark = pytest.mark.megatron


def write_wheel(name: str, folder: Path, wheels: Path) -> str:
    """Make a wheel of the released files that the series touches; return its requirement."""
    installed = importlib.metadata.distribution(name)
    (found,) = packages.status([name])
    site = folder / name
    for path in (record_path(Path(), name), *found.contents):
        if (found.site / path).exists():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.site / path, site / path)
    info = f"{name.replace('-', '_')}-{installed.version}.dist-info"
    (site / info).mkdir()
    (site / info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {installed.version}\n")
    (site / info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: r3\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    packages.revert([name], site=site)
    files = [path for path in site.rglob("*") if path.is_file()]
    (site / info / "RECORD").write_text(
        "".join(f"{path.relative_to(site)},,\n" for path in files) + f"{info}/RECORD,,\n"
    )
    with zipfile.ZipFile(wheels / f"{info.removesuffix('.dist-info')}-py3-none-any.whl", "w") as wheel:
        for path in (*files, site / info / "RECORD"):
            wheel.write(path, path.relative_to(site))
    return f"{name}=={installed.version}"


KNOWN = all(found.state not in (State.NOT_PINNED, State.NOT_INSTALLED) for found in packages.status(ENGINES))


@pytest.mark.skipif(not KNOWN, reason="other engines are installed")
def test_engines_are_patched_from_any_state(tmp_path: Path) -> None:
    venv, wheels = tmp_path / "venv", tmp_path / "wheels"
    wheels.mkdir()
    sglang, megatron = (write_wheel(name, tmp_path, wheels) for name in ENGINES)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    code = "import sys; from r3_adapter.cli import main; sys.exit(main(sys.argv[1:]))"
    (venv / "bin/r3").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@" --site {site}\n')
    (venv / "bin/r3").chmod(0o755)
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PYTHON": sys.executable}
    script = (
        f"set -euo pipefail; source {REPO}/launch/setup.sh; VENV={venv} SGLANG={sglang} MEGATRON={megatron}; r3_patch"
    )

    def patch() -> str:
        ran = subprocess.run(["bash", "-c", script], env=env, check=True, capture_output=True, text=True)
        assert [found.state for found in packages.status(ENGINES, site=site)] == [State.APPLIED, State.APPLIED]
        return ran.stderr

    assert "installing the engines again" in patch()  # there were none
    assert "again" not in patch()
    added = site / "sglang/srt/state_capturer/routed_experts_compact.py"
    added.write_text("# of somebody else\n")
    record_path(site, "sglang").write_text(json.dumps({"version": 1}))
    (site / "megatron/core/transformer/moe/router.py").unlink()
    for file in site.glob("megatron_core-*/*"):
        file.unlink()
    patch()
    (kept,) = venv.glob("set-aside-*/sglang/srt/state_capturer")
    assert (kept / added.name).read_text() == "# of somebody else\n"
    assert "again" not in patch()


def choose(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Return what launch/setup.sh makes of a choice of pins."""
    script = f'source {REPO}/launch/setup.sh; echo "$VENV $SGLANG $MEGATRON $PINS"'
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_VERSION") and name != "R3_VENV"}
    env = {**clean, "PYTHON": sys.executable, **variables}
    return subprocess.run(["bash", "-c", script], env=env, check=False, capture_output=True, text=True)


PLAIN = ".venv" if sys.version_info < (3, 12) else f".venv-3.{sys.version_info.minor}"
MEGATRON = "0.16.1" if sys.version_info < (3, 12) else "0.19.2"


@pytest.mark.parametrize(
    ("variables", "venv", "sglang", "megatron"),
    [
        ({}, PLAIN, "0.5.20", MEGATRON),
        ({"SGLANG_VERSION": "0.5.20", "MEGATRON_VERSION": MEGATRON}, PLAIN, "0.5.20", MEGATRON),
        ({"SGLANG_VERSION": "0.5.23"}, f"{PLAIN}-sglang-0.5.23", "0.5.23", MEGATRON),
        (
            {"SGLANG_VERSION": "0.5.15.post1", "MEGATRON_VERSION": "0.19.2"},
            f"{PLAIN}-sglang-0.5.15.post1" + "-megatron-core-0.19.2" * (MEGATRON != "0.19.2"),
            "0.5.15.post1",
            "0.19.2",
        ),
        ({"SGLANG_VERSION": "0.5.23", "R3_VENV": "elsewhere"}, "elsewhere", "0.5.23", MEGATRON),
    ],
)
def test_each_choice_of_pins_has_its_environment(
    variables: dict[str, str], venv: str, sglang: str, megatron: str
) -> None:
    want = f"{venv} sglang=={sglang} megatron-core=={megatron} launch/pins/sglang-{sglang}.txt"
    assert choose(variables).stdout.split() == want.split()


@pytest.mark.parametrize(
    ("variable", "version", "pins"),
    [
        ("SGLANG_VERSION", "0.5.19", sorted(path.parent.name for path in (REPO / "patches/sglang").glob("*/series"))),
        ("MEGATRON_VERSION", "0.15.0", MEGATRON_PINS),
        ("MEGATRON_VERSION", "0.16.0rc0", MEGATRON_PINS),
    ],
)
def test_a_version_that_is_not_pinned_is_refused_with_the_pins(variable: str, version: str, pins: list[str]) -> None:
    refused = choose({variable: version})
    assert refused.returncode == 2 and not refused.stdout
    assert f"{variable}={version} is no pin" in refused.stderr
    said = refused.stderr.partition("pins: ")[2].split("\033")[0].split()
    assert set(pins) == set(said)


@pytest.mark.parametrize("path", sorted((REPO / "launch/pins").glob("*.txt")), ids=lambda path: path.stem)
def test_each_environment_says_its_engine_and_torch(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    names = [Requirement(line).name for line in lines]
    assert names == sorted(set(names))
    assert path.stem.replace("sglang-", "sglang==") in lines
    assert {"torch", "transformers", "tokenizers"} <= set(names)
