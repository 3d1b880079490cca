"""What repack and collect refuse, and that the message names the place and both operands."""

from dataclasses import replace

import numpy as np
import pytest

from r3_adapter import _core
from r3_adapter.errors import LayoutError, TraceError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.repack import LIVE, PADDING, RankRoutes, collect, repack
from r3_adapter.trace import RoutingTrace

LAYERS = [1, 4]


def trace(num_tokens, first_token=100, version="a"):
    """Return a trace of 2 layers, top 2 of 6, whose last token was not captured."""
    ids = np.add.outer(np.add.outer(np.arange(num_tokens), [0, 3]), [0, 1]) % 6
    version_ids = np.zeros(num_tokens, dtype=np.int32)
    version_ids[-1:] = -1
    ids[-1:] = 0
    tokens = np.arange(first_token, first_token + num_tokens, dtype=np.int32)
    return RoutingTrace(ids.astype(np.uint8), tokens, version_ids, np.array(LAYERS, dtype=np.int32), 6, (version,))


TRACES = [trace(3), trace(4, 200, "b")]
PACKING = Packing.packed([0, 4, 8])
LAYOUT = ParallelLayout(ep=2, dp=2)


def routes(**changes) -> RankRoutes:
    arguments = {"traces": TRACES, "packing": PACKING, "layout": LAYOUT, "rank": 0, "layer_ids": LAYERS}
    return repack(**{**arguments, **changes})


def test_the_small_example_by_hand():
    found = routes(layer_ids=[4])
    assert found.topk_ids.dtype == np.int16
    assert found.topk_ids.tolist() == [[[3, 4], [4, 5], [-1, -1], [0, 3], [3, 4], [4, 5], [5, 0], [-1, -1]]]
    assert found.row_versions.tolist() == [0, 0, LIVE, PADDING, 1, 1, 1, LIVE]
    assert found.weight_versions == ("a", "b")
    assert found.counts.tolist() == [[2, 0, 0, 3, 4, 3]]
    assert found.segments.tolist() == [[0, 0, 4, 0, 1], [1, 0, 4, 4, 1]]
    assert (found.num_replayed, found.num_live, found.num_padding) == (5, 2, 1)


def test_last_rows_with_balanced_experts_by_hand():
    found = routes(layer_ids=[4], last_row="balanced", count=True)
    # Padding rows take turns: the ranks of ep 2 have experts 0 to 2 and 3 to 5.
    assert found.topk_ids.tolist() == [[[3, 4], [4, 5], [0, 3], [1, 4], [3, 4], [4, 5], [5, 0], [2, 5]]]
    assert found.row_versions.tolist() == [0, 0, PADDING, PADDING, 1, 1, 1, PADDING]
    assert (found.num_replayed, found.num_live, found.num_padding) == (5, 0, 3)
    assert found.counts.tolist() == [[2, 1, 1, 3, 5, 4]]


def test_only_a_last_row_without_a_route_is_balanced():
    first, second = (replace(trace, version_ids=trace.version_ids.copy()) for trace in TRACES)
    first = replace(first, topk_ids=np.roll(first.topk_ids, 1, axis=0), version_ids=np.array([-1, 0, 0], np.int32))
    second = replace(second, topk_ids=second.topk_ids * 0, version_ids=np.full(4, -1, np.int32), weight_versions=())
    found = routes(traces=[first, second], last_row="balanced")
    assert found.row_versions.tolist() == [LIVE, 0, 0, PADDING, LIVE, LIVE, LIVE, PADDING]


def test_a_balanced_last_row_is_still_of_its_token():
    tokens = np.array([100, 101, 102, -1, 200, 201, 202, 203])
    assert routes(input_ids=tokens, last_row="balanced").num_live == 0
    for row in (2, 7):
        with pytest.raises(TraceError, match=rf"!= 99 of the micro-batch at local row {row}$"):
            routes(input_ids=np.where(np.arange(8) == row, 99, tokens), last_row="balanced")
    with pytest.raises(LayoutError, match="last_row 'padding' is none of 'live', 'balanced'"):
        routes(last_row="padding")
    with pytest.raises(TraceError, match=r"row_versions\[2\] .* sample 0, token 2 is not padding"):
        collected(routes(last_row="balanced"))


