"""The native check of a trace's rows against the slow one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3_adapter import _core, reference
from r3_adapter.trace import ids_dtype


def routes(rng, num_tokens, num_layers, topk, num_experts):
    ids = rng.random((num_tokens, num_layers, num_experts)).argsort(axis=2)[:, :, :topk]
    return np.ascontiguousarray(ids.astype(ids_dtype(num_experts)))


@st.composite
def damaged(draw):
    """Return ids, version_ids and E of a trace in which up to two cells and two captured marks were changed."""
    num_experts = draw(st.one_of(st.integers(1, 20), st.sampled_from([64, 127, 128, 129, 255, 256, 257, 512, 1024])))
    topk = draw(st.integers(1, min(16, num_experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = routes(rng, draw(st.integers(0, 5)), draw(st.integers(1, 4)), topk, num_experts)
    versions = rng.integers(-1, 2, len(ids)).astype(np.int32)
    ids[versions < 0] = 0
    for _ in range(draw(st.integers(0, 2)) if ids.size else 0):
        cell = draw(st.integers(0, ids.size - 1))
        ids.flat[cell] = draw(
            st.one_of(st.sampled_from(sorted(set(ids.flat))), st.integers(0, np.iinfo(ids.dtype).max), st.just(0))
        )
    return ids, versions, num_experts


@settings(max_examples=300)
@given(damaged())
def test_the_same_row_is_found_as_by_the_reference(case):
    assert _core.find_bad_route(*case) == reference.find_bad_route(*case)


@pytest.mark.parametrize("topk", range(1, 17))
@pytest.mark.parametrize("num_experts", [17, 128, 200, 256, 500, 65536])
def test_every_pair_of_places_and_every_too_large_id_is_seen(topk, num_experts):
    rng = np.random.default_rng(topk)
    good = rng.choice(num_experts, topk, replace=False).astype(ids_dtype(num_experts)).reshape(1, 1, topk)
    captured = np.zeros(1, dtype=np.int32)
    assert _core.find_bad_route(good, captured, num_experts) is None
    assert _core.find_bad_route(good * 0 + 1, captured - 1, num_experts) == (0, 0)
    for i in range(topk):
        for j in range(i):
            twice = good.copy()
            twice[0, 0, i] = twice[0, 0, j]
            assert _core.find_bad_route(twice, captured, num_experts) == (0, 0), (i, j)
        for too_large in {num_experts, num_experts + 1, np.iinfo(good.dtype).max}:
            if num_experts <= too_large <= np.iinfo(good.dtype).max:
                large = good.copy()
                large[0, 0, i] = too_large
                assert _core.find_bad_route(large, captured, num_experts) == (0, 0), (i, too_large)


def test_arrays_that_do_not_fit_are_refused():
    ids, versions = np.zeros((3, 2, 1), dtype=np.uint8), np.zeros(3, dtype=np.int32)
    cases = [
        (ids.astype(np.int16), versions, 8, "topk_ids: dtype int16 is neither uint8 nor uint16"),
        (ids.astype(">u2"), versions, 8, "topk_ids: dtype >u2 is neither"),
        (ids[::2], versions[:2], 8, "topk_ids: not C-contiguous and aligned"),
        (ids[0], versions, 8, "topk_ids: 2 dimensions != 3"),
        (ids, versions[:2], 8, "version_ids: length 2 != 3 of topk_ids"),
        (ids, versions.astype(np.int64), 8, "version_ids: dtype int64 != int32"),
        (ids, versions, 0, r"num_experts \(0\) outside 1 to 256"),
        (ids, versions, 257, r"num_experts \(257\) outside 1 to 256"),
        (ids[:, :, :0].copy(), versions, 8, r"topk \(0\) outside 1 to num_experts \(8\)"),
    ]
    for *arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            _core.find_bad_route(*arguments)
    odd = np.frombuffer(bytes(1 + 8), dtype=np.uint8)[1:].view(np.uint16).reshape(2, 2, 1)
    if not odd.flags.aligned:
        with pytest.raises(ValueError, match="aligned"):
            _core.find_bad_route(odd, versions[:2], 8)
    with pytest.raises(TypeError):
        _core.find_bad_route(ids.tolist(), versions, 8)
