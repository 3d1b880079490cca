"""The model that a trace names: in every form and way of a trace, and what does not fit it is refused."""

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r3_adapter.codec import decode_all, encode, encode_all
from r3_adapter.errors import TraceError
from r3_adapter.layout import Packing, ParallelLayout
from r3_adapter.repack import RankRoutes, collect, repack
from r3_adapter.rollout import Sample, load_samples, save_samples
from r3_adapter.trace import ModelId, RoutingTrace, concatenate

MODEL = ModelId(num_layers=5, hidden_size=64, vocab_size=104)
OTHER = MODEL._replace(hidden_size=128)
LAYERS = [1, 4]
PACKING, LAYOUT = Packing.packed([0, 4]), ParallelLayout(pp=2)


def make(model: ModelId | None = MODEL) -> RoutingTrace:
    ids = np.sort(np.random.default_rng(0).random((4, 2, 8)).argsort(axis=2)[:, :, :2]).astype(np.uint8)
    return RoutingTrace(
        ids, np.arange(100, 104, dtype=np.int32), np.zeros(4, np.int32), np.array(LAYERS, np.int32), 8, ("1",), model
    )


def shards(trace: RoutingTrace) -> list[RankRoutes]:
    return [repack([trace], PACKING, LAYOUT, rank, layer_ids=[layer]) for rank, layer in enumerate(LAYERS)]


def folder_of(trace: RoutingTrace, folder: Path, *, coded: bool) -> RoutingTrace:
    save_samples(folder, [Sample(trace, 1, np.zeros(3, np.float32))], coded=coded)
    return load_samples(folder)[0].trace


WAYS: dict[str, Callable[[RoutingTrace, Path], RoutingTrace]] = {
    "bytes": lambda trace, _: RoutingTrace.from_bytes(trace.to_bytes()),
    "sets": lambda trace, _: decode_all(encode_all([trace, trace]))[1],
    "folder": lambda trace, path: folder_of(trace, path, coded=False),
    "folder of sets": lambda trace, path: folder_of(trace, path, coded=True),
    "pickle": lambda trace, _: pickle.loads(pickle.dumps(trace)),
    "rows": lambda trace, _: concatenate([trace.rows(0, 1), trace.rows(1, 4)]),
    "ranks": lambda trace, _: collect(shards(trace), [trace.token_ids], layer_ids=LAYERS, num_experts=8)[0],
}


@pytest.mark.parametrize("model", [MODEL, None])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_trace_keeps_its_model(
    way: Callable[[RoutingTrace, Path], RoutingTrace], model: ModelId | None, tmp_path: Path
) -> None:
    found = way(make(model), tmp_path)
    assert found == make(model)
    assert found.model == model and type(found.model) is type(model)
    assert found.digest() == make(model).digest()


def test_routes_of_a_rank_keep_the_model() -> None:
    held = shards(make())
    assert [each.model for each in held] == [MODEL] * 2


def test_traces_of_two_models_are_not_the_same() -> None:
    traces = [make(), make(OTHER), make(None)]
    assert len({trace.digest() for trace in traces}) == 3
    assert make() != make(OTHER) != make(None)


@pytest.mark.parametrize("other", [OTHER, None])
def test_traces_of_two_models_do_not_go_together(other: ModelId | None) -> None:
    pair = [make(), make(other)]
    with pytest.raises(TraceError) as caught:
        concatenate(pair)
    assert str(caught.value) == f"model {other} of trace 1 != {MODEL} of trace 0"
    with pytest.raises(TraceError, match="of trace 1 != "):
        encode_all(pair)
    with pytest.raises(TraceError, match="of sample 1 != "):
        repack(pair, Packing.packed([0, 4, 8]), ParallelLayout(), 0, layer_ids=LAYERS)
    held = [shards(pair[0])[0], shards(pair[1])[1]]
    with pytest.raises(TraceError, match="of shard 1 != "):
        collect(held, [make().token_ids], layer_ids=LAYERS, num_experts=8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODEL._replace(num_layers=4), "layer 4 is none of the 4 layers of the model"),
        (MODEL._replace(vocab_size=103), "token_ids[3] (103) >= vocab_size (103)"),
        (MODEL._replace(hidden_size=0), "model: hidden_size (0) is not a whole number from 1 to 2147483647"),
        (MODEL._replace(num_layers=5.0), "model: num_layers (5.0) is not a whole number from 1 to 2147483647"),
        (MODEL._replace(vocab_size=True), "model: vocab_size (True) is not a whole number from 1 to 2147483647"),
        ((5, 64, 104), "model (5, 64, 104) is not a ModelId"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(model: ModelId, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        replace(make(), model=model)
    assert str(caught.value) == message


def edited(data: bytes, value: str | None) -> bytes:
    """Return wire bytes with another model."""
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"].pop("model", None)
    header["__metadata__"].update({} if value is None else {"model": value})
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "null",
        "[5, 64, 104]",
        "{}",
        json.dumps(OTHER._asdict()),
        json.dumps(MODEL._asdict() | {"more": 1}),
        json.dumps(MODEL._asdict() | {"num_layers": 5.0}),
        json.dumps(MODEL._asdict() | {"num_layers": "5"}),
        json.dumps(MODEL._asdict() | {"num_layers": True}),
        "[" * 100_000,
        '{"num_layers": ' + "9" * 5000 + "}",
    ],
)
def test_another_model_in_the_bytes_is_refused(value: str | None) -> None:
    with pytest.raises(TraceError, match=r"^here: "):
        RoutingTrace.from_bytes(edited(make().to_bytes(), value), place="here")
    with pytest.raises(TraceError, match=r"^here: "):
        decode_all(edited(encode(make()), value), place="here")


def test_bytes_without_a_model_are_of_an_unknown_one() -> None:
    assert b'"model"' not in make(None).to_bytes() + encode(make(None))
    # As traces were written before they named a model.
    assert make(None).digest() == "60cbe2dbe65b607fa9e17717638f10536c17e95e6a63d07809e3a9465991b146"