def test_repack_refuses():
    other = replace(TRACES[1], num_experts=7)
    wide = replace(
        TRACES[1], topk_ids=np.insert(TRACES[1].topk_ids, 0, 5, axis=2) * 0, version_ids=np.full(4, -1, np.int32)
    )
    moved = replace(TRACES[1], layer_ids=np.array([1, 5], dtype=np.int32))
    tokens = np.array([100, 101, 102, -1, 200, 201, 202, 203])
    cases = [
        (TraceError, {"traces": [TRACES[0], other]}, r"num_experts \(7\) of sample 1 != 6 of sample 0"),
        (TraceError, {"traces": [TRACES[0], wide]}, r"topk \(3\) of sample 1 != 2 of sample 0"),
        (TraceError, {"traces": [TRACES[0], moved]}, r"layer_ids \[1, 5\] of sample 1 != \[1, 4\] of sample 0"),
        (LayoutError, {"traces": TRACES[:1]}, "1 traces != 2 samples of the packing"),
        (LayoutError, {"traces": []}, "0 traces != 2 samples of the packing"),
        (LayoutError, {"traces": [TRACES[0], trace(5)]}, r"trace of 5 tokens > padded length \(4\) of sample 1"),
        (LayoutError, {"layer_ids": [1, 2]}, r"layer 2 is none of the MoE layers \[1, 4\]"),
        (LayoutError, {"layer_ids": [4, 4]}, r"layer_ids \[4, 4\] name a layer twice"),
        (LayoutError, {"layout": ParallelLayout(ep=4, dp=4)}, r"ep \(4\) does not divide num_experts \(6\)"),
        (LayoutError, {"layout": ParallelLayout(cp=3, ep=3)}, r"\(6\) does not divide padded length \(4\) of sample 0"),
        (LayoutError, {"rank": 2}, r"rank \(2\) outside world of 2"),
        (LayoutError, {"dtype": np.int8}, "dtype int8 is none of"),
        (LayoutError, {"dtype": np.float32}, "dtype float32 is none of"),
        (TraceError, {"num_threads": 0}, r"num_threads \(0\) outside 1 to 1024"),
        (LayoutError, {"input_ids": tokens[:7]}, r"input_ids \(7,\) int64 != \(8,\) integers of a cp rank"),
        (LayoutError, {"input_ids": tokens.reshape(2, 4)}, r"input_ids \(2, 4\) int64 != \(8,\)"),
        (LayoutError, {"input_ids": tokens.astype(float)}, r"input_ids \(8,\) float64 != \(8,\) integers"),
        (
            TraceError,
            {"input_ids": tokens + (np.arange(8) == 5), "rank": 1},
            r"rank 1: token \(201\) of the trace of sample 1 at position 1 != 202 of the micro-batch at local row 5",
        ),
    ]
    assert routes(input_ids=tokens).num_padding == 1
    assert routes(input_ids=tokens.astype(np.int32)).num_padding == 1
    for error, changes, message in cases:
        with pytest.raises(error, match=message):
            routes(**changes)
    with pytest.raises(LayoutError, match=r"layer_ids \(1.0\) is not a whole number"):
        routes(layer_ids=[1.0, 4.0])


def collected(*shards, token_ids=None, **changes):
    arguments = {"layer_ids": LAYERS, "num_experts": 6}
    tokens = [trace.token_ids for trace in TRACES] if token_ids is None else token_ids
    return collect(shards, tokens, **{**arguments, **changes})


