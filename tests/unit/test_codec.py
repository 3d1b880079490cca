"""The set-coded wire form: what comes back, how small it is, and bytes that somebody hostile wrote."""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3_adapter import _core
from r3_adapter.codec import FORMAT, decode, decode_all, encode, encode_all
from r3_adapter.errors import TraceError
from r3_adapter.trace import RoutingTrace, ids_dtype

LAYERS = np.array([1, 4], dtype=np.int32)
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def make_ids(rng, num_tokens, num_layers, topk, num_experts):
    ids = rng.random((num_tokens, num_layers, num_experts)).argsort(axis=2)[:, :, :topk]
    return ids.astype(ids_dtype(num_experts))


def make(rng, num_tokens, topk=2, num_experts=8, table=("a", "b"), captured=0.7):
    version_ids = rng.integers(0, len(table), num_tokens).astype(np.int32)
    version_ids[rng.random(num_tokens) > captured] = -1
    ids = make_ids(rng, num_tokens, len(LAYERS), topk, num_experts)
    ids[version_ids < 0] = 0
    tokens = rng.integers(0, 9, num_tokens).astype(np.int32)
    return RoutingTrace(ids, tokens, version_ids, LAYERS, num_experts, table)


def ordered(trace):
    ids = np.sort(trace.topk_ids, axis=2)
    return RoutingTrace(
        ids, trace.token_ids, trace.version_ids, trace.layer_ids, trace.num_experts, trace.weight_versions
    )


def continued(rng, trace, keep, more, table):
    """Return a trace that begins like another one, whose versions may have other numbers."""
    known = [i for i, version in enumerate(trace.version_ids[:keep]) if version >= 0]
    head = np.full(keep, -1, dtype=np.int32)
    names = [trace.weight_versions[version] for version in trace.version_ids[known]]
    table = (*table, *(name for name in dict.fromkeys(names) if name not in table))
    head[known] = [table.index(name) for name in names]
    rest = make(rng, more, trace.topk, trace.num_experts, table)
    return RoutingTrace(
        np.concatenate([trace.topk_ids[:keep, :, ::-1], rest.topk_ids]),
        np.concatenate([trace.token_ids[:keep], rest.token_ids]),
        np.concatenate([head, rest.version_ids]),
        LAYERS,
        trace.num_experts,
        table,
    )


