"""The errors that wrong input raises. Each message names the place and both operands."""

from operator import index
from reprlib import Repr
from typing import Any, get_args

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class R3Error(ValueError):
    """Input that would make routes go wrong, or an installation that cannot be used."""


class TraceError(R3Error):
    """A routing trace, or a payload that should become one, is malformed or missing."""


class LayoutError(R3Error):
    """A parallel layout, or the cut of a trace for it, is impossible."""


class PatchError(R3Error):
    """Patches cannot be applied to, or reverted from, the installed packages."""


class ReplayError(R3Error):
    """Replay in the trainer would be wrong or would not happen."""


class CaptureError(R3Error):
    """The rollout engine's reply cannot be used."""


class UnknownModelError(CaptureError):
    """A model whose routers or sizes cannot be known here: nothing is said of them rather than something wrong."""


def check_choice(name: str, value: object, choices: Any, error: type[R3Error] = R3Error) -> None:
    """Refuse a word that is none of the known ones: a typo must not be taken for the most permissive of them.

    choices: a Literal of strings.

    Raises:
        R3Error: Of the given type; names the known words.
    """
    known = get_args(choices)
    if not isinstance(value, str) or value not in known:
        raise error(f"{name} {value!r} is none of {', '.join(map(repr, known))}")


def check_whole(name: str, value: object, least: int | None = None, *, error: type[R3Error] = R3Error) -> int:
    """Return a whole number of any integer type as int; True, 2.0 and "2" are none.

    Raises:
        R3Error: Of the given type; names the value.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        raise error(f"{name} ({show(value)}) is not a whole number") from None
    if least is not None and number < least:
        raise error(f"{name} ({show(number)}) < {least}")
    return number


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, to which an s is added for all numbers but 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show(value: object) -> str:
    """Return what a value from outside is, short and in ASCII, however large or deep it is."""
    try:
        return _SHORT.repr(value).encode("ascii", "backslashreplace").decode()
    except (ValueError, RecursionError):
        return f"{type(value).__name__} that is too large to show"