def test_collect_refuses():
    whole, low, high = routes(), routes(layer_ids=[1]), routes(layer_ids=[4])
    assert collected(whole) == collected(low, high) == collected(high, low) == TRACES

    def edited(shard, place, value, name="topk_ids"):
        array = getattr(shard, name).copy()
        array[place] = value
        return replace(shard, **{name: array})

    cases = [
        (TraceError, [low], "no shard holds sample 0, token 0, layer 4"),
        (TraceError, [whole, high], "sample 0, token 0, layer 4 is held twice, the second time by shard 1"),
        (TraceError, [edited(whole, (1, 5, 0), 6)], r"id \(6\) of sample 1, token 1, layer 4 is outside 0 to"),
        (TraceError, [edited(whole, (1, 5, 0), -1)], r"id \(-1\) of sample 1, token 1, layer 4 is outside 0 to"),
        (TraceError, [edited(whole, (1, 5, 0), 5)], r"sample 1: topk_ids at token 1, layer 4: \[5, 5\] has 1 distinct"),
        (
            TraceError,
            [low, edited(high, 1, 1, "row_versions")],
            r"version \(1\) of sample 0, token 1 in shard 1 != 0 in an earlier one",
        ),
        (
            TraceError,
            [low, edited(high, 1, LIVE, "row_versions")],
            r"version \(-1\) of sample 0, token 1 in shard 1 != 0",
        ),
        (TraceError, [edited(whole, 3, 0, "row_versions")], r"row_versions\[3\] \(0\) .* sample 0, token 3 is padding"),
        (
            TraceError,
            [edited(whole, 2, PADDING, "row_versions")],
            r"row_versions\[2\] .* sample 0, token 2 is not padding",
        ),
        (TraceError, [edited(whole, 2, -3, "row_versions")], r"row_versions\[2\] \(-3\) of shard 0 is wrong"),
        (TraceError, [edited(whole, 1, 2, "row_versions")], r"version id \(2\) is not one of the 2 weight versions"),
        (TraceError, [replace(whole, segments=whole.segments[:1])], "local row 4 of 8 is covered by no segment"),
        (TraceError, [edited(whole, (1, 3), 3, "segments")], "local row 3 is covered twice"),
        (LayoutError, [replace(whole, layer_ids=np.array([1, 3], dtype=np.int32))], r"layer 3 is none of"),
        (LayoutError, [], "no shards"),
    ]
    for error, shards, message in cases:
        with pytest.raises(error, match=message):
            collected(*shards)
    with pytest.raises(TraceError, match=r"sample \(1\) outside the 1 samples"):
        collected(whole, token_ids=[TRACES[0].token_ids])
    with pytest.raises(TraceError, match=r"num_experts \(0\) outside"):
        collected(whole, num_experts=0)
    # What live and padding rows hold is nobody's business.
    assert collected(edited(edited(whole, (0, 2, 0), 99), (1, 3, 1), -5)) == TRACES


def arrays():
    return {
        "topk_ids": [np.zeros((2, 1, 1), dtype=np.uint8)],
        "version_ids": [np.zeros(2, dtype=np.int32)],
        "segments": np.array([[0, 0, 2, 0, 1]]),
        "layer_indices": np.zeros(1, dtype=np.int64),
        "out": np.empty((1, 2, 1), dtype=np.int16),
        "row_versions": np.empty(2, dtype=np.int32),
        "counts": np.empty((1, 4), dtype=np.int64),
        "token_ids": [np.zeros(2, dtype=np.int32)],
        "expected_ids": np.zeros(2, dtype=np.int64),
        "num_experts": 4,
        "ep_size": 1,
    }


