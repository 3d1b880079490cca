"""The script that tests all pins: which there are, what it says of one that fails, what it takes for a release."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from r3_adapter.patch.series import load_series

REPO = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("r3_launch_pins", REPO / "launch/pins.py")
pins = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pins)


def test_the_pins_are_the_series() -> None:
    shipped = [
        f"{series.distribution}=={series.version}"
        for group in load_series().values()
        for series in group
        if not series.source
    ]
    assert sorted(pins.all_pins()) == sorted(shipped)


def test_what_is_no_pin_is_refused_with_the_pins(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        pins.main(["sglang==0.5.20", "sglang==0.5.19"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "no pins: sglang==0.5.19; pins: " in said
    assert all(pin in said for pin in pins.all_pins())
    with pytest.raises(SystemExit):
        pins.main(["sglang==0.5.20", "--quick", "--record"])
    assert "--record keeps what all tests say" in capsys.readouterr().err


def test_a_version_that_no_registry_has_is_refused_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    for series in (series for series in load_series()["megatron-core"] if series.source):
        with pytest.raises(SystemExit) as stopped:
            pins.main([f"megatron-core=={series.version}"])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert f"{series.version}: no registry has it, it is {series.source}; there: `r3 patch" in said


def test_each_pin_has_its_turn_though_one_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The environment cannot be made for one, and nothing holds in that of the other."""
    monkeypatch.setattr(
        pins, "SETUP", 'if [ "$SGLANG_VERSION" = 0.5.20 ]; then echo "no wheel"; exit 3; fi; echo /none'
    )
    assert pins.main(["sglang==0.5.20", "sglang==0.5.23"]) == 1
    said = capsys.readouterr()
    first, second = map(json.loads, said.out.splitlines())
    assert (first["pin"], first["environment"], first["passed"]) == ("sglang==0.5.20", None, False)
    assert list(first["steps"]) == ["setup"]
    assert (second["pin"], second["environment"], second["passed"]) == ("sglang==0.5.23", "/none", False)
    assert {name for name, step in second["steps"].items() if step["passed"]} == {"setup"}
    assert {"verify", "tests", "off", "prove", "ep 2", "group 8", "retract", "revert", "again"} < set(second["steps"])
    assert "no wheel" in said.err and "exit code 3" in said.err
    head, *rows = said.err.splitlines()[-3:]
    assert head.split()[:3] == ["pin", "setup", "verify"]
    assert [row.split()[0] for row in rows] == ["sglang==0.5.20", "sglang==0.5.23"]


def test_pins_of_megatron_share_an_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pins, "SETUP", "echo /none")
    monkeypatch.setattr(pins, "EXCHANGE", 'echo "$1 gets $2"; exit 4')
    assert pins.main(["megatron-core==0.19.0", "megatron-core==0.19.1"]) == 1
    said = capsys.readouterr()
    first, second = map(json.loads, said.out.splitlines())
    assert (list(first["steps"]), list(second["steps"])) == (["setup", "exchange"], ["exchange"])
    assert "/none gets 0.19.0" in said.err and "/none gets 0.19.1" in said.err


def test_a_step_in_which_no_test_ran_fails(tmp_path: Path) -> None:
    empty = tmp_path / "test_empty.py"
    empty.write_text("import pytest\npytestmark = pytest.mark.skip\ndef test_it(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, str(empty)]
    assert not pins.run_step("a==1", "tests", command, tmp_path / "log")["passed"]
    empty.write_text("def test_it(): pass\n")
    assert pins.run_step("a==1", "tests", command, tmp_path / "log")["passed"]


def test_a_release_has_the_files_of_its_record_and_no_others(tmp_path: Path) -> None:
    installed = distribution("packaging")
    for folder in {file.parts[0] for file in installed.files or ()}:
        shutil.copytree(Path(str(installed.locate_file(folder))), tmp_path / folder)

    def said() -> str:
        command = [sys.executable, "-c", pins.AS_RECORDED, "packaging"]
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False).stderr

    assert said() == ""
    (tmp_path / "packaging/more.py").write_text("")
    assert said().strip() == f"{tmp_path}/packaging/more.py: not in RECORD"
    (tmp_path / "packaging/more.py").unlink()
    (tmp_path / "packaging/version.py").write_text("")
    assert said().strip() == f"{tmp_path}/packaging/version.py: not as RECORD has it"
