"""The shards of a rollout's ranks merge to the trace that they were cut from; gaps and overlaps are refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r3_adapter.errors import LayoutError, TraceError
from r3_adapter.shards import merge_shards
from r3_adapter.trace import NOT_CAPTURED, RoutingTrace


@st.composite
def traces(draw):
    tokens, layers, topk = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    num_experts = draw(st.sampled_from([topk + 1, 200, 300]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    dtype = np.uint8 if num_experts <= 256 else np.uint16
    ids = np.argsort(rng.random((tokens, layers, num_experts)), axis=2)[..., :topk].astype(dtype)
    versions = rng.integers(0, 3, tokens).astype(np.int32)
    if draw(st.booleans()):
        ids[-1], versions[-1] = 0, NOT_CAPTURED
    used, first = np.unique(versions[versions >= 0], return_index=True)
    order = used[np.argsort(first)].tolist()
    versions = np.array([NOT_CAPTURED if v < 0 else order.index(v) for v in versions], np.int32)
    layer_ids = np.cumsum(rng.integers(1, 3, layers)).astype(np.int32)
    tokens = rng.integers(0, 99, tokens).astype(np.int32)
    return RoutingTrace(ids, tokens, versions, layer_ids, num_experts, tuple(f"v{v}" for v in order))


def cut(trace, rows, layers):
    """Return the shard of a rank with these tokens ([S] bool) and these layers ([M] bool)."""
    ids = np.where(rows[:, None, None], trace.topk_ids, 0)[:, layers]
    versions = np.where(rows, trace.version_ids, NOT_CAPTURED)
    return replace(trace, topk_ids=ids, version_ids=versions, layer_ids=trace.layer_ids[layers])


def shards_of(draw, trace):
    """Return shards of pipeline stages, each cut again by tokens in its own way, in any order."""
    stages = np.array(draw(st.lists(st.integers(0, 2), min_size=len(trace.layer_ids), max_size=len(trace.layer_ids))))
    shards = []
    for stage in np.unique(stages):
        ranks = np.array(draw(st.lists(st.integers(0, 2), min_size=trace.num_tokens, max_size=trace.num_tokens)))
        shards += [cut(trace, ranks == rank, stages == stage) for rank in range(3)]
    return draw(st.permutations(shards))


def layers_of(trace):
    return trace.layer_ids.tolist()


@given(data=st.data())
def test_shards_merge_to_what_they_were_cut_from(data):
    trace = data.draw(traces())
    assert merge_shards(shards_of(data.draw, trace), layer_ids=layers_of(trace)) == trace


@given(data=st.data())
def test_gaps_and_overlaps_are_refused(data):
    trace = data.draw(traces().filter(lambda trace: trace.captured.sum() > 1))
    shards = shards_of(data.draw, trace)
    full = [at for at, shard in enumerate(shards) if shard.captured[:-1].any()]
    at = data.draw(st.sampled_from(full))
    # Without its last token a shard may be whole again: what was captured nowhere need not be.
    with pytest.raises(TraceError, match=r"no shard holds|is held twice"):
        merge_shards(shards[:at] + shards[at + 1 :], layer_ids=layers_of(trace))
    with pytest.raises(TraceError, match=r"no shard holds|is held twice"):
        merge_shards([*shards, shards[at]], layer_ids=layers_of(trace))


def small(**changes):
    ids = np.array([[[1, 2]], [[3, 4]]], np.uint8)
    trace = RoutingTrace(ids, np.array([7, 8], np.int32), np.zeros(2, np.int32), np.array([1], np.int32), 8, ("v1",))
    return replace(trace, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_experts": 9}, TraceError, r"shard 1: num_experts \(9\) != 8 of shard 0"),
        ({"topk_ids": np.zeros((2, 1, 1), np.uint8)}, TraceError, r"shard 1: topk \(1\) != 2"),
        ({"token_ids": np.array([7, 9], np.int32)}, TraceError, "shard 1: token id 9 at 1 != 8"),
        ({"layer_ids": np.array([3], np.int32)}, LayoutError, "layer 3 is none of"),
        ({"layer_ids": np.array([2], np.int32), "weight_versions": ("v2",)}, TraceError, "version"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        merge_shards([small(), small(**changes)], layer_ids=[1, 2])
    with pytest.raises(TraceError, match="no shards"):
        merge_shards([], layer_ids=[1, 2])
