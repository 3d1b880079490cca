"""A full disk is said in one line, whichever library meets it first, and what was half written does not stay."""

import errno
import io
import os
from collections import namedtuple

import pytest

from r3_adapter.errors import R3Error
from r3_adapter.runs import disk
from r3_adapter.runs.checkpoints import Checkpoints, seal
from r3_adapter.runs.disk import writing
from r3_adapter.runs.log import Run, RunLog

Usage = namedtuple("Usage", "total used free")


def test_a_run_whose_log_cannot_be_written_ends_in_one_line_and_can_be_read(tmp_path, config):
    says = "full: cannot be written: No space left on device; [0-9,.]+ MiB are free there"
    with pytest.raises(R3Error, match=says), RunLog(tmp_path, config, trackers={}) as log:
        log.step(0, {"reward": 1.0})
        log._metrics.close()
        log._metrics = io.FileIO("/dev/full", "ab")
        log.step(1, {"reward": 1.0})
    run = Run.load(tmp_path)
    assert [step["step"] for step in run.steps] == [0] and not run.finished


@pytest.mark.parametrize(
    ("error", "free", "says"),
    [
        (OSError(errno.ENOSPC, "x"), 1 << 30, "No space left on device; 1,024.0 MiB are free there"),
        (OSError(errno.EROFS, "x"), 1 << 30, "Read-only file system; 1,024.0 MiB are free there"),
        (RuntimeError("file write failed"), 1 << 20, r"the disk is full \(RuntimeError\); 1.0 MiB are free there"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            1 << 30,
            r"the disk is full \(RuntimeError\)",
        ),
        (RuntimeError("gloo"), 1 << 30, None),
        (ConnectionResetError(errno.ECONNRESET, "x"), 1 << 30, None),
    ],
)
def test_what_fails_by_the_disk_is_told_from_what_fails_otherwise(tmp_path, monkeypatch, error, free, says):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: Usage(1 << 40, 0, free))
    wanted = pytest.raises(type(error)) if says is None else pytest.raises(R3Error, match=f"there/w: cannot.*: {says}")
    with wanted, writing(tmp_path / "not" / "there" / "w"):
        raise error


def test_a_checkpoint_that_does_not_fit_is_removed_and_the_one_before_stays(tmp_path):
    checkpoints, name = Checkpoints(tmp_path), "model.safetensors"

    def fits(folder):
        (folder / name).write_bytes(b"weights")
        return {name: seal(folder / name)}

    def does_not(folder):
        (folder / name).write_bytes(b"wei")
        with writing(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints.save(1, fits, {})
    with pytest.raises(R3Error, match="partial-2: cannot be written: No space left on device"):
        checkpoints.save(2, does_not, {})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["00000001"]
    found = checkpoints.newest({})
    assert found is not None and found.step == 1 and not found.damaged
