"""A command that could not write its result says so before the work."""

import subprocess
import sys
from pathlib import Path

import pytest

from r3_adapter import cli
from r3_adapter.flag_values import output_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", [["prove"], ["bench", "repack"], ["bench", "capture"], ["bench", "replay"]])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    missing = tmp_path / "no" / "file"
    for given, said in ((missing, f"{missing.parent}: no such folder"), (tmp_path, f"{tmp_path}: is a folder")):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*command, "--json", str(given)])
        assert f"error: argument --json: {said}" in capsys.readouterr().err


def test_a_file_that_only_the_kernel_refuses_is_refused_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Root may write to such a folder, as far as its mode says."""
    for path in ("/proc/verdict.json", f"/tmp/{'n' * 300}"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["prove", "--json", path])
        assert f"r3 prove: error: argument --json: {path}: cannot be written: " in capsys.readouterr().err


def test_the_check_changes_nothing(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("kept")
    assert (output_file(str(old)), output_file(str(new))) == (old, new)
    assert old.read_text() == "kept" and not new.exists()
    assert output_file("/dev/stdout") == Path("/dev/stdout")


def test_a_report_is_refused_before_the_runs_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", "nowhere", "--out", str(tmp_path)])
    assert capsys.readouterr().err.endswith(f"r3 report: error: argument --out: {tmp_path}: is a folder, not a file\n")


@pytest.mark.parametrize("script", ["quickstart", "grpo"])
def test_a_launcher_that_cannot_write_says_so_in_a_line(tmp_path: Path, script: str) -> None:
    (tmp_path / "file").touch()
    flag = {"quickstart": "--out", "grpo": "--save"}[script]
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), flag, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        f"{script}: {tmp_path / 'file'}: cannot be written to: File exists",
    )
