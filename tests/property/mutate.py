"""Damage to what comes from outside: seeded, so that a case that fails can be run again.

Tests load it with `importlib.util.spec_from_file_location`, as they are not on the path.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

ODD = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    1 << 31,
    1 << 63,
    1 << 200,
    10**4000,
    "",
    "5",
    "nan",
    "\ud800",
    "x" * 3000,
    [],
    {},
    [None],
    [[]],
    {"": None},
)
"""Values that stand where another is expected."""


def nested(depth: int = 500) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with some places flipped, overwritten, left out, doubled, or cut off."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(found) + 1)
        size = rng.choice((1, 1, 4, 8, rng.randrange(1, 64)))
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            found[at:at] = found[at : at + size]
        elif kind == 4:
            found[at : at + size] = rng.choice((b"\0", b"\xff", b"[", b"{", b'"', b"9")) * size
        elif kind == 5 and rng.random() < 0.3:
            del found[at:]
    return bytes(found)


def changed(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with some parts replaced, left out, doubled or renamed, also within text that is JSON."""
    found = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = _changed_once(rng, found)
    return found


def _changed_once(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = rng.randrange(12)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, list):
            value.append(value[key])
        elif kind == 1:
            value[f"{key}x"] = value.pop(key)
        elif kind == 2:
            value[key] = value[rng.choice(list(value) if isinstance(value, dict) else range(len(value)))]
        else:
            value[key] = _changed_once(rng, value[key])
        return value
    if isinstance(value, str) and value[:1] in ("[", "{") and rng.random() < 0.7:
        try:
            return text_of(_changed_once(rng, json.loads(value)))
        except (ValueError, RecursionError):  # changed before
            return value[:-1]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-4, -1, 1, 4, 1 << 16, 1 << 40))
    if isinstance(value, str) and rng.random() < 0.5:
        return rng.choice((value[1:], value + "0", "-" + value, "9" * 5000, "[" * 5000, text_of(rng.choice(ODD))))
    return nested() if rng.random() < 0.1 else copy.deepcopy(rng.choice(ODD))


def text_of(value: Any) -> str:
    return json.dumps(value)


def with_header(data: bytes, edit: Callable[[Any], Any]) -> bytes:
    """Return safetensors bytes whose header is another; its size is the right one."""
    size = int.from_bytes(data[:8], "little")
    header = text_of(edit(json.loads(data[8 : 8 + size]))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
