"""Read and write the safetensors that come from outside: their bytes may be hostile; and the checksum over them."""

import json
import re
from collections.abc import Collection, Mapping
from math import prod
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from r3_adapter.errors import TraceError, show
from r3_adapter.frozen import is_frozen

MAX_HEADER = 1 << 20
"""Bytes of a header at most, unless the reader says otherwise: to read one takes many times as much memory."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
}
_MAX_SIZE = 1 << 16
"""What an empty tensor's other sizes may be: the most experts that ids can name."""

_CHECKSUM = re.compile(rb'"checksum": ?"([0-9a-f]{8})"')
_NO_CHECKSUM = "0" * 8

Data = bytes | bytearray | memoryview


class Header(NamedTuple):
    """The checked header of safetensors.

    tensors: the entry of each; dtype a name, shape whole numbers from 0, data_offsets two of them, the first the lower.
    metadata: texts.
    start: where the data begin. stop: where the last tensor ends.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int
    stop: int


def write_tensors(
    tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str], *, max_header: int = MAX_HEADER
) -> bytes:
    """Return safetensors bytes; a checksum among the metadata, whatever it is, becomes the right one.

    Raises:
        TraceError: a header that nobody would read.
    """
    placeholder = {"checksum": _NO_CHECKSUM} if "checksum" in metadata else {}
    data = save(dict(tensors), {**metadata, **placeholder})
    size = int.from_bytes(data[:8], "little")
    if size > max_header:
        largest = max(metadata, key=lambda name: len(metadata[name]))
        raise TraceError(f"header of {size} bytes > {max_header}; its {largest} are too many to be written at once")
    return with_checksum(data) if placeholder else data


def with_checksum(data: bytes) -> bytes:
    """Return safetensors bytes whose header has a checksum, with the right one.

    Raises:
        TraceError: a header without just one checksum.
    """
    start, stop = _find_checksum(memoryview(data), "payload")
    return data[:start] + _crc(memoryview(data), start, stop).encode() + data[stop:]


def checksum_of(data: Data, place: str = "payload") -> tuple[str, str]:
    """Return the checksum that a header has, and the right one: the CRC-32 of all bytes, with "00000000" in its place.

    Raises:
        TraceError: a header without just one checksum; names `place`.
    """
    buffer = as_buffer(data, place)
    start, stop = _find_checksum(buffer, place)
    return bytes(buffer[start:stop]).decode(), _crc(buffer, start, stop)


def check_checksum(data: Data, place: str = "payload") -> None:
    """Refuse bytes that do not match the checksum of their writer.

    Raises:
        TraceError: a header without just one checksum, or another one; names `place`.
    """
    wanted, found = checksum_of(data, place)
    if found != wanted:
        raise TraceError(f"{place}: checksum {found} != {wanted} of its header")


def as_buffer(data: object, place: str) -> memoryview:
    """Return the bytes as a flat buffer that nobody else can change: a copy, unless their memory stays as it is.

    Raises:
        TraceError: an object that has no bytes; names `place`.
    """
    try:
        buffer = memoryview(data)  # type: ignore[arg-type]
        if buffer.nbytes == 0 or not is_frozen(buffer):
            return memoryview(bytes(buffer))
        return buffer.cast("B")
    except (TypeError, ValueError, BufferError) as error:
        raise TraceError(f"{place}: {type(data).__name__} is not bytes") from error


def parse_json(text: str | bytes, place: str) -> Any:
    """Parse a JSON text from outside.

    Raises:
        TraceError: no JSON, or one that is nested too deeply, has a key twice, or a number that is none or too long.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{place} cannot be read: {str(error)[:200]}") from error


def whole_number(text: str, place: str) -> int:
    """Return the whole number that a text is, in plain digits.

    Raises:
        TraceError: another text.
    """
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise TraceError(f"{place} {show(text)} is not a whole number")
    return int(text)


def read_header(buffer: memoryview, place: str, *, max_header: int = MAX_HEADER) -> Header:
    """Read the header of safetensors that may be followed by something else.

    Raises:
        TraceError: bytes that are something else; names `place`.
    """
    start = 8 + _header_size(buffer, place, max_header)
    header = parse_json(bytes(buffer[8:start]), f"{place}: header")
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TraceError(f"{place}: header cannot be read: it has no metadata of texts")
    size = len(buffer) - start
    for name, entry in header.items():
        _check_entry(f"{place}: {show(name)}", entry, size)
    stop = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if stop > len(buffer):
        raise TraceError(f"{place}: tensors end at byte {stop} of {len(buffer)}: it is cut short")
    return Header(header, metadata, start, stop)


