"""Whatever is written can be read, and what could not be is refused when it is written."""

import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3_adapter.codec import FORMAT, decode, decode_all, encode, encode_all
from r3_adapter.errors import TraceError
from r3_adapter.trace import ModelId, RoutingTrace, ids_dtype
from r3_adapter.wire import write_tensors

SETTINGS = settings(max_examples=80, deadline=None)


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    """A trace of any shape: without tokens, or with more experts a token than there are bytes of anything else."""
    num_experts = draw(st.sampled_from([1, 2, 16, 17, 256, 257, 5000, 65536]))
    topk = draw(st.integers(1, min(num_experts, draw(st.sampled_from([1, 16, 300])))))
    num_layers, num_tokens = draw(st.integers(1, 4)), draw(st.sampled_from([0, 0, 1, 2, 7]))
    versions = tuple(draw(st.lists(st.text(max_size=4), max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    ids = np.zeros((num_tokens, num_layers, topk), ids_dtype(num_experts))
    for row in ids.reshape(-1, topk) if num_tokens else ():
        row[:] = rng.permutation(num_experts)[:topk]
    version_ids = rng.integers(-1, len(versions), num_tokens).astype(np.int32)
    ids[version_ids < 0] = 0
    model = draw(st.sampled_from([None, ModelId(9, 64, 1000)]))
    tokens = rng.integers(0, 1000, num_tokens).astype(np.int32)
    return RoutingTrace(ids, tokens, version_ids, np.arange(num_layers, dtype=np.int32), num_experts, versions, model)


@SETTINGS
@given(traces())
def test_a_trace_that_is_written_is_read(trace: RoutingTrace) -> None:
    assert RoutingTrace.from_bytes(trace.to_bytes()) == trace


@SETTINGS
@given(traces(), st.integers(1, 3))
def test_traces_that_are_encoded_are_decoded(trace: RoutingTrace, count: int) -> None:
    try:
        data = encode_all([trace] * count)
    except TraceError:
        assert trace.topk > 16 or trace.num_experts > 1024
        return
    for found in decode_all(data):
        assert np.array_equal(found.topk_ids, np.sort(trace.topk_ids, axis=2))
        assert np.array_equal(found.token_ids, trace.token_ids) and found.model == trace.model


def many(count: int, *, versions: int = 1, num_tokens: int = 1) -> list[RoutingTrace]:
    names = tuple(f"step-{number}" for number in range(versions))
    tokens, versions_ids = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    trace = RoutingTrace(np.ones((num_tokens, 1, 1), np.uint8), tokens, versions_ids, np.zeros(1, np.int32), 2, names)
    return [trace] * count


def test_more_than_a_reader_takes_is_not_written() -> None:
    with pytest.raises(TraceError, match=r"header of \d+ bytes > 1048576; its digests are too many"):
        encode_all(many(16_384))
    with pytest.raises(TraceError, match=r"header of \d+ bytes > 1048576; its weight_versions are too many"):
        many(1, versions=100_000)[0].to_bytes()
    with pytest.raises(TraceError, match=r"header of \d+ bytes > 1048576; its weight_versions are too many"):
        encode(many(1, versions=100_000)[0])
    alike = many(2000, num_tokens=5000)
    with pytest.raises(
        TraceError, match=r"ids and tokens of \d+ bytes > \d+, which is 256 times a message of \d+ bytes"
    ):
        encode_all(alike)
    assert len(decode_all(encode_all(many(8000)))) == 8000


def test_a_small_message_takes_little_memory() -> None:
    """20,000 tokens of 20,000 layers of a model with one expert, whose rows take no bits at all."""
    num, zeros = 20_000, np.zeros
    tensors = {
        "codes": zeros(0, np.uint8),
        "layer_ids": np.arange(num, dtype=np.int32),
        "num_shared": zeros(1, np.int32),
        "num_tokens": np.array([num], np.int32),
        "places": zeros(1, np.int32),
        "token_ids": zeros(num, np.int32),
        "version_ids": zeros(num, np.int32),
    }
    names = {"num_experts": "1", "topk": "1", "weight_versions": '[["a"]]', "digests": '["x"]'}
    data = write_tensors(tensors, {"format": FORMAT, **names})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TraceError, match=r"^here: ids and tokens of 800320000 bytes > 6\d{7}, which is 256 times"):
        decode(data, place="here")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    with pytest.raises(TraceError, match=r"800000000 bytes of ids > max_bytes \(1000000\)"):
        decode(data, max_bytes=1_000_000)
