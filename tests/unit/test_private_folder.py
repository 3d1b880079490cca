"""The folder of a cluster that is started here: this user's alone, and gone when its process is."""

import fcntl
import os
import stat
import tempfile
from pathlib import Path

import pytest

from r3_adapter.ray.cluster import _private_folder, _private_processes
from r3_adapter.watchdog import open_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = Path(tempfile.mkdtemp(prefix="p", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    return base


def test_it_and_what_is_made_in_it_are_this_users(temporary: Path) -> None:
    before = os.umask(0o022)
    try:
        with _private_folder() as folder, _private_processes(folder):
            assert folder.parent == temporary and stat.S_IMODE(folder.stat().st_mode) == 0o700
            token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
            assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64
            assert os.environ["RAY_AUTH_MODE"] == "token" and Path(os.environ["TMPDIR"]).parent == folder
            with tempfile.TemporaryDirectory() as made:
                assert Path(made).is_relative_to(folder)
            (folder / "file").touch()
            assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o600
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert not list(temporary.iterdir()) and "RAY_AUTH_MODE" not in os.environ
    temporary.rmdir()


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(temporary: Path) -> None:
    killed, used, link = (temporary / f"r3-ray-{name}" for name in ("killed", "used", "link"))
    other = temporary / "other"
    for folder in (killed, used, other):
        folder.mkdir()
        (folder / "file").touch()
    link.symlink_to(other)
    lock = open_folder(used)
    fcntl.flock(lock, fcntl.LOCK_SH)
    with _private_folder():
        assert not killed.exists() and used.exists() and link.exists() and (other / "file").exists()
