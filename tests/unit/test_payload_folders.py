"""The folder of an engine's payloads goes with it, or with the next engine if it was killed; live ones stay."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from r3_adapter.sglang.shared import payload_folder

USER = """
import sys
from pathlib import Path
from r3_adapter.sglang.shared import payload_folder
with payload_folder(Path(sys.argv[1])) as folder:
    (folder / ("0" * 32)).write_bytes(b"routes")
    print(folder.name, flush=True)
    sys.stdin.read()
"""


def _start(parent: Path) -> "tuple[subprocess.Popen[str], str]":
    process = subprocess.Popen(
        [sys.executable, "-c", USER, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def _end(process: "subprocess.Popen[str]", how: int | None = None) -> None:
    if how is not None:
        process.send_signal(how)
    process.communicate(timeout=60)


def _names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_a_folder_goes_with_its_user(tmp_path: Path) -> None:
    with payload_folder(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").write_bytes(b"x")
        with payload_folder(tmp_path) as other:
            assert _names(tmp_path) == sorted((folder.name, other.name))
    assert _names(tmp_path) == []


def test_the_folder_of_a_process_that_was_killed_goes_with_the_next_one(tmp_path: Path) -> None:
    (killed, left), (alive, kept) = _start(tmp_path), _start(tmp_path)
    _end(killed, signal.SIGKILL)
    assert _names(tmp_path) == sorted((left, kept))
    with payload_folder(tmp_path) as mine:
        assert _names(tmp_path) == sorted((kept, mine.name))
    _end(alive)
    assert _names(tmp_path) == []


def test_what_is_not_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "r3-routes-link").symlink_to(tmp_path / "others")
    (tmp_path / "r3-routes-file").write_bytes(b"x")
    (tmp_path / "r3-routes-theirs").mkdir()
    before = _names(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with payload_folder(tmp_path):
        pass
    assert _names(tmp_path) == before
    monkeypatch.undo()
    with payload_folder(tmp_path):
        pass
    assert _names(tmp_path) == ["others", "r3-routes-file", "r3-routes-link"]
