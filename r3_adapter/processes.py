"""Start processes that belong together, watch them, and end all of them when one fails or time runs out."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from r3_adapter.errors import R3Error

_TAIL = 4000
_GRACE_SECONDS = 5.0


def run_together(
    commands: Sequence[Sequence[str]],
    *,
    env: Sequence[Mapping[str, str]],
    timeout: float,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run commands side by side, each in a process group of its own, until all have ended well.

    env: what each process gets on top of this one's environment.
    timeout: seconds for all of them together.
    tick: called several times a second, to show progress.

    Raises:
        R3Error: one failed, or time ran out; the message has the end of its output. The others have been ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{index}.log") for index in range(len(commands))]
        running = []
        try:
            for command, extra, log in zip(commands, env, logs, strict=True):
                with log.open("wb") as out:
                    running.append(_start(command, extra, out))
            failed, code = _wait(running, time.monotonic() + timeout, tick)
        finally:
            for process in running:
                _end(process)
        if failed is not None:
            why = f"did not end within {timeout:g} s" if code is None else f"exit code {code}"
            tail = logs[failed].read_bytes()[-_TAIL:].decode(errors="replace")
            raise R3Error(f"process {failed} of {len(commands)} ({' '.join(commands[failed])}): {why}\n{tail}")


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
    running: Sequence["subprocess.Popen[bytes]"], deadline: float, tick: Callable[[], None]
) -> tuple[int | None, int | None]:
    """Return the index and exit code of a process that failed, or is late (no code); no index if all ended well."""
    while True:
        codes = [process.poll() for process in running]
        tick()
        failed = next((index for index, code in enumerate(codes) if code not in (None, 0)), None)
        if failed is not None:
            return failed, codes[failed]
        if None not in codes:
            return None, None
        if time.monotonic() > deadline:
            return codes.index(None), None
        time.sleep(0.1)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and what it has started; a group outlives its leader."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
