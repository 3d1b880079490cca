"""RoutingTrace: what it takes, what it refuses and how; its bytes, also when somebody hostile wrote them."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from r3_adapter.errors import TraceError
from r3_adapter.trace import FORMAT, RoutingTrace, concatenate, ids_dtype
from r3_adapter.wire import with_checksum


def make(num_tokens=5, layers=(0, 2, 3), topk=2, num_experts=8):
    ids = np.random.default_rng(0).random((num_tokens, len(layers), num_experts)).argsort(axis=2)[:, :, :topk]
    version_ids = np.arange(num_tokens, dtype=np.int32) % 2
    version_ids[num_tokens - 1 :] = -1
    ids[num_tokens - 1 :] = 0
    return RoutingTrace(
        ids.astype(ids_dtype(num_experts)),
        np.arange(num_tokens, dtype=np.int32) + 100,
        version_ids,
        np.array(layers, dtype=np.int32),
        num_experts,
        ("step-1", "schritt-\u00fc"),
    )


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("num_experts", [2, 256, 257, 65536])
def test_bytes_come_back_as_the_same_trace(num_tokens, num_experts):
    trace = make(num_tokens, num_experts=num_experts, layers=(1,))
    again = RoutingTrace.from_bytes(trace.to_bytes())
    assert again == trace
    assert again.digest() == trace.digest()
    assert again.topk_ids.dtype == (np.uint8 if num_experts <= 256 else np.uint16)
    assert (again.num_tokens, again.topk) == (num_tokens, 2)
    assert again.captured.tolist() == [True] * (num_tokens - 1) + [False] * (num_tokens > 0)
    assert RoutingTrace.from_bytes(memoryview(bytearray(trace.to_bytes()))) == trace


def test_bytes_are_safetensors():
    trace = make()
    tensors = load(trace.to_bytes())
    assert all(np.array_equal(tensors[name], getattr(trace, name)) for name in tensors)
    assert sorted(tensors) == ["layer_ids", "token_ids", "topk_ids", "version_ids"]


def test_arrays_are_views_of_the_bytes_and_read_only():
    data = make().to_bytes()
    trace = RoutingTrace.from_bytes(data)
    assert np.shares_memory(trace.topk_ids, np.frombuffer(data, dtype=np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        trace.topk_ids[0] = 0
    ids = make().topk_ids.copy()
    mine = replace(make(), topk_ids=ids)
    ids[:] = 77
    assert mine == make()


def test_equality_and_digest_see_every_part():
    trace = make()
    others = [
        replace(trace, topk_ids=np.ascontiguousarray(trace.topk_ids[:, :, ::-1])),
        replace(trace, token_ids=changed(trace.token_ids, 0, 7)),
        replace(trace, version_ids=changed(trace.version_ids, 0, 1)),
        replace(trace, layer_ids=changed(trace.layer_ids, -1, 9)),
        replace(trace, num_experts=9),
        replace(trace, weight_versions=("step-1", "step-2")),
    ]
    assert all(other != trace for other in others)
    assert len({trace.digest(), *(other.digest() for other in others)}) == len(others) + 1
    assert trace != "trace"
    with pytest.raises(TypeError, match="unhashable"):
        hash(trace)


def test_malformed_parts_are_refused_with_place_and_operands():
    trace = make()
    ids = trace.topk_ids
    row = ids[1, 2].tolist()
    cases = [
        ({"num_experts": 0}, r"num_experts \(0\) outside 1 to 65536"),
        ({"num_experts": 65537}, r"num_experts \(65537\) outside 1 to 65536"),
        ({"num_experts": 8.0}, r"num_experts \(8.0\)"),
        ({"num_experts": 257}, "topk_ids: dtype uint8 != uint16"),
        ({"topk_ids": ids.tolist()}, "topk_ids: dtype list != uint8"),
        ({"topk_ids": ids[0]}, r"topk_ids: shape \(3, 2\) has 2 dimensions != 3"),
        ({"topk_ids": ids[:4]}, r"token_ids: length 5 != 4 of topk_ids \(4, 3, 2\)"),
        ({"topk_ids": ids[:, :2]}, r"layer_ids: length 3 != 2 of topk_ids \(5, 2, 2\)"),
        ({"topk_ids": ids[:, :, :0]}, r"topk \(0\) outside 1 to num_experts \(8\)"),
        ({"num_experts": 1}, r"topk \(2\) outside 1 to num_experts \(1\)"),
        ({"token_ids": trace.token_ids.astype(np.int64)}, "token_ids: dtype int64 != int32"),
        ({"token_ids": changed(trace.token_ids, 3, -5)}, r"token_ids\[3\] \(-5\) < 0"),
        ({"version_ids": trace.version_ids[:4]}, "version_ids: length 4 != 5"),
        ({"version_ids": changed(trace.version_ids, 2, 2)}, r"version_ids\[2\] \(2\) is not one of 2"),
        ({"version_ids": changed(trace.version_ids, 2, -2)}, r"version_ids\[2\] \(-2\) is not one of 2"),
        ({"version_ids": changed(trace.version_ids, 0, -1)}, r"token 0, layer 0: .* is not 0, but .* not captured"),
        ({"version_ids": changed(trace.version_ids, 4, 0)}, r"token 4, layer 0: \[0, 0\] has 1 distinct ids != topk"),
        ({"layer_ids": changed(trace.layer_ids, 0, 2)}, r"layer_ids \[2, 2, 3\] are not increasing"),
        ({"layer_ids": changed(trace.layer_ids, 0, -1)}, r"layer_ids \[-1, 2, 3\] are not increasing"),
        ({"layer_ids": np.array([0, 2**31 - 1, -(2**31)], dtype=np.int32)}, "are not increasing"),
        ({"topk_ids": ids[:, :0], "layer_ids": trace.layer_ids[:0]}, r"layer_ids \[\] are not increasing"),
        ({"topk_ids": changed(ids, (1, 2, 0), row[1])}, rf"token 1, layer 3: \[{row[1]}, {row[1]}\] has 1 distinct"),
        (
            {"topk_ids": changed(ids, (1, 2, 0), 8)},
            rf"token 1, layer 3: \[8, {row[1]}\] has an id >= num_experts \(8\)",
        ),
        ({"weight_versions": ("a", 1)}, "weight_versions .* are not a tuple of strings"),
        ({"weight_versions": ["a", "b"]}, "weight_versions .* are not a tuple of strings"),
        ({"weight_versions": "ab"}, "weight_versions .* are not a tuple of strings"),
    ]
    for parts, message in cases:
        with pytest.raises(TraceError, match=message):
            replace(trace, **parts)


def test_numbers_of_numpy_are_numbers():
    trace = replace(make(), num_experts=np.int64(8))
    assert RoutingTrace.from_bytes(trace.to_bytes()) == make()


def wire(header, body=b"", size=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if size is None else size) + head + body


def parts_of(trace):
    data = trace.to_bytes()
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def edited(edit):
    """Return the bytes of a trace with an edited header."""
    header, body = parts_of(make())
    edit(header)
    return wire(header, body)


def setter(*path_and_value):
    *path, last, value = path_and_value

    def edit(header):
        for key in path:
            header = header[key]
        header[last] = value

    return edit


def test_a_changed_byte_of_data_or_metadata_changes_the_digest():
    header, body = parts_of(make())
    at = header["token_ids"]["data_offsets"][0]
    with pytest.raises(TraceError, match=r"from the wire: digest [0-9a-f]{64} != [0-9a-f]{64} of its header"):
        RoutingTrace.from_bytes(wire(header, body[:at] + b"\x01" + body[at + 1 :]), place="from the wire")
    with pytest.raises(TraceError, match="digest"):
        RoutingTrace.from_bytes(edited(setter("__metadata__", "weight_versions", '["step-1", "step-2"]')))
    no_digest = edited(lambda header: header["__metadata__"].pop("digest"))
    with pytest.raises(TraceError, match=r"^here: neither a checksum nor a digest in the header$"):
        RoutingTrace.from_bytes(no_digest, place="here")


def test_a_trace_that_breaks_its_rules_is_refused_from_bytes_too():
    with pytest.raises(TraceError, match=r"sample 3: topk \(2\) outside 1 to num_experts \(1\)"):
        RoutingTrace.from_bytes(edited(setter("__metadata__", "num_experts", "1")), place="sample 3")


def with_gap():
    """Return the bytes of a trace with four bytes between its tensors that none of them holds."""
    header, body = parts_of(make())
    last = max(entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__")
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] == last:
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    return wire(header, body[:last] + b"\0\0\0\0" + body[last:])


HOSTILE = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "header of 2**63 bytes": wire({}, size=1 << 63),
    "header beyond the data": wire({}, size=3),
    "header of 2 MiB": wire(b" " * (2 << 20)),
    "no JSON": wire(b"{"),
    "no UTF-8": wire(b'{"\xff\xfe": 1}'),
    "deep JSON": wire(b"[" * 500_000),
    "deep JSON as weight versions": edited(setter("__metadata__", "weight_versions", "[" * 200_000)),
    "huge number": wire(b'{"__metadata__": ' + b"9" * 100_000 + b"}"),
    "a list": wire([]),
    "no metadata": wire({"topk_ids": {}}),
    "metadata is a list": edited(setter("__metadata__", [])),
    "metadata holds a number": edited(setter("__metadata__", "num_experts", 8)),
    "other format": edited(setter("__metadata__", "format", FORMAT + "0")),
    "no format": edited(lambda header: header["__metadata__"].pop("format")),
    "no num_experts": edited(lambda header: header["__metadata__"].pop("num_experts")),
    "num_experts is a word": edited(setter("__metadata__", "num_experts", "many")),
    "num_experts is huge": edited(setter("__metadata__", "num_experts", "9" * 10_000)),
    "weight_versions are numbers": edited(setter("__metadata__", "weight_versions", "[1]")),
    "weight_versions is an object": edited(setter("__metadata__", "weight_versions", "{}")),
    "weight_versions is no JSON": edited(setter("__metadata__", "weight_versions", "[")),
    "tensor missing": edited(lambda header: header.pop("token_ids")),
    "tensor too many": edited(lambda header: header.update(more=header["token_ids"])),
    "tensor is a number": edited(setter("token_ids", 3)),
    "dtype unknown": edited(setter("token_ids", "dtype", "F32")),
    "dtype is a list": edited(setter("token_ids", "dtype", [])),
    "dtype of another size": edited(setter("token_ids", "dtype", "U8")),
    "dtype of the same size": edited(setter("layer_ids", "dtype", "U16")),
    "shape is a number": edited(setter("token_ids", "shape", 5)),
    "shape is a word": edited(setter("token_ids", "shape", "5")),
    "shape is an object": edited(setter("layer_ids", "shape", {})),
    "shape has true": edited(setter("token_ids", "shape", [5, True])),
    "shape has a fraction": edited(setter("token_ids", "shape", [5.0])),
    "shape is negative": edited(setter("token_ids", "shape", [-1, -5])),
    "shape is huge": edited(setter("token_ids", "shape", [1 << 62, 1 << 62])),
    "shape has 100 dimensions": edited(setter("token_ids", "shape", [1] * 99 + [5])),
    "shape has 100 empty dimensions": edited(setter("token_ids", "shape", [0] * 100)),
    "shape has the wrong rank": edited(setter("topk_ids", "shape", [15, 2])),
    "offsets are one": edited(setter("token_ids", "data_offsets", [0])),
    "offsets go back": edited(setter("token_ids", "data_offsets", [20, 0])),
    "offsets are negative": edited(setter("token_ids", "data_offsets", [-20, 0])),
    "offsets beyond the data": edited(setter("token_ids", "data_offsets", [1 << 40, (1 << 40) + 20])),
    "offsets overlap": edited(lambda header: header["token_ids"].update(header["version_ids"])),
    "offsets leave a gap": with_gap(),
    "data too short": make().to_bytes()[:-1],
    "data too long": make().to_bytes() + b"\0",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused(data):
    with pytest.raises(TraceError, match=r"^here: "):
        RoutingTrace.from_bytes(data, place="here")


def read(data):
    """Read bytes; anything but a trace or a TraceError is a failure."""
    try:
        RoutingTrace.from_bytes(data)
    except TraceError:
        return


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200))
def test_fuzzed_bytes_never_raise_anything_else(data):
    read(data)
    read(wire(data))


def json_values():
    leaves = st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=5)
    return st.recursive(leaves, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=4))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_fuzzed_headers_never_raise_anything_else(data):
    header, body = parts_of(make())
    header["__metadata__"].pop("digest")
    header["__metadata__"]["checksum"] = "00000000"
    for _ in range(data.draw(st.integers(1, 3))):
        at = header
        while True:
            key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            deeper = isinstance(at[key], dict | list) and len(at[key]) and data.draw(st.booleans())
            if not deeper:
                at[key] = data.draw(json_values() | st.sampled_from(["U8", "I32", [0, 4], [5], [3, 5], "1", "[]"]))
                break
            at = at[key]
        if not header:
            break
    data = wire(header, body)
    read(with_checksum(data) if data.count(b'"checksum": "00000000"') == 1 else data)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_changes_nothing(place, flip):
    data = bytearray(make().to_bytes())
    data[place % len(data)] ^= flip
    try:
        assert RoutingTrace.from_bytes(bytes(data)) == make()
    except TraceError:
        return


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (0, 5), (2, 4), (5, 5)])
def test_rows_are_the_tokens_of_a_range(start, stop):
    trace = make(5)
    trace.digest()
    part = trace.rows(start, stop)
    assert part.num_tokens == stop - start
    for name in ("topk_ids", "token_ids", "version_ids"):
        assert np.array_equal(getattr(part, name), getattr(trace, name)[start:stop])
    assert part == replace(part)
    assert part.digest() == replace(part).digest()
    assert RoutingTrace.from_bytes(part.to_bytes()) == part


@pytest.mark.parametrize(("start", "stop"), [(0, -1), (0, 6), (-1, 2), (3, 2)])
def test_rows_that_are_not_there_are_refused(start, stop):
    with pytest.raises(TraceError, match=f"rows {start} to {stop} outside 0 to 5"):
        make(5).rows(start, stop)


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), data=st.data())
@settings(max_examples=50)
def test_concatenated_traces_come_back_as_rows(lengths, data):
    names = ["a", "b", "c"]
    traces = [replace(make(n), weight_versions=tuple(data.draw(st.permutations(names))[:2])) for n in lengths]
    together = concatenate(traces)
    stops = np.cumsum(lengths)
    for trace, stop in zip(traces, stops, strict=True):
        part = together.rows(int(stop) - trace.num_tokens, int(stop))
        for name in ("topk_ids", "token_ids", "layer_ids", "captured"):
            assert np.array_equal(getattr(part, name), getattr(trace, name))
        assert named_versions(part) == named_versions(trace)
    assert together == replace(together)


def named_versions(trace):
    return [trace.weight_versions[at] if at >= 0 else None for at in trace.version_ids]


@pytest.mark.parametrize("other", [{"topk": 1}, {"num_experts": 9}, {"layers": (0, 2, 4)}])
def test_traces_of_several_models_are_not_concatenated(other):
    with pytest.raises(TraceError, match=r"of trace 1 != .* of trace 0"):
        concatenate([make(), make(**other)])


def test_nothing_is_not_concatenated():
    with pytest.raises(TraceError, match="no traces to concatenate"):
        concatenate([])
