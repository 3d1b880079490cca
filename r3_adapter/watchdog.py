"""Clear up behind a process, however it ends: `python watchdog.py TOKEN FOLDER`, started by processes.guard.

Its standard input is a pipe whose other end that process alone has: the end of it says that the process has closed the
pipe or is dead, of SIGKILL too. Then all processes with the token in their environment are killed, and the folder and
the files in shared memory that they made are removed.

It runs as a file of its own, without site-packages: it must start at once.
"""

import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

VARIABLE = "R3_GUARD"
MEMORY = Path("/dev/shm")
FOLDERS = "r3-routes-"
"""How the names of folders in shared memory begin."""
_TRACKER = b"multiprocessing.resource_tracker"
_TRACKER_SECONDS = 3.0
_SECONDS = 30.0


def main(token: str, folder: str) -> None:
    """Wait for the end of the process, and clear up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    before = set(os.listdir(MEMORY))
    # The process goes on from here.
    os.close(1)
    sys.stdin.read()
    made = end_marked(token) - before
    for name in made - set().union(*map(mapped, _pids())):
        with suppress(OSError):
            os.unlink(MEMORY / name)
    for found in MEMORY.glob(f"{FOLDERS}*"):
        remove_dead(found)
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            break
        time.sleep(0.1)


def end_marked(token: str) -> set[str]:
    """Kill all processes with the token, and those that they start meanwhile; return the memory files they had mapped.

    Python's own trackers of shared memory are left the time to remove what the others had.
    """
    files: set[str] = set()
    begin = time.monotonic()
    while (pids := list(marked(token))) and (waited := time.monotonic() - begin) < _SECONDS:
        others = [pid for pid in pids if _TRACKER not in _read(pid, "cmdline")]
        for pid in others or (pids if waited > _TRACKER_SECONDS else []):
            files |= mapped(pid)
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return files


def marked(token: str) -> Iterator[int]:
    """Return the processes that were started with the token; one that has ended has no environment."""
    return (pid for pid in _pids() if token.encode() in _read(pid, "environ"))


def mapped(pid: int) -> set[str]:
    """Return the names of the files in shared memory, in no folder of it, that a process has mapped."""
    places = (line.partition(f"{MEMORY}/")[2] for line in _read(pid, "maps").decode(errors="replace").splitlines())
    return {name for name in places if name and "/" not in name and not name.endswith(" (deleted)")}


def remove_dead(folder: Path) -> None:
    """Remove a folder of this user of which no process has a lock."""
    try:
        lock = open_folder(folder)
    except OSError:
        return
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def open_folder(folder: Path) -> int:
    """Return a descriptor of a folder that is no link."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
