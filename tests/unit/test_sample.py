"""Samples: log-probabilities that are ones, tokens that were appended, and folders that say when they are damaged."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from r3_adapter.errors import TraceError
from r3_adapter.rollout import Sample, SampleFolder, load_samples, save_samples, unrouted
from r3_adapter.trace import ModelId, RoutingTrace
from r3_adapter.wire import write_tensors

REST = "logprobs.safetensors"


def make(seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.random((5, 2, 8)).argsort(axis=2)[:, :, :2]).astype(np.uint8)
    versions = np.array([0, 0, 0, 0, -1], np.int32)
    ids[-1] = 0
    tokens = rng.integers(0, 50, 5).astype(np.int32)
    trace = RoutingTrace(ids, tokens, versions, np.array([1, 4], np.int32), 8, ("1",), ModelId(5, 16, 60))
    return Sample(trace, 2, -rng.random(3).astype(np.float32), 77, np.array([True, False, True]), 0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-6, 3.0])
def test_what_is_no_log_probability_is_refused(value: float) -> None:
    logprobs = make().logprobs.copy()
    logprobs[1] = value
    with pytest.raises(TraceError) as caught:
        replace(make(), logprobs=logprobs)
    shown = np.float32(value)
    assert str(caught.value) == f"logprobs[1] ({shown}) of token 3 is no log-probability, finite and at most 0"
    logprobs[1] = 0
    assert replace(make(), logprobs=logprobs).logprobs[1] == 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"logprobs": np.zeros(3)}, "logprobs: dtype float64 != float32"),
        ({"logprobs": [0.0, 0.0, 0.0]}, "logprobs: dtype list != float32"),
        ({"logprobs": np.zeros((3, 1), np.float32)}, "logprobs: shape (3, 1) has 2 dimensions != 1"),
        ({"sampled": np.ones(3, np.int8)}, "sampled: dtype int8 != bool"),
        ({"num_prompt_tokens": 2.0}, "num_prompt_tokens (2.0) is not a whole number"),
        ({"payload_bytes": -1}, "payload_bytes (-1) < 0"),
        ({"num_prompt_tokens": 0}, "prompt (0) + response (3) tokens != 5"),
    ],
)
def test_other_wrong_parts_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError) as caught:
        replace(make(), **parts)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replace(make(), trace=None), "trace (None) is not a RoutingTrace"),
        (lambda: unrouted([], []), "none of the 0 tokens is trained on"),
        (lambda: unrouted([1, 2], [False, False]), "none of the 2 tokens is trained on"),
        (lambda: unrouted([1, 2], [True]), "2 tokens != 1 marks in sampled"),
        (lambda: make().trace.rows(0.0, 2), "start (0.0) is not a whole number"),
        (lambda: make().trace.rows(0, "2"), "stop ('2') is not a whole number"),
        (lambda: make().trace.at_layers([1.7]), "layer (1.7) is not a whole number"),
    ],
)
def test_calls_that_make_no_sense_say_so(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TraceError) as caught:
        call()
    assert str(caught.value) == message


def test_a_sample_does_not_change_with_what_it_was_made_of() -> None:
    logprobs, sampled = make().logprobs.copy(), make().sampled.copy()
    sample = replace(make(), logprobs=logprobs, sampled=sampled)
    logprobs[:], sampled[:] = np.nan, False
    np.testing.assert_array_equal(sample.logprobs, make().logprobs)
    np.testing.assert_array_equal(sample.sampled, make().sampled)


@pytest.mark.parametrize("tokens", [[9], [9, 3], np.array([9, 3, 1]), np.array([4], np.uint8)])
def test_tokens_that_no_engine_computed_are_appended(tokens: Any) -> None:
    sample = make()
    longer = sample.append_tokens(tokens)
    assert longer.trace == sample.trace.append_tokens(tokens)
    assert longer.trace.rows(0, 5) == sample.trace
    assert longer.trace.token_ids[5:].tolist() == list(tokens)
    assert not longer.trace.captured[4:].any() and not longer.trace.topk_ids[4:].any()
    assert longer.sampled.tolist() == [True, False, True] + [False] * len(tokens)
    assert longer.logprobs.tolist() == [*sample.logprobs.tolist()] + [0.0] * len(tokens)
    assert (longer.num_prompt_tokens, longer.temperature, longer.trace.model) == (2, 0.5, sample.trace.model)
    assert RoutingTrace.from_bytes(longer.trace.to_bytes()) == longer.trace


def test_nothing_appended_is_the_same() -> None:
    assert make().trace.append_tokens([]) == make().trace
    assert make().append_tokens([]).trace == make().trace


@pytest.mark.parametrize("tokens", [[1.0], ["1"], 3, None, [[1]], [[1], [1, 2]], [-1], [1 << 31], [True], [1 << 70]])
def test_what_are_no_tokens_is_not_appended(tokens: Any) -> None:
    with pytest.raises(TraceError, match=r"^token_ids .* are not a list of whole numbers from 0 to 2147483647$"):
        make().append_tokens(tokens)


def test_a_token_that_the_model_does_not_have_is_not_appended() -> None:
    with pytest.raises(TraceError, match=r"\(60\) >= vocab_size \(60\)"):
        make().append_tokens([60])


def same(one: Sample, other: Sample) -> bool:
    parts = [(one.logprobs, other.logprobs), (one.sampled, other.sampled)]
    numbers = [(each.num_prompt_tokens, each.payload_bytes, each.temperature) for each in (one, other)]
    return one.trace == other.trace and numbers[0] == numbers[1] and all(np.array_equal(*pair) for pair in parts)


def rest_without(folder: Path, **changes: Any) -> None:
    """Write the rest of a folder anew as it was before it had checksums, with other tensors or metadata."""
    tensors = load_file(folder / REST)
    data = (folder / REST).read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    for name in ("checksums", "checksum", *(name for name, value in changes.items() if value is None)):
        tensors.pop(name, None)
        metadata.pop(name, None)
    for name, value in changes.items():
        if value is not None:
            (metadata if isinstance(value, str) else tensors)[name] = value
    if "checksums" in tensors:
        metadata["checksum"] = ""
    (folder / REST).write_bytes(write_tensors(tensors, metadata))


@pytest.mark.parametrize("coded", [False, True])
def test_folders_with_and_without_checksums_are_read(tmp_path: Path, coded: bool) -> None:
    samples = [make(seed) for seed in range(3)]
    save_samples(tmp_path, samples, coded=coded)
    assert all(map(same, load_samples(tmp_path), samples))
    rest_without(tmp_path)
    assert all(map(same, load_samples(tmp_path), samples))


@pytest.mark.parametrize("coded", [False, True])
def test_traces_that_changed_places_are_refused(tmp_path: Path, coded: bool) -> None:
    save_samples(tmp_path, [make(0), make(1)], coded=coded)
    paths = [tmp_path / f"00000{number}.trace.safetensors" for number in range(2)]
    data = [path.read_bytes() for path in paths]
    for path, other in zip(paths, reversed(data), strict=True):
        path.write_bytes(other)
    with pytest.raises(TraceError, match=r"checksum [0-9a-f]{8} != [0-9a-f]{8} of sample 0 in logprobs\.safetensors"):
        load_samples(tmp_path)


def test_every_flipped_bit_of_the_rest_is_refused(tmp_path: Path) -> None:
    save_samples(tmp_path, [make()])
    data = bytearray((tmp_path / REST).read_bytes())
    for bit in range(0, 8 * len(data), 3):
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / REST).write_bytes(data)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TraceError, match=str(tmp_path)):
            load_samples(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampled": None}, r"tensors \['logprobs'\] != \['logprobs', 'sampled'\]"),
        ({"sampled": np.ones(3, np.uint8)}, "sampled: dtype uint8 != bool"),
        ({"sampled": np.ones((3, 1), np.bool_)}, "log-probabilities != 3 response tokens"),
        ({"logprobs": np.zeros(2, np.float32)}, r"\(2,\) log-probabilities != 3 response tokens"),
        ({"logprobs": np.full(3, np.nan, np.float32)}, r"sample 0: logprobs\[0\] \(nan\) of token 2"),
        ({"logprobs": np.ones(3, np.float32)}, r"sample 0: logprobs\[0\] \(1.0\) of token 2"),
        ({"checksums": np.zeros(2, np.uint32)}, r"\(2,\) checksums != 1 samples"),
        ({"checksums": np.zeros(1, np.int32)}, "checksums: dtype int32 != uint32"),
        ({"samples": None}, "samples None are not a list"),
        ({"samples": "5"}, "samples 5 are not a list"),
        ({"samples": "[5]"}, "sample 0: 5 are not three whole numbers from 0"),
        ({"samples": "[[2, 3]]"}, "are not three whole numbers from 0"),
        ({"samples": "[[2, 3.0, 77]]"}, "are not three whole numbers from 0"),
        ({"samples": "[[2, true, 77]]"}, "are not three whole numbers from 0"),
        ({"samples": "[[2, 3, -1]]"}, "are not three whole numbers from 0"),
        ({"samples": "[[5, 3, 77], [2, -3, 0], [2, 3, 0]]"}, "sample 1: .* are not three whole numbers"),
        ({"samples": '[[2, "3", 77]]'}, "are not three whole numbers from 0"),
        ({"samples": "[[0, 3, 77]]"}, r"prompt \(0\) \+ response"),
        ({"samples": "[[3, 3, 77]]"}, r"prompt \(3\) \+ response"),
        ({"samples": f"[[{1 << 61}, 3, 77]]"}, "prompt"),
        ({"samples": "[[2, 3, " + "9" * 5000 + "]]"}, "samples cannot be read: Exceeds the limit"),
        ({"samples": "[" * 100_000}, "samples cannot be read"),
        ({"coded": "1"}, "coded 1 is neither true nor false"),
        ({"coded": '"false"'}, "coded 'false' is neither true nor false"),
        ({"coded": "true"}, r"000000\.trace\.safetensors: format"),
        ({"temperatures": "3"}, "temperatures 3 are not those of 1 samples"),
        ({"temperatures": "[NaN]"}, "temperatures cannot be read: NaN is no number"),
        ({"temperatures": "[[]]"}, r"sample 0: temperature \[\] is not"),
        ({"temperatures": "[-1]"}, "sample 0: temperature -1 is not"),
    ],
)
def test_what_a_folder_cannot_say_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_samples(tmp_path, [make()])
    rest_without(tmp_path, **changes)
    with pytest.raises(TraceError, match=message) as caught:
        load_samples(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: (path.unlink(), path.mkdir())]
)
@pytest.mark.parametrize("name", [REST, "000000.trace.safetensors"])
def test_files_that_are_none_are_refused(tmp_path: Path, name: str, damage: Callable[[Path], Any]) -> None:
    save_samples(tmp_path, [make()])
    damage(tmp_path / name)
    with pytest.raises(TraceError, match=str(tmp_path)):
        load_samples(tmp_path)


def test_a_folder_that_is_being_written_again_is_none(tmp_path: Path) -> None:
    save_samples(tmp_path, [make(0), make(1)])

    class Lost(Exception):
        pass

    class Broken:
        trace = property(lambda self: (_ for _ in ()).throw(Lost))

    with pytest.raises(Lost):
        save_samples(tmp_path, [make(2), Broken()])  # type: ignore[list-item]
    with pytest.raises(TraceError, match="samples cannot be read"):
        SampleFolder(tmp_path)
