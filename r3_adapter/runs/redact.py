"""Keep secrets out of what a run writes down: settings are shown to whoever reads its report."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
_SECRET = re.compile(
    r"(^|_)(api_?)?keys?$|access_?key|private_?key|passw|passphrase|pwd|secret|credential|bearer|authorization|cookie"
    r"|(^|_)auth$|(^|_)(auth|access|api|hf|hub|wandb|id|refresh|session|bot|bearer)_?tokens?$|^token$|dsn$",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
"""User and password of a URL."""


def redacted(value: Any) -> Any:
    """Return JSON-like data with each value that has a secret's name replaced, at any depth; nothing else changes.

    Absent values stay: None, False and the empty text say that no secret was set.
    """
    if isinstance(value, Mapping):
        return {key: HIDDEN if inner and _is_secret(key) else redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    return _IN_URL.sub(HIDDEN, value) if isinstance(value, str) else value


def _is_secret(name: object) -> bool:
    return isinstance(name, str) and _SECRET.search(name.replace("-", "_")) is not None
