"""What a command does at a signal that ends a process: all that it started ends too, and one sentence says so."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from r3_adapter.errors import R3Error

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
AFTER = "nothing was saved: the same command begins anew"


class Stopped(KeyboardInterrupt):
    """A signal asks the command to end. A KeyboardInterrupt, since event loops let that through.

    during: what was under way, if somebody knows.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)
        self.during: str | None = None


def stop(number: int, _: FrameType | None = None) -> None:
    """Raise Stopped; later signals wait until everything has ended.

    Raises:
        Stopped: always.
    """
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)


@contextmanager
def stopping() -> Iterator[None]:
    """Let the first signal that ends a process raise Stopped inside; one that is ignored, as by nohup, stays so.

    Stopped comes out of it even where something inside, as a library's C++ code, has made another error of it or has
    swallowed it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in SIGNALS}
    came: list[Stopped] = []

    def handle(number: int, _: FrameType | None) -> None:
        try:
            stop(number)
        except Stopped as stopped:
            came.append(stopped)
            raise

    try:
        for each, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(each, handle)
        yield
    except BaseException as error:
        if not came or isinstance(error, Stopped):
            raise
        raise came[0] from error
    else:
        if came:
            raise came[0]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def during(what: str) -> Iterator[None]:
    """Let Stopped say what was under way."""
    try:
        yield
    except Stopped as stopped:
        stopped.during = stopped.during or what
        raise


def run_command(name: str, do: Callable[[], int | None], after: str | Callable[[], str] = AFTER) -> int:
    """Do what a command does; return its exit code: 2 for an R3Error or OSError, 128 + the number of a signal.

    Each of them is said in one line on stderr.

    name: of the command, as its user has typed it.
    after: what is so after a signal, and how to go on; a function says it once the signal has come.
    """
    try:
        with stopping():
            return do() or 0
    except Stopped as stopped:
        under_way = f" during {stopped.during}" if stopped.during else ""
        say(f"{name}: stopped by {stopped.signal.name}{under_way}; {after if isinstance(after, str) else after()}")
        return 128 + stopped.signal
    except R3Error as error:
        say(f"{name}: {error}")
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        say(f"{name}: {place}{error.strerror or error}")
        return 2


def say(text: str) -> None:
    """Tell whoever watches, in one line.

    It is one write with its end, so that lines of several ranks do not run into one another.
    """
    sys.stderr.write(" ".join(line.strip() for line in text.splitlines() if line.strip()) + "\n")
    sys.stderr.flush()
