"""Environment variables for a while."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of this process, and of those that are started inside; give them their old values back afterwards.

    variables: None takes one away. `tempfile`, which keeps what it has once read, follows TMPDIR.
    """
    before, kept = {name: os.environ.get(name) for name in variables}, tempfile.tempdir
    _set(variables)
    tempfile.tempdir = variables.get("TMPDIR", kept)
    try:
        yield
    finally:
        tempfile.tempdir = kept
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
