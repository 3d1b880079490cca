"""A process that has imported what others need, and forks for each of them: `python server.py SOCKET MODULE...`.

Each connection is one process: its request is a JSON object with "arguments" (after the interpreter's own options: -m,
the module and its arguments, or a script and its), "environment" and "folder", and its three standard files; the answer
is its id, and when it has ended its exit code. A process whose connection is closed is killed. The server ends when its
standard input does.
"""

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PDEATHSIG = 1
"""prctl's PR_SET_PDEATHSIG."""


def serve(path: str) -> list[str]:
    """Fork for each request; return in the new process only, with what it is to run."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    print("serving", flush=True)
    poll = select.poll()
    poll.register(0, 0)
    poll.register(listener, select.POLLIN)
    connections: dict[int, tuple[socket.socket, int, int]] = {}
    ends: dict[int, int] = {}
    while True:
        for number, _ in poll.poll():
            if number == 0:
                for _, pid, _ in connections.values():
                    kill(pid)
                    os.waitpid(pid, 0)
                os._exit(0)
            elif number == listener.fileno():
                connection, _ = listener.accept()
                data, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
                pid = os.fork()
                if pid == 0:
                    for each, _, end in connections.values():
                        each.close()
                        os.close(end)
                    listener.close()
                    connection.close()
                    return become(json.loads(data), files)
                for each in files:
                    os.close(each)
                end = os.pidfd_open(pid)
                connections[connection.fileno()] = connection, pid, end
                ends[end] = connection.fileno()
                poll.register(connection, select.POLLIN)
                poll.register(end, select.POLLIN)
                connection.send(str(pid).encode())
            elif number in connections:
                kill(connections[number][1])
                poll.unregister(number)
            elif number in ends:
                of = ends.pop(number)
                connection, pid, _ = connections.pop(of)
                poll.unregister(number)
                with contextlib.suppress(KeyError):
                    poll.unregister(of)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):
                    connection.send(str(code).encode())
                connection.close()
                os.close(number)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def become(request: dict[str, Any], files: Sequence[int]) -> list[str]:
    """Be a process as if it had just been started, but for what is imported."""
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    return list(request["arguments"])


def run(arguments: Sequence[str]) -> None:
    """Run a module or a script as the interpreter does."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if arguments[0] == "-m":
        name, sys.path[0], sys.argv = arguments[1], os.getcwd(), ["-m", *arguments[2:]]
        # It is not to be there twice.
        sys.modules.pop(name, None)
        runpy._run_module_as_main(name)  # type: ignore[attr-defined]
        return
    path = arguments[0]
    sys.path[0], sys.argv = os.path.dirname(os.path.abspath(path)), list(arguments)
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    main.__file__ = path
    exec(code, main.__dict__)


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    run(serve(sys.argv[1]))
