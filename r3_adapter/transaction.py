"""Replace a set of files as one: all of them, or none.

New bytes are written beside their targets and renamed over them. A rename leaves the old inode alone, so a package
cache that shares it by hard link or symbolic link keeps the released file.
"""

import fcntl
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import cache_from_source
from pathlib import Path

from r3_adapter.errors import PatchError


@dataclass(frozen=True)
class Change:
    """New bytes for a file; None stands for no file."""

    path: Path
    old: bytes | None
    new: bytes | None


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file, waiting for whoever has it; the file is gone afterwards.

    A lock file rather than the folder itself: a network file system locks only what is open for writing.
    """
    path = folder / ".r3-patch.lock"
    while True:
        try:
            held = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError as error:
            raise PatchError(f"{path}: cannot be written and locked: {error.strerror}") from error
        # The holder before us has removed the file that we waited for: take the one that is there now.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), path.stat()):
                break
        os.close(held)
    try:
        yield
    finally:
        path.unlink()
        os.close(held)


def commit(changes: Sequence[Change]) -> None:
    """Make all changes, or restore what was there and raise.

    Modes are kept. Compiled bytecode of the changed modules is removed: Python trusts it by time and size alone.

    Raises:
        PatchError: A file could not be written; the message says so should a file not be restorable either.
    """
    started: list[Change] = []
    try:
        for change in changes:
            _stage(change)
        for change in changes:
            started.append(change)
            _put(change.path, _new(change.path), change.new)
        drop_bytecode(change.path for change in changes)
    except BaseException as error:
        broken = _restore(started)
        if broken:
            raise PatchError(f"{error}; these were not put back (.*.r3-old has the bytes): {broken}") from error
        _tidy(changes)
        if isinstance(error, OSError):
            raise PatchError(f"nothing changed: {error}") from error
        raise
    _tidy(changes)


def drop_bytecode(sources: Iterable[Path]) -> None:
    """Remove the compiled forms of modules, of every interpreter and optimisation level."""
    for source in sources:
        folders = {source.parent / "__pycache__", Path(cache_from_source(str(source))).parent}
        for folder in folders:
            for compiled in folder.glob(f"{glob.escape(source.stem)}.*.pyc"):
                compiled.unlink(missing_ok=True)


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.r3-new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.r3-old")


def _stage(change: Change) -> None:
    """Write the new bytes, and the old ones too: a rollback must not depend on room on the disk."""
    change.path.parent.mkdir(parents=True, exist_ok=True)
    like = None if change.old is None else change.path.stat()
    if change.old is not None:
        _write(_old(change.path), change.old, like)
        assert like is not None
        os.utime(_old(change.path), ns=(like.st_atime_ns, like.st_mtime_ns))
    if change.new is not None:
        _write(_new(change.path), change.new, like)


def _write(path: Path, data: bytes, like: os.stat_result | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o666), "wb") as file:
        if like is not None:
            os.fchmod(file.fileno(), like.st_mode & 0o7777)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put(path: Path, staged: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink(missing_ok=True)
    else:
        os.replace(staged, path)


def _restore(started: Sequence[Change]) -> list[str]:
    """Put the old bytes back, also where the new ones may not have arrived; return what could not be restored."""
    broken = []
    for change in reversed(started):
        try:
            _put(change.path, _old(change.path), change.old)
            drop_bytecode([change.path])
        except OSError as error:
            broken.append(f"{change.path} ({error.strerror})")
    return broken


def _tidy(changes: Sequence[Change]) -> None:
    """Remove staged files, and folders that the changes left empty."""
    for path in (change.path for change in changes):
        with suppress(OSError):
            _new(path).unlink(missing_ok=True)
            _old(path).unlink(missing_ok=True)
        if not path.exists():
            with suppress(OSError):
                (path.parent / "__pycache__").rmdir()
            with suppress(OSError):
                for folder in path.parents:
                    folder.rmdir()
