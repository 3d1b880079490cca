"""Replace a set of files as one: all of them, or none.

New bytes are written beside their targets and renamed over them. A rename leaves the old inode alone, so a package
cache that shares it by hard link or symbolic link keeps the released file.

What stops the process between two renames leaves a journal, from which the change can be completed or taken back.
"""

import errno
import fcntl
import glob
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import cache_from_source
from pathlib import Path

from r3_adapter.errors import PatchError

WAIT_S = 60.0


@dataclass(frozen=True)
class Change:
    """New bytes for a file; None stands for no file, and the same bytes for one that is only tidied up."""

    path: Path
    old: bytes | None
    new: bytes | None


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file, waiting for whoever has it and saying so; the file is gone afterwards.

    A lock file rather than the folder itself: a network file system locks only what is open for writing.

    Raises:
        PatchError: The folder cannot be written, or somebody else has had the lock for WAIT_S seconds.
    """
    path = lock_path(folder)
    until = 0.0
    while (held := _try_lock(path)) is None:
        if not until:
            until = time.monotonic() + WAIT_S
            print(
                f"r3: waiting up to {WAIT_S:.0f} s for {_holder(path)}, which has {path}", file=sys.stderr, flush=True
            )
        elif time.monotonic() > until:
            raise PatchError(f"{path}: {_holder(path)} still has it after {WAIT_S:.0f} s; nothing changed")
        time.sleep(0.05)
    try:
        yield
    finally:
        path.unlink()
        os.close(held)


def lock_path(folder: Path) -> Path:
    """Return the file that is locked while files below a folder are changed."""
    return folder / ".r3-patch.lock"


def is_begun(path: Path) -> bool:
    """Say whether the journal at path, or what was to become it, was left behind."""
    return path.exists() or _new(path).exists()


@contextmanager
def journal(path: Path, data: bytes, changes: Sequence[Change]) -> Iterator[None]:
    """Keep data in a file on the disk from before the first change until after the last.

    It also stays when an error leaves a file neither as it was nor changed, and when it was there before.
    """
    before = is_begun(path)
    try:
        _write(_new(path), data, _model(path))
        os.replace(_new(path), path)
        _sync_folder(path.parent)
    except BaseException as error:
        if not before:
            _forget(path)
        if isinstance(error, OSError):
            raise PatchError(f"nothing changed: {error}") from error
        raise
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if not before and all(_bytes(change.path) == change.old for change in changes):
                _forget(path)
        raise
    try:
        _forget(path)
    except OSError as error:
        raise PatchError(f"all is changed, but the journal cannot be removed: {error}") from error


def commit(changes: Sequence[Change]) -> None:
    """Make all changes, or restore what was there and raise.

    Modes and owners are kept. Compiled bytecode of the modules is removed: Python trusts it by time and size alone.

    Raises:
        PatchError: A file could not be written; the message says so should a file not be restorable either.
    """
    started: list[Change] = []
    needed = [change for change in changes if change.old != change.new]
    try:
        for change in needed:
            _stage(change)
        for change in needed:
            started.append(change)
            _put(change.path, _new(change.path), change.new)
        drop_bytecode(change.path for change in changes)
        for folder in {change.path.parent for change in needed}:
            _sync_folder(folder)
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
    _make_folder(change.path.parent)
    if change.old is not None:
        like, model = change.path.stat(), _access(change.path)
        _write(_old(change.path), change.old, model)
        os.utime(_old(change.path), ns=(like.st_atime_ns, like.st_mtime_ns))
    else:
        model = _model(change.path)
    if change.new is not None:
        _write(_new(change.path), change.new, model)


def _make_folder(folder: Path) -> None:
    """Make a folder with the mode and the owner of the one that it is in, whatever the umask."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir()
    _own(folder, *_access(folder.parent))


def _model(path: Path) -> tuple[int, int, int]:
    """Return mode, owner and group for a new file: those of most files in the nearest folder.

    Of several that are as frequent, or where there are folders only, what the folder itself suggests.
    """
    for folder in filter(Path.is_dir, path.parents):
        entries = [Path(entry) for entry in os.scandir(folder) if entry.name[0] != "."]
        if entries:
            break
    mode, owner, group = _access(folder)
    suggested = (mode & 0o666, owner, group)
    found = Counter(_access(entry) for entry in entries if entry.is_file())
    return max(found, key=lambda access: (found[access], access == suggested), default=suggested)


def _access(path: Path) -> tuple[int, int, int]:
    like = path.stat()
    return like.st_mode & 0o7777, like.st_uid, like.st_gid


def _write(path: Path, data: bytes, model: tuple[int, int, int]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(path, flags, 0o666), "wb") as file:
        _own(path, *model)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _own(path: Path, mode: int, owner: int, group: int) -> None:
    have = path.stat()
    if (have.st_uid, have.st_gid) != (owner, group):
        try:
            os.chown(path, owner, group)
        except PermissionError as error:
            raise PatchError(f"nothing changed: {path}: only its owner {owner}:{group} or root can patch it") from error
    os.chmod(path, mode)


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
            for folder in path.parents:
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    continue  # a run may have been stopped before it made this one
                except OSError:
                    break


def _sync_folder(folder: Path) -> None:
    """Let renames and removals in a folder outlast a loss of power."""
    if folder.is_dir():
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which a file system says that cannot do it for folders
                raise
        finally:
            os.close(opened)


def _forget(path: Path) -> None:
    """Remove a journal."""
    path.unlink(missing_ok=True)
    _new(path).unlink(missing_ok=True)
    _sync_folder(path.parent)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _try_lock(path: Path) -> int | None:
    """Return the locked file, or None while somebody else has it or has just removed it."""
    held = -1
    try:
        held = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        with suppress(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed the file that we locked.
            if path.exists() and os.path.samestat(os.fstat(held), path.stat()):
                os.ftruncate(held, 0)
                os.pwrite(held, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return held
    except OSError as error:
        if held >= 0:
            os.close(held)
        raise PatchError(f"{path}: cannot be written and locked: {error.strerror}") from error
    os.close(held)
    return None


def _holder(path: Path) -> str:
    try:
        with path.open("rb") as file:
            said = file.read(200).decode(errors="replace")
    except OSError:
        said = ""
    return "".join(filter(str.isprintable, said)) or "another process"
