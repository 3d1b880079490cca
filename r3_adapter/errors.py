"""The errors that wrong input raises. Each message names the place and both operands."""

from typing import Any, get_args


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


def check_choice(name: str, value: object, choices: Any, error: type[R3Error] = R3Error) -> None:
    """Refuse a word that is none of the known ones: a typo must not be taken for the most permissive of them.

    choices: a Literal of strings.

    Raises:
        R3Error: Of the given type; names the known words.
    """
    known = get_args(choices)
    if not isinstance(value, str) or value not in known:
        raise error(f"{name} {value!r} is none of {', '.join(map(repr, known))}")
