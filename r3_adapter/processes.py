"""Start processes that belong together; end all of them when one fails, time runs out, or this one ends.

However this process ends, SIGKILL included, a watchdog ends what it has started and removes its folder.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from r3_adapter import watchdog
from r3_adapter.environment import environment
from r3_adapter.errors import R3Error
from r3_adapter.locked import make_locked
from r3_adapter.signals import during

LOGS = "R3_LOGS"
"""An environment variable: a folder that gets the whole output of processes that fail."""

_PREFIX = "r3-run-"
_SOCKET_PATH = 107 - len(f"/{_PREFIX}12345678" * 2 + "/tmp12345678")
"""Characters that Linux leaves for the folder in the path of a socket."""
_R3_ERROR = re.compile(r"(?:^|[\s.:])(?:R3|Trace|Layout|Patch|Replay|Capture|UnknownModel)Error: (.*)")
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")


@dataclass(frozen=True)
class Guard:
    """What is cleared up behind this process: see `guard`.

    folder: for temporary files of this process and of those that it starts.
    variables: what they must have in their environment.
    """

    folder: Path
    variables: Mapping[str, str]


@contextmanager
def guard() -> Iterator[Guard]:
    """Make a folder; in the end, and however this process ends, remove it and kill all that has been marked.

    Processes are marked by Guard.variables in their environment, and so are those that they start.
    """
    base = Path(tempfile.gettempdir())
    folder, lock = make_locked(base if len(str(base)) <= _SOCKET_PATH else Path("/tmp"), _PREFIX)
    token = secrets.token_hex(16)
    above = os.environ.get(watchdog.VARIABLE)
    variables = {
        watchdog.VARIABLE: f"{above},{token}" if above else token,
        "TMPDIR": str(folder),
        # setproctitle would write over the mark.
        "SPT_NOENV": "1",
    }
    clear_up = subprocess.Popen(
        [sys.executable, "-I", "-S", watchdog.__file__, token, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != watchdog.VARIABLE},
        start_new_session=True,
        pass_fds=[lock],
    )
    os.close(lock)
    assert clear_up.stdin is not None and clear_up.stdout is not None
    try:
        clear_up.stdout.read()
        yield Guard(folder, variables)
    finally:
        with suppress(BrokenPipeError):
            clear_up.stdin.close()
        clear_up.stdout.close()
        clear_up.wait()


@contextmanager
def guarded() -> Iterator[None]:
    """Guard all that this process starts and all temporary files that it makes; for a process that is a command's own.

    Where another process guards this one already, that one clears up.
    """
    if watchdog.VARIABLE in os.environ:
        yield
        return
    with guard() as found, environment(found.variables):
        yield


def run_together(
    commands: Sequence[Sequence[str]],
    *,
    env: Sequence[Mapping[str, str]],
    timeout: float,
    tick: Callable[[], None] = lambda: None,
    what: str = "process",
    each: str = "process",
) -> None:
    """Run commands side by side, each in a process group of its own, until all have ended well.

    env: what each process gets on top of this one's environment.
    timeout: seconds for all of them together.
    tick: called several times a second, to show progress.
    what, each: what they are together, and what one of several is, in messages.

    Raises:
        R3Error: one failed, or time ran out; the message names it and has the reason in its output. The others have
            been ended.
    """
    with ExitStack() as stack:
        stack.enter_context(during(f"the {what}"))
        running: list[subprocess.Popen[bytes]] = []
        stack.callback(_reap, running)
        # It looks at what they have before it kills them.
        found = stack.enter_context(guard())
        logs = [found.folder / f"{index}.log" for index in range(len(commands))]
        for command, extra, log in zip(commands, env, logs, strict=True):
            with log.open("wb") as out:
                running.append(_start(command, {**extra, **found.variables}, out))
        failed, code = _wait(running, logs, time.monotonic() + timeout, tick)
        if failed is not None:
            name = what if len(commands) == 1 else f"{what}, {each} {failed} of {len(commands)}"
            why = f"did not end within {timeout:g} s: " if code is None else ""
            raise R3Error(f"{name}: {why}{_reason(logs[failed], code, what)}{_keep(logs[failed], name)}")


def _reap(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def _start(command: Sequence[str], extra: Mapping[str, str], out: BinaryIO) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        env={**os.environ, **extra},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait(
    running: Sequence["subprocess.Popen[bytes]"], logs: Sequence[Path], deadline: float, tick: Callable[[], None]
) -> tuple[int | None, int | None]:
    """Return the index and exit code of a process that failed, or is late (no code); no index if all ended well.

    Where several failed it is the one that was the first to say so: others lose their connection to it.
    """
    while True:
        codes = [process.poll() for process in running]
        tick()
        if failed := [index for index, code in enumerate(codes) if code not in (None, 0)]:
            first = min(failed, key=lambda index: logs[index].stat().st_mtime_ns)
            return first, codes[first]
        if None not in codes:
            return None, None
        if time.monotonic() > deadline:
            return codes.index(None), None
        time.sleep(0.1)


def _reason(log: Path, code: int | None, what: str) -> str:
    """Return in a line why a process failed, as run_command, an R3Error or another traceback says."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line.removeprefix(f"{what}: ") for line in lines if line.startswith(f"{what}: ")]
    ours = ours or [match[1] for line in lines if (match := _R3_ERROR.search(line))]
    said = ours[-1] if ours else _raised(lines) or (lines[-1].strip() if lines else "no output")
    if code is not None and code < 0 and not ours:
        return f"killed by {signal.Signals(-code).name}; {said}"
    return said


def _raised(lines: Sequence[str]) -> str | None:
    """Return the last line of the first traceback, or of the last one in its chain: later ones follow from it."""
    found, chained = None, True
    for at, line in enumerate(lines):
        chained = chained or line.startswith(_CHAINED)
        if _TRACEBACK in line and chained:
            found = next((each.strip() for each in lines[at + 1 :] if not each.startswith(" ")), found)
            chained = False
    return found


def _keep(log: Path, name: str) -> str:
    """Keep the whole output where R3_LOGS says, and say where."""
    if (folder := os.environ.get(LOGS)) is None:
        return f" (set {LOGS}=FOLDER to keep its whole output)"
    kept = Path(folder, re.sub(r"\W+", "-", name) + ".log")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(log.read_bytes())
    except OSError as error:
        return f" ({LOGS}: {kept}: {error.strerror})"
    return f" (its whole output: {kept})"
