"""A command that could not write its result says so before the work."""

from pathlib import Path

import pytest

from r3_adapter import cli


@pytest.mark.parametrize("command", [["prove"], ["bench", "repack"], ["bench", "capture"], ["bench", "replay"]])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    missing = tmp_path / "no" / "file"
    for given, said in ((missing, f"{missing.parent}: no such folder"), (tmp_path, f"{tmp_path}: is a folder")):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*command, "--json", str(given)])
        assert f"error: argument --json: {said}" in capsys.readouterr().err
