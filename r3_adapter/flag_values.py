"""What the value of a flag may be: each is a `type` of argparse, which refuses the rest before a command starts."""

import argparse
import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r3_adapter.errors import R3Error

LARGEST_SEED = 2**31 - 1
"""Engines and data take seeds beside the one given; numpy's are below 2**32."""


def json_object(text: str) -> dict[str, Any]:
    """Return what a text is as a JSON object.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, such as '{{\"name\": 1}}'")
    return value


def output_file(text: str) -> Path:
    """Return the path of a file that a command will write, once it is known that it can: before the work, not after.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    path = Path(text)
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: is a folder, not a file")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{path.parent}: no such folder")
        _try_to_write(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be written: {error.strerror}") from error
    return path


STDOUT = Path("-")


def output_file_or_stdout(text: str) -> Path:
    """Return STDOUT for "-", and otherwise what output_file does."""
    return STDOUT if text == str(STDOUT) else output_file(text)


def _try_to_write(path: Path) -> None:
    """Open a file as whoever writes it will, and leave everything as it was."""
    if path.exists() and not path.is_file():
        # To open a pipe and close it would end it for its reader.
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        os.close(os.open(path, os.O_WRONLY))
    else:
        path.unlink()


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder that a command will write to, with those above it, and see that it can.

    Raises:
        R3Error: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=mode)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise R3Error(f"{folder}: cannot be written to: {error.strerror}") from error


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of a flag that takes whole numbers of this range; LARGEST_SEED is the most of a seed."""

    def number(text: str) -> int:
        try:
            found = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
        if found < least:
            raise argparse.ArgumentTypeError(f"{found} < {least}")
        if most is not None and found > most:
            raise argparse.ArgumentTypeError(f"{found} > {most}")
        return found

    return number
