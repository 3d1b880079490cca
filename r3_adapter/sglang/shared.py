"""Payloads in shared memory: a reply has the handle of a file, which its reader takes and removes."""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r3_adapter.errors import CaptureError
from r3_adapter.locked import make_locked
from r3_adapter.sglang.reply import info_of, payload_of
from r3_adapter.watchdog import FOLDERS, MEMORY, open_folder

_NAME = re.compile("[0-9a-f]{32}")
_MAX_HANDLE = 256


@contextmanager
def payload_folder(parent: Path = MEMORY) -> Iterator[Path]:
    """Make a folder for the payloads of one engine, and remove it in the end; first remove those of engines that died.

    A folder is in use as long as a process holds a lock of it, which it loses however it ends: this process does, and
    so do the engine's.

    Source: patches/sglang: srt/state_capturer/routed_experts_files.py:PayloadFolder
    """
    folder, lock = make_locked(parent, FOLDERS)
    try:
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def fetch_payload(reply: dict[str, Any], folder: Path, place: str) -> dict[str, Any]:
    """Return a reply with its payload in place of the handle.

    The file is read at once and removed: a handle is good for once. Mapped memory would cost a descriptor and a mapping
    for as long as a trace lives, and whoever still has the file open could change it. A reply whose payload travelled
    with it, or that has none, is returned as it is.

    folder: what the server was started with as --routed-experts-dir; nothing else is opened.

    Raises:
        CaptureError: The handle is malformed, or its file is not there, is no plain file or has another size.

    Source: patches/sglang: srt/state_capturer/routed_experts_files.py
    """
    info = info_of(reply, place)
    if info.get("routed_experts") is None:
        return reply
    payload = payload_of(reply, place)
    if payload[:1] != b"{" or len(payload) > _MAX_HANDLE:
        return reply
    name, size = _read_handle(bytes(payload), place)
    return {**reply, "meta_info": {**info, "routed_experts": _take(folder, name, size, place)}}


def _read_handle(handle: bytes, place: str) -> tuple[str, int]:
    try:
        values = json.loads(handle)
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"{place}: handle {handle!r} cannot be read: {error}") from error
    name, size = (values.get("file"), values.get("num_bytes")) if isinstance(values, dict) else (None, None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CaptureError(f"{place}: file {name!r} of the handle is not 32 hexadecimal digits")
    if type(size) is not int or size < 1:
        raise CaptureError(f"{place}: num_bytes {size!r} of the handle is not a size")
    return name, size


def _take(folder: Path, name: str, size: int, place: str) -> bytes:
    """Read a file of a folder, and remove it."""
    where = f"{place}: {folder / name}"
    try:
        parent = open_folder(folder)
        try:
            # A pipe must not make the reader wait.
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
            try:
                found = os.fstat(file)
                if not stat.S_ISREG(found.st_mode):
                    raise CaptureError(f"{where}: is no plain file")
                if found.st_size != size:
                    raise CaptureError(f"{where}: {found.st_size} bytes != {size} of the handle")
                with open(file, "rb", closefd=False) as stream:
                    payload = stream.read(size)
                if len(payload) != size:
                    raise CaptureError(f"{where}: {len(payload)} bytes could be read != {size} of the handle")
            finally:
                os.close(file)
            os.unlink(name, dir_fd=parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise CaptureError(f"{where}: cannot be taken: {error}") from error
    return payload