def frozen(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("topk_ids", [], "topk_ids: no traces"),
        ("topk_ids", [None], r"topk_ids\[0\] is not a numpy array"),
        ("topk_ids", [np.zeros((2, 1, 1), dtype=np.int32)], r"topk_ids\[0\]: dtype int32 is neither uint8 nor uint16"),
        ("topk_ids", [np.zeros((4, 1, 1), dtype=np.uint8)[::2]], r"topk_ids\[0\]: not C-contiguous"),
        ("topk_ids", [np.zeros((2, 1, 2), dtype=np.uint8)], r"topk_ids\[0\] dimension 2: length 2 != 1 of out"),
        ("topk_ids", [np.zeros((3, 1, 1), dtype=np.uint8)], r"version_ids\[0\]: length 2 != 3 of topk_ids\[0\]"),
        ("version_ids", [], "version_ids: length 0 != 1 of topk_ids"),
        ("version_ids", [np.zeros(2, dtype=np.int64)], r"version_ids\[0\]: dtype int64 != int32"),
        ("segments", np.zeros((1, 4), dtype=np.int64), "length 4 != 5 of sample, pos, length, row, stride"),
        ("segments", np.zeros((1, 5), dtype=np.int32), "segments: dtype int32 != int64"),
        ("segments", np.array([[0, 0, 2, 0, 1]], dtype=">i8"), "segments: dtype >i8 != int64"),
        # As many tokens as rows, but one row twice and one not at all.
        ("segments", np.array([[0, 0, 1, 0, 1], [0, 1, 1, 0, 1]]), "local row 0 is covered twice, .* by segment 1"),
        ("segments", np.array([[0, 0, 1, 1, 1]]), "local row 0 of 2 is covered by no segment"),
        ("layer_indices", np.zeros(2, dtype=np.int64), "out: length 1 != 2 of layer_indices"),
        ("layer_indices", np.ones(1, dtype=np.int64), r"layer index \(1\) outside the 1 layers"),
        ("out", np.empty((1, 2, 1), dtype=np.float32), "out: dtype float32 is none of"),
        ("out", np.empty((1, 2, 2), dtype=np.int16)[:, :, :1], "out: not C-contiguous"),
        ("out", frozen(np.empty((1, 2, 1), dtype=np.int16)), "out: read-only"),
        ("row_versions", np.empty(3, dtype=np.int32), "row_versions: length 3 != 2 of out"),
        ("row_versions", frozen(np.empty(2, dtype=np.int32)), "row_versions: read-only"),
        ("counts", np.empty((1, 5), dtype=np.int64), "counts dimension 1: length 5 != 4 of num_experts"),
        ("counts", np.empty((2, 4), dtype=np.int64), "counts: length 2 != 1 of layer_indices"),
        ("token_ids", None, "token_ids and expected_ids are compared: give both or neither"),
        ("token_ids", [np.zeros(1, dtype=np.int32)], r"token_ids\[0\]: length 1 != 2 of topk_ids\[0\]"),
        ("expected_ids", np.zeros(3, dtype=np.int64), "expected_ids: length 3 != 2 of out"),
        ("num_experts", 257, r"num_experts \(257\) outside 1 to 256 of ids of 1 bytes"),
        ("num_experts", -1, r"num_experts \(-1\) outside"),
        ("ep_size", 0, r"ep_size \(0\) < 1"),
        ("ep_size", 3, r"ep_size \(3\) does not divide num_experts \(4\)"),
        ("num_threads", -1, r"num_threads \(-1\) outside 1 to 1024"),
    ],
)
def test_the_native_repack_takes_only_arrays_that_fit(name, value, message):
    _core.repack(**arrays())
    with pytest.raises(ValueError, match=message):
        _core.repack(**{**arrays(), name: value})


def test_the_native_repack_does_not_count_an_id_out_of_range():
    wrong = arrays()
    wrong["topk_ids"][0][1] = 4
    with pytest.raises(ValueError, match=r"id \(4\) >= num_experts \(4\) in the trace of sample 0 at position 1"):
        _core.repack(**wrong)


def test_what_is_no_array_is_not_converted():
    for name in ("segments", "layer_indices", "out", "row_versions", "counts", "expected_ids"):
        with pytest.raises(TypeError):
            _core.repack(**{**arrays(), name: arrays()[name].tolist()})
    with pytest.raises(TypeError):
        _core.repack(**{**arrays(), "num_experts": 4.0})


@pytest.mark.parametrize(
    ("slot_of", "says"),
    [
        ([[0, 1, 2, 3, 4, 4]], r"slot \(4\) of expert 5 in local layer 0 is another's too"),
        ([[0, 6, 2, 1, 4, 5]], r"slot \(6\) of expert 1 in local layer 0 is outside 0 to 5"),
        ([[0, -1, 2, 1, 4, 5]], r"slot \(-1\) of expert 1 in local layer 0 is outside 0 to 5"),
        ([[0, 1, 2, 3, 4]], r"slot_of dimension 1: length 5 != 6"),
        ([[0, 1, 2, 3, 4, 5]] * 2, r"slot_of: length 2 != 1"),
    ],
)
def test_a_table_that_is_no_permutation_is_refused(slot_of, says):
    with pytest.raises(TraceError, match=says):
        routes(layer_ids=[4], slot_of=np.array(slot_of, np.int32))
