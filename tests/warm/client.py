"""Start processes that have imported an engine already: see server.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from r3_adapter.sglang.cpu import has_gpu

HERE = Path(__file__).parent
OWN = {
    "PYTEST_CURRENT_TEST",
    "R3_GUARD",
    "R3_LOGS",
    "R3_PERTURB",
    "SGLANG_CPU_OMP_THREADS_BIND",
    "SPT_NOENV",
    "TMPDIR",
}
"""Variables that no import looks at: a server serves processes with any values of them."""
MODULES = {
    "r3_adapter.megatron.": "preload_megatron",
    "r3_adapter.sglang.worker": "preload_sglang",
    "r3_adapter.proof.scoring_rank": "preload_megatron",
    "sglang.launch_server": "preload_sglang",
}
READY = b"serving\n"
MOST = 3
"""Servers at a time."""


class Process:
    """As much of subprocess.Popen as those who wait for a process need."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = int(connection.recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._ended(socket.MSG_DONTWAIT)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
        code = self._ended(0)
        assert code is not None
        return code

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _ended(self, flags: int) -> int | None:
        if self.returncode is None:
            try:
                said = self._connection.recv(64, flags)
            except BlockingIOError:
                return None
            except ConnectionError:
                said = b""
            # Without its server a process is killed.
            self.returncode = int(said) if said else -9
            self._connection.close()
        return self.returncode


class Servers:
    """Start processes by servers, which are started when they are first needed."""

    def __init__(self, cold: Callable[[Sequence[str], Mapping[str, str], BinaryIO], Any]) -> None:
        self._cold, self._servers = cold, dict[tuple[Any, ...], Server]()

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.close()

    @property
    def pids(self) -> set[int]:
        """The servers themselves, which have the environment of what they start."""
        return {server.pid for server in self._servers.values()}

    def start(self, command: Sequence[str], extra: Mapping[str, str], out: BinaryIO) -> Any:
        """Start a process as r3_adapter.processes does, by a server where that is the same."""
        options = list(takewhile(lambda word: word in ("-W", "ignore"), command[1:]))
        arguments = list(command[1 + len(options) :])
        module = preloaded(command[0], arguments)
        if module is None or has_gpu():
            return self._cold(command, extra, out)
        environment = {**os.environ, **extra}
        static = {name: value for name, value in environment.items() if name not in OWN}
        key = module, tuple(options), tuple(sorted(static.items()))
        if key not in self._servers:
            if len(self._servers) == MOST:
                self._servers.pop(next(iter(self._servers))).close()
            self._servers[key] = Server(module, options, static)
        return self._servers[key].start(arguments, environment, out)


def preloaded(python: str, arguments: Sequence[str]) -> str | None:
    """Return which module has what a command imports; None for one that is to be started anew."""
    # A server that was forked leaves its folder in shared memory.
    if python != sys.executable or "--routed-experts-dir" in arguments:
        return None
    if arguments[0] == "-m":
        return next((module for start, module in MODULES.items() if arguments[1].startswith(start)), None)
    return "preload_megatron" if Path(arguments[0]).parent == HERE.parent / "integration" else None


class Server:
    """One environment's process that has imported a module."""

    def __init__(self, module: str, options: Sequence[str], environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._path = f"{self._folder.name}/s"
        path = os.pathsep.join([str(HERE), *filter(None, [environment.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, *options, str(HERE / "server.py"), self._path, module],
            env={**environment, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        # Engines print as they are imported.
        if READY not in self._process.stdout:
            raise RuntimeError(f"{module} cannot be imported: exit code {self._process.wait()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], out: BinaryIO) -> Process:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self._path)
        request = {"arguments": list(arguments), "environment": dict(environment), "folder": os.getcwd()}
        with open(os.devnull, "rb") as nothing:
            files = [nothing.fileno(), out.fileno(), out.fileno()]
            socket.send_fds(connection, [json.dumps(request).encode()], files)
        return Process(connection)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()
