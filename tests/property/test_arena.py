"""The arena gives out the same memory again, and never memory that somebody still looks at."""

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r3_adapter.arena import Arena, aligned_empty
from r3_adapter.errors import LayoutError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.repack import repack
from r3_adapter.trace import RoutingTrace


def test_memory_is_used_again():
    arena = Arena()
    first = arena.empty((4, 5), np.int16)
    place = first.ctypes.data
    assert first.shape == (4, 5) and first.dtype == np.int16 and place % 64 == 0
    second = arena.empty((4, 5), np.int16)
    assert not np.shares_memory(first, second)
    size = arena.num_bytes
    del first
    assert arena.empty((20,), np.int16).ctypes.data == place
    assert arena.num_bytes == size


def test_views_and_tensors_keep_memory():
    torch = pytest.importorskip("torch")
    for keep in (lambda a: a[1:], lambda a: a.T.reshape(-1)[2:], memoryview, torch.from_numpy):
        arena = Arena()
        kept = keep(arena.empty((8, 8), np.int64))
        gc.collect()
        place = np.asarray(kept).ctypes.data
        other = arena.empty((8, 8), np.int64)
        assert not np.shares_memory(other, np.asarray(kept)), place
        del kept
        gc.collect()
        arena.empty((8, 8), np.int64)
        assert len(arena._blocks) == 2


def test_a_larger_array_replaces_a_free_smaller_one():
    arena = Arena()
    arena.empty((10,), np.uint8)
    arena.empty((1000,), np.uint8)
    assert arena.num_bytes == 1000 + 64
    arena.empty((10,), np.uint8)
    assert arena.num_bytes == 1000 + 64


def test_an_allocator_must_give_what_it_was_asked_for():
    seen = []

    def allocate(size):
        seen.append(size)
        return np.zeros(size, dtype=np.uint8)

    assert Arena(allocate).empty((3,), np.int32).tolist() == [0, 0, 0]
    assert seen == [3 * 4 + 64]
    for wrong in (np.zeros(3, dtype=np.uint8), np.zeros(76, dtype=np.int8), np.frombuffer(bytes(76), dtype=np.uint8)):
        with pytest.raises(LayoutError, match=r"allocate\(76\) gave"):
            Arena(lambda _, wrong=wrong: wrong).empty((3,), np.int32)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 5))))
def test_no_two_arrays_share_memory(calls):
    arena, held = Arena(), []
    for size, drop in calls:
        array = arena.empty((size,), np.uint8)
        array[:] = len(held) % 251
        held.append((array, len(held) % 251))
        del array, held[:drop]
        assert all((array == value).all() for array, value in held)


def test_repack_writes_into_an_arena():
    ids = np.array([[[0, 1]], [[1, 2]]], dtype=np.uint8)
    trace = RoutingTrace(ids, np.zeros(2, np.int32), np.zeros(2, np.int32), np.zeros(1, np.int32), 3, ("a",))
    arena = Arena()
    arguments = ([trace], Packing.packed([0, 2]), ParallelLayout(), 0)
    first = repack(*arguments, layer_ids=[0], arena=arena)
    place = first.topk_ids.ctypes.data
    second = repack(*arguments, layer_ids=[0], arena=arena)
    assert not np.shares_memory(first.topk_ids, second.topk_ids)
    assert np.array_equal(first.topk_ids, ids.transpose(1, 0, 2)) and np.array_equal(second.topk_ids, first.topk_ids)
    del first
    third = repack(*arguments, layer_ids=[0], arena=arena)
    assert third.topk_ids.ctypes.data == place
    assert aligned_empty((0, 3), np.int16).shape == (0, 3)
