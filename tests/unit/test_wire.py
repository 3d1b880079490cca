"""The checksum of a payload: every bit of it counts."""

import json
from zlib import crc32

import numpy as np
import pytest
from safetensors.numpy import save

from r3_adapter.errors import TraceError
from r3_adapter.trace import RoutingTrace
from r3_adapter.wire import check_checksum, checksum_of

PLACEHOLDER = b'"checksum":"00000000"'


def payload() -> bytes:
    """What an engine writes: a checksum and no digest."""
    arrays = {
        "topk_ids": np.array([[[3, 1]], [[0, 2]], [[0, 0]]], np.uint8),
        "token_ids": np.array([11, 12, 13], np.int32),
        "version_ids": np.array([0, 0, -1], np.int32),
        "layer_ids": np.array([1], np.int32),
    }
    model = {"num_layers": 2, "hidden_size": 8, "vocab_size": 32}
    # A name in the header must not be taken for its checksum.
    names = {"weight_versions": json.dumps(['"checksum":"12345678"']), "model": json.dumps(model)}
    metadata = {"format": "r3.routing_trace/1", "num_experts": "4", "checksum": "00000000", **names}
    data = save(arrays, metadata)
    assert data.count(PLACEHOLDER) == 1
    return data.replace(PLACEHOLDER, b'"checksum":"%08x"' % crc32(data))


def test_a_payload_is_read_if_its_checksum_is_right() -> None:
    trace = RoutingTrace.from_bytes(payload())
    assert trace.model == (2, 8, 32)
    check_checksum(payload())
    wanted, found = checksum_of(memoryview(payload()))
    assert wanted == found


def test_every_flipped_bit_of_a_payload_is_refused() -> None:
    data = bytearray(payload())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TraceError, match=r"^here: "):
            RoutingTrace.from_bytes(bytes(data), place="here")
        data[bit // 8] ^= 1 << bit % 8


def test_a_wrong_checksum_names_both() -> None:
    data = payload()
    right = checksum_of(data)[1]
    with pytest.raises(TraceError) as caught:
        check_checksum(data.replace(right.encode(), b"0123abcd"), "request 3")
    assert str(caught.value) == f"request 3: checksum {right} != 0123abcd of its header"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "here: 0 bytes have no header, which takes 8 and more"),
        (payload().replace(b'"checksum"', b'"Checksum"'), "here: 0 checksums in the header != 1"),
        (payload().replace(b'"format":"', b'"checksum":"00000000",'), "here: 2 checksums in the header != 1"),
    ],
)
def test_bytes_without_just_one_checksum_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        check_checksum(data, "here")
    assert str(caught.value) == message
