"""The files of a run's folder: JSON objects, one a line or one a file, read without trusting whoever wrote them."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r3_adapter.errors import R3Error, show
from r3_adapter.runs.disk import writing
from r3_adapter.wire import unique_keys

MAX_FILE_BYTES = 1 << 30

Step = Mapping[str, Any]
Number = int | float

_OBJECTS = ("agreement", "rows", "micro_batches", "expert_load", "seconds", "bytes", "memory", "throughput")
_KINDS = {str: "a string", dict: "an object", int: "a whole number"}
_CONFIG = {"name": str, "flags": dict, "model": str, "layout": dict, "seed": int, "versions": dict}


@dataclass(frozen=True)
class Line:
    """A whole line of a file: what it says, where it ends in bytes, and its place for an error."""

    value: dict[str, Any]
    end: int
    place: str


@dataclass(frozen=True)
class Lines:
    """The whole lines of a file; half: bytes are left behind the last one."""

    lines: list[Line]
    half: bool


def read_lines(path: Path, check: Callable[[dict[str, Any], str], None]) -> Lines:
    """Read a file of one object a line; one that is not there has none.

    Args:
        path: the file.
        check: called with each object and its place; raises what it refuses.

    Raises:
        R3Error: a whole line that is not one JSON object, or a file that is too large.
    """
    *whole, rest = _read(path).split(b"\n") if os.path.lexists(path) else [b""]
    lines, end = [], 0
    for number, text in enumerate(whole, start=1):
        end += len(text) + 1
        line = Line(_parse(text, f"{path}, line {number}"), end, f"{path}, line {number}")
        check(line.value, line.place)
        lines.append(line)
    return Lines(lines, bool(rest))


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        R3Error: it is not there or malformed.
    """
    config = read_object(path)
    check_config(config, str(path))
    return config


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        R3Error: it is not there, or holds something else.
    """
    return _parse(_read(path), str(path))


def check_step(step: Mapping[str, Any], place: str) -> None:
    """Refuse a step whose values have other types than the schema at the top.

    Raises:
        R3Error: with the place and the key.
    """
    check_count(step, "step", place)
    for key, value in step.items():
        if key in _OBJECTS:
            if not isinstance(value, dict):
                raise R3Error(f"{place}: {key} is {show(value)}, not an object of numbers")
            for inner, number in value.items():
                if not (_is_number(number) and math.isfinite(number) and number >= 0):
                    raise R3Error(f"{place}: {key}/{inner} is {show(number)}, not a finite number from 0 on")
                if key == "agreement" and not (inner.isascii() and inner.isdigit() and len(inner) < 6):
                    raise R3Error(f"{place}: agreement of {show(inner)}, which is no layer")
        elif key == "weight_version":
            if not isinstance(value, str):
                raise R3Error(f"{place}: weight_version is {show(value)}, not a string")
        elif not _is_number(value):
            raise R3Error(f"{place}: {key} is {show(value)}, not a number of 64 bits")


def check_event(event: Mapping[str, Any], place: str) -> None:
    """Refuse an event without step, time, kind and what, or with others of another type.

    Raises:
        R3Error: with the place and the key.
    """
    check_count(event, "step", place)
    if not (_is_number(event.get("time")) and math.isfinite(event["time"])):
        raise R3Error(f"{place}: time is {show(event.get('time'))}, not a finite number")
    for key in ("kind", "what"):
        if not isinstance(event.get(key), str):
            raise R3Error(f"{place}: {key} is {show(event.get(key))}, not a string")


def check_config(config: Mapping[str, Any], place: str) -> None:
    """Refuse a config that lacks a key or has one of another type, and a name that cannot be printed in a line.

    Raises:
        R3Error: with the place and the key.
    """
    for key, kind in _CONFIG.items():
        if not isinstance(config.get(key), kind) or isinstance(config[key], bool):
            raise R3Error(f"{place}: {_found(config, key)} {_KINDS[kind]}")
    name = config["name"]
    if not (name.isprintable() and 0 < len(name) <= 200):
        raise R3Error(f"{place}: name is {show(name)}, not 1 to 200 printable characters")


def check_count(record: Mapping[str, Any], key: str, place: str) -> None:
    """Refuse a record in which a key is no whole number from 0 on.

    Raises:
        R3Error: with the place and the key.
    """
    value = record.get(key)
    if not (isinstance(value, int) and _is_number(value) and value >= 0):
        raise R3Error(f"{place}: {key} is {show(value)}, not a whole number from 0 on")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object so that whoever reads the file finds the old one or the new one, whole.

    Raises:
        R3Error: it holds what JSON has no form for, or the disk is full.
    """
    beside = path.with_name(f".{path.name}.new")
    with writing(path), beside.open("wb") as file:
        file.write(dump(value, str(path), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def dump(value: Mapping[str, Any], place: str, indent: int | None = None) -> bytes:
    try:
        return json.dumps(value, indent=indent).encode()
    except (TypeError, ValueError) as error:
        raise R3Error(f"{place}: {error}") from error


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise R3Error(f"{path}: no such file")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise R3Error(f"{path}: {size} bytes > {MAX_FILE_BYTES}")
    return path.read_bytes()


def _parse(text: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise R3Error(f"{place}: no JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise R3Error(f"{place}: {show(value)}, not an object")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def _found(record: Mapping[str, Any], key: str) -> str:
    return f"{key} is {show(record[key])}, not" if key in record else f"no {key}, which must be"
