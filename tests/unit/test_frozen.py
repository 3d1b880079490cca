"""What a trace was checked for stays true: no way to hand arrays or bytes over leaves one to change them."""

import copy
import ctypes
import mmap
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.errors import TraceError
from r3_adapter.frozen import freeze, is_frozen
from r3_adapter.trace import RoutingTrace, concatenate

NAMES = ("topk_ids", "token_ids", "version_ids", "layer_ids")


def make() -> RoutingTrace:
    ids = np.sort(np.random.default_rng(0).random((4, 2, 8)).argsort(axis=2)[:, :, :2]).astype(np.uint8)
    tokens, versions, layers = np.arange(4, dtype=np.int32), np.zeros(4, np.int32), np.array([1, 4], np.int32)
    return RoutingTrace(ids, tokens, versions, layers, 8, ("1",))


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def owner(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A read-only array that owns its memory; who holds it can turn that back."""
    return read_only(array), array


def view(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return read_only(array.view()), array


def view_of_view(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return read_only(read_only(array[:]).view()), array


def buffer(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    data = bytearray(array.tobytes())
    given = np.frombuffer(memoryview(data).toreadonly(), array.dtype).reshape(array.shape)
    return given, np.frombuffer(data, array.dtype)


def ctypes_memory(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    data = (ctypes.c_char * array.nbytes).from_buffer_copy(array.tobytes())
    given = read_only(np.frombuffer(data, array.dtype).reshape(array.shape))
    return given, np.frombuffer(data, array.dtype)


def mapped(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A mapping that this side can only read, of memory that another one writes."""
    file = Path(mapped.folder, "memory")  # type: ignore[attr-defined]
    file.write_bytes(array.tobytes())
    with file.open("r+b") as handle:
        given = np.frombuffer(mmap.mmap(handle.fileno(), array.nbytes, prot=mmap.PROT_READ), array.dtype)
        return given.reshape(array.shape), np.frombuffer(mmap.mmap(handle.fileno(), array.nbytes), array.dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", [owner, view, view_of_view, buffer, ctypes_memory, mapped, lambda a: (a, a)])
def test_arrays_that_change_afterwards_change_no_trace(
    way: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], name: str, tmp_path: Path
) -> None:
    mapped.folder = tmp_path  # type: ignore[attr-defined]
    parts: dict[str, Any] = {each: getattr(make(), each) for each in NAMES}
    parts[name], memory = way(parts[name].copy())
    trace = RoutingTrace(**parts, num_experts=8, weight_versions=("1",))
    digest = trace.digest()
    memory.flags.writeable = True
    memory[...] = 77
    assert trace == make()
    assert RoutingTrace.from_bytes(trace.to_bytes()).digest() == digest


@pytest.mark.parametrize("as_given", [lambda data: data, memoryview, lambda data: memoryview(data).toreadonly()])
def test_bytes_that_are_used_again_change_no_trace(as_given: Callable[[bytearray], Any]) -> None:
    data = bytearray(make().to_bytes())
    trace = RoutingTrace.from_bytes(as_given(data))
    data[:] = b"\xff" * len(data)
    assert trace == make()


WAYS: dict[str, Callable[[RoutingTrace], RoutingTrace]] = {
    "made": lambda trace: trace,
    "read": lambda trace: RoutingTrace.from_bytes(trace.to_bytes()),
    "read of a buffer": lambda trace: RoutingTrace.from_bytes(memoryview(bytearray(trace.to_bytes()))),
    "joined": lambda trace: concatenate([trace, trace]).rows(0, 4),
    "cut": lambda trace: trace.at_layers([1, 4]),
    "pickled": lambda trace: pickle.loads(pickle.dumps(trace)),
    "pickled by an old protocol": lambda trace: pickle.loads(pickle.dumps(trace, 2)),
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_array_of_a_trace_can_be_made_writeable(way: Callable[[RoutingTrace], RoutingTrace]) -> None:
    trace = make()
    trace.digest()
    found = way(trace)
    assert found == trace
    for name in NAMES:
        array = getattr(found, name)
        assert is_frozen(array)
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    assert found.digest() == trace.digest()


def test_what_is_pickled_with_a_trace_does_not_change_it() -> None:
    trace = make()
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        ids, again = pickle.loads(pickle.dumps((trace.topk_ids, trace), protocol))
        if ids.flags.writeable:
            ids[...] = 9
        assert again == trace


def test_a_pickle_is_checked_and_keeps_no_digest() -> None:
    trace = make()
    trace.digest()
    build, parts = trace.__reduce__()
    assert [type(part) for part in parts] == [np.ndarray] * 4 + [int, tuple, type(None)]
    ids = trace.topk_ids.copy()
    ids[1, 1] = 5
    with pytest.raises(TraceError, match="token 1, layer 4"):
        pickle.loads(pickle.dumps(_Pickled(build, (ids, *parts[1:]))))


class _Pickled:
    """Pickles as something else."""

    def __init__(self, build: Any, parts: tuple[Any, ...]) -> None:
        self.how = build, parts

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how  # type: ignore[return-value]


def test_memory_that_stays_is_not_copied() -> None:
    data = make().to_bytes()
    for given in (data, memoryview(data), memoryview(memoryview(data)[:])):
        trace = RoutingTrace.from_bytes(given)
        assert np.shares_memory(trace.topk_ids, np.frombuffer(data, np.uint8))
        assert np.shares_memory(RoutingTrace(*trace.__reduce__()[1]).topk_ids, trace.topk_ids)
    array = np.frombuffer(bytearray(data), np.uint8)
    assert np.shares_memory(RoutingTrace.from_bytes(freeze(array).data).topk_ids, array)
    # Arrays that a pickle carries beside it, as Ray does, may be anybody's memory.
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(trace, 5, buffer_callback=buffers.append)
    kept = [bytes(each) for each in buffers]
    again = pickle.loads(text, buffers=kept)
    assert any(np.shares_memory(again.topk_ids, np.frombuffer(each, np.uint8)) for each in kept if each)
    assert pickle.loads(text, buffers=[bytearray(each) for each in kept]) == trace


@pytest.mark.parametrize("data", [None, 5, "text", [1], np.zeros((3, 3), np.uint8)[:, :2]])
def test_what_has_no_bytes_is_refused(data: Any) -> None:
    with pytest.raises(TraceError, match=r"^here: "):
        RoutingTrace.from_bytes(data, place="here")
