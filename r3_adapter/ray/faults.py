"""What Ray says of a fault, in one line that people can read."""

import re
from collections.abc import Iterable, Iterator

import ray

from r3_adapter.errors import R3Error, counted
from r3_adapter.ray.store import SampleRef

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_DEAD = "The actor is dead because "
_GUESSES = " Some common causes"
_SILENT = re.compile(
    r"Worker exit type: \w+ Worker exit detail: \w+ unexpectedly exits with a connection error code .*"
)
"""Ray's words for a process whose connection has ended, of which it knows nothing."""
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
    # What an engine is lost by says it in a sentence of its own.
    kind = "" if isinstance(cause, EngineLost) else f"{type(cause).__name__}: "
    # Others go on with the sentence.
    return f"{kind}{' '.join(lines)}".removesuffix(": ").rstrip(".")[:_MAX_CHARACTERS]


def told_by_prompt(problems: Iterable[tuple[SampleRef, str]]) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of one event for each prompt, of samples and what is wrong with each.

    All samples of a prompt may lie in one object: the first one is named with its fault, the others are counted.
    """
    found: dict[tuple[int, str], list[str]] = {}
    for ref, why in problems:
        kind = "trace_lost" if "lost: " in why else "trace_damaged"
        found.setdefault((ref.group, kind), []).append(f"{ref.name}: {why}")
    for (_, kind), (first, *others) in found.items():
        samples = f"{counted(len(others), 'more sample')} of it"
        yield kind, f"{first}{f', and {samples}' if others else ''}"


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
            return _SILENT.sub("It was killed, crashed or was out of memory.", line.removeprefix(_DEAD)).partition(
                _GUESSES
            )[0]
    traceback = any(line.startswith('File "') for line in lines)
    return (lines[-1] if traceback else lines[0]) if lines else ""