def read_tensors(
    data: Data,
    place: str,
    form: str | None,
    names: Collection[str],
    *,
    optional: Collection[str] = (),
    max_header: int = MAX_HEADER,
) -> tuple[dict[str, npt.NDArray[Any]], Mapping[str, str]]:
    """Split safetensors bytes, with just these tensors, into views and metadata; they may be hostile.

    form: what the metadata must name as their format; None for any.
    optional: names of tensors that may be missing.

    Raises:
        TraceError: bytes that are something else, or whose checksum, where there is one, differs; names `place`.
    """
    buffer = as_buffer(data, place)
    header = read_header(buffer, place, max_header=max_header)
    if form is not None and header.metadata.get("format") != form:
        raise TraceError(f"{place}: format {show(header.metadata.get('format'))} != {form!r}")
    if header.tensors.keys() - set(optional) != set(names):
        raise TraceError(f"{place}: tensors {show(sorted(header.tensors))} != {sorted(names)}")
    if "checksum" in header.metadata:
        check_checksum(buffer, place)
    at, body = 0, buffer[header.start :]
    for start, stop in sorted(tuple(entry["data_offsets"]) for entry in header.tensors.values()):
        if start != at:
            raise TraceError(f"{place}: a tensor starts at {start} != {at}, where the one before it ends")
        at = stop
    if at != len(body):
        raise TraceError(f"{place}: tensors of {at} bytes != {len(body)} bytes after the header")
    return {name: _view(f"{place}: {name}", body, entry) for name, entry in header.tensors.items()}, header.metadata


def _header_size(buffer: memoryview, place: str, max_header: int) -> int:
    if len(buffer) < 8:
        raise TraceError(f"{place}: {len(buffer)} bytes have no header, which takes 8 and more")
    size = int.from_bytes(buffer[:8], "little")
    if size > min(max_header, len(buffer) - 8):
        raise TraceError(f"{place}: header of {size} bytes > {min(max_header, len(buffer) - 8)}")
    return size


def _find_checksum(buffer: memoryview, place: str) -> tuple[int, int]:
    """Return where the digits of the checksum are."""
    # The whole header is searched, however large: the reader has limited its size.
    found = list(_CHECKSUM.finditer(buffer[: 8 + _header_size(buffer, place, len(buffer))]))
    if len(found) != 1:
        raise TraceError(f"{place}: {len(found)} checksums in the header != 1")
    return found[0].span(1)


def _crc(buffer: memoryview, start: int, stop: int) -> str:
    return f"{crc32(buffer[stop:], crc32(_NO_CHECKSUM.encode(), crc32(buffer[:start]))):08x}"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, as json.loads' object_pairs_hook.

    Raises:
        ValueError: a key twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_entry(place: str, entry: Any, size: int) -> None:
    """Check what a header says of a tensor; size: of all data."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise TraceError(f"{place}: {show(entry)} is not dtype, shape and data_offsets")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise TraceError(f"{place}: dtype {show(name)} is none of {sorted(_DTYPES)}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > 8 or len(offsets) != 2:
        raise TraceError(f"{place}: shape {show(shape)}, offsets {show(offsets)} are not up to 8 and 2 numbers")
    most = max(size, _MAX_SIZE)
    good = all(type(number) is int and 0 <= number <= most for number in [*offsets, *shape])
    # Sizes beside a 0 could be more than arrays may have together.
    if not good or prod(max(number, 1) for number in shape) > 1 << 62:
        raise TraceError(f"{place}: shape {show(shape)}, offsets {show(offsets)} beyond the {size} bytes of data")
    start, stop = offsets
    if stop - start != (want := dtype.itemsize * prod(shape)):
        raise TraceError(f"{place}: offsets {start} to {stop} != {want} bytes of shape {shape}")


def _view(place: str, body: memoryview, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    start, stop = entry["data_offsets"]
    array = np.frombuffer(body[start:stop], dtype=np.uint8)
    if entry["dtype"] == "BOOL" and np.any(array > 1):
        raise TraceError(f"{place}: a byte is neither 0 nor 1")
    return array.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
