"""An engine's processes in the process that uses it: when they die, the next call raises, and the caller lives.

SGLang's schedulers send SIGQUIT to the process that started them, whose handler then kills the whole process tree,
caller included; so does an exception where replies are received, and a watchdog that sees a process end. SGLang's
shutdown kills all children of the caller, its own or not. Here each of these ends the engine's processes alone.

Source: sglang@0.5.20: srt/entrypoints/engine.py, srt/managers/tokenizer_manager.py, srt/utils/watchdog.py
"""

import asyncio
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import psutil

from r3_adapter.errors import CaptureError

Reply = TypeVar("Reply")
_TICK = 0.2
"""Seconds between looks at the processes while a call waits."""
_open: list["EngineProcesses"] = []


class EngineProcesses:
    """The processes that SGLang starts inside `starting`.

    Signals arrive in the main thread: an engine of another thread, whose process fails, still ends this process.
    """

    def __init__(self) -> None:
        self._before = set(_children())
        self._own: list[psutil.Process] | None = None
        self._watchdog: Any = None
        self._failed = False
        self._caller: Any = None

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Start SGLang inside; if that fails, what it has started is ended."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT)}
        _spare_the_caller()
        _open.append(self)
        try:
            with _restored(handlers):
                yield
        except BaseException:
            self.end()
            raise
        self._own = self._started()
        self._handle_signals()

    def watch(self, engine: Any) -> None:
        """Take the signals of a started engine, which its first request would handle in its own way."""
        manager: Any = engine.tokenizer_manager
        self._watchdog, handle_replies = manager._subprocess_watchdog, manager.auto_create_handle_loop

        def handle_replies_alone() -> None:
            if manager.event_loop is not None:
                return
            caller = signal.getsignal(signal.SIGTERM)
            handle_replies()
            if _in_main_thread():
                loop: Any = manager.event_loop
                for number in (signal.SIGTERM, signal.SIGQUIT):
                    loop.remove_signal_handler(number)
                if caller is not None:
                    signal.signal(signal.SIGTERM, caller)
                self._handle_signals()

        manager.auto_create_handle_loop = handle_replies_alone

    async def result_of(self, call: Awaitable[Reply]) -> Reply:
        """Await a call to the engine.

        Raises:
            CaptureError: The engine is dead, or dies meanwhile.
        """
        task = asyncio.ensure_future(call)
        while not task.done():
            if (death := self.death()) is not None:
                task.cancel()
                await asyncio.wait({task}, timeout=_TICK)
                raise CaptureError(death)
            await asyncio.wait({task}, timeout=_TICK)
        return task.result()

    def death(self) -> str | None:
        """Say how the engine died; None while it lives."""
        if self._watchdog is not None:
            for process, name in zip(self._watchdog._processes, self._watchdog._names, strict=True):
                if not process.is_alive():
                    return f"the engine is dead: its {name} (pid {process.pid}) ended with code {process.exitcode}"
        return "the engine is dead: one of its processes failed, as its output says" if self._failed else None

    def end(self, engine: Any = None) -> None:
        """Shut a started engine down, end the processes, and give the signals back."""
        _open.remove(self)
        try:
            if engine is not None:
                with _kept(list(_open)):
                    engine.shutdown()
        finally:
            _wait(self._kill())
            for process in self._watchdog._processes if self._watchdog is not None else ():
                process.join(1)
            if _in_main_thread() and signal.getsignal(signal.SIGQUIT) == self._fail:
                signal.signal(signal.SIGQUIT, self._caller)

    def _started(self) -> list[psutil.Process]:
        return [process for process in _children() if process not in self._before]

    def _kill(self) -> list[psutil.Process]:
        """Kill the processes and what they have started; return them."""
        found = self._started() if self._own is None else list(self._own)
        for process in list(found):
            with suppress(psutil.NoSuchProcess):
                found += process.children(recursive=True)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return found

    def _handle_signals(self) -> None:
        if _in_main_thread() and signal.getsignal(signal.SIGQUIT) != self._fail:
            self._caller = self._caller or signal.getsignal(signal.SIGQUIT) or signal.SIG_DFL
            signal.signal(signal.SIGQUIT, self._fail)

    def _fail(self, *_: Any) -> None:
        self._failed = True
        self._kill()


def _spare_the_caller() -> None:
    """Let SGLang end an engine's processes where it would end this process and all its children."""
    from sglang.srt.entrypoints import engine
    from sglang.srt.managers import tokenizer_manager

    def end_engines(parent_pid: int | None, *args: Any, **options: Any) -> None:
        if parent_pid not in (None, os.getpid()):
            kill_process_tree(parent_pid, *args, **options)
            return
        for each in list(_open):
            each._fail()

    if engine.kill_process_tree.__name__ != end_engines.__name__:
        kill_process_tree = engine.kill_process_tree
        engine.kill_process_tree = tokenizer_manager.kill_process_tree = end_engines


@contextmanager
def _kept(engines: list[EngineProcesses]) -> Iterator[None]:
    """Leave engines alone while another one is shut down."""
    _open[:] = []
    try:
        yield
    finally:
        _open[:] = engines


def _wait(processes: list[psutil.Process], timeout: float = 60) -> None:
    """Wait until processes have ended, and with them what they hold."""
    end = time.monotonic() + timeout
    while any(map(_alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _restored(handlers: Any) -> Iterator[None]:
    """Give signals their handlers back afterwards."""
    try:
        yield
    finally:
        if _in_main_thread():
            for number, handler in handlers.items():
                if handler is not None:
                    signal.signal(number, handler)


def _children() -> list[psutil.Process]:
    """Return all processes below this one but Python's own helper, which all of them share."""
    tracker = getattr(multiprocessing.resource_tracker._resource_tracker, "_pid", None)
    return [each for each in psutil.Process().children(recursive=True) if each.pid != tracker]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
