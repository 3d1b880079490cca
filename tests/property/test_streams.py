"""Repack of more rows than a chunk, past the cache or not, at every alignment of the output."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3_adapter import _core

DTYPES = (np.uint8, np.uint16, np.int16, np.int32, np.int64)
NUM_LAYERS, NUM_EXPERTS = 3, 200


def make_segments(draw, num_rows):
    """Return segments that fill the rows, some of them interleaved, and as many samples."""
    segments, row = [], 0
    while row < num_rows:
        stride = draw(st.sampled_from([1, 1, 2, 3, 700]))
        length = min(draw(st.sampled_from([1, 5, 64, 1000, 5000])), (num_rows - row) // stride)
        if length == 0:
            stride, length = 1, num_rows - row
        segments += [(len(segments) + i, draw(st.sampled_from([0, 9])), length, row + i, stride) for i in range(stride)]
        row += length * stride
    return np.array(segments, dtype=np.int64)[draw(st.permutations(range(len(segments))))], len(segments)


def wanted(traces, versions, segments, layers, num_rows, ep_size):
    """Return ids, row versions and counts, in numpy."""
    ids = np.zeros((len(layers), num_rows, traces[0].shape[2]), dtype=np.int64)
    row_versions = np.full(num_rows, -9)
    for sample, pos, length, row, stride in segments.tolist():
        of_trace = versions[sample][pos : pos + length]
        found = np.full(length, -2)
        found[: len(of_trace)] = np.maximum(of_trace, -1)
        rows = row + np.arange(length) * stride
        row_versions[rows] = found
        ids[:, rows[: len(of_trace)]] = traces[sample][pos : pos + length, layers].transpose(1, 0, 2)
    ids[:, row_versions == -1] = -1
    padding = np.flatnonzero(row_versions == -2)
    step = np.arange(len(padding) * ids.shape[2]).reshape(len(padding), ids.shape[2]) % NUM_EXPERTS
    ids[:, padding] = step % ep_size * (NUM_EXPERTS // ep_size) + step // ep_size
    counts = np.stack([np.bincount(layer[row_versions != -1].ravel(), minlength=NUM_EXPERTS) for layer in ids])
    return ids, row_versions, counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True], ids=["uint8", "uint16"])
@settings(max_examples=8)
@given(data=st.data())
def test_every_way_to_store(wide, dtype, data):
    draw, rng = data.draw, np.random.default_rng(data.draw(st.integers(0, 2**32)))
    topk = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 10, 16]))
    num_rows = draw(st.one_of(st.integers(1, 200), st.integers(2000, 9000)))
    segments, num_samples = make_segments(draw, num_rows)
    lengths = [draw(st.sampled_from([0, 3, 800, 6000])) for _ in range(min(8, num_samples))]
    lengths = [lengths[i % len(lengths)] for i in range(num_samples)]
    traces = [
        rng.integers(0, NUM_EXPERTS, (n, NUM_LAYERS, topk)).astype(np.uint16 if wide else np.uint8) for n in lengths
    ]
    versions = [np.where(rng.random(n) < draw(st.sampled_from([0, 0.01])), -1, 7).astype(np.int32) for n in lengths]
    layers = draw(st.sampled_from([[0, 1, 2], [2, 0], [1], []]))
    # Any alignment that numpy allows for the type.
    memory = np.zeros(len(layers) * num_rows * topk * np.dtype(dtype).itemsize + 128, dtype=np.uint8)
    begin = -memory.ctypes.data % 64 + draw(st.integers(0, 8)) * np.dtype(dtype).itemsize
    size = len(layers) * num_rows * topk * np.dtype(dtype).itemsize
    out = memory[begin : begin + size].view(dtype).reshape(len(layers), num_rows, topk)
    row_versions = np.empty(num_rows, dtype=np.int32)
    counts = np.empty((len(layers), NUM_EXPERTS), dtype=np.int64)
    ep_size = draw(st.sampled_from([1, 4]))
    _core.repack(
        topk_ids=traces,
        version_ids=versions,
        segments=segments,
        layer_indices=np.array(layers, dtype=np.int64),
        out=out,
        row_versions=row_versions,
        counts=counts,
        num_experts=NUM_EXPERTS,
        ep_size=ep_size,
        num_threads=draw(st.integers(1, 4)),
        stream_from=draw(st.sampled_from([0, 1 << 40])),
    )
    if layers:
        ids, want_versions, want_counts = wanted(traces, versions, segments, layers, num_rows, ep_size)
        assert np.array_equal(out, ids.astype(dtype))
        assert np.array_equal(row_versions, want_versions)
        assert np.array_equal(counts, want_counts)
    assert not memory[:begin].any() and not memory[begin + size :].any()
