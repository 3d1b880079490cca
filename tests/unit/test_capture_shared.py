"""Handles of payloads in shared memory are hostile until checked; a payload is mapped once and removed."""

import base64
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import CaptureError
from r3_adapter.sglang.capture import trace_from_reply
from r3_adapter.sglang.shared import fetch_payload
from r3_adapter.trace import RoutingTrace

NAME = "0123456789abcdef" * 2
TRACE = RoutingTrace(
    np.array([[[1, 2]], [[3, 4]], [[0, 0]]], np.uint8),
    np.array([11, 12, 21], np.int32),
    np.array([0, 0, -1], np.int32),
    np.array([1], np.int32),
    8,
    ("v1",),
)


def _reply(payload: bytes | str) -> dict[str, Any]:
    return {"output_ids": [21], "meta_info": {"routed_experts": payload, "finish_reason": {"type": "length"}}}


def _handle(**changes: Any) -> bytes:
    return json.dumps({"file": NAME, "num_bytes": len(TRACE.to_bytes()), **changes}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The server's folder with one payload; what lies beside it belongs to others."""
    folder = tmp_path / "payloads"
    folder.mkdir()
    for path in (folder / NAME, tmp_path / ("a" * 32)):
        path.write_bytes(TRACE.to_bytes())
    return folder


@pytest.mark.parametrize("as_text", [False, True])
def test_a_payload_is_taken_once_and_removed(folder: Path, as_text: bool) -> None:
    handle = base64.b64encode(_handle()).decode() if as_text else _handle()
    reply = fetch_payload(_reply(handle), folder, "request 3")
    trace = trace_from_reply(reply, [11, 12])
    assert trace == TRACE
    assert list(folder.iterdir()) == []
    # No second copy: the array lies in what was read.
    payload = np.frombuffer(reply["meta_info"]["routed_experts"], np.uint8)
    assert np.shares_memory(trace.topk_ids, payload)
    with pytest.raises(CaptureError, match=rf"request 3: .*{NAME}: cannot be taken: .*No such file"):
        fetch_payload(_reply(handle), folder, "request 3")


def test_a_payload_that_came_with_the_reply_stays(folder: Path) -> None:
    reply = _reply(TRACE.to_bytes())
    assert fetch_payload(reply, folder, "reply") is reply
    nothing = {"meta_info": {}}
    assert fetch_payload(nothing, folder, "reply") is nothing


def test_a_handle_is_no_payload() -> None:
    with pytest.raises(CaptureError, match="reply: routes are in shared memory; say in which folder"):
        trace_from_reply(_reply(_handle()), [11, 12])


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        (b"{", "cannot be read"),
        (b"{" * 100, "cannot be read"),
        (b'{"file": 1}', "file 1 of the handle is not"),
        (_handle(file="../" + "a" * 32), r"file '\.\./a+' of the handle"),
        (_handle(file=f"{NAME}/"), "of the handle is not 32 hexadecimal digits"),
        (_handle(file=NAME + "\n"), "of the handle is not 32 hexadecimal digits"),
        (_handle(file="a" * 32), "cannot be taken: .*No such file"),
        (_handle(num_bytes=8), r"bytes != 8 of the handle"),
        (_handle(num_bytes=1 << 40), r"bytes != 1099511627776 of the handle"),
        (_handle(num_bytes=-1), "num_bytes -1 of the handle"),
        (_handle(num_bytes=True), "num_bytes True of the handle"),
        (_handle(num_bytes="9"), "num_bytes '9' of the handle"),
    ],
)
def test_hostile_handles_are_refused(folder: Path, handle: bytes, message: str) -> None:
    with pytest.raises(CaptureError, match=f"request 3: .*{message}"):
        fetch_payload(_reply(handle), folder, "request 3")
    assert (folder / NAME).exists()


def test_files_that_are_no_payload_are_refused(folder: Path) -> None:
    other = folder.parent / ("a" * 32)
    for at, make in enumerate((lambda path: path.symlink_to(other), os.mkfifo, Path.mkdir)):
        name = f"{at}" * 32
        make(folder / name)
        with pytest.raises(CaptureError, match=rf"{name}: (cannot be taken|is no plain file)"):
            fetch_payload(_reply(_handle(file=name)), folder, "reply")
    link = folder.parent / "link"
    link.symlink_to(folder)
    with pytest.raises(CaptureError, match="cannot be taken"):
        fetch_payload(_reply(_handle()), link, "reply")
    assert other.exists()
    assert (folder / NAME).exists()


def test_live_traces_hold_no_descriptors(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        held = []
        for number in range(2000):
            name = f"{number:032x}"
            (folder / name).write_bytes(TRACE.to_bytes())
            held.append(trace_from_reply(fetch_payload(_reply(_handle(file=name)), folder, name), [11, 12]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(held) == 2000 and all(trace == TRACE for trace in held)
