"""What Ray says of a fault, in one line that people can read."""

import re
from collections.abc import Iterator

import ray

from r3_adapter.errors import R3Error

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_DEAD = "The actor is dead because "
_MAX_CHARACTERS = 300


class RankLost(R3Error):
    """A rank of the trainer died, hung or failed; the others may wait for it without end."""


class EngineLost(Exception):
    """A process of a rollout engine has ended: whatever the engine is asked, it will not answer."""


def reason(error: BaseException) -> str:
    """Return the kind of an error and what it says: of one that a task raised, that one's.

    Ray's own messages have escape sequences, addresses and whole tracebacks in them.
    """
    cause = cause_of(error)
    lines = [line.strip() for line in _ANSI.sub("", str(cause)).splitlines() if line.strip()]
    if isinstance(cause, ray.exceptions.RayError):
        lines = [_of_ray(lines)]
    return f"{type(cause).__name__}: {' '.join(lines)}".removesuffix(": ")[:_MAX_CHARACTERS]


def cause_of(error: BaseException) -> BaseException:
    """Return what a task raised, of Ray's error about it; another error as it is."""
    *_, last = _causes(error)
    return last


def _causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        yield from _causes(cause)


def _of_ray(lines: list[str]) -> str:
    """Return the line that says why: a dead actor's, that of a traceback's error, else the first."""
    for line in lines:
        if line.startswith(_DEAD):
            # What follows guesses at causes.
            return line.removeprefix(_DEAD).partition(" Some common causes")[0]
    traceback = any(line.startswith('File "') for line in lines)
    return (lines[-1] if traceback else lines[0]) if lines else ""
