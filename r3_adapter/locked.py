"""Folders that are found and removed when nobody uses them any more, whichever way their users ended."""

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from r3_adapter.watchdog import open_folder, remove_dead


def make_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder that only this user can enter; return it with a descriptor that holds a lock of it.

    A folder is in use as long as a process has such a descriptor. Those of the prefix that none uses are removed first.
    """
    for found in parent.glob(f"{prefix}*"):
        remove_dead(found)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # Somebody may find and remove it before it is locked.
        with suppress(FileNotFoundError):
            lock = open_folder(folder)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if folder.exists():
                return folder, lock
            os.close(lock)
