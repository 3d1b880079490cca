"""The wire form's frame: safetensors whose header may be hostile, and the checksum over all of it."""

import json
import re
import struct
from collections.abc import Collection, Mapping
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from r3_adapter.errors import TraceError

_MAX_HEADER = 1 << 20
_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "U16": np.dtype("<u2"), "I32": np.dtype("<i4")}
_CHECKSUM = re.compile(rb'"checksum": ?"([0-9a-f]{8})"')


def checksum_of(data: bytes | memoryview, place: str = "payload") -> tuple[str, str]:
    """Return the checksum that a header has, and the right one: the CRC-32 of all bytes, with "00000000" in its place.

    Raises:
        TraceError: a header without just one checksum; names `place`.
    """
    buffer = memoryview(data).cast("B")
    found = list(_CHECKSUM.finditer(buffer[: 8 + _header_size(buffer, place)]))
    if len(found) != 1:
        raise TraceError(f"{place}: {len(found)} checksums in the header != 1")
    start, stop = found[0].span(1)
    crc = crc32(buffer[stop:], crc32(b"00000000", crc32(buffer[:start])))
    return found[0][1].decode(), f"{crc:08x}"


def check_checksum(data: bytes | memoryview, place: str = "payload") -> None:
    """Refuse bytes that are not those that their writer made the checksum of.

    Raises:
        TraceError: a header without just one checksum, or another one; names `place`.
    """
    wanted, found = checksum_of(data, place)
    if found != wanted:
        raise TraceError(f"{place}: checksum {found} != {wanted} of its header")


def _header_size(buffer: memoryview, place: str) -> int:
    if len(buffer) < 8:
        raise TraceError(f"{place}: {len(buffer)} bytes < 8 of a safetensors header")
    (size,) = struct.unpack_from("<Q", buffer)
    if size > min(_MAX_HEADER, len(buffer) - 8):
        raise TraceError(f"{place}: header of {size} bytes > {min(_MAX_HEADER, len(buffer) - 8)}")
    return int(size)


def read_tensors(
    data: bytes | memoryview, place: str, form: str, names: Collection[str]
) -> tuple[dict[str, npt.NDArray[Any]], Mapping[str, str]]:
    """Split safetensors bytes of a format, with just these tensors, into views and metadata; they may be hostile.

    Raises:
        TraceError: bytes that are something else; names `place`.
    """
    buffer = memoryview(data).cast("B").toreadonly()
    size = _header_size(buffer, place)
    try:
        header = json.loads(bytes(buffer[8 : 8 + size]))
        metadata = header.pop("__metadata__")
        if not all(isinstance(value, str) for value in metadata.values()) or metadata["format"] != form:
            raise TraceError(f"{place}: format {metadata.get('format')!r} != {form!r}")
        if header.keys() != set(names):
            raise TraceError(f"{place}: tensors {sorted(header)} != {sorted(names)}")
        body = buffer[8 + size :]
        arrays = {name: _view(f"{place}: {name}", body, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{place}: header cannot be read: {error!r}") from error
    at = 0
    for start, stop in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if start != at:
            raise TraceError(f"{place}: a tensor starts at {start} != {at}, where the one before it ends")
        at = stop
    if at != len(body):
        raise TraceError(f"{place}: tensors of {at} bytes != {len(body)} bytes after the header")
    return arrays, metadata


def _view(place: str, body: memoryview, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    dtype = _DTYPES.get(entry["dtype"])
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise TraceError(f"{place}: dtype {entry['dtype']!r} is none of {sorted(_DTYPES)}")
    numbers = [start, stop, *shape]
    if not all(type(number) is int and 0 <= number <= len(body) for number in numbers):
        raise TraceError(f"{place}: shape {shape}, offsets {start} to {stop} beyond the {len(body)} bytes of data")
    size = dtype.itemsize
    for number in shape:
        size *= number
    if stop - start != size:
        raise TraceError(f"{place}: offsets {start} to {stop} != {size} bytes of shape {shape}")
    view: npt.NDArray[Any] = np.frombuffer(body[start:stop], dtype=dtype).reshape(shape)
    return view
