"""What is said where a file of a run cannot be written: which one, why, and how many bytes are free there."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r3_adapter.errors import R3Error

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_NO_SPACE = os.strerror(errno.ENOSPC)
FULL = 16 << 20
"""Free bytes below which whatever fails while it writes is taken for a full disk."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Let what fails inside, because a disk is full or cannot be written to, be an R3Error in one line.

    safetensors and torch have errors of their own for a full disk: what they say decides, or the free bytes.

    path: the file or folder that is written.

    Raises:
        R3Error: names the path, the cause and the free bytes; every other error goes on as it is.
    """
    try:
        yield
    except R3Error:
        raise
    except Exception as error:
        free = free_bytes(path)
        number = error.errno if isinstance(error, OSError) else None
        if number not in _OF_DISKS and free >= FULL and _NO_SPACE not in str(error):
            raise
        why = os.strerror(number) if number is not None else f"the disk is full ({type(error).__name__})"
        raise R3Error(f"{path}: cannot be written: {why}; {free / (1 << 20):,.1f} MiB are free there") from error


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system in which a path is or would be."""
    return shutil.disk_usage(next(each for each in (path, *path.absolute().parents) if each.exists())).free