@SETTINGS
@given(st.data())
def test_one_trace_comes_back(data):
    num_experts = data.draw(st.sampled_from([1, 2, 5, 8, 60, 64, 128, 255, 256, 257, 512, 1024]))
    topk = data.draw(st.integers(1, min(16, num_experts)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    trace = make(
        rng, data.draw(st.integers(0, 40)), topk, num_experts, captured=data.draw(st.sampled_from([0, 0.7, 1]))
    )
    assert decode(encode(trace)) == ordered(trace)


@SETTINGS
@given(st.data())
def test_shared_prefixes_come_back(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    traces = [make(rng, data.draw(st.integers(0, 20)))]
    for _ in range(data.draw(st.integers(0, 8))):
        parent = traces[data.draw(st.integers(0, len(traces) - 1))]
        keep = data.draw(st.integers(0, parent.num_tokens))
        table = data.draw(st.sampled_from([("a", "b"), ("b", "a"), ("c", "b", "a"), ("b", "a", "b")]))
        traces.append(continued(rng, parent, keep, data.draw(st.integers(0, 10)), table))
    assert decode_all(encode_all(traces)) == [ordered(trace) for trace in traces]


@pytest.mark.parametrize("num_experts", [1, 2, 3, 7, 16, 17])
@pytest.mark.parametrize("topk", [1, 2, 3, 5, 8, 16])
def test_ranks_are_the_combinatorial_number_system(num_experts, topk):
    """Every set of a small E has its own code, which is the sum of binomials."""
    if topk > num_experts or math.comb(num_experts, topk) > 20_000:
        return
    import itertools

    sets = list(itertools.combinations(range(num_experts), topk))
    ids = np.array(sets, dtype=np.uint8).reshape(len(sets), 1, topk)
    versions = np.zeros(len(sets), dtype=np.int32)
    bits = _core.set_bits(num_experts, topk)
    assert bits == (len(sets) - 1).bit_length()
    codes = np.zeros((len(sets) * bits + 7) // 8, dtype=np.uint8)
    _core.encode_sets(topk_ids=ids[:, :, ::-1].copy(), version_ids=versions, num_experts=num_experts, codes=codes)
    stream = int.from_bytes(codes.tobytes(), "little")
    ranks = [stream >> (i * bits) & ((1 << bits) - 1) for i in range(len(sets))]
    assert ranks == [sum(math.comb(c, i) for i, c in enumerate(row, 1)) for row in sets]
    assert sorted(ranks) == list(range(len(sets)))
    again = np.empty_like(ids)
    _core.decode_sets(codes=codes, version_ids=versions, num_experts=num_experts, topk_ids=again)
    assert np.array_equal(again, ids)


@pytest.mark.parametrize(("num_experts", "topk"), [(128, 8), (256, 8), (512, 10), (1024, 16), (64, 6), (1024, 8)])
def test_the_first_and_last_ranks_of_wide_codes(num_experts, topk):
    rows = [
        list(range(topk)),
        list(range(num_experts - topk, num_experts)),
        [0, *range(num_experts - topk + 1, num_experts)],
    ]
    ids = np.array(rows, dtype=ids_dtype(num_experts)).reshape(3, 1, topk)
    bits = _core.set_bits(num_experts, topk)
    assert bits == (math.comb(num_experts, topk) - 1).bit_length()
    codes = np.zeros((3 * bits + 7) // 8, dtype=np.uint8)
    versions = np.zeros(3, dtype=np.int32)
    _core.encode_sets(topk_ids=ids, version_ids=versions, num_experts=num_experts, codes=codes)
    stream = int.from_bytes(codes.tobytes(), "little")
    assert stream & ((1 << bits) - 1) == 0
    assert stream >> bits & ((1 << bits) - 1) == math.comb(num_experts, topk) - 1
    again = np.empty_like(ids)
    _core.decode_sets(codes=codes, version_ids=versions, num_experts=num_experts, topk_ids=again)
    assert np.array_equal(again, ids)
    for rank in (math.comb(num_experts, topk), (1 << bits) - 1):
        wrong = np.frombuffer((rank << bits).to_bytes(len(codes), "little"), dtype=np.uint8)
        with pytest.raises(ValueError, match="is not below the number of sets"):
            _core.decode_sets(codes=wrong, version_ids=versions, num_experts=num_experts, topk_ids=again)


def test_size_is_near_the_bound():
    rng = np.random.default_rng(0)
    trace = make(rng, 6000, 8, 128, captured=1.0)
    ids_bytes = len(encode(trace)) - 8 * trace.num_tokens  # tokens and versions are there in any form
    assert ids_bytes <= 1.03 * trace.num_tokens * len(LAYERS) * math.ceil(math.log2(math.comb(128, 8))) / 8


def test_a_group_holds_its_prompt_once():
    rng = np.random.default_rng(0)
    prompt = make(rng, 2000, 8, 128)
    group = [continued(rng, prompt, 2000, 10, ("a", "b")) for _ in range(8)]
    assert len(encode_all(group)) < 1.2 * len(encode(group[0]))


def test_what_cannot_be_encoded_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(TraceError, match="no traces to encode"):
        encode_all([])
    with pytest.raises(TraceError, match=r"\(9, 2, \[1, 4\]\) of trace 1 != \(8, 2, \[1, 4\]\) of trace 0"):
        encode_all([make(rng, 3), make(rng, 3, num_experts=9)])
    with pytest.raises(TraceError, match=r"num_experts \(1025\) outside 1 to 1024 of set coding"):
        encode(make(rng, 3, num_experts=1025))
    with pytest.raises(TraceError, match=r"topk \(17\) outside 1 to 16 of set coding of 32 experts"):
        encode(make(rng, 3, topk=17, num_experts=32))
    with pytest.raises(TraceError, match="2 traces != 1"):
        decode(encode_all([make(rng, 3), make(rng, 2)]))


def wire(header, body):
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


def parts_of(data):
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])


def group():
    rng = np.random.default_rng(1)
    first = make(rng, 6, captured=1)
    return [first, continued(rng, first, 5, 3, ("b", "a"))]


def edited(name=None, place=0, value=None, **metadata):
    """Return the bytes of two traces with a number of a tensor, or metadata, changed."""
    header, body = parts_of(encode_all(group()))
    if name is not None:
        start, stop = header[name]["data_offsets"]
        array = np.frombuffer(
            body,
            dtype=np.uint8 if name == "codes" else np.int32,
            count=(stop - start) // (1 if name == "codes" else 4),
            offset=start,
        )
        array[place] = value
    header["__metadata__"].update(metadata)
    return wire(header, bytes(body))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (edited(format="r3.routing_trace/1"), "format"),
        (edited(num_experts="-1"), r"num_experts \(-1\) < 0"),
        (edited(num_experts="2000"), r"num_experts \(2000\) outside"),
        (edited(num_experts="9" * 30), "here: "),
        (edited(topk="0"), r"topk \(0\) outside"),
        (edited(topk="17"), r"topk \(17\) outside"),
        (edited(topk="many"), "here: "),
        (edited(topk="3"), "codes: "),
        (edited(weight_versions="[]"), "weight_versions: length 0 != 2"),
        (edited(weight_versions="[1, 2]"), "are not a list of strings"),
        (edited(weight_versions='[["a"], ["a"]]'), "here: "),
        (edited(weight_versions="["), "here: "),
        (edited(weight_versions="[" * 100_000), "here: "),
        (edited(digests='["", ""]'), "digest [0-9a-f]{64} of trace 0 != ''"),
        (edited(digests="3"), "digests: length -1 != 2"),
        (edited("num_shared", 0, 1), "num_shared"),
        (edited("num_shared", 1, 7), "num_shared"),
        (edited("num_shared", 1, -1), "num_shared"),
        (edited("num_tokens", 0, -3), "num_shared"),
        (edited("num_tokens", 0, 2**31 - 1), "token_ids and version_ids: lengths"),
        (edited("places", 0, 1), "places"),
        (edited("places", 0, 2**30), "places"),
        (edited("codes", 0, 255), "here: "),
        (edited("codes", -1, 255), "bits behind the last route"),
        (edited("version_ids", 0, -1), "codes: "),
        (edited("version_ids", 0, 5), "version_ids"),
        (edited("token_ids", 0, 7), "digest"),
    ],
)
def test_hostile_bytes_are_refused(data, message):
    with pytest.raises(TraceError, match=message) as caught:
        decode_all(data, place="here")
    assert str(caught.value).startswith("here: ")


def test_a_small_message_cannot_ask_for_much_memory():
    trace = make(np.random.default_rng(0), 1000)
    data = encode_all([trace] * 50)
    assert len(data) < 3 * len(encode(trace))
    assert decode_all(data)[49] == ordered(trace)
    with pytest.raises(TraceError, match=r"204000 bytes of ids > max_bytes \(100000\)"):
        decode_all(data, max_bytes=100_000)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 100_000), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_changes_nothing(place, flip):
    data = bytearray(encode_all(group()))
    data[place % len(data)] ^= flip
    try:
        assert decode_all(bytes(data)) == [ordered(trace) for trace in group()]
    except TraceError:
        return


def test_format_is_named():
    assert parts_of(encode(make(np.random.default_rng(0), 3)))[0]["__metadata__"]["format"] == FORMAT
