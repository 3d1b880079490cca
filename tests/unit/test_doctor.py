"""`r3 doctor` names what is broken, and what to do."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from r3_adapter import doctor
from r3_adapter.doctor import Finding, Grade
from r3_adapter.patch import packages


def _run(tmp_path: Path, *, limit: int = 20000, path: Path | None = None) -> tuple[int, list[str], dict[str, Finding]]:
    out = tmp_path / "findings.json"
    command = f'ulimit -n {limit}; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", command, "-", sys.executable, "-m", "r3_adapter.cli", "doctor", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(path or tmp_path)},
        check=False,
    )
    report = json.loads(out.read_text())
    assert report["passed"] == (done.returncode == 0)
    found = [Finding(**each) for each in report["findings"]]
    assert [str(each) for each in found] == done.stdout.splitlines()[:-1], done.stderr
    return done.returncode, done.stdout.splitlines(), {each.name: each for each in found}


def test_a_broken_torch_and_few_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.99: no such file')")
    code, lines, found = _run(tmp_path, limit=512)
    assert code == 1
    assert found["torch"].grade == Grade.BAD
    assert "OSError: libcudart.so.99" in found["torch"].says
    assert found["open files"].grade == Grade.NOTE
    assert "ulimit -n" in found["open files"].todo
    assert lines[-1].startswith("1 of ")


def test_what_is_said_of_this_installation_agrees_with_it(tmp_path: Path) -> None:
    _, _, found = _run(tmp_path)
    assert found["r3_adapter"].grade == found["torch"].grade == found["loopback"].grade == Grade.GOOD
    for each in packages.status():
        assert (found[each.distribution].grade == Grade.GOOD) == (each.state is packages.State.APPLIED)


def test_a_module_of_another_interpreter_is_named() -> None:
    found = doctor.core("r3_adapter._core_of_another_build")
    assert found.grade == Grade.BAD
    assert "No module named 'r3_adapter._core_of_another_build'" in found.says
    assert found.todo


def test_engines_that_are_not_patched_and_those_without_a_pin_are_named(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    info = Path(str(distribution("megatron-core")._path))  # type: ignore[attr-defined]
    shutil.copytree(info, site / info.name)
    (other := site / "sglang-0.0.1.dist-info").mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.0.1\n")
    found = {each.name: each for each in doctor.ask_engines(site)}
    assert {each.grade for each in found.values()} == {Grade.BAD}
    assert "0.0.1" in found["sglang"].says


@pytest.mark.parametrize("folder", [Path("/proc"), Path("/nowhere/at/all")])
def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    found = doctor.room("temporary files", folder, 1, "set TMPDIR")
    assert found.grade == Grade.BAD
    assert str(folder) in str(found)
    assert str(found).endswith("; set TMPDIR")


def test_shared_memory_that_is_too_small_is_named_with_both_sizes(tmp_path: Path) -> None:
    found = doctor.room("shared memory", tmp_path, 1 << 60, "larger --shm-size", scarce=Grade.BAD)
    assert found.grade == Grade.BAD
    assert f"< {(1 << 60) / doctor.GIB:.1f} GiB" in found.says
    assert doctor.room("shared memory", tmp_path, 1, "").grade == Grade.GOOD
    assert doctor.room("this folder", tmp_path, 1 << 60, "take another").grade == Grade.NOTE


def test_a_question_that_cannot_be_asked_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask_nothing() -> object:
        raise ValueError("no such thing")

    monkeypatch.setattr(doctor, "QUESTIONS", (ask_nothing,))
    found = doctor.examine()
    assert [(each.name, each.grade, each.says) for each in found] == [
        ("nothing", Grade.BAD, "cannot be told: ValueError: no such thing")
    ]
