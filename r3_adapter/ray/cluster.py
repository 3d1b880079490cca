"""Ray: a cluster that runs already, or one on this machine that is this user's alone.

Loopback is no border between users: whoever may run a process on the host can connect to its ports. So a cluster that
is started here asks for a token that only this user can read, and its sockets, logs and temporary files are in a
folder that only this user can enter.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from r3_adapter.environment import environment
from r3_adapter.errors import R3Error
from r3_adapter.locked import make_locked
from r3_adapter.sglang.meeting import FOLDER
from r3_adapter.signals import SIGNALS, say

_PREFIX = "r3-ray-"
_MEMORY = Path("/dev/shm")
_WORKER_DIED = "A worker died or was killed while executing a task"
_SOCKET_PATH = 107 - len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
"""Characters that Linux leaves for the folder in the path of a socket."""


@contextmanager
def cluster(address: str | None = None, *, num_cpus: int = 64, object_store_bytes: int = 512 << 20) -> Iterator[None]:
    """Connect to a cluster, or start one that ends with the context.

    address: of a cluster; None to start one here.
    num_cpus, object_store_bytes: of one that is started. Actors here say how many CPUs they want, and on a small
        machine they share: the number is only a limit on how many there can be.

    Raises:
        R3Error: Ray is connected to a cluster already, does not stay on loopback, or the cluster cannot be reached.
    """
    import ray

    if ray.is_initialized():
        raise R3Error("Ray is connected already; start the loop in a process of its own")
    with ExitStack() as stack:
        # Of a task that failed Ray prints the traceback too where nobody asks what became of it; here it is an event.
        stack.enter_context(environment({"RAY_IGNORE_UNHANDLED_ERRORS": "1"}))
        stack.enter_context(_errors_in_a_line())
        if address is None:
            folder = stack.enter_context(_private_folder())
            stack.enter_context(_private_processes(folder))
            stack.callback(ray.shutdown)
            with _own_signals():
                _start(folder, num_cpus, object_store_bytes)
        else:
            _check_reachable(address)
            stack.callback(ray.shutdown)
            try:
                with _own_signals():
                    ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                said = next(iter(str(error).splitlines()), "")
                raise R3Error(f"no Ray cluster can be used at {address}: {said}") from error
        yield


def spilled_bytes() -> int:
    """Return how many bytes the object stores of all nodes have moved to disk so far, because they were full.

    Source: ray@2.55.1: _private/internal_api.py:memory_summary
    """
    import ray
    from ray._private import internal_api

    reply = internal_api.get_memory_info_reply(ray._private.state.state)
    return int(reply.store_stats.spilled_bytes_total)


@contextmanager
def _errors_in_a_line() -> Iterator[None]:
    """Say what Ray's nodes report, as an object store or a disk that is full, in plain lines on stderr.

    Ray prints it to stdout, in colours. That a worker has died is left out: whoever waits for the worker is told.

    Source: ray@2.55.1: _private/worker.py:listen_error_messages
    """
    from ray._private import worker

    before, said = worker.print_to_stdstream, set[str]()

    def show(data: dict[str, Any], ignore_prefix: bool) -> None:
        if data.get("pid") != "raylet":
            before(data, ignore_prefix)
            return
        for text in data["lines"]:
            # Of a traceback its last line, which says what happened.
            line = text.strip().splitlines()[-1] if text.startswith("Traceback") else text
            if not line.startswith(_WORKER_DIED) and line not in said:
                said.add(line)
                say(f"ray: {line}")

    worker.print_to_stdstream = show
    try:
        yield
    finally:
        worker.print_to_stdstream = before


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handlers of signals where it has its own: Ray puts one of its own in their place.

    Source: ray@2.55.1: _private/worker.py:init, which sets one for SIGTERM
    """
    before = {each: signal.getsignal(each) for each in SIGNALS}
    yield
    for each, handler in before.items():
        if callable(handler) and signal.getsignal(each) is not handler:
            signal.signal(each, handler)


def _check_reachable(address: str) -> None:
    """Refuse an address at which nothing listens: Ray would try for minutes.

    Raises:
        R3Error: it is HOST:PORT, and nothing does.
    """
    host, _, port = address.rpartition(":")
    if host and port.isascii() and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise R3Error(f"no Ray cluster can be used at {address}: {error}") from error


def _start(folder: Path, num_cpus: int, object_store_bytes: int) -> None:
    import ray

    _stay_on_loopback()
    _say_where_objects_are(object_store_bytes, folder.parent)
    # Its workers would give way to everything else on the machine, but here they are what it is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        num_cpus=num_cpus,
        object_store_memory=object_store_bytes,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        # Ray lets everybody write into the folder that it is given.
        _temp_dir=str(folder / "ray"),
    )
    found = ray.nodes()[0]["NodeManagerAddress"]
    if found != "127.0.0.1":
        raise R3Error(f"Ray listens at {found} != 127.0.0.1")


def _say_where_objects_are(num_bytes: int, disk: Path) -> None:
    """Say it in a line if shared memory is too small for the object store: Ray then takes a disk, and says it in five.

    Source: ray@2.55.1: _private/services.py:determine_plasma_store_config
    """
    free = shutil.disk_usage(_MEMORY).free
    if free < num_bytes:
        mib = f"{free / (1 << 20):,.0f} MiB free of {num_bytes / (1 << 20):,.0f} that the object store wants"
        todo = "in a container, start it with a larger --shm-size"
        say(f"ray: {_MEMORY} has {mib}: samples lie on the disk of {disk}, which is slower; {todo}")
    logging.getLogger("ray._private.services").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "The object store is using" not in record.getMessage()


@contextmanager
def _private_folder() -> Iterator[Path]:
    """Make a folder that only this user can enter, and remove it; also those of processes that were killed."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) + len(f"/{_PREFIX}12345678") > _SOCKET_PATH:
        base = Path("/tmp")
    folder, lock = make_locked(base, _PREFIX)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder in which processes that are about to end may still write."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextmanager
def _private_processes(folder: Path) -> Iterator[None]:
    """Let processes that are started inside ask for a token, and keep their files to this user."""
    token, temporary = folder / "token", folder / "tmp"
    temporary.mkdir(mode=0o700)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="ascii")
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_AUTH_TOKEN": None,
        # Engines make the sockets of their processes there.
        "TMPDIR": str(temporary),
        FOLDER: str(temporary),
    }
    mask = os.umask(0o077)
    try:
        with environment(variables):
            _forget_token()
            yield
    finally:
        os.umask(mask)
        _forget_token()


def _forget_token() -> None:
    """Let Ray look at the environment again: it keeps what it has read.

    Source: ray@2.55.1: _private/authentication_test_utils.py:reset_auth_token_state
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


def _stay_on_loopback() -> None:
    """Ray replaces a loopback address by one that the network can reach, except where it takes itself to be alone.

    Source: ray@2.55.1: _private/ray_constants.py:ENABLE_RAY_CLUSTER, _private/services.py:get_node_ip_address
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
