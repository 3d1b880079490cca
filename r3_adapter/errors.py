"""The errors that wrong input raises. Each message names the place and both operands."""


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
