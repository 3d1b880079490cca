"""Damaged bytes of traces, sets, payloads and folders: each is refused by an R3Error, or says what it said before."""

import importlib.util
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r3_adapter.codec import decode_all, encode_all
from r3_adapter.errors import R3Error
from r3_adapter.rollout import Sample, load_samples, save_samples
from r3_adapter.sglang.computation import read_computations
from r3_adapter.trace import ModelId, RoutingTrace, concatenate
from r3_adapter.wire import with_checksum, write_tensors

SPEC = importlib.util.spec_from_file_location("mutate", Path(__file__).with_name("mutate.py"))
assert SPEC is not None and SPEC.loader is not None
mutate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutate)

CASES = int(os.environ.get("R3_FUZZ_CASES", "1500"))
MODEL = ModelId(5, 16, 60)


def make(seed: int, num_tokens: int = 5) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.random((num_tokens, 2, 8)).argsort(axis=2)[:, :, :2]).astype(np.uint8)
    versions = rng.integers(-1, 2, num_tokens).astype(np.int32)
    ids[versions < 0] = 0
    tokens = rng.integers(0, 50, num_tokens).astype(np.int32)
    return RoutingTrace(ids, tokens, versions, np.array([1, 4], np.int32), 8, ("1", "schritt"), MODEL)


def payload(trace: RoutingTrace, **metadata: str) -> bytes:
    """What an engine writes."""
    arrays = {name: getattr(trace, name) for name in ("topk_ids", "token_ids", "version_ids", "layer_ids")}
    known = {"format": "r3.routing_trace/1", "num_experts": "8", "weight_versions": '["1", "schritt"]'}
    model = mutate.text_of(MODEL._asdict())
    return write_tensors(arrays, {**known, "model": model, "checksum": "", **metadata})


TRACE, TWIN = make(0), concatenate([make(0).rows(0, 3), make(1)])
COMPUTED = [payload(TRACE, last_row="e:3"), payload(TWIN, start="2", sampled_start="4", previous_row="e:1")]
FORMS: dict[str, tuple[bytes, Callable[[bytes], Any], Any]] = {
    "trace": (TRACE.to_bytes(), RoutingTrace.from_bytes, TRACE),
    "payload": (COMPUTED[0], RoutingTrace.from_bytes, TRACE),
    "sets": (encode_all([TRACE, TWIN, TRACE]), decode_all, [TRACE, TWIN, TRACE]),
    "computations": (
        b"".join(COMPUTED),
        lambda data: [(each.trace, each.start, each.last_row) for each in read_computations(data)],
        [(TRACE, 0, "e:3"), (TWIN, 2, None)],
    ),
}


def unsealed(rng: random.Random, header: Any) -> Any:
    """Return a changed header with room for a checksum and no digest."""
    header["__metadata__"].pop("digest", None)
    header["__metadata__"]["checksum"] = "00000000"
    return mutate.changed(rng, header)


def sealed(data: bytes) -> bytes:
    return with_checksum(data) if data.count(b'"checksum": "00000000"') == 1 else data


@pytest.mark.parametrize("form", FORMS)
def test_damaged_bytes_say_what_they_said_or_nothing(form: str) -> None:
    data, read, want = FORMS[form]
    assert read(data) == want
    for case in range(CASES):
        bad = mutate.damaged(random.Random(case), data)
        try:
            found = read(bad)
        except R3Error:
            continue
        assert found == want or (form == "computations" and found == want[:1]), case


@pytest.mark.parametrize("form", ["trace", "payload", "sets"])
def test_changed_headers_raise_nothing_else(form: str) -> None:
    """The checksum is made right again, so that what lies behind it is reached."""
    data, read, _ = FORMS[form]
    for case in range(CASES):
        rng = random.Random(case)

        bad = sealed(mutate.with_header(data, lambda header, rng=rng: unsealed(rng, header)))
        try:
            read(bad)
        except R3Error:
            continue


@pytest.mark.parametrize("name", ["logprobs.safetensors", "000001.trace.safetensors"])
@pytest.mark.parametrize("coded", [False, True])
def test_damaged_folders_say_what_they_said_or_nothing(tmp_path: Path, name: str, coded: bool) -> None:
    samples = [Sample(TRACE, 2, -np.arange(3, dtype=np.float32)), Sample(TWIN, 3, -np.arange(5, dtype=np.float32))]
    save_samples(tmp_path, samples, coded=coded)
    data = (tmp_path / name).read_bytes()
    for case in range(CASES // 3):
        (tmp_path / name).write_bytes(mutate.damaged(random.Random(case), data))
        try:
            found = load_samples(tmp_path)
        except R3Error as error:
            assert str(error).startswith(str(tmp_path))
            continue
        for one, other in zip(found, samples, strict=True):
            assert one.trace == other.trace and np.array_equal(one.logprobs, other.logprobs), case


def test_folders_with_changed_headers_raise_nothing_else(tmp_path: Path) -> None:
    save_samples(tmp_path, [Sample(TRACE, 2, -np.arange(3, dtype=np.float32))])
    path = tmp_path / "logprobs.safetensors"
    data = path.read_bytes()
    for case in range(CASES):
        rng = random.Random(case)

        path.write_bytes(sealed(mutate.with_header(data, lambda header, rng=rng: unsealed(rng, header))))
        try:
            load_samples(tmp_path)
        except R3Error as error:
            assert str(error).startswith(str(tmp_path))
